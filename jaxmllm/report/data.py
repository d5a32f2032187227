"""What the data of a run is like: lengths of samples, how full rows are, what could not be used."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from jaxmllm.config import Run, Source, Stage
from jaxmllm.data.build import sample_spec, weighted_sources
from jaxmllm.data.check import Stats, summarize
from jaxmllm.data.sizes import MeasuredSource, Progress, sample_sizes
from jaxmllm.report import plots
from jaxmllm.report.page import Block, Figure, Grid, Missing, Section, Share, Table
from jaxmllm.report.workdir import RunFiles

LIMIT = 500  # records of a source that a report measures
HEAD = [
    "stage",
    "source",
    "share",
    "records",
    "examined",
    "unusable",
    "tokens: median",
    "longest",
    "row",
    "rows filled",
]


@dataclasses.dataclass(frozen=True)
class StageSource:
    """A source of a stage, measured."""

    stage: Stage
    source: Source
    records: int
    sizes: MeasuredSource
    stats: Stats
    row: int  # tokens of a row


def measured(
    config: Run, stages: Sequence[Stage], limit: int, progress: Progress | None = None
) -> Iterator[StageSource]:
    """Measures the sources of some stages, at most `limit` records of each. Raises ValueError for data that cannot be
    used."""
    for stage in stages:
        data, spec = config.data_of(stage), sample_spec(config, stage)
        for source, (records, _) in zip(stage.sources, weighted_sources(stage)):
            sizes = sample_sizes(records, spec, limit, progress)
            found = summarize(sizes, spec, data.packing)
            yield StageSource(stage, source, len(records), sizes, found, data.seq_len)


def section(run: RunFiles) -> Section:
    """The section of a run: every stage's sources, and the samples that training could not use."""
    try:
        blocks = source_blocks(list(measured(run.config, run.config.stages, LIMIT)))
    except (ValueError, OSError) as error:
        blocks = [Missing(f"The data cannot be read here: {error}")]
    return Section("Data", [*blocks, *bad_blocks(run.bad)])


def source_blocks(sources: Sequence[StageSource]) -> list[Block]:
    """A table of all sources, and how long their samples are."""
    rows = [cells(each) for each in sources]
    caption = "Tokens of a sample include those of its pictures. The dashed line in the plots is the length of a row."
    return [Table(HEAD, rows, caption), Grid([lengths(each) for each in sources])]


def cells(found: StageSource) -> list[Any]:
    """The row of a source in the table."""
    share = found.source.weight / sum(source.weight for source in found.stage.sources)
    stats, tokens = found.stats, found.stats.tokens
    row = [found.stage.name, found.source.path, Share(share), found.records, stats.used + stats.bad, stats.bad]
    return [*row, tokens["p50"], tokens["max"], found.row, Share(stats.packing)]


def lengths(found: StageSource) -> Figure:
    """How long the usable samples of a source are."""
    title, tokens = f"{found.stage.name}: {Path(found.source.path).name}", [size.tokens for size in found.sizes.usable]
    return Figure(plots.histogram(title, tokens, "tokens per sample", found.row))


def bad_blocks(bad: list[dict[str, Any]]) -> list[Block]:
    """The samples that training dropped, by kind, with the first of each."""
    kinds: dict[str, list[dict[str, Any]]] = {}
    for entry in bad:
        kinds.setdefault(entry["reason"].partition(":")[0], []).append(entry)
    rows = [[kind, len(entries), entries[0]["id"], entries[0]["path"]] for kind, entries in kinds.items()]
    caption = "Samples that training could not use and dropped: bad_samples.jsonl names them all."
    return [Table(["problem", "samples", "the first", "its file"], rows, caption)] if rows else []
