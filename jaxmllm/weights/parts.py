"""Starts the parts of a model from real weights: checks all sources, then loads them into their shards."""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmllm.config import part_of
from jaxmllm.errors import suggest
from jaxmllm.weights.load import Abstract
from jaxmllm.weights.sources import Part, open_source
from jaxmllm.weights.tables import TABLES, grows
from jaxmllm.weights.workdir import WorkdirPart

RANDOM, REST = "random", "rest"
Rates = Mapping[str, float | None]  # path -> factor of the learning rate, None: frozen


@dataclasses.dataclass(frozen=True)
class PartReport:
    """What a part starts from. All fields are plain JSON data (dataclasses.asdict).

    tensors: tensors that were read, or for "random" arrays of ours. trainable: how many of the parameters are trained,
    None if unknown. rates: the factors of their learning rates. fingerprint: of the source, "" for "random". grown: how
    many rows were added to tables of tokens, "" for none.
    """

    part: str
    source: str
    tensors: int
    parameters: int
    trainable: int | None
    rates: tuple[float, ...]
    dtypes: tuple[str, ...]
    fingerprint: str
    left_out: str
    grown: str = ""

    def __str__(self) -> str:
        """One line."""
        facts = [f"{self.tensors:,} tensors", f"{self.parameters:,} parameters"]
        if self.trainable:
            whole = self.trainable == self.parameters
            facts.append("trainable" if whole else f"{self.trainable:,} of them trainable")
            facts.append(f"rate x {', '.join(f'{rate:g}' for rate in self.rates)}")
        elif self.trainable == 0:
            facts.append("frozen")
        facts.append("/".join(self.dtypes))
        facts += [f"fingerprint {self.fingerprint}"] if self.fingerprint else []
        facts += [f"left out: {self.left_out}"] if self.left_out else []
        facts += [self.grown] if self.grown else []
        return f"{self.part}: {self.source}, {', '.join(facts)}"


def load_parts(
    model: Any,
    sources: Mapping[str, str],
    abstract: Abstract,
    *,
    rates: Rates | None = None,
    length: int | None = None,
) -> tuple[dict[str, jax.Array], list[PartReport]]:
    """-> (path -> array, for all parameters that do not start at random; a report for each part of the model).

    Adapters (nn/lora.py) start at random, unless the source is a run that has them too.

    model: an MLLM. sources: part -> FOLDER, hf:org/name@revision, run:WORKDIR[/stage[/step]] or "random". Parts are
    "llm", "encoders.NAME", "fusers.NAME", "aggregator", "objectives.NAME"; "rest" stands for all that are not named
    (default: random). abstract: path -> shape, dtype and sharding of every parameter of the model; the arrays get
    these. rates: path -> factor of the learning rate, None if frozen; a frozen parameter keeps the dtype of its file.
    length: tokens of the longest sequence; a language model with a shorter sliding window is refused.

    All processes must call this together. Raises one ValueError that lists everything that is wrong with any source,
    before the first tensor is loaded.
    """
    problems: list[str] = []
    own = by_part(abstract)
    parts = open_parts(model, sources, own, length, problems)
    for name, part in parts.items():
        problems += _about(name, part.problems)
    for name, part in parts.items() if not problems else ():
        problems += _about(name, part.different_numbers)
    agree([f"{name} {part.source.fingerprint}" for name, part in parts.items()] if not problems else [], problems)
    arrays: dict[str, jax.Array] = {}
    for name, part in parts.items():
        dtypes = {path: part.stored_dtype(path) for path in part.abstract if rates is not None and rates[path] is None}
        typed = {path: x.update(dtype=dtypes.get(path, x.dtype)) for path, x in part.abstract.items()}
        own[name] |= typed
        arrays |= dataclasses.replace(part, abstract=typed).load()
    return arrays, [report(name, parts.get(name), params, rates) for name, params in own.items()]


def by_part(abstract: Abstract) -> dict[str, dict[str, jax.ShapeDtypeStruct]]:
    """Part -> its parameters."""
    parts: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, x in abstract.items():
        parts.setdefault(part_of(path), {})[path] = x
    return parts


def open_parts(
    model: Any, sources: Mapping[str, str], own: Mapping[str, Abstract], length: int | None, problems: list[str]
) -> dict[str, Part]:
    """Opens each source once -> the parts that have one. Appends what is wrong to `problems`."""
    for name in sources:
        if name not in own and name != REST:
            problems.append(f"{name}: the model has no such part with parameters{suggest(name, own)}")
    opened = {}
    for text in dict.fromkeys(sources.values()):
        if text != RANDOM:
            try:
                opened[text] = open_source(text, model)
            except ValueError as error:
                problems.append(str(error))
    texts = {name: sources.get(name, sources.get(REST, RANDOM)) for name in own}
    return {
        name: opened[text].part(name, module_of(model, name), own[name], length)
        for name, text in texts.items()
        if text in opened
    }


def module_of(model: Any, part: str) -> Any:
    """The module of a part that a Hugging Face folder may hold, None for others."""
    kind, _, name = part.partition(".")
    return model.encoders[name] if kind == "encoders" else {"llm": model.llm, "aggregator": model.aggregator}.get(part)


def report(name: str, part: Part | None, params: Abstract, rates: Rates | None) -> PartReport:
    """The report of a part; `part` is None if it starts at random."""
    sizes = {path: math.prod(x.shape) for path, x in params.items()}
    trained = {path: rates[path] for path in sizes if rates[path] is not None} if rates is not None else {}
    return PartReport(
        part=name,
        source=part.source.name if part else RANDOM,
        tensors=part.tensors if part else len(sizes),
        parameters=sum(sizes.values()),
        trainable=None if rates is None else sum(sizes[path] for path in trained),
        rates=tuple(sorted(set(trained.values()), reverse=True)),
        dtypes=tuple(sorted({str(x.dtype) for x in params.values()})),
        fingerprint=part.source.fingerprint if part else "",
        left_out=part.left_out if part else "",
        grown=grown(part) if part else "",
    )


def grown(part: Part) -> str:
    """How many rows the tables of tokens have in the folder and here, if these are more (tables.Grown)."""
    if isinstance(part, WorkdirPart):
        return ""
    folder, here = part.source.folder, {path: x.shape for path, x in part.abstract.items() if path in TABLES}
    there = {e.path: folder[e.key].shape for e in part.key_map.entries if e.path in here}
    rows = {(there[path][0], here[path][0]) for path in there if grows(path, there[path], here[path])}
    return "; ".join(f"tables of {a:,} tokens grown to {b:,} rows, the new ones their mean" for a, b in sorted(rows))


def agree(facts: list[str], problems: list[str]) -> None:
    """Raises ValueError if there are problems, in this process or in another, or if processes see other weights."""
    differ = False
    if jax.process_count() > 1:
        digest = hashlib.sha256("\n".join(facts or problems).encode()).digest()
        found = multihost_utils.process_allgather(np.frombuffer(digest[:8], np.uint32))
        differ = bool((found != found[0]).any())
    if problems:
        raise ValueError("\n".join(problems))
    if differ:
        raise ValueError("other processes cannot read these weights or find others; every host needs the same files")


def _about(name: str, find: Callable[[], list[str]]) -> list[str]:
    """What `find` finds wrong with a part, as one text that starts with the part's name."""
    try:
        found = find()
    except ValueError as error:
        found = [str(error)]
    if len(found) > 1:
        return [f"{name}: {len(found)} weights do not fit:\n  " + "\n  ".join(found)]
    return [f"{name}: {found[0]}"] if found else []
