"""From a config to the loader of a training stage."""

from __future__ import annotations

from jaxmllm import host_batches
from jaxmllm.config import Data, Run, Stage
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.loader import Loader
from jaxmllm.data.samples import SampleSpec
from jaxmllm.data.sources.open import open_source
from jaxmllm.data.tokenizer import load_tokenizer
from jaxmllm.errors import ConfigError


def sample_spec(run: Run, stage: Stage | None = None) -> SampleSpec:
    """How records become samples, in a stage or in general.

    Raises ConfigError if the tokenizer has more tokens than the model.
    """
    data, model = run.data_of(stage) if stage else run.data, run.model
    tokenizer = load_tokenizer(data.tokenizer)
    if tokenizer.size > model.llm.vocab:
        raise ConfigError(f"{data.tokenizer} has {tokenizer.size} tokens, but model.llm.vocab is {model.llm.vocab}")
    lengths = data.seq_len, data.image_slots
    return SampleSpec(tokenizer, data.template, model.layout, *lengths, data.targets, data.fast_jpeg, data.tiling)


def check_data(run: Run) -> None:
    """Raises before the first stage what would otherwise stop a later one: a tokenizer or data file is missing."""
    for stage in run.stages:
        sample_spec(run, stage)
        for source in stage.sources:
            open_source(source.path, source.image_root)


def resolve_shards(data: Data, rows: int) -> int:
    """The number of virtual shards: by default the largest power of two up to 256 that divides the rows."""
    return data.shards or max(2**i for i in range(9) if rows % 2**i == 0)


def make_loader(run: Run, stage: Stage, workdir: str) -> Loader:
    """The loader of this process's share of a stage's batches; it notes bad samples in WORKDIR/bad_samples.jsonl."""
    data = run.data_of(stage)
    index, count = host_batches.process_rows(run.mesh.build())
    return Loader(
        [(open_source(source.path, source.image_root), source.weight) for source in stage.sources],
        sample_spec(run, stage),
        Ledger(f"{workdir}/bad_samples.jsonl", data.max_bad),
        rows=stage.rows,
        num_shards=resolve_shards(data, stage.rows),
        seed=run.seed,
        packing=data.packing,
        process_index=index,
        process_count=count,
    )
