"""Cycles of our kernels, which the compiler does not estimate: units of work x the cycles it schedules for one."""

from __future__ import annotations

import math
import re

from jaxmllm.plan.chips import Chip
from jaxmllm.plan.hlo import Array, Instruction

# (chip, head size) -> cycles of one core for each kernel, as libtpu 0.0.42 schedules blocks of 1024 x 1024
# (benchmarks/attention_blocks.py). FLASH: per score of a block without a mask, of one on the diagonal, and of one with
# a mask of segments; per query; per key. SPLASH: per score. Smaller blocks are assumed to cost as much per score.
FLASH = {
    ("v5p", 64): {
        "forward": (3.53e-3, 3.20e-3, 3.83e-3, 2.2, 0.0),
        "backward": (6.02e-3, 5.14e-3, 6.47e-3, 1.33, 0.565),
    },
    ("v5p", 128): {
        "forward": (4.35e-3, 3.80e-3, 4.77e-3, 2.26, 0.0),
        "backward": (8.52e-3, 6.96e-3, 9.35e-3, 1.26, 0.814),
    },
    ("v6e", 64): {
        "forward": (1.88e-3, 2.37e-3, 2.82e-3, 1.4, 0.0),
        "backward": (3.78e-3, 3.47e-3, 4.02e-3, 0.858, 0.438),
    },
    ("v6e", 128): {
        "forward": (2.00e-3, 2.44e-3, 2.95e-3, 1.48, 0.0),
        "backward": (4.18e-3, 3.58e-3, 4.37e-3, 0.942, 0.422),
    },
}
SPLASH = {
    ("v5p", 64): {"fwd": 6.60e-3, "dkv": 8.43e-3, "dq": 6.31e-3},
    ("v5p", 128): {"fwd": 6.43e-3, "dkv": 8.31e-3, "dq": 6.37e-3},
    ("v6e", 64): {"fwd": 4.40e-3, "dkv": 5.13e-3, "dq": 4.36e-3},
    ("v6e", 128): {"fwd": 4.34e-3, "dkv": 5.07e-3, "dq": 4.20e-3},
}
# For one head and four points: per pixel and query of a level, per query of a level, per query
# (benchmarks/sampling_blocks.py).
SAMPLING = {
    "v5p": {"forward": (2.83e-3, 0.947, 0.762), "backward": (10.3e-3, 1.82, 2.56)},
    "v6e": {"forward": (2.93e-3, 0.781, 0.809), "backward": (10.0e-3, 0.979, 1.88)},
}
# Chips for which the kernels were not compiled -> a chip with the same matrix units, whose cycles are used.
ALIKE = {"v4": "v5p", "v5e": "v5p", "tpu7x": "v6e"}


def kernel_cycles(instruction: Instruction, chip: Chip) -> float:
    """Cycles of a kernel, without the time it waits for queries from memory; 0 for an unknown kernel.

    The first two floating-point operands of attention are q [..., S, D] and k [..., T, D]. A causal kernel has the
    scope "causal"; each of its rows is assumed to hold one sample (several samples in a row have fewer scores), and its
    queries to be the last of the row.
    """
    if match := re.match(r"(forward|backward)_sampling", instruction.name):
        return sampling(instruction, chip, match[1])
    if match := re.match(r"(forward|backward)_flash_(\d+)x(\d+)", instruction.name):
        return flash(instruction, chip, match[1], int(match[2]), int(match[3]))
    if match := re.match(r"splash_m[hq]a_(fwd|dkv|dq)", instruction.name):
        return splash(instruction, chip, match[1])
    return 0.0


def flash(instruction: Instruction, chip: Chip, kernel: str, block_q: int, block_k: int) -> float:
    """Cycles of nn/attention/tpu_flash.py. Nothing else runs while all keys of a head, and the gradients, are moved."""
    query, key = operands(instruction)
    rows, columns = math.ceil(query.dims[-2] / block_q), math.ceil(key.dims[-2] / block_k)
    if "/causal/" in instruction.op_name:
        blocks = rows * (columns - rows) + rows * (rows - 1) // 2, rows, 0
    else:
        # Rows that do not fill whole blocks have segments, which put a mask on the last block of keys.
        segments = any(array.dtype == "s32" and len(array.dims) == 3 for array, *_ in instruction.inputs)
        blocks = rows * (columns - segments), 0, rows * segments
    *per_score, per_query, per_key = rates(FLASH, chip, query.dims[-1])[kernel]
    scores = block_q * block_k * sum(count * rate for count, rate in zip(blocks, per_score))
    cycles = math.prod(query.dims[:-2]) * (scores + rows * block_q * per_query) + math.prod(key.dims[:-1]) * per_key
    moved = key.bytes * (2 if kernel == "forward" else 4)
    return cycles / min(chip.cores, math.prod(key.dims[:-2])) + moved / chip.hbm_per_cycle


def splash(instruction: Instruction, chip: Chip, kernel: str) -> float:
    """Cycles of JAX's splash attention: the blocks that the mask touches. Their size is in the kernel's metadata."""
    suffix = {"fwd": "", "dkv": "_dkv", "dq": "_dq"}[kernel]
    block_q, block_k = (int(re.search(rf"block_{x}{suffix}\W+(\d+)", instruction.attributes)[1]) for x in ("q", "kv"))
    query, key = operands(instruction)
    rows, columns, head_dim = query.dims[-2] // block_q, key.dims[-2] // block_k, query.dims[-1]
    if "/causal/" in instruction.op_name:
        before = key.dims[-2] - query.dims[-2]  # keys of earlier parts of the row
        match = re.search(r"/window_(\d+)_of_", instruction.op_name)
        window = int(match[1]) if match else key.dims[-2]
        starts = [before + i * block_q for i in range(rows)]
        ends = [min(columns, math.ceil((start + block_q) / block_k)) for start in starts]
        blocks = sum(end - max(0, start - window + 1) // block_k for start, end in zip(starts, ends))
    else:
        blocks = rows * columns
    per_score = rates(SPLASH, chip, head_dim)[kernel]
    return math.prod(query.dims[:-2]) * blocks * block_q * block_k * per_score * max(1, head_dim / 128) / chip.cores


def sampling(instruction: Instruction, chip: Chip, kernel: str) -> float:
    """Cycles of nn/sampling/tpu.py: maps [levels, N, pixels, C], places [N, heads, levels, 3 points, Q].

    Nothing else runs while the maps of a group of heads, and their gradients, are moved.
    """
    maps, places = operands(instruction)
    (levels, images, pixels, _), (_, heads, _, rows, queries) = maps.dims, places.dims
    per_pixel, per_level, per_query = SAMPLING[ALIKE.get(chip.name, chip.name)][kernel]
    per_query += levels * (pixels * per_pixel * rows / 12 + per_level)
    moved = maps.bytes * (1 if kernel == "forward" else 2)
    cycles = images * heads * 128 * math.ceil(queries / 128) * per_query
    return cycles / min(chip.cores, images) + moved / chip.hbm_per_cycle


def operands(instruction: Instruction) -> tuple[Array, Array]:
    """The first two floating-point operands: queries and keys, or maps and places."""
    first, second = [arrays[0] for arrays in instruction.inputs if arrays and arrays[0].dtype in ("bf16", "f32")][:2]
    return first, second


def rates(table: dict, chip: Chip, head_dim: int) -> dict:
    """The entry for a chip and head size."""
    return table[ALIKE.get(chip.name, chip.name), 64 if head_dim <= 64 else 128]
