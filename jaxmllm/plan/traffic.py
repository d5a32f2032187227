"""Collectives: which mesh axes they cross, how many bytes they move, and how long they take at link rate.

Model ("How to Scale Your Model", jax-ml.github.io/scaling-book, chapter 3). An all-gather of b bytes over n chips takes
b (n-1)/n / rate, a reduce-scatter the same, an all-reduce twice that, an all-to-all a quarter of it on a ring. `rate`
adds up the torus dimensions that the group spans: two links for a ring, one for a dimension that does not wrap around.
Each hop on the longest way adds HOP_SECONDS. What crosses slices goes over the data-centre network at its rate.
"""

from __future__ import annotations

import dataclasses
import math
import re

import numpy as np

from jaxmllm.plan.chips import Topology
from jaxmllm.plan.hlo import Instruction
from jaxmllm.plan.price import COLLECTIVES, base_opcode

HOP_SECONDS = 1e-6
# How many times b (n-1)/n passes through the links of a chip.
PASSES = {"all-gather": 1, "reduce-scatter": 1, "all-reduce": 2, "collective-broadcast": 1}


@dataclasses.dataclass(frozen=True)
class Transfer:
    """One run of a collective."""

    opcode: str
    axes: str  # the mesh axes it crosses: "fsdp", "data+fsdp"
    bytes: float  # per chip
    ici: float  # seconds on the links inside a slice
    dcn: float  # seconds on the data-centre network

    @property
    def seconds(self) -> float:
        return self.ici + self.dcn


class Network:
    """The links of a slice, and where in the torus the devices of a mesh are."""

    def __init__(self, topology: Topology, axes: tuple[str, ...], devices: np.ndarray):
        """devices: the array of the mesh's devices; axes: the names of its dimensions."""
        self.topology, self.axes, self.shape = topology, axes, devices.shape
        flat = list(devices.flat)
        self.coords = np.array([[*d.coords, getattr(d, "core_on_chip", 0)] for d in flat])
        self.slices = np.array([getattr(d, "slice_index", 0) or 0 for d in flat])

    def transfer(self, opcode: str, carrier: Instruction) -> Transfer:
        """What one run of a collective moves. `carrier`: the instruction with its replica groups and result."""
        group = first_group(carrier, len(self.coords))
        arrays = carrier.arrays
        if carrier.opcode == "all-gather-start":  # operands, then results
            arrays = arrays[len(arrays) // 2 :]
        elif carrier.opcode == "collective-permute-start":  # operand, result, two counters
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
        """Seconds in which one chip sends `size` bytes over the data-centre network."""
        return size / self.topology.chip.dcn_rate

    def varying(self, group: np.ndarray) -> list[bool]:
        """For each mesh axis, whether the members of the group differ in it."""
        places = np.array(np.unravel_index(group, self.shape))
        return [len(set(row)) > 1 for row in places]

    def extent(self, group: np.ndarray) -> list[int]:
        """How many members the group has along each dimension of the torus, and finally how many cores of a chip."""
        return [len(set(column)) for column in self.coords[group].T]

    def rate(self, group: np.ndarray) -> tuple[float, int]:
        """(bytes/s into one chip, hops on the longest way) for a group inside a slice."""
        chip, links, hops = self.topology.chip, 0, 0
        *extents, cores = self.extent(group)
        for extent, size in zip(extents, self.topology.shape):
            ring = size % chip.ring_multiple == 0 and extent == size
            links += (2 if ring and extent > 2 else 1) * (extent > 1)
            hops += extent // 2 if ring else extent - 1
        # Two cores of a chip exchange data through its memory; both share the links of the chip.
        if not links:
            return chip.hbm_rate / 2, 1
        return links * chip.link_rate / (1 if cores > 1 else chip.devices_per_chip), hops


def first_group(instruction: Instruction, count: int) -> np.ndarray:
    """The members of the first replica group, as places in the flattened mesh of `count` devices.

    Reads all forms that XLA prints: lists, iota ([4,16]<=[64]T(0)), named meshes, source-target pairs. Raises
    ValueError for any other.
    """
    text = instruction.attributes
    if match := re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", text):
        return np.array([int(match[1]), int(match[2])])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", text):
        return np.array([int(i) for i in match[1].split(",")])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", text):
        return iota(match[2], match[3]).reshape([int(i) for i in match[1].split(",")])[0]
    if match := re.search(
        r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}]*)\}", text
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        ids = iota(match[2] or str(math.prod(sizes.values())), match[3]).reshape(list(sizes.values()))
        wanted = re.findall(r"'([^']+)'", match[4])
        return ids[tuple(slice(None) if name in wanted else 0 for name in sizes)].reshape(-1)
    if "replica_groups={}" in text:
        return np.arange(count)
    raise ValueError(f"{instruction.name}: cannot read its replica groups: {text[:160]}")


def iota(dims: str, order: str | None) -> np.ndarray:
    """ "4,16" and "1,0" -> arange(64) as [4, 16], transposed."""
    ids = np.arange(math.prod(int(d) for d in dims.split(","))).reshape([int(d) for d in dims.split(",")])
    return ids.transpose([int(d) for d in order.split(",")]) if order else ids


@dataclasses.dataclass(frozen=True)
class CollectivePart:
    """The role of an instruction in a collective."""

    # "whole" (synchronous), "start", "step" (a fusion that advances the transfer while it computes) or "done"
    role: str
    key: str  # the same for all parts of one collective
    opcode: str
    carrier: Instruction  # has the replica groups and the result


def collective_part(instruction: Instruction, inner: list[Instruction]) -> CollectivePart | None:
    """The role of an instruction in a collective, None if it has none. inner: the instructions inside a fusion."""
    if instruction.opcode.endswith(("-done", "-update")):
        done = instruction.opcode.endswith("-done")
        return CollectivePart("done", instruction.operands[0], "", instruction) if done else None
    carrier = next((part for part in (instruction, *inner) if base_opcode(part.opcode) in COLLECTIVES), None)
    if carrier is None:
        return None
    opcode = base_opcode(carrier.opcode)
    if instruction.opcode == "fusion":
        calls = " ".join(part.attributes for part in inner if part.opcode == "custom-call")
        role = "start" if "AsyncCollectiveStart" in calls else "done" if "AsyncCollectiveDone" in calls else "step"
        channel = re.search(r"channel_id=(\d+)", carrier.attributes)
        return CollectivePart(role, f"channel {channel[1]}" if channel else instruction.name, opcode, carrier)
    role = "start" if instruction.opcode.endswith("-start") else "whole"
    return CollectivePart(role, instruction.name, opcode, carrier)
