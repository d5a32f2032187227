"""Collectives: which mesh axes they cross, how many bytes, how long at link rate.

Model ("How to Scale Your Model", jax-ml.github.io/scaling-book, chapter 3). An all-gather of B bytes over n chips takes
B (n-1)/n / rate, a reduce-scatter the same, an all-reduce twice that, an all-to-all a quarter on a ring. `rate` adds up
the torus dimensions the group spans: two links of a ring each, one where the dimension does not wrap around. Each
neighbour on the longest way adds HOP_SECONDS. What crosses slices goes over the data-centre network at its rate.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from jaxmllm.plan.chips import Topology
from jaxmllm.plan.hlo import Instruction
from jaxmllm.plan.price import COLLECTIVES, base

HOP_SECONDS = 1e-6
# Shares of B (n-1)/n that pass through a chip's links.
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "collective-broadcast": 1}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One run of a collective: axes that it crosses ("fsdp", "data+fsdp"), bytes a chip, seconds per network."""

    opcode: str
    axes: str
    bytes: float
    ici: float
    dcn: float

    @property
    def seconds(self) -> float:
        return self.ici + self.dcn


class Network:
    """Links and mesh of a program: where the partitions of a mesh axis lie in the torus."""

    def __init__(self, topology: Topology, axes: tuple[str, ...], devices: np.ndarray):
        """devices: the mesh's array of devices, dimensions named by `axes`."""
        self.topology, self.axes, self.shape = topology, axes, devices.shape
        flat = list(devices.flat)
        self.coords = np.array([[*d.coords, getattr(d, "core_on_chip", 0)] for d in flat])
        self.slices = np.array([getattr(d, "slice_index", 0) or 0 for d in flat])

    def transfer(self, opcode: str, each: Instruction) -> Transfer:
        """What one run of a collective moves. `each`: the instruction that carries groups and result."""
        group = first_group(each, len(self.coords))
        arrays = each.arrays
        if each.opcode == "all-gather-start":  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        elif each.opcode == "collective-permute-start":  # operand, result, two counters
            arrays = arrays[:1]
        size = sum(array.bytes for array in arrays)
        if opcode == "reduce-scatter":
            size *= len(group)
        crossed = "+".join(a for a, varies in zip(self.axes, self.varying(group)) if varies) or "none"
        n = len(group)
        across = len(set(self.slices[group]))
        inner = n // across
        shared = size * (n - 1) / n
        if opcode == "collective-permute":
            step = size / self.topology.chip.link_rate + HOP_SECONDS
            return Transfer(opcode, crossed, size, 0 if across > 1 else step, self.dcn(size) if across > 1 else 0)
        ici = dcn = 0.0
        if inner > 1:
            rate, hops = self.rate(group[self.slices[group] == self.slices[group[0]]])
            passes = PASSES.get(opcode, 0.25 * max(self.extent(group)))
            part = size / across if opcode in ("all-gather", "reduce-scatter") else size
            ici = passes * part * (inner - 1) / inner / rate + hops * HOP_SECONDS
        if across > 1:
            dcn = self.dcn(PASSES.get(opcode, 1) * size / inner * (across - 1) / across)
        return Transfer(opcode, crossed, PASSES.get(opcode, 1) * shared, ici, dcn)

    def dcn(self, size: float) -> float:
        return size / self.topology.chip.dcn_rate

    def varying(self, group: np.ndarray) -> list[bool]:
        """For each mesh axis, whether members of the group differ in it."""
        places = np.array(np.unravel_index(group, self.shape))
        return [len(set(row)) > 1 for row in places]

    def extent(self, group: np.ndarray) -> list[int]:
        """Members of the group along each dimension of the torus, the cores of a chip last."""
        return [len(set(column)) for column in self.coords[group].T]

    def rate(self, group: np.ndarray) -> tuple[float, int]:
        """(bytes/s into one chip, hops on the longest way) of a group inside a slice."""
        chip, links, hops = self.topology.chip, 0, 0
        *extents, cores = self.extent(group)
        for extent, size in zip(extents, self.topology.shape):
            ring = size % chip.wrap == 0 and extent == size
            links += (2 if ring and extent > 2 else 1) * (extent > 1)
            hops += extent // 2 if ring else extent - 1
        # Two cores of a chip speak through its memory; both share the links of the chip.
        if not links:
            return chip.hbm_rate / 2, 1
        return links * chip.link_rate / (1 if cores > 1 else chip.per_chip), hops


def first_group(each: Instruction, count: int) -> np.ndarray:
    """Members of one replica group, as places in the flattened mesh (`count` of them).

    Reads all forms XLA prints: lists, iota ([4,16]<=[64]T(0)), named meshes, source-target pairs. Raises ValueError.
    """
    text = each.attributes
    if found := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return np.array([int(found[1]), int(found[2])])
    if found := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array([int(i) for i in found[1].split(",")])
    if found := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return iota(found[2], found[3]).reshape([int(i) for i in found[1].split(",")])[0]
    if found := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        ids = iota(found[2] or str(math.prod(sizes.values())), found[3]).reshape(list(sizes.values()))
        wanted = re.findall(r"'([^']+)'", found[4])
        return ids[tuple(slice(None) if name in wanted else 0 for name in sizes)].reshape(-1)
    if "replica_groups={}" in text:
        return np.arange(count)
    raise ValueError(f"{each.name}: cannot read its replica groups: {text[:160]}")


def iota(dims: str, order: str | None) -> np.ndarray:
    """ "4,16" and "1,0" -> arange(64) as [4, 16], transposed."""
    ids = np.arange(math.prod(int(d) for d in dims.split(","))).reshape([int(d) for d in dims.split(",")])
    return ids.transpose([int(d) for d in order.split(",")]) if order else ids


@dataclasses.dataclass(frozen=True)
class Part:
    """The role of an instruction in a collective. role: "whole" (synchronous), "start", "step" (a fusion that works on
    a transfer under way beside its own computation) or "done"; key: what joins the roles of one collective."""

    role: str
    key: str
    opcode: str
    carrier: Instruction  # has the groups and the result


def part_of(each: Instruction, inner: list[Instruction]) -> Part | None:
    """The role of an instruction, None if it has nothing to do with collectives."""
    if each.opcode.endswith(("-done", "-update")):
        return Part("done", each.operands[0], "", each) if each.opcode.endswith("-done") else None
    carrier = next((part for part in (each, *inner) if base(part.opcode) in COLLECTIVES), None)
    if carrier is None:
        return None
    opcode = base(carrier.opcode)
    if each.opcode == "fusion":
        calls = " ".join(part.attributes for part in inner if part.opcode == "custom-call")
        role = "start" if "AsyncCollectiveStart" in calls else "done" if "AsyncCollectiveDone" in calls else "step"
        channel = re.search(r"channel_id=(\d+)", carrier.attributes)
        return Part(role, f"channel {channel[1]}" if channel else each.name, opcode, carrier)
    return Part("start" if each.opcode.endswith("-start") else "whole", each.name, opcode, carrier)
