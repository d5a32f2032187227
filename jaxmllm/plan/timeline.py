"""Runs a scheduled program on paper: compute in the order of the schedule, asynchronous collectives beside it.

A `start` hands its transfer to the network, which works on one transfer at a time. The `done` waits for the rest of the
transfer; this wait is exposed. The whole time of a synchronous collective is exposed. A transfer that advances in steps
inside fusions ("async collective fusion") advances only while those fusions run.
"""

from __future__ import annotations

import dataclasses
import re

from jaxmllm.plan.chips import Chip
from jaxmllm.plan.hlo import Instruction, Module
from jaxmllm.plan.price import price
from jaxmllm.plan.traffic import Network, Transfer, collective_part

WINDOWED = "windowed_dot_general"  # in the names of loops that gather and multiply in parts


@dataclasses.dataclass
class OpenTransfer:
    """A transfer under way: when it ends and, if it advances only inside fusions, the seconds that are left."""

    end: float
    left: float | None


@dataclasses.dataclass
class Charge:
    """What all runs of one instruction cost."""

    name: str
    path: str  # op_name
    kind: str
    times: float
    cycles: float  # of all runs
    bytes: float  # of the results of all runs
    model: str | None
    transfer: Transfer | None
    exposed: float  # seconds, of all runs


class Timeline:
    """The charges of a program, in the order of the schedule, and the seconds it takes."""

    def __init__(self, module: Module, chip: Chip, network: Network):
        self.module, self.chip, self.network = module, chip, network
        self.charges: list[Charge] = []
        self.seconds = self.walk(module.entry, 1, "")

    def walk(self, name: str, times: float, scope: str) -> float:
        """Adds the charges of a computation that runs `times` times. Returns the seconds of one run."""
        now, free_at, under_way = 0.0, dict.fromkeys(("ici", "dcn"), 0.0), {}
        computation = self.module.computations[name]
        for instruction in computation.values():
            path = self.module.path(instruction, computation) or scope
            for body, runs in self.module.calls(instruction, computation):
                now += runs * self.walk(body, times * runs, path)
            if instruction.opcode in ("while", "call", "conditional"):
                continue
            cost = price(instruction, self.module, self.chip, WINDOWED in name)
            busy, wait, transfer = cost.cycles / self.chip.clock, 0.0, None
            part = collective_part(instruction, self.module.inside(instruction))
            if part and part.role in ("whole", "start"):
                transfer = self.network.transfer(part.opcode, part.carrier)
                networks = [network for network in free_at if getattr(transfer, network)]
                end = max([now, *(free_at[network] for network in networks)]) + transfer.seconds
                free_at.update(dict.fromkeys(networks, end))
                wait = end - now if part.role == "whole" else 0.0
                under_way[part.key] = OpenTransfer(end, transfer.seconds if instruction.opcode == "fusion" else None)
            elif part and part.key in under_way:
                open_transfer = under_way[part.key]
                if part.role == "step":
                    open_transfer.left = max(0.0, open_transfer.left - busy)
                elif open_transfer.left is None:
                    wait = max(0.0, open_transfer.end - now)
                else:
                    wait = open_transfer.left
            now += busy + wait
            if cost.kind != "free":
                cycles, size = times * cost.cycles, times * instruction.bytes
                self.charges.append(
                    Charge(instruction.name, path, cost.kind, times, cycles, size, cost.model, transfer, times * wait)
                )
        return now


# The parts of a path that transformations and loops add.
_WRAPPER = re.compile(
    r"jit\(|jvp\(|transpose\(|vmap\(|shard_map|MLLM|(while|body|cond|closed_call|checkpoint|rematted_computation)$"
)


def scopes(path: str) -> list[str]:
    """The named scopes of an op_name: "jit(step)/jvp(MLLM)/llm/while/body/attn/add" -> llm, attn."""
    parts = path.split("/") if path.startswith("jit(") else [""]
    parts = parts if _WRAPPER.match(parts[-1]) else parts[:-1]
    return [part for part in parts if not _WRAPPER.match(part)]


def component(path: str) -> str:
    """The component of the model that an op_name is in: its first scope, as mllm.py and the train step name them.

    Two components are inside others: `llm_insert`, the visual layers in the language model, and `head`, the output
    matmul.
    """
    names = scopes(path)
    if "insert" in names:
        return f"{names[0]}_insert"
    return "head" if "logits" in names else names[0] if names else "other"


def phase(path: str) -> str:
    """forward, recompute (a forward pass repeated because of rematerialisation) or backward."""
    if "rematted_computation" in path:
        return "recompute"
    return "backward" if "transpose(" in path else "forward"


def saved_bytes(module: Module) -> int:
    """Bytes that the forward pass keeps for the backward pass.

    These are results of forward instructions of the entry computation that backward ones read, including the stacked
    buffers of scanned layers.
    """
    entry, saved = module.computations[module.entry], {}

    def source(name: str, index: int | None) -> tuple[str, int | None]:
        """(instruction that made a value, its index there if it is one element of a tuple)"""
        instruction = entry[name]
        if instruction.opcode == "get-tuple-element":
            return source(instruction.operands[0], int(instruction.attribute("index")))
        if instruction.opcode == "tuple" and index is not None:
            return source(instruction.operands[index], None)
        if instruction.opcode in ("bitcast", "copy"):
            return source(instruction.operands[0], index)
        return name, index

    def is_forward(instruction: Instruction) -> bool:
        path = instruction.op_name
        return "jvp(" in path and phase(path) == "forward" and instruction.opcode != "parameter"

    for reader in entry.values():
        if phase(reader.op_name) != "forward" or "optimizer" in reader.op_name:
            for name in reader.operands:
                names = entry[name].operands if entry[name].opcode == "tuple" else [name]
                for origin, index in (source(part, None) for part in names):
                    if is_forward(entry[origin]):
                        arrays = entry[origin].arrays
                        saved[origin, index] = arrays[index].bytes if index is not None else entry[origin].bytes
    return sum(saved.values())
