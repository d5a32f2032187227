"""Weights from a workdir of ours: run:WORKDIR[/stage[/step]]."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmllm.config import part_of
from jaxmllm.documents import check_format, stages_of
from jaxmllm.errors import suggest, suggest_path
from jaxmllm.nn.lora import PARTS, is_adapter, kernel_of
from jaxmllm.nn.lora import merged as merge
from jaxmllm.train.checkpoint import StageCheckpoints, open_checkpoints
from jaxmllm.train.state import Params
from jaxmllm.weights.hf_config import read_json
from jaxmllm.weights.load import Abstract


@dataclasses.dataclass(frozen=True)
class WorkdirSource:
    """The parameters after a step of a stage."""

    workdir: Path
    stage: str
    step: int
    checkpoints: StageCheckpoints

    @property
    def name(self) -> str:
        """What a report calls it."""
        return f"run:{self.workdir}/{self.stage}/{self.step}"

    @functools.cached_property
    def stored(self) -> Mapping[str, Any]:
        """Path -> metadata of all parameters."""
        return self.checkpoints.stored_params(self.step)

    @property
    def fingerprint(self) -> str:
        """A hash of the workdir's config, of stage and step, and of the names, shapes and dtypes of all parameters."""
        facts = sorted((path, list(x.shape), str(x.dtype)) for path, x in self.stored.items())
        text = (self.workdir / "config.json").read_text() + json.dumps([self.stage, self.step, facts])
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def part(self, name: str, module: Any, abstract: Abstract, length: int | None) -> WorkdirPart:
        """A part in the workdir. Adapters that it does not have are left to start at random."""
        return WorkdirPart(self, name, {k: x for k, x in abstract.items() if k in self.stored or not is_adapter(k)})

    def merged(self, abstract: Abstract) -> Params:
        """Some parameters, with adapters merged into their kernels, and the moving average where the stage has one."""
        paths = [path for path in self.stored if is_adapter(path) and kernel_of(path) in abstract]
        own = {path: _like(self.stored[path], abstract[kernel_of(path)].sharding) for path in paths}
        found = self.checkpoints.restore_params({**abstract, **own}, self.step, average=True)
        for kernel in dict.fromkeys(map(kernel_of, paths)):
            a, b, alpha = (np.asarray(found[f"{kernel.removesuffix('kernel')}{x}"]) for x in PARTS[:3])
            x = abstract[kernel]
            found[kernel] = jax.device_put(merge(np.asarray(found[kernel]), a, b, alpha).astype(x.dtype), x.sharding)
        return {path: found[path] for path in abstract}


@dataclasses.dataclass(frozen=True)
class WorkdirPart:
    """A part that is to be loaded from a workdir. abstract: its parameters."""

    source: WorkdirSource
    name: str
    abstract: Abstract

    def problems(self) -> list[str]:
        """Parameters that are missing or have other shapes, in one line; adapters that would be lost."""
        there = {path: tuple(x.shape) for path, x in self.source.stored.items()}
        adapters = [path for path in there if is_adapter(path) and part_of(path) == self.name]
        if lost := [path for path in adapters if path not in self.abstract]:
            mend = "give this run the same `lora`, or start it from a folder of `jaxmllm export`, where they are merged"
            return [f"{self.source.name} has adapters that would be lost, such as {lost[0]}; {mend}"]
        missing = [path for path in self.abstract if path not in there]
        if len(missing) == len(self.abstract):
            return [f"{self.source.name} has no such part; parts: {', '.join(sorted({part_of(p) for p in there}))}"]
        others = {path: x.shape for path, x in self.abstract.items() if there.get(path, x.shape) != x.shape}
        lines = [f"{path} is not there" for path in missing]
        lines += [f"{path} {there[path]} there, {shape} here" for path, shape in others.items()]
        return [f"{'; '.join(lines)} ({self.source.name})"] if lines else []

    def different_numbers(self) -> list[str]:
        """Nothing: a workdir holds every table once."""
        return []

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype in which the checkpoint has a parameter."""
        return np.dtype(self.source.stored[path].dtype)

    def load(self) -> dict[str, jax.Array]:
        """The part's parameters."""
        return self.source.checkpoints.restore_params(dict(self.abstract), self.source.step)

    @property
    def tensors(self) -> int:
        """How many arrays are read."""
        return len(self.abstract)

    @property
    def left_out(self) -> str:
        """Nothing is left out."""
        return ""


def _like(stored: Any, sharding: jax.sharding.Sharding) -> jax.ShapeDtypeStruct:
    """The whole of a stored array in float32 on the devices of a sharding."""
    whole = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
    return jax.ShapeDtypeStruct(tuple(stored.shape), np.float32, sharding=whole)


def open_workdir(text: str) -> WorkdirSource:
    """run:WORKDIR[/stage[/step]]; by default the newest step of the newest stage. Raises ValueError, in one line."""
    path = Path(text.removeprefix("run:"))
    roots = [root for root in (path, path.parent, path.parent.parent) if (root / "config.json").is_file()]
    if not roots:
        raise ValueError(f"{text}: {path} is no workdir, for it has no config.json{suggest_path(path)}")
    workdir, given = roots[0], path.relative_to(roots[0]).parts
    document = read_json(workdir / "config.json")
    check_format(document, f"{workdir}/config.json")
    stages = [stage["name"] for stage in stages_of(document, f"{workdir}/config.json")]
    if given and given[0] not in stages:
        raise ValueError(f"{text}: there is no stage {given[0]!r}{suggest(given[0], stages)}")
    by_stage = dict(zip(stages, open_checkpoints(str(workdir), stages)))
    for stage in given[:1] or reversed(stages):
        checkpoints = by_stage[stage]
        steps = sorted(checkpoints.manager.all_steps())
        if given[1:] and given[1] not in map(str, steps):
            raise ValueError(f"{text}: stage {stage} has no step {given[1]}; steps: {', '.join(map(str, steps))}")
        if steps:
            return WorkdirSource(workdir, stage, int(given[1]) if given[1:] else steps[-1], checkpoints)
    raise ValueError(f"{text}: there is no checkpoint yet")
