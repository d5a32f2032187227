"""From a config to the loader of a training stage, and what must hold before anything compiles."""

from __future__ import annotations

import dataclasses
import functools
import math
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from jaxmllm import host_batches, mesh
from jaxmllm.config import Data, Run, Stage
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.loader import Loader
from jaxmllm.data.mixture import normalized
from jaxmllm.data.samples import SampleSpec
from jaxmllm.data.sizes import steps_of_epochs
from jaxmllm.data.sources.open import open_source
from jaxmllm.data.sources.record import RecordSource
from jaxmllm.data.tokenizer import load_tokenizer
from jaxmllm.documents import read_document, stages_of
from jaxmllm.errors import ConfigError
from jaxmllm.processes import say

MAX_SHARDS = 256  # virtual shards by default


def sample_spec(run: Run, stage: Stage | None = None) -> SampleSpec:
    """How records become samples, in a stage or in general.

    Raises ConfigError if the tokenizer has more tokens than the model, ValueError for an OwnTemplate that it cannot
    have.
    """
    data, model = run.data_of(stage) if stage else run.data, run.model
    tokenizer = load_tokenizer(data.tokenizer, data.added_tokens)
    if tokenizer.size > model.llm.vocab:
        raise ConfigError(
            f"{data.tokenizer} has {tokenizer.size} tokens, but model.llm.vocab is {model.llm.vocab}; "
            f"model.llm.vocab={tokenizer.size} makes the tables of its folder larger"
        )
    template, lengths = data.template.of(data.tokenizer), (data.seq_len, data.image_slots)
    return SampleSpec(tokenizer, template, model.layout, *lengths, data.targets, data.fast_jpeg, data.tiling)


@functools.cache
def opened(path: str, image_root: str | None, outside_root: bool) -> RecordSource:
    """A source, which a process opens once: large files are read whole for their index and fingerprint."""
    return open_source(path, image_root, outside_root)


def weighted_sources(stage: Stage) -> list[tuple[RecordSource, float]]:
    """The opened sources of a stage, with their weights."""
    return [(opened(s.path, s.image_root, s.outside_root), s.weight) for s in stage.sources]


def resolve_shards(data: Data, rows: int) -> int:
    """The number of virtual shards of batches of `rows` rows: data.shards, or else the largest power of two up to
    MAX_SHARDS that divides the rows."""
    return math.gcd(rows, MAX_SHARDS) if data.shards is None else data.shards


def check_division(
    stage: str, rows: int, shards: int, processes: int, data_shards: int = 1, accumulate: int = 1
) -> None:
    """Raises ConfigError, with the numbers and a mend, if the rows of a batch cannot be dealt out.

    The processes must divide the virtual shards, these the rows, and the mesh's data shards the rows of a micro-batch.

    Args:
      rows: B, of the global batch.
      processes: those that read different rows (host_batches.process_rows).
      data_shards: parts into which the mesh splits a batch.
      accumulate: micro-batches of a step.
    """
    parts = data_shards * accumulate
    if rows % parts:
        rule = f"{data_shards} data shards x accumulate={accumulate} must divide the rows"
    elif shards < 1 or rows % shards:
        rule = "the virtual shards must divide the rows"
    elif shards % processes:
        rule = f"the {processes} processes that read rows must divide the virtual shards"
    else:
        return
    fitting = [n for n in range(processes, max(MAX_SHARDS, processes) + 1, processes) if rows % n == 0]
    if rows % parts or not fitting:
        multiple = math.lcm(parts, processes)
        mend = f"stages.{stage}.rows={-(-rows // multiple) * multiple}"
    else:
        mend = f"stages.{stage}.data.shards={fitting[-1]}"
    raise ConfigError(f"stages.{stage}: {rows} rows in {shards} virtual shards: {rule}; set {mend}")


def check_rows(run: Run, stage: Stage, devices: jax.sharding.Mesh) -> None:
    """Raises ConfigError or ValueError if a stage's batch cannot be dealt to the processes and devices of a mesh."""
    _, processes = host_batches.process_rows(devices)
    shards = resolve_shards(run.data_of(stage), stage.rows)
    check_division(stage.name, stage.rows, shards, processes, mesh.data_shards(devices), stage.accumulate)


