"""What a compiled program sends between devices: its collectives, the mesh axes they cross, how often they run."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from jaxmllm.mesh import AXES, RULES
from jaxmllm.plan.hlo import Array, Module, parse
from jaxmllm.plan.timeline import component, phase
from jaxmllm.plan.traffic import collective_part, first_group

DATA = set(RULES["batch"])


@dataclasses.dataclass(frozen=True)
class Crossing:
    """One collective: its operation, mesh axes, results, op_name, and how often it runs in a step."""

    opcode: str
    axes: frozenset[str]
    arrays: tuple[Array, ...]
    path: str
    times: int


def crossings(text: str, mesh: tuple[int, ...]) -> list[Crossing]:
    """The collectives of a compiled program, from its text; mesh: the sizes of its mesh axes."""
    module, found = parse(text), []
    walk(module, module.entry, 1, mesh, found)
    return found


def walk(module: Module, name: str, times: int, mesh: tuple[int, ...], found: list[Crossing]) -> None:
    """Adds to `found` the collectives of a computation that runs `times` times."""
    computation = module.computations[name]
    for instruction in computation.values():
        for body, runs in module.calls(instruction, computation):
            walk(module, body, times * runs, mesh, found)
        part = collective_part(instruction, module.inside(instruction))
        if part and part.role in ("whole", "start"):
            arrays = part.carrier.arrays
            if part.carrier.opcode == "all-gather-start":  # operands, then results
                arrays = arrays[len(arrays) // 2 :]
            places = np.unravel_index(first_group(part.carrier, math.prod(mesh)), mesh)
            axes = frozenset(axis for axis, row in zip(AXES, places) if len(set(row)) > 1)
            found.append(Crossing(part.opcode, axes, arrays, module.path(instruction, computation), times))


def key(dims: tuple[int, ...]) -> tuple[int, ...]:
    """A shape without dimensions of size 1 and in sorted order: compilers change both."""
    return tuple(sorted(d for d in dims if d > 1))


def stacked(path: str) -> int:
    """How many leading dimensions of a parameter count layers."""
    return int("/layers/" in path)


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes of one dimension of a PartitionSpec."""
    return (part,) if isinstance(part, str) else part or ()


def whole(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """The shape of a device's share of a weight after it is gathered over fsdp."""
    spec = (tuple(axis for axis in axes_of(part) if axis != "fsdp") for part in x.sharding.spec)
    return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec(*spec)).shard_shape(x.shape)


def weight_shapes(params: dict[str, jax.ShapeDtypeStruct]) -> set[tuple[int, ...]]:
    """Keys of the shapes in which weights, and so their gradients, occur on a device.

    These are a share over fsdp, the whole, or all shares side by side, of one layer or of all layers.
    params: path -> shape with its sharding on the mesh.
    """
    shapes = set()
    for path, x in params.items():
        share, parts = x.sharding.shard_shape(x.shape), x.sharding.mesh.shape["fsdp"]
        for dims in (share, whole(x)):
            shapes |= {key(dims), key(dims[stacked(path) :])}
        shapes |= {key((parts, *share)), key((parts, *share[stacked(path) :]))}
    return shapes


def of_activations(found: list[Crossing], weights: set, targets: set[int]) -> list[Crossing]:
    """Collectives that send pixels, features, hidden states or their gradients across the data axes.

    That is anything except weights, counts and targets. Weights may be gathered, over fsdp only, and summed.
    targets: sizes of the teachers' targets, which the contrastive loss compares across the global batch.
    """

    def harmless(crossing: Crossing, array: Array) -> bool:
        size = math.prod(array.dims)
        if size == 1 or (array.dtype in ("pred", "s32", "u32") and size <= 128):  # counts, masks
            return True
        if crossing.opcode == "all-gather" and "/objective_" in crossing.path and size in targets:
            return True
        gathered = crossing.opcode == "all-gather" and crossing.axes == {"fsdp"}
        allowed = gathered or crossing.opcode in ("all-reduce", "reduce-scatter")
        return allowed and key(array.dims) in weights

    return [c for c in found if c.axes & DATA and not all(harmless(c, array) for array in c.arrays)]


def gathered_weights(found: list[Crossing]) -> dict[str, tuple[int, int]]:
    """Component -> weights gathered over fsdp in one step: in the forward pass, and again for the backward pass."""
    counts: dict[str, list[int]] = {}
    for c in found:
        if c.opcode == "all-gather" and c.axes == {"fsdp"}:
            again = phase(c.path) != "forward"
            counts.setdefault(component(c.path), [0, 0])[again] += c.times * len(c.arrays)
    return {name: tuple(count) for name, count in counts.items()}


def summed_weights(found: list[Crossing], params: dict[str, jax.ShapeDtypeStruct], parts: set) -> int:
    """How many gradients of weights that are split over fsdp are summed over data axes in one step.

    They are found by shape: that of one layer's weight, or one of `parts` (keys).
    """
    split = {k: x for k, x in params.items() if any("fsdp" in axes_of(part) for part in x.sharding.spec)}
    shapes = {key(whole(x)[stacked(path) :]) for path, x in split.items()}
    return sum(c.times * (key(array.dims) in shapes | parts) for c in sums(found, DATA) for array in c.arrays)


def summed_in_blocks(found: list[Crossing], name: str) -> tuple[int, int, int]:
    """How many activations of the scanned blocks of component `name` are summed over tensor in one step.

    Counted in the forward pass, the repeated forward pass and the backward pass.
    """
    counts = dict.fromkeys(("forward", "recompute", "backward"), 0)
    for c in sums(found, {"tensor"}):
        if component(c.path) == name and "/block/" in c.path and c.times > 1:
            counts[phase(c.path)] += c.times * sum(len(array.dims) == 3 for array in c.arrays)
    return tuple(counts.values())


def sums(found: list[Crossing], axes: set[str]) -> list[Crossing]:
    """Reductions over some of these axes and no others."""
    return [c for c in found if c.opcode in ("all-reduce", "reduce-scatter") and c.axes and c.axes <= axes]
