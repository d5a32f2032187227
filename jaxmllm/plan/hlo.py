"""Reads the text of optimised HLO into instructions, and how often each runs.

XLA's cost analysis counts the body of a loop once; here the body of a `while` counts as often as it runs.
Grammar: what `Compiled.as_text()` prints for TPUs in jaxlib 0.10 to 0.12; an unknown line raises ValueError.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import re
from collections.abc import Iterator

# Bytes of one element; other types (token, opaque) hold nothing.
ITEM_BYTES = {
    "pred": 1, "s8": 1, "u8": 1, "s4": 0.5, "u4": 0.5, "s16": 2, "u16": 2, "bf16": 2, "f16": 2, "s32": 4, "u32": 4,
    "f32": 4, "s64": 8, "u64": 8, "f64": 8, "c64": 8, "c128": 16, "f8e4m3fn": 1, "f8e5m2": 1,
}  # fmt: skip

_HEADER = re.compile(r"^(ENTRY )?%?([\w.\-]+) \(.*\{$")
_LINE = re.compile(r"^\s+(ROOT )?%?([\w.\-]+) = (.*)$")
_END = re.compile(r"^\}(, execution_thread=.*)?$")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](\{[^}]*\})?")
_HOST = "S(5)"  # the memory space of the host, in a layout


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a result: element type, dimensions, and whether it is in host memory."""

    dtype: str
    dims: tuple[int, ...]
    host: bool = False

    @property
    def bytes(self) -> int:
        return int(math.prod(self.dims) * ITEM_BYTES.get(self.dtype, 0))


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`name = arrays opcode(operands), attributes`; `arguments` is the raw text between the parentheses."""

    name: str
    opcode: str
    arrays: tuple[Array, ...]
    operands: tuple[str, ...]
    inputs: tuple[tuple[Array, ...], ...]  # arrays of each operand
    arguments: str
    attributes: str
    root: bool

    @property
    def bytes(self) -> int:
        """Bytes of all arrays of the result."""
        return sum(array.bytes for array in self.arrays)

    @property
    def op_name(self) -> str:
        """The path of named scopes that it comes from, "" if the compiler added it."""
        match = re.search(r'op_name="([^"]*)"', self.attributes)
        return match[1] if match else ""

    @functools.cached_property
    def config(self) -> dict:
        """The backend_config."""
        start = self.attributes.find("backend_config={")
        return json.JSONDecoder().raw_decode(self.attributes, start + 15)[0] if start >= 0 else {}

    @property
    def cycles(self) -> int | None:
        """The compiler's estimate for one run, None if it made none."""
        match = re.search(r'"estimated_cycles":"(\d+)"', self.attributes)
        return int(match[1]) if match else None

    def attribute(self, key: str) -> str | None:
        """The value of an attribute that is one word: "body", "calls", "to_apply", "index", "direction"."""
        match = re.search(rf"\b{key}=%?([\w.\-]+)", self.attributes)
        return match[1] if match else None


Computation = dict[str, Instruction]  # by name, in the order of the schedule


@dataclasses.dataclass(frozen=True)
class Module:
    """A program: computations by name."""

    computations: dict[str, Computation]
    entry: str

    def inside(self, instruction: Instruction) -> list[Instruction]:
        """All instructions of a fusion or of a wrapped asynchronous operation, nested ones included."""
        name = instruction.attribute("to_apply" if instruction.opcode == "call-start" else "calls")
        parts = list(self.computations[name].values()) if name else []
        return [inner for part in parts for inner in (part, *self.inside(part))]

    def calls(self, instruction: Instruction, computation: Computation) -> list[tuple[str, float]]:
        """(computation, how often it runs) for each computation that a while, call or conditional runs.

        The longest branch of a conditional gets the share of the runs that a scope like "10_of_32" around it states,
        and the other branches the rest; without such a scope the longest always runs. If only some branches hold
        attention with a window, these get the share that a scope like "windowed_25_of_30" states.
        """
        if instruction.opcode == "while":
            return [(instruction.attribute("body"), self.trips(instruction, computation))]
        if instruction.opcode == "call":
            return [(instruction.attribute("to_apply"), 1)]
        if instruction.opcode == "conditional":
            names = re.findall(r"(?:true_computation|false_computation)=%?([\w.\-]+)", instruction.attributes)
            braces = re.search(r"branch_computations=\{([^}]*)\}", instruction.attributes)
            names += re.findall(r"%?([\w.\-]+)", braces[1]) if braces else []
            near = [any("/window_" in i.op_name for i in self.computations[n].values()) for n in names]
            if shares := windowed_shares(instruction.op_name, near):
                return list(zip(names, shares))
            longest, share = max(names, key=lambda n: len(self.computations[n])), run_share(instruction.op_name)
            return [(longest, share), *((n, 1 - share) for n in names if n != longest and share < 1)]
        return []

    def path(self, instruction: Instruction, computation: Computation, depth: int = 8) -> str:
        """The op_name of an instruction, or of the nearest operand that has one."""
        if instruction.op_name or not depth:
            return instruction.op_name
        for name in instruction.operands:
            if name in computation and (path := self.path(computation[name], computation, depth - 1)):
                return path
        return ""

    def trips(self, loop: Instruction, computation: Computation) -> int:
        """How often the body of a `while` runs: the backend's count, or else computed from condition, start and step.

        Raises ValueError if the condition is not a comparison of a counter with a constant.
        """
        if known := known_trip_count(loop):
            return known
        condition = self.computations[loop.attribute("condition")]
        root = next(i for i in condition.values() if i.root)
        limit = next((n for n in map(lambda o: constant(condition, o), root.operands) if n is not None), None)
        index = next((i for i in map(lambda o: tuple_index(condition, o), root.operands) if i is not None), None)
        direction = root.attribute("direction")
        if limit is None or index is None or not direction:
            raise ValueError(f"{loop.name}: cannot read how often the loop runs from {root.opcode}{root.operands}")
        start = constant(computation, tuple_element(computation, loop.operands[0], index)) or 0
        body = self.computations[loop.attribute("body")]
        result = body[next(i for i in body.values() if i.root).operands[index]]
        step = next((n for n in map(lambda o: constant(body, o), result.operands) if n is not None), 1)
        span = limit - start + (step > 0) * (direction == "LE") - (step < 0) * (direction == "GE")
        return max(0, math.ceil(span / step))