def check_data(run: Run) -> None:
    """Raises before the first stage what would otherwise stop a later one, or come only after compiling: a tokenizer or
    data file is missing, a source is empty, a weight is wrong, rows cannot be dealt out."""
    devices = run.mesh.build()
    for stage in run.stages:
        sample_spec(run, stage)
        normalized(weighted_sources(stage))
        check_rows(run, stage, devices)


def resolve(run: Run, workdir: str | None = None, accept_changed: bool = False) -> Run:
    """The run with the virtual shards and steps of all stages filled in as numbers, as config.json keeps them.

    The steps of a stage with epochs are measured, which gives the same number for the same data. accept_changed: the
    data may have changed, and stages keep the steps that WORKDIR/config.json has. Raises ValueError if the data cannot
    be read, ConfigError if the steps differ from those in the workdir.
    """
    stages, saved = [], saved_steps(workdir) if workdir else {}
    for stage in run.stages:
        data = run.data_of(stage)
        filled = {"shards": resolve_shards(data, stage.rows)} if data.shards is None else {}
        steps = stage.steps or resolve_steps(run, stage, saved.get(stage.name), accept_changed)
        stages.append(dataclasses.replace(stage, data={**stage.data, **filled}, steps=steps, epochs=None))
    return dataclasses.replace(run, stages=tuple(stages))


def resolve_steps(run: Run, stage: Stage, saved: int | None = None, keep: bool = False) -> int:
    """The steps of a stage that is given in epochs (sizes.steps_of_epochs says what an epoch is); prints them.

    saved: the steps in the run's workdir. They are taken if `keep`; otherwise ConfigError is raised if they differ.
    """
    if saved and keep:
        text, steps = f"stage {stage.name} keeps its {saved} steps", saved
    else:
        sources, spec = weighted_sources(stage), sample_spec(run, stage)
        steps = steps_of_epochs(stage.epochs, stage.rows, sources, spec, run.data_of(stage).packing)
        text = f"stage {stage.name}: epochs={stage.epochs:g} makes {steps} steps"
    if saved and steps != saved:
        mend = f"if the data has changed, --accept-changed-data keeps the {saved}; otherwise use another --workdir"
        raise ConfigError(f"{text}, but the workdir's config.json has {saved}: {mend}")
    if jax.process_index() == 0:
        say(text)
    return steps


def saved_steps(workdir: str) -> dict[str, int]:
    """Stage -> steps, as WORKDIR/config.json says; {} without such a file."""
    file = Path(workdir) / "config.json"
    document = read_document(file) if file.exists() else {"stages": []}
    return {stage["name"]: stage["steps"] for stage in stages_of(document, str(file))}


def make_loader(run: Run, stage: Stage, workdir: str, accept_changed: bool = False) -> Loader:
    """The loader of this process's share of a stage's batches; it notes bad samples in WORKDIR/bad_samples.jsonl.

    accept_changed: whether to go on if the data has changed since its position was saved. Raises ValueError if the
    processes do not read the same data.
    """
    index, count = host_batches.process_rows(run.mesh.build())
    data = run.data_of(stage)
    loader = Loader(
        weighted_sources(stage),
        sample_spec(run, stage),
        Ledger(f"{workdir}/bad_samples.jsonl", data.max_bad),
        rows=stage.rows,
        num_shards=resolve_shards(data, stage.rows),
        seed=run.seed,
        packing=data.packing,
        process_index=index,
        process_count=count,
        accept_changed=accept_changed,
    )
    check_same_everywhere(loader.sources)
    return loader


def check_same_everywhere(sources: list[dict]) -> None:
    """Raises ValueError, naming the source, if the processes hold different versions of one. All must call it."""
    if jax.process_count() == 1:
        return
    own = np.array([list(bytes.fromhex(source["fingerprint"])) for source in sources], np.uint8)
    for_each = multihost_utils.process_allgather(own)  # [processes, sources, bytes]
    for number, source in enumerate(sources):
        if (for_each[:, number] != for_each[0, number]).any():
            raise ValueError(f"the processes read different versions of {source['path']}; give all hosts the same data")
