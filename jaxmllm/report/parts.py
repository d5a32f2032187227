"""The parts of the model: their classes, their parameters, where they come from, what is trained."""

from __future__ import annotations

import dataclasses
from collections import Counter, defaultdict
from typing import Any

import jax

from jaxmllm.config import Run, part_of
from jaxmllm.mesh import Mesh
from jaxmllm.report.page import Section, Share, Table, Text
from jaxmllm.train.setup import abstract_params, trained_paths


def section(config: Run) -> Section:
    """The section: a row for each part, and one for all. Nothing is allocated: parameters are counted by shape."""
    alone = dataclasses.replace(config, mesh=Mesh())  # shapes are the same on every mesh
    mesh = alone.mesh.build()
    with jax.set_mesh(mesh):
        shapes, infos = abstract_params(alone, mesh)
        trained = {stage.name: trained_paths(stage, infos) for stage in config.stages}
    by_part = defaultdict(list)
    for path in shapes:
        by_part[part_of(path)].append(path)
    total, sources = sum(x.size for x in shapes.values()), config.init.sources()
    rows = []
    for part in [*[p for p in config.parts() if p in by_part], *[p for p in by_part if p not in config.parts()]]:
        count = sum(shapes[path].size for path in by_part[part])
        states = [fate(by_part[part], paths) for paths in trained.values()]
        start = sources.get(part, sources.get("rest", "random"))
        rows.append([part, class_of(config, part), count, Share(count / total), start, *states])
    counts = [sum(shapes[path].size for path in paths) for paths in trained.values()]
    rows.append(["all", "", total, Share(1), "", *(f"{count:,} trained" for count in counts)])
    head = ["part", "kind", "parameters", "share", "starts from", *(f"in {name}" for name in trained)]
    return Section("Parts", [Text(sentence(config)), Table(head, rows)])


def fate(paths: list[str], trained: set[str]) -> str:
    """Whether a stage trains all, some or none of the parameters of a part."""
    count = Counter(path in trained for path in paths)[True]
    return "trained" if count == len(paths) else f"{count} of {len(paths)} arrays trained" if count else "frozen"


def class_of(config: Run, part: str) -> str:
    """The name of the class of a part."""
    kind, _, name = part.partition(".")
    if part == "inserts":
        return type(config.model.llm.inserts.layer).__name__
    found: Any = getattr(config.model, kind, None)
    found = found[name] if name else found
    return type(found).__name__ if found is not None else ""


def sentence(config: Run) -> str:
    """The visual path in words, from picture to token."""
    model, layout = config.model, config.model.layout
    if not model.encoders:
        return "A language model without pictures."
    seen = ", ".join(
        f"{name} ({each.size} px, {each.grid} x {each.grid} cells)" for name, each in layout.encoders.items()
    )
    return f"A picture is seen by {seen} and becomes {layout.block} tokens of the language model."
