"""Runs a scheduled program on paper: compute cycles in order, collectives beside them where they are asynchronous.

A `-start` hands its transfer to the network, which works on one at a time; the `-done` waits for what is left of it,
and that wait is exposed. A synchronous collective is exposed whole. Inside a fusion that holds a collective, only what
takes longer than the fusion's own cycles is exposed.
"""

from __future__ import annotations

import dataclasses
import re
from collections import defaultdict

from jaxmllm.plan.chips import Chip
from jaxmllm.plan.hlo import Instruction, Module
from jaxmllm.plan.price import price
from jaxmllm.plan.traffic import Network, Transfer, collective_of


@dataclasses.dataclass
class Charge:
    """What all runs of one instruction cost."""

    name: str
    opcode: str
    path: str  # scopes
    kind: str
    times: float
    cycles: float  # of all runs
    bytes: float  # of the results of all runs
    model: str | None
    transfer: Transfer | None
    exposed: float = 0.0  # seconds


class Timeline:
    """Charges of a program, in the order of the schedule."""

    def __init__(self, module: Module, chip: Chip, network: Network):
        self.module, self.chip, self.network = module, chip, network
        self.charges: list[Charge] = []
        self.seconds = self.walk(module.entry, 1, "")

    def walk(self, name: str, times: float, scope: str) -> float:
        """Adds the charges of a computation that runs `times` times; seconds of one run."""
        now, free, ends = 0.0, defaultdict(float), {}
        computation = self.module.computations[name]
        for each in computation.values():
            path = self.module.path(each, computation) or scope
            for body, runs in self.module.calls(each, computation):
                now += runs * self.walk(body, times * runs, path)
            if each.opcode in ("while", "call", "conditional"):
                continue
            cost = price(each, self.module, self.chip)
            busy, wait, transfer = cost.cycles / self.chip.clock, 0.0, None
            found = collective_of(each, self.module.inside(each))
            if found:
                transfer = self.network.transfer(*found)
                begin = max([now, *(free[net] for net in ("ici", "dcn") if getattr(transfer, net))])
                end = begin + transfer.ici + transfer.dcn
                free.update({net: end for net in ("ici", "dcn") if getattr(transfer, net)})
                if each.opcode.endswith("-start"):
                    ends[each.name] = end
                else:
                    wait = max(0.0, end - now - busy)
            elif each.opcode.endswith("-done") and each.operands[0] in ends:
                wait = max(0.0, ends[each.operands[0]] - now)
            now += busy + wait
            if cost.kind != "free":
                self.charges.append(
                    Charge(
                        each.name,
                        each.opcode,
                        path,
                        cost.kind,
                        times,
                        times * cost.cycles,
                        times * each.bytes,
                        cost.model,
                        transfer,
                        times * wait,
                    )  # fmt: skip
                )
        return now


# Parts of a path that transformations and loops add.
_WRAPPER = re.compile(
    r"jit\(|jvp\(|transpose\(|vmap\(|shard_map|MLLM|(while|body|cond|closed_call|checkpoint|rematted_computation)$"
)


def scopes(path: str) -> list[str]:
    """Named scopes of an op_name ("jit(step)/jvp(MLLM)/llm/while/body/attn/add" -> llm, attn), the primitive left out."""
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
