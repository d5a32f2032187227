"""Runs a scheduled program on paper: compute cycles in order, collectives beside them where they are asynchronous.

A `start` hands its transfer to the network, which works on one at a time; the `done` waits for what is left of it, and
that wait is exposed. A synchronous collective is exposed whole. A transfer that goes on in steps inside fusions ("async
collective fusion") advances only while those fusions run.
"""

from __future__ import annotations

import dataclasses
import re

from jaxmllm.plan.chips import Chip
from jaxmllm.plan.hlo import Module
from jaxmllm.plan.price import price
from jaxmllm.plan.traffic import Network, Transfer, part_of

WINDOWED = "windowed_dot_general"  # in the names of loops that gather and multiply by parts


@dataclasses.dataclass
class Open:
    """A transfer under way: when it ends, and, if it advances inside fusions only, the seconds that are left."""

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
    """Charges of a program, in the order of the schedule."""

    def __init__(self, module: Module, chip: Chip, network: Network):
        self.module, self.chip, self.network = module, chip, network
        self.charges: list[Charge] = []
        self.seconds = self.walk(module.entry, 1, "")

    def walk(self, name: str, times: float, scope: str) -> float:
        """Adds the charges of a computation that runs `times` times; seconds of one run."""
        now, free, open_ = 0.0, dict.fromkeys(("ici", "dcn"), 0.0), {}
        computation = self.module.computations[name]
        for each in computation.values():
            path = self.module.path(each, computation) or scope
            for body, runs in self.module.calls(each, computation):
                now += runs * self.walk(body, times * runs, path)
            if each.opcode in ("while", "call", "conditional"):
                continue
            cost = price(each, self.module, self.chip, WINDOWED in name)
            busy, wait, transfer = cost.cycles / self.chip.clock, 0.0, None
            part = part_of(each, self.module.inside(each))
            if part and part.role in ("whole", "start"):
                transfer = self.network.transfer(part.opcode, part.carrier)
                networks = [net for net in free if getattr(transfer, net)]
                end = max([now, *(free[net] for net in networks)]) + transfer.seconds
                free.update(dict.fromkeys(networks, end))
                wait = end - now if part.role == "whole" else 0.0
                open_[part.key] = Open(end, transfer.seconds if each.opcode == "fusion" else None)
            elif part and part.key in open_:
                under_way = open_[part.key]
                if part.role == "step":
                    under_way.left = max(0.0, under_way.left - busy)
                else:
                    wait = max(0.0, under_way.end - now) if under_way.left is None else under_way.left
            now += busy + wait
            if cost.kind != "free":
                cycles, size = times * cost.cycles, times * each.bytes
                charge = Charge(each.name, path, cost.kind, times, cycles, size, cost.model, transfer, times * wait)
                self.charges.append(charge)
        return now


# Parts of a path that transformations and loops add.
_WRAPPER = re.compile(
    r"jit\(|jvp\(|transpose\(|vmap\(|shard_map|MLLM|(while|body|cond|closed_call|checkpoint|rematted_computation)$"
)


def scopes(path: str) -> list[str]:
    """Named scopes of an op_name, without the primitive: "jit(step)/jvp(MLLM)/llm/while/body/attn/add" -> llm, attn."""
    parts = path.split("/") if path.startswith("jit(") else [""]
    parts = parts if _WRAPPER.match(parts[-1]) else parts[:-1]
    return [part for part in parts if not _WRAPPER.match(part)]


def stage(path: str) -> str:
    """The stage of the model that an op_name lies in: the first scope, as mllm.py and the train step name them.

    Two parts stand out: `llm_insert`, the visual layers inside the language model, and `head`, the output matmul.
    """
    names = scopes(path)
    if "insert" in names:
        return f"{names[0]}_insert"
    return "head" if "logits" in names else names[0] if names else "other"


def phase(path: str) -> str:
    """forward, recompute (a forward pass repeated for rematerialisation) or backward."""
    if "rematted_computation" in path:
        return "recompute"
    return "backward" if "transpose(" in path else "forward"


def saved_bytes(module: Module) -> int:
    """Bytes that the forward pass leaves for the backward pass: results of forward instructions of the entry
    computation that backward ones read, the stacked buffers of scanned layers among them."""
    entry, saved = module.computations[module.entry], {}

    def source(name: str, index: int | None) -> tuple[str, int | None]:
        each = entry[name]
        if each.opcode == "get-tuple-element":
            return source(each.operands[0], int(each.called("index")))
        if each.opcode == "tuple" and index is not None:
            return source(each.operands[index], None)
        return (source(each.operands[0], index)) if each.opcode in ("bitcast", "copy") else (name, index)

    def forward(each) -> bool:
        return "jvp(" in each.op_name and phase(each.op_name) == "forward" and each.opcode != "parameter"

    for each in entry.values():
        if phase(each.op_name) != "forward" or "optimizer" in each.op_name:
            for name in each.operands:
                packed = entry[name].operands if entry[name].opcode == "tuple" else [name]
                for origin, index in (source(part, None) for part in packed):
                    if forward(entry[origin]):
                        arrays = entry[origin].arrays
                        saved[origin, index] = arrays[index].bytes if index is not None else entry[origin].bytes
    return sum(saved.values())
