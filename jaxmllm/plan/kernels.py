"""Cycles of the attention kernels, which carry no estimate of the compiler: scores x what it schedules for one."""

from __future__ import annotations

import math
import re

from jaxmllm.nn.flash import CHUNK
from jaxmllm.plan.chips import Chip
from jaxmllm.plan.hlo import Array, Instruction

# (chip, head size) -> cycles of one core by kernel, as libtpu 0.0.42 schedules blocks of 1024 x 1024
# (benchmarks/attention_blocks.py). FLASH: for a score of a block without a mask, of a chunk with one, for a query, for
# a key. SPLASH: for a score.
FLASH = {
    ("v5p", 64): {"forward": (3.53e-3, 4.98e-3, 2.18, 1.46e-3), "backward": (6.02e-3, 7.19e-3, 1.28, 0.591)},
    ("v5p", 128): {"forward": (4.35e-3, 5.92e-3, 2.25, 1.95e-3), "backward": (8.52e-3, 9.56e-3, 1.44, 0.727)},
    ("v6e", 64): {"forward": (1.88e-3, 5.03e-3, 1.40, 0.0), "backward": (3.78e-3, 5.02e-3, 0.857, 0.437)},
    ("v6e", 128): {"forward": (2.00e-3, 5.36e-3, 1.47, 0.0), "backward": (4.18e-3, 5.65e-3, 0.94, 0.422)},
}
SPLASH = {
    ("v5p", 64): {"fwd": 6.60e-3, "dkv": 8.43e-3, "dq": 6.31e-3},
    ("v5p", 128): {"fwd": 6.43e-3, "dkv": 8.31e-3, "dq": 6.37e-3},
    ("v6e", 64): {"fwd": 4.40e-3, "dkv": 5.13e-3, "dq": 4.36e-3},
    ("v6e", 128): {"fwd": 4.34e-3, "dkv": 5.07e-3, "dq": 4.20e-3},
}
# Chips whose kernels were not compiled: priced as one with the same matrix units.
ALIKE = {"v4": "v5p", "v5e": "v5p", "tpu7x": "v6e"}


def kernel_cycles(each: Instruction, chip: Chip) -> float:
    """Cycles of an attention kernel, waiting for queries' memory not included; 0 for another kernel.

    Operands: q [..., S, D], k [..., T, D] first of the floating ones. A causal kernel has the scope "causal"; its rows
    are taken to be one sample each (several samples in a row have fewer scores), its queries to be the row's last.
    """
    if name := re.match(r"(forward|backward)_flash_(\d+)x(\d+)", each.name):
        return flash(each, chip, name[1], int(name[2]), int(name[3]))
    if name := re.match(r"splash_m[hq]a_(fwd|dkv|dq)", each.name):
        return splash(each, chip, name[1])
    return 0.0


def flash(each: Instruction, chip: Chip, kernel: str, bq: int, bk: int) -> float:
    """Of nn/flash.py's kernels. All keys of a head, and the gradients, are moved while nothing else runs."""
    query, key = operands(each)
    n, m, d = query.dims[-2] // bq, key.dims[-2] // bk, query.dims[-1]
    if "/causal/" in each.op_name:
        whole = n * (m - n) + n * (n - 1) // 2
        starts = range(0, bq, CHUNK)
        sizes = {start: min(CHUNK, bq - start) for start in starts}
        masked = n * sum(sizes[r] * sizes[c] for c in starts for r in starts if r <= c)
    else:
        # Segments put a mask on the last block of keys.
        segments = any(array.dtype == "s32" and len(array.dims) == 3 for array, *_ in each.inputs)
        whole, masked = n * (m - segments), n * segments * bq * bk
    of_whole, of_masked, of_query, of_key = rates(FLASH, chip, d)[kernel]
    heads = math.prod(query.dims[:-2])
    cycles = heads * (whole * bq * bk * of_whole + masked * of_masked + query.dims[-2] * of_query)
    cycles += math.prod(key.dims[:-1]) * of_key
    moved = key.bytes * (2 if kernel == "forward" else 4)
    return cycles * max(1, d / 128) / chip.cores + moved / chip.hbm_per_cycle


def splash(each: Instruction, chip: Chip, kernel: str) -> float:
    """Of JAX's splash attention: blocks that the mask touches; their sizes are in the kernel's notes."""
    suffix = {"fwd": "", "dkv": "_dkv", "dq": "_dq"}[kernel]
    bq, bk = (int(re.search(rf"block_{x}{suffix}\W+(\d+)", each.attributes)[1]) for x in ("q", "kv"))
    query, key = operands(each)
    rows, columns, d = query.dims[-2] // bq, key.dims[-2] // bk, query.dims[-1]
    if "/causal/" in each.op_name:
        blocks = sum(min(columns, math.ceil((i + 1) * bq / bk)) for i in range(rows))
    else:
        blocks = rows * columns
    scheduled = rates(SPLASH, chip, d)[kernel]
    return math.prod(query.dims[:-2]) * blocks * bq * bk * scheduled * max(1, d / 128) / chip.cores


def operands(each: Instruction) -> tuple[Array, Array]:
    """Queries and keys."""
    query, key = [arrays[0] for arrays in each.inputs if arrays and arrays[0].dtype in ("bf16", "f32")][:2]
    return query, key


def rates(table: dict, chip: Chip, head: int) -> dict:
    """The entry of a chip and head size."""
    return table[ALIKE.get(chip.name, chip.name), 64 if head <= 64 else 128]
