"""What a compiled program sends between devices: every collective, the mesh axes it crosses, and how often it runs."""

from __future__ import annotations

import dataclasses
import math

import jax
import numpy as np

from jaxmllm.mesh import AXES, RULES
from jaxmllm.plan.hlo import Array, Module, parse
from jaxmllm.plan.timeline import phase, stage
from jaxmllm.plan.traffic import first_group, part_of

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
    """Collectives of the text of a compiled program for a mesh of these sizes."""
    module, found = parse(text), []
    walk(module, module.entry, 1, mesh, found)
    return found


def walk(module: Module, name: str, times: int, mesh: tuple[int, ...], found: list[Crossing]) -> None:
    computation = module.computations[name]
    for each in computation.values():
        for body, runs in module.calls(each, computation):
            walk(module, body, times * runs, mesh, found)
        part = part_of(each, module.inside(each))
        if part and part.role in ("whole", "start"):
            arrays = part.carrier.arrays
            if part.carrier.opcode == "all-gather-start":  # operands, then results
                arrays = arrays[len(arrays) // 2 :]
            places = np.unravel_index(first_group(part.carrier, math.prod(mesh)), mesh)
            axes = frozenset(axis for axis, row in zip(AXES, places) if len(set(row)) > 1)
            found.append(Crossing(part.opcode, axes, arrays, module.path(each, computation), times))


def key(dims: tuple[int, ...]) -> tuple[int, ...]:
    """A shape but for the order of its dimensions and those of size 1, which compilers change."""
    return tuple(sorted(d for d in dims if d > 1))


def stacked(path: str) -> int:
    """Leading dimensions of a parameter that count layers."""
    return int("/layers/" in path)


def axes_of(part: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """Mesh axes of one dimension of a PartitionSpec."""
    return (part,) if isinstance(part, str) else part or ()


def whole(x: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """A device's share of a weight that is gathered over fsdp."""
    spec = (tuple(axis for axis in axes_of(part) if axis != "fsdp") for part in x.sharding.spec)
    return jax.sharding.NamedSharding(x.sharding.mesh, jax.sharding.PartitionSpec(*spec)).shard_shape(x.shape)


def weight_shapes(params: dict[str, jax.ShapeDtypeStruct]) -> set[tuple[int, ...]]:
    """Shapes (keys) in which weights, and so their gradients, occur on a device: of one layer or of all, a share over
    fsdp, whole, or all shares side by side. params: path -> shape with its sharding on the mesh."""
    shapes = set()
    for path, x in params.items():
        share, parts = x.sharding.shard_shape(x.shape), x.sharding.mesh.shape["fsdp"]
        for dims in (share, whole(x)):
            shapes |= {key(dims), key(dims[stacked(path) :])}
        shapes |= {key((parts, *share)), key((parts, *share[stacked(path) :]))}
    return shapes


def of_activations(found: list[Crossing], weights: set, targets: set[int]) -> list[Crossing]:
    """Collectives that cross the data axes with pixels, features, hidden states or their gradients: with what is no
    weight, no count and no target. Weights may be gathered over fsdp alone, and summed.

    targets: elements of the teachers' targets, which the contrastive loss compares across the global batch.
    """

    def harmless(each: Crossing, array: Array) -> bool:
        size = math.prod(array.dims)
        if size == 1 or (array.dtype in ("pred", "s32", "u32") and size <= 128):  # counts, masks
            return True
        if each.opcode == "all-gather" and "/distill_" in each.path and size in targets:
            return True
        allowed = each.opcode in ("all-reduce", "reduce-scatter") or (each.opcode, each.axes) == (
            "all-gather",
            {"fsdp"},
        )
        return allowed and key(array.dims) in weights

    return [each for each in found if each.axes & DATA and not all(harmless(each, array) for array in each.arrays)]


def gathered_weights(found: list[Crossing]) -> dict[str, tuple[int, int]]:
    """Stage -> weights gathered over fsdp in the forward pass, and again for the backward pass, in one step."""
    counts: dict[str, list[int]] = {}
    for each in found:
        if each.opcode == "all-gather" and each.axes == {"fsdp"}:
            again = phase(each.path) != "forward"
            counts.setdefault(stage(each.path), [0, 0])[again] += each.times * len(each.arrays)
    return {name: tuple(count) for name, count in counts.items()}


def summed_weights(found: list[Crossing], params: dict[str, jax.ShapeDtypeStruct], parts: set) -> int:
    """Gradients that are summed over data axes in one step and have the shape of a layer's weight split over fsdp, or
    one of `parts` (keys)."""
    split = {k: x for k, x in params.items() if any("fsdp" in axes_of(part) for part in x.sharding.spec)}
    shapes = {key(whole(x)[stacked(path) :]) for path, x in split.items()}
    return sum(each.times * (key(a.dims) in shapes | parts) for each in sums(found, DATA) for a in each.arrays)


def summed_in_blocks(found: list[Crossing], name: str) -> tuple[int, int, int]:
    """Activations of the looped blocks of stage `name` that are summed over tensor in one step: in the forward pass,
    the repeated one and the backward pass."""
    counts = dict.fromkeys(("forward", "recompute", "backward"), 0)
    for each in sums(found, {"tensor"}):
        if stage(each.path) == name and "/block/" in each.path and each.times > 1:
            counts[phase(each.path)] += each.times * sum(len(a.dims) == 3 for a in each.arrays)
    return tuple(counts.values())


def sums(found: list[Crossing], axes: set[str]) -> list[Crossing]:
    """Reductions over some of these axes and no other."""
    return [c for c in found if c.opcode in ("all-reduce", "reduce-scatter") and c.axes and c.axes <= axes]
