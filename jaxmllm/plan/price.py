"""Cycles of one instruction: the compiler's estimate if it made one, else a stated model.

The compiler estimates fusions, copies, broadcasts and reductions. It does not estimate gathers, scatters, sorts,
hand-written kernels, in-place updates and collectives (traffic.py), so a sum of its estimates would flatter a program
that uses them. MODELS says how each of these is priced; the plan lists every use.
"""

from __future__ import annotations

import dataclasses
import math
import re

from jaxmllm.plan.chips import Chip
from jaxmllm.plan.hlo import Instruction, Module
from jaxmllm.plan.kernels import kernel_cycles

ROW_CYCLES = 64  # to start the transfer of one row; assumed, since no figure for TPUs is published
WINDOW_EFFICIENCY = 0.95  # share of peak that the compiler estimates for a large matmul on its own
KERNEL_EFFICIENCY = 0.45  # share of peak that a hand-written kernel is assumed to reach

MODELS = {
    "gather": f"rows x max({ROW_CYCLES} cycles, row bytes at HBM rate); twice for a scatter, which reads and writes",
    "sort": "bytes at HBM rate x log2(n) (log2(n) + 1) / 2 passes",
    "windowed matmul": f"max(FLOPs at {WINDOW_EFFICIENCY:.0%} of peak, operands and results at HBM rate)",
    "kernel": f"max(FLOPs at {KERNEL_EFFICIENCY:.0%} of peak, bytes at HBM rate) of the kernel's own cost estimate",
    "our kernel": "scores of blocks that a mask touches, or pixels x places; x cycles the compiler schedules for one",
    "kernel without estimate": "operands and results at HBM rate; its FLOPs are not counted",
    "in-place update": "twice the updated bytes at HBM rate",
    "asynchronous copy": "nothing: it runs beside other work",
    "host copy": "bytes at the rate of the host link, while nothing else runs",
    "elementwise": "operands and results at HBM rate",
}

# Instructions that do nothing at run time, and custom calls that only tell the compiler something.
FREE = {
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "partition-id", "replica-id", "after-all",
    "opt-barrier", "domain", "add-dependency", "AllocateBuffer", "AssumeGatherIndicesInBound", "Sharding",
    "PrepareAsyncCallStart", "PrepareAsyncCallDone",
}  # fmt: skip
COLLECTIVES = {
    "all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast",
    "ragged-all-to-all",
}  # fmt: skip
SMALL = 4096  # bytes of a result; below this it is scalar bookkeeping, which is free


@dataclasses.dataclass(frozen=True)
class Price:
    """Cycles of one run, the kind of work, and the key in MODELS if the compiler made no estimate."""

    cycles: float
    kind: str
    model: str | None = None


def base_opcode(opcode: str) -> str:
    """ "all-gather-start" -> "all-gather"."""
    return re.sub(r"-(start|done|update)$", "", opcode)


