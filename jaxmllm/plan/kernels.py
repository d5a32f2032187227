"""Cycles of our kernels, which carry no estimate of the compiler: what they do x what it schedules for one of it."""

from __future__ import annotations

import math
import re

from jaxmllm.plan.chips import Chip
from jaxmllm.plan.hlo import Array, Instruction

# (chip, head size) -> cycles of one core by kernel, as libtpu 0.0.42 schedules blocks of 1024 x 1024
# (benchmarks/attention_blocks.py). FLASH: for a score of a block without a mask, of one on the diagonal, of one with
# a mask of segments, for a query, for a key. SPLASH: for a score. Smaller blocks are taken to cost as much a score.
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
# Of one head, four points: for a pixel and query of a level, for a query of a level, for a query
# (benchmarks/sampling_blocks.py).
SAMPLING = {
    "v5p": {"forward": (2.83e-3, 0.947, 0.762), "backward": (10.3e-3, 1.82, 2.56)},
    "v6e": {"forward": (2.93e-3, 0.781, 0.809), "backward": (10.0e-3, 0.979, 1.88)},
}
# Chips whose kernels were not compiled: priced as one with the same matrix units.
ALIKE = {"v4": "v5p", "v5e": "v5p", "tpu7x": "v6e"}


def kernel_cycles(each: Instruction, chip: Chip) -> float:
    """Cycles of a kernel, waiting for queries' memory not included; 0 for one that is not known.

    Operands of attention: q [..., S, D], k [..., T, D] first of the floating ones. A causal kernel has the scope
    "causal"; its rows are taken to be one sample each (several samples in a row have fewer scores), its queries to be
    the row's last.
    """
    if name := re.match(r"(forward|backward)_sampling", each.name):
        return sampling(each, chip, name[1])
    if name := re.match(r"(forward|backward)_flash_(\d+)x(\d+)", each.name):
        return flash(each, chip, name[1], int(name[2]), int(name[3]))
    if name := re.match(r"splash_m[hq]a_(fwd|dkv|dq)", each.name):
        return splash(each, chip, name[1])
    return 0.0


def flash(each: Instruction, chip: Chip, kernel: str, bq: int, bk: int) -> float:
    """Of nn/flash.py's kernels. All keys of a head, and the gradients, are moved while nothing else runs."""
    query, key = operands(each)
    n, m, d = math.ceil(query.dims[-2] / bq), math.ceil(key.dims[-2] / bk), query.dims[-1]
    if "/causal/" in each.op_name:
        blocks = n * (m - n) + n * (n - 1) // 2, n, 0
    else:
        # Rows that are no whole blocks have segments, and these put a mask on the last block of keys.
        segments = any(array.dtype == "s32" and len(array.dims) == 3 for array, *_ in each.inputs)
        blocks = n * (m - segments), 0, n * segments
    *of_scores, of_query, of_key = rates(FLASH, chip, d)[kernel]
    scores = bq * bk * sum(count * rate for count, rate in zip(blocks, of_scores))
    cycles = math.prod(query.dims[:-2]) * (scores + n * bq * of_query) + math.prod(key.dims[:-1]) * of_key
    moved = key.bytes * (2 if kernel == "forward" else 4)
    return cycles / min(chip.cores, math.prod(key.dims[:-2])) + moved / chip.hbm_per_cycle


def splash(each: Instruction, chip: Chip, kernel: str) -> float:
    """Of JAX's splash attention: blocks that the mask touches; their sizes are in the kernel's notes."""
    suffix = {"fwd": "", "dkv": "_dkv", "dq": "_dq"}[kernel]
    bq, bk = (int(re.search(rf"block_{x}{suffix}\W+(\d+)", each.attributes)[1]) for x in ("q", "kv"))
    query, key = operands(each)
    rows, columns, d = query.dims[-2] // bq, key.dims[-2] // bk, query.dims[-1]
    if "/causal/" in each.op_name:
        before = key.dims[-2] - query.dims[-2]  # keys of the row's earlier parts
        blocks = sum(min(columns, math.ceil((before + (i + 1) * bq) / bk)) for i in range(rows))
    else:
        blocks = rows * columns
    scheduled = rates(SPLASH, chip, d)[kernel]
    return math.prod(query.dims[:-2]) * blocks * bq * bk * scheduled * max(1, d / 128) / chip.cores


def sampling(each: Instruction, chip: Chip, kernel: str) -> float:
    """Of nn/sampling.py's kernels: maps [level, N, pixels, C], places [N, head, level, 3 points, Q]. A group of heads'
    maps, and their gradients, are moved while nothing else runs.
    """
    maps, places = operands(each)
    (levels, n, pixels, _), (_, heads, _, rows, queries) = maps.dims, places.dims
    of_pixel, of_level, of_query = SAMPLING[ALIKE.get(chip.name, chip.name)][kernel]
    of_query += levels * (pixels * of_pixel * rows / 12 + of_level)
    moved = maps.bytes * (1 if kernel == "forward" else 2)
    cycles = n * heads * 128 * math.ceil(queries / 128) * of_query
    return cycles / min(chip.cores, n) + moved / chip.hbm_per_cycle


def operands(each: Instruction) -> tuple[Array, Array]:
    """Queries and keys, or maps and places."""
    query, key = [arrays[0] for arrays in each.inputs if arrays and arrays[0].dtype in ("bf16", "f32")][:2]
    return query, key


def rates(table: dict, chip: Chip, head: int) -> dict:
    """The entry of a chip and head size."""
    return table[ALIKE.get(chip.name, chip.name), 64 if head <= 64 else 128]