def run_share(path: str) -> float:
    """10/32 for an op_name or name stack with a scope "10_of_32", else 1."""
    match = re.search(r"\b(\d+)_of_(\d+)\b", path)
    return int(match[1]) / int(match[2]) if match else 1.0


def windowed_shares(path: str, windowed: list[bool]) -> list[float]:
    """The shares of the runs that the branches of a conditional get, if only some of them have a window: in a scope
    "windowed_25_of_30" these get 25/30 and the others 5/30. Otherwise none."""
    match = re.search(r"\bwindowed_(\d+)_of_(\d+)\b", path)
    if not match or len(set(windowed)) < 2:
        return []
    share = int(match[1]) / int(match[2])
    return [share if has_window else 1 - share for has_window in windowed]


def known_trip_count(loop: Instruction) -> int | None:
    """The trip count that the backend states, if it does."""
    match = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    return int(match[1]) if match else None


def constant(computation: Computation, name: str) -> int | None:
    """The value of a scalar integer constant, or of a copy of one; None for anything else."""
    instruction = computation.get(name)
    if instruction is not None and instruction.opcode in ("copy", "convert", "bitcast"):
        return constant(computation, instruction.operands[0])
    if instruction is None or instruction.opcode != "constant":
        return None
    return int(instruction.arguments) if re.fullmatch(r"-?\d+", instruction.arguments) else None


def tuple_index(computation: Computation, name: str) -> int | None:
    """The index of the tuple element that an instruction reads; None if it reads none."""
    instruction = computation.get(name)
    if instruction is None or instruction.opcode != "get-tuple-element":
        return None
    return int(instruction.attribute("index"))


def tuple_element(computation: Computation, name: str, index: int) -> str:
    """Name of the instruction that makes element `index` of a tuple."""
    instruction = computation[name]
    return instruction.operands[index] if instruction.opcode == "tuple" else ""


def parse(text: str) -> Module:
    """Reads the text of a module. Raises ValueError for a line that it cannot read."""
    computations, entry, current = {}, None, None
    for line in whole_lines(re.sub(r"/\*.*?\*/", "", text)):
        if _END.match(line):
            current = None
        elif current is not None:
            instruction = parse_line(line, current)
            current[instruction.name] = instruction
        elif header := _HEADER.match(line):
            current = computations.setdefault(header[2], {})
            entry = header[2] if header[1] else entry
    if entry is None:
        raise ValueError("this is not the text of an optimised HLO module: it has no ENTRY computation")
    return Module(computations, entry)


def whole_lines(text: str) -> Iterator[str]:
    """Lines of a module. An instruction whose attributes contain line breaks (kernel metadata) becomes one line."""
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
    """Reads one line of a computation, given the instructions before it."""
    match = _LINE.match(line)
    if not match:
        raise ValueError(f"cannot read this line of HLO: {line.strip()[:120]}")
    rest = match[3]
    end = closing_parenthesis(rest, 0) + 1 if rest.startswith("(") else len(re.match(r"\S+", rest)[0])
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode = re.match(r"[\w\-]+", rest)[0]
    stop = closing_parenthesis(rest, len(opcode))
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


def closing_parenthesis(text: str, start: int) -> int:
    """Index of the parenthesis that closes the one at `start`."""
    depth = 0
    for i in range(start, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if not depth:
            return i
    raise ValueError(f"unbalanced parentheses in HLO: {text[:120]}")
