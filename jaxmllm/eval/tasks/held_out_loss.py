"""The mean of each training loss over all samples of a data source."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxmllm import host_batches
from jaxmllm import mesh as meshes
from jaxmllm.batch import Batch, empty_batch
from jaxmllm.config import Run, Source, Stage
from jaxmllm.data.build import sample_spec
from jaxmllm.data.one_pass import one_pass
from jaxmllm.data.sources.open import open_source
from jaxmllm.data.sources.record import BadSample
from jaxmllm.errors import ConfigError, suggest
from jaxmllm.eval.tasks.base import Measure, Note, Result, number
from jaxmllm.json_lines import append_line
from jaxmllm.train.compiler import options
from jaxmllm.train.state import Params, unflatten

MAX_SHARDS = 256  # virtual shards; a batch does not depend on how many processes read it, if they divide the shards


@dataclasses.dataclass(frozen=True)
class HeldOutLoss:
    """The model's own losses and metrics on a source, each a mean over all values of all samples (for next_token: over
    all trained tokens), as the training step would see them, in rows packed in the order of the source.

    losses: names as in Stage.losses, by default the stage's. rows: of a batch, by default those of a micro-batch of the
    stage. The contrastive part of EmbedDistill depends on the rows, since its negatives are the images of a batch. How
    records become rows is what the stage says. Samples that cannot be used are counted ("bad") and noted in
    WORKDIR/bad_eval_samples.jsonl. A mean is None if no sample has a value for it.
    """

    source: Source
    _: dataclasses.KW_ONLY
    name: str = "held_out_loss"
    losses: tuple[str, ...] | None = None
    rows: int | None = None

    def prepare(self, run: Run, stage: Stage, workdir: str) -> Measure:
        """As Task.prepare. Raises ConfigError for a loss that the model lacks, and if the rows do not divide over
        processes."""
        names, rows = self.losses or tuple(stage.losses), self.rows or stage.rows // stage.accumulate
        for name in names:
            if name not in run.model.loss_names:
                known = suggest(name, run.model.loss_names)
                raise ConfigError(f"task {self.name}: the model has no objective {name!r}{known}")
        mesh, data, spec = run.mesh.build(), run.data_of(stage), sample_spec(run, stage)
        source = open_source(self.source.path, self.source.image_root, self.source.outside_root)
        if not len(source):
            raise ConfigError(f"task {self.name}: {self.source.path} has no records")
        index, parts = host_batches.process_rows(mesh)
        shards = math.gcd(rows, MAX_SHARDS)
        if rows % meshes.data_shards(mesh) or shards % parts:
            need = f"the {meshes.data_shards(mesh)} data shards and {parts} processes"
            raise ConfigError(f"task {self.name}: {rows} rows do not divide over {need}; set rows={stage.rows}")
        divided = {"rows": rows, "num_shards": shards, "process_index": index, "process_count": parts}
        empty = empty_batch(spec.layout, rows // parts, spec.seq_len, spec.image_slots, spec.target_shapes)
        sums, named = jax.jit(make_sums(run.model, names), compiler_options=options(mesh)), set()

        def measure(params: Params, note: Note) -> Result:
            bad: dict[int, BadSample] = {}
            batches = one_pass(source, spec, bad.__setitem__, packing=data.packing, **divided)
            totals: dict[str, np.ndarray] = {}
            for batch in in_step(batches, empty):
                totals = add(totals, jax.device_get(sums(params, host_batches.global_from_rows(batch, mesh))))
            for index in sorted(bad.keys() - named):
                each = bad[index]
                place = {"eval": self.name, "source": source.path, "index": index}
                entry = {**place, "id": each.id, "path": each.path, "reason": each.reason}
                append_line(f"{workdir}/bad_eval_samples.jsonl", entry)
                named.add(index)
            return result(totals, names, len(source))

        return measure


def make_sums(model, names: tuple[str, ...]) -> Callable[[Params, Batch], dict[str, jax.Array]]:
    """-> sums(params, batch) -> {loss or metric: float32[sum, count]}, and "samples": float32[samples, 1]."""

    def pair(term, count) -> jax.Array:
        total = jnp.where(term.mask, term.values, 0).sum()
        return jnp.stack([total.astype(jnp.float32), jnp.asarray(count, jnp.float32)])

    def sums(params: Params, batch: Batch) -> dict[str, jax.Array]:
        counts = model.counts(batch, names)
        terms, metrics = model.apply({"params": unflatten(params)}, batch, names)
        found = {name: pair(term, counts.get(name, term.values.size)) for name, term in terms.items()}
        for name, own in metrics.items():
            found |= {metric: pair(term, counts[name]) for metric, term in own.items()}
        samples = ((batch.segment_ids > 0) & (batch.positions == 0)).sum()
        return found | {"samples": jnp.stack([samples.astype(jnp.float32), jnp.ones(())])}

    return sums


def add(totals: dict[str, np.ndarray], more: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Sums in float64, so that they do not depend on the number of batches."""
    return {name: totals.get(name, 0.0) + np.asarray(value, np.float64) for name, value in more.items()}


def result(totals: dict[str, np.ndarray], losses: tuple[str, ...], records: int) -> Result:
    """Means of the sums, those of the losses first, and the number of samples. Raises ValueError if none could be
    used."""
    samples = round(totals["samples"][0]) if totals else 0
    if not samples:
        raise ValueError(f"none of {records} held-out samples can be used; see bad_eval_samples.jsonl")
    names = [*losses, *sorted(totals.keys() - {*losses, "samples"})]
    means = {name: float(totals[name][0] / totals[name][1]) if totals[name][1] else None for name in names}
    lines = [f"{name:<24} {number(mean):>10}" for name, mean in means.items()]
    counts = {"samples": samples, "bad": records - samples}
    return Result({**means, **counts}, "\n".join([*lines, *[f"{k:<24} {n:>10}" for k, n in counts.items()]]))


def in_step(batches: Iterator[Batch], empty: Batch) -> Iterator[Batch]:
    """Yields the batches of this process, then empty ones until every process has handed out its own."""
    while True:
        batch = next(batches, None)
        if jax.process_count() == 1:
            left = batch is not None
        else:
            with jax.transfer_guard("allow"):
                left = multihost_utils.process_allgather(np.array(batch is not None)).any()
        if not left:
            return
        yield empty if batch is None else batch