def price(instruction: Instruction, module: Module, chip: Chip, windowed: bool = False) -> Price:
    """What one run of an instruction costs the compute units of one chip. Collectives cost them nothing.

    windowed: it is inside a loop of partial matmuls, where the compiler's estimates are two to three times too high.
    """
    if base_opcode(instruction.opcode) in COLLECTIVES | {"send", "recv", "async", "call"}:
        return Price(0, "collective")
    inner = module.inside(instruction)
    if any("AsyncCollective" in part.attributes for part in inner if part.opcode == "custom-call"):
        return Price(0, "collective")
    kind = kind_of(instruction, inner)
    read = sum(array.bytes for arrays in instruction.inputs for array in arrays)
    moved = (instruction.bytes + read) / chip.hbm_per_cycle
    if windowed and kind == "matmul":
        compute = sum(product_flops(part) for part in inner) / (WINDOW_EFFICIENCY * chip.flops_per_cycle)
        return Price(max(compute, moved), kind, "windowed matmul")
    if instruction.cycles is not None:
        return Price(instruction.cycles, kind)
    target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
    if instruction.opcode in FREE or (target and target[1] in FREE):
        return Price(0, "free")
    if instruction.opcode in ("copy-start", "copy-done", "slice-start", "slice-done"):
        arrays = [array for arrays in (instruction.arrays, *instruction.inputs) for array in arrays]
        if instruction.opcode.endswith("start") and len({array.host for array in arrays}) == 2:
            return Price(instruction.arrays[0].bytes / chip.host_rate * chip.clock, "host copy", "host copy")
        return Price(0, "copy", "asynchronous copy" if instruction.opcode.endswith("start") else None)
    if target:
        return kernel_price(instruction, moved, chip)
    for part in inner or [instruction]:
        if part.opcode in ("gather", "scatter"):
            return Price(row_cycles(part, chip), "gather", "gather")
        if part.opcode == "sort":
            log = math.log2(max(2, *(max(array.dims, default=1) for array in part.arrays)))
            return Price(2 * part.bytes / chip.hbm_per_cycle * log * (log + 1) / 2, "sort", "sort")
    if instruction.bytes < SMALL:
        return Price(0, "free")
    if instruction.opcode == "dynamic-update-slice":
        return Price(2 * sum(a.bytes for a in instruction.inputs[1]) / chip.hbm_per_cycle, "slice", "in-place update")
    return Price(moved, kind, "elementwise")


def kind_of(instruction: Instruction, inner: list[Instruction]) -> str:
    """matmul, gather, sort, reduce, copy, slice or fusion (anything else), by what the instruction contains."""
    opcodes = {instruction.opcode, *(part.opcode for part in inner)} - {"parameter", "bitcast", "fusion", "constant"}
    for kind, names in (
        ("matmul", {"convolution", "dot"}),
        ("gather", {"gather", "scatter"}),
        ("sort", {"sort"}),
        ("reduce", {"reduce", "reduce-window"}),
    ):
        if opcodes & names:
            return kind
    for kind, names in (
        ("copy", {"copy", "transpose", "reshape"}),
        ("slice", {"dynamic-slice", "dynamic-update-slice", "slice", "concatenate", "pad", "broadcast", "copy"}),
    ):
        if opcodes <= names:
            return kind
    return "fusion"


def product_flops(instruction: Instruction) -> float:
    """2 m n k of a matmul without batch dimensions, 0 for anything else: m k * k n / m n = k^2."""
    if instruction.opcode not in ("convolution", "dot"):
        return 0.0
    out, left, right = (math.prod(arrays[0].dims) for arrays in (instruction.arrays, *instruction.inputs[:2]))
    return 2.0 * out * math.sqrt(left * right / out)


def row_cycles(instruction: Instruction, chip: Chip) -> float:
    """Cycles of a gather or scatter, by the rows that it moves: a row is what one index selects."""
    scatter = instruction.opcode == "scatter"
    moved = instruction.inputs[-1][0] if scatter else instruction.arrays[0]
    key = "update_window_dims" if scatter else "offset_dims"
    match = re.search(rf"\b{key}=\{{([\d,]*)\}}", instruction.attributes)
    row = math.prod(moved.dims[int(d)] for d in match[1].split(",") if d)
    row_bytes = row * moved.bytes / max(1, math.prod(moved.dims))
    rows = math.prod(moved.dims) / max(1, row)
    return (1 + scatter) * rows * max(ROW_CYCLES, row_bytes / chip.hbm_per_cycle)


def kernel_price(instruction: Instruction, moved: float, chip: Chip) -> Price:
    """The price of a Pallas kernel or another custom call; moved: cycles to move its operands and results."""
    cost = instruction.config.get("custom_call_config", {}).get("cost_estimate")
    if cost:
        compute = float(cost.get("flops", 0)) / (KERNEL_EFFICIENCY * chip.flops_per_cycle)
        return Price(max(compute, float(cost.get("bytes_accessed", 0)) / chip.hbm_per_cycle), "kernel", "kernel")
    if cycles := kernel_cycles(instruction, chip):
        return Price(max(cycles, moved), "kernel", "our kernel")
    return Price(moved, "kernel", "kernel without estimate")
