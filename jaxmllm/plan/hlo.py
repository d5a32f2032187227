"""Optimised HLO text -> instructions with the number of times each runs.

XLA's cost analysis counts the body of a loop once; here a `while` body counts as often as its condition lets it run.
Grammar: what `Compiled.as_text()` prints in jaxlib 0.10 to 0.12 for TPU; lines it does not know raise ValueError.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

# Bytes of one element; types that are not here (tokens, opaque) hold nothing.
ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HOST = "S(5)"  # memory space of the host in a layout


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result: element type, dimensions, whether it lies in host memory."""

    dtype: str
    dims: tuple[int, ...]
    host: bool = False

    @property
    def bytes(self) -> int:
        return int(math.prod(self.dims) * ITEM_BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = arrays opcode(operands), attributes`; arguments is the raw text between the parentheses."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inputs: tuple[tuple[Array, ...], ...]  # arrays of the operands
    arguments: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Of all arrays of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """The path of named scopes it came from, "" if the compiler made it up."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @functools.cached_property
    def config(self) -> dict:
        """The backend's own notes."""
        at = self.attributes.find("backend_config={")
        return json.JSONDecoder().raw_decode(self.attributes, at + 15)[0] if at >= 0 else {}

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for one run, None if it made none."""
        found = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(found[1]) if found else None

    def called(self, key: str) -> str | None:
        """Name of the computation behind an attribute such as "body", "condition", "calls", "to_apply"."""
        found = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else None


Computation = dict[str, Instruction]  # in the order of the schedule


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name."""

    computations: dict[str, Computation]
    entry: str

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """What a fusion (or a wrapped asynchronous operation) consists of, nested ones included."""
        name = instruction.called("to_apply" if instruction.opcode == "call-start" else "calls")
        parts = list(self.computations[name].values()) if name else []
        return [inner for part in parts for inner in (part, *self.inside(part))]

    def calls(self, each: Instruction, computation: Computation) -> list[tuple[str, float]]:
        """(computation, how often) that a while, call or conditional runs. Of a conditional's branches the longest has
        the share of the runs that a scope like "10_of_32" around it says, else all."""
        if each.opcode == "while":
            return [(each.called("body"), self.trips(each, computation))]
        if each.opcode == "call":
            return [(each.called("to_apply"), 1)]
        if each.opcode == "conditional":
            names = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", each.attributes)
            braces = re.search(r"branch_computations=\{([^}]*)\}", each.attributes)
            names += re.findall(r"%?([\w.\-]+)", braces[1]) if braces else []
            longest, runs = max(names, key=lambda n: len(self.computations[n])), share(each.op_name)
            return [(longest, runs), *((n, 1 - runs) for n in names if n != longest and runs < 1)]
        return []

    def path(self, instruction: Instruction, computation: Computation, depth: int = 8) -> str:
        """Its op_name or that of the nearest operand that has one."""
        if instruction.op_name or not depth:
            return instruction.op_name
        for name in instruction.operands:
            if name in computation and (found := self.path(computation[name], computation, depth - 1)):
                return found
        return ""

    def trips(self, loop: Instruction, computation: Computation) -> int:
        """How often the body of a `while` runs: the backend's own count, else read from condition, start and step.

        Raises ValueError if the condition is not a comparison of a counter with a constant.
        """
        if known := self_count(loop):
            return known
        condition = self.computations[loop.called("condition")]
        root = next(i for i in condition.values() if i.root)
        limit = next((n for n in map(lambda o: constant(condition, o), root.operands) if n is not None), None)
        index = next((i for i in map(lambda o: element(condition, o), root.operands) if i is not None), None)
        direction = re.search(r"direction=(\w+)", root.attributes)
        if limit is None or index is None or not direction:
            raise ValueError(f"{loop.name}: cannot read how often the loop runs from {root.opcode}{root.operands}")
        start = constant(computation, operand_at(computation, loop.operands[0], index)) or 0
        body = self.computations[loop.called("body")]
        result = body[next(i for i in body.values() if i.root).operands[index]]
        step = next((n for n in map(lambda o: constant(body, o), result.operands) if n is not None), 1)
        span = limit - start + (step > 0) * (direction[1] == "LE") - (step < 0) * (direction[1] == "GE")
        return max(0, math.ceil(span / step))


def share(path: str) -> float:
    """10/32 for an op_name or name stack with a scope "10_of_32", else 1."""
    found = re.search(r"\b(\d+)_of_(\d+)\b", path)
    return int(found[1]) / int(found[2]) if found else 1.0


def self_count(loop: Instruction) -> int | None:
    """The trip count the backend wrote down."""
    found = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    return int(found[1]) if found else None


def constant(computation: Computation, name: str) -> int | None:
    """The value of a scalar integer constant, copies of it included."""
    each = computation.get(name)
    if each is not None and each.opcode in ("copy", "convert", "bitcast"):
        return constant(computation, each.operands[0])
    if each is None or each.opcode != "constant":
        return None
    return int(each.arguments) if re.fullmatch(r"-?\d+", each.arguments) else None


def element(computation: Computation, name: str) -> int | None:
    """Which element of the loop's state an instruction reads."""
    each = computation.get(name)
    if each is None or each.opcode != "get-tuple-element":
        return None
    return int(re.search(r"index=(\d+)", each.attributes)[1])


def operand_at(computation: Computation, name: str, index: int) -> str:
    """Name of the instruction that makes element `index` of a tuple."""
    each = computation[name]
    return each.operands[index] if each.opcode == "tuple" else ""


def parse(text: str) -> Module:
    """Text of a module -> Module. Raises ValueError for a line it cannot read."""
    computations, entry, current = {}, None, None
    for line in whole_lines(re.sub(r"/\*.*?\*/", "", text)):
        if _END.match(line):
            current = None
        elif current is not None:
            each = parse_line(line, current)
            current[each.name] = each
        elif header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
    if entry is None:
        raise ValueError("this is not the text of an optimised HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def whole_lines(text: str) -> Iterator[str]:
    """Lines of a module; an instruction whose attributes hold line breaks (kernel metadata) is one line."""
    held = ""
    for line in text.splitlines():
        if held and not _END.match(line) and not _LINE.match(line):
            held += line
            continue
        if held:
            yield held
        held = line if _LINE.match(line) else ""
        if not held:
            yield line
    if held:
        yield held


def parse_line(line: str, before: Computation) -> Instruction:
    """One line of a computation, given those before it."""
    match = _LINE.match(line)
    if not match:
        raise ValueError(f"cannot read this line of HLO: {line.strip()[:120]}")
    rest = match[3]
    end = closing(rest, 0) + 1 if rest.startswith("(") else len(re.match(r"\S+", rest)[0])
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"[\w\-]+", rest)[0]
    stop = closing(rest, len(opcode))
    arguments, attributes = rest[len(opcode) + 1 : stop], rest[stop + 1 :]
    operands = tuple(re.findall(r"%([\w.\-]+)", arguments))
    inputs = tuple(before[name].arrays if name in before else () for name in operands)
    return Instruction(match[2], opcode, parse_shape(shape), operands, inputs, arguments, attributes, bool(match[1]))


def parse_shape(text: str) -> tuple[Array, ...]:
    """ "(f32[4]{0}, bf16[])" -> arrays."""
    return tuple(
        Array(kind, tuple(int(d) for d in dims.split(",") if d), _HOST in (layout or ""))
        for kind, dims, layout in _ARRAY.findall(text)
    )


def closing(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]}")
