"""What is wrong with a data set, and how full its rows will be, found before a run rather than during it."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxmllm.batch import EncoderInput
from jaxmllm.config import Data, Run, Source, Stage
from jaxmllm.data.ahead import map_ahead
from jaxmllm.data.build import sample_spec, weighted_sources
from jaxmllm.data.conversation import exchanges, opens_with_answer, system_text
from jaxmllm.data.images import View
from jaxmllm.data.mixture import normalized
from jaxmllm.data.picture import decode, open_image
from jaxmllm.data.samples import SampleSpec, make_sample
from jaxmllm.data.sizes import MEASURED, MeasuredSource, Progress, packed_rows, sample_sizes
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.record import BadSample, Record, RecordSource
from jaxmllm.data.targets import MapTargets
from jaxmllm.errors import shown

ANY_MAPS, ANY_ENCODER = MapTargets(grid=1), EncoderInput(1, 1, (0, 0, 0), "squash")  # to read maps without a config
PERCENTILES = (0, 50, 90, 99, 100)


@dataclasses.dataclass(frozen=True)
class Problem:
    """A record that training would drop."""

    index: int
    source: str  # value of its field `source`, "" if it has none or cannot be read
    bad: BadSample


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found in a source."""

    path: str
    records: int
    images: int  # pictures that could be decoded
    sources: dict[str, int]  # value of the field `source` ("" if absent) -> records
    problems: list[Problem]  # in the order of the records; the first thing that is wrong with each
    duplicates: dict[str, int]  # id that occurs more than once -> how often
    opening_answers: int  # usable records with an answer before the first question, which training leaves out

    @property
    def bad(self) -> int:
        """Records that training would drop."""
        return len(self.problems)

    @property
    def kinds(self) -> dict[str, int]:
        """Kind of problem -> records."""
        return dict(collections.Counter(problem.bad.kind for problem in self.problems))

    def usable(self) -> list[int]:
        """The indices of the other records."""
        bad = {problem.index for problem in self.problems}
        return [index for index in range(self.records) if index not in bad]

    def document(self) -> dict[str, Any]:
        """The report as JSON data; `problems` are as in the ledger of a run, with the kind."""
        by_source = {}
        for name, count in self.sources.items():
            kinds = collections.Counter(problem.bad.kind for problem in self.problems if problem.source == name)
            by_source[name] = {"records": count, "kinds": dict(kinds)}
        problems = [
            {"source": self.path, "index": p.index, "id": p.bad.id, "path": p.bad.path, "kind": p.bad.kind,
             "reason": p.bad.reason}
            for p in self.problems
        ]  # fmt: skip
        found = {"path": self.path, "records": self.records, "pictures": self.images, "bad": self.bad}
        return {
            **found,
            "kinds": self.kinds,
            "by_source": by_source,
            "problems": problems,
            "duplicates": self.duplicates,
            "opening_answers": self.opening_answers,
        }


@dataclasses.dataclass(frozen=True)
class Stats:
    """How well the usable records of a source fill rows."""

    used: int  # usable records among those examined
    bad: int  # unusable ones
    tokens: dict[str, int]  # "min", "p50", "p90", "p99", "max", and "mean": tokens per sample, pictures included
    trained: int  # tokens with a label, in all samples
    images: dict[int, int]  # image slots of a record -> records with that many
    packing: float  # share of a row's places that are not padding


def examine(record: Record, index: int, spec: SampleSpec | None = None) -> int:
    """Raises BadSample if training would refuse a record, with the same words; returns the number of its pictures.

    Without a spec it is what any config may refuse: its lengths do not count, and target maps must fit their picture.
    """
    if spec:
        make_sample(record, index, spec)
        return len(record.images)
    pictures = [open_image(record, blob) for blob in record.images]
    exchanges(record, len(pictures))
    system_text(record)
    for number, (blob, picture) in enumerate(zip(record.images, pictures)):
        decode(record, blob, picture)
        ANY_MAPS(record, number, View(picture.size, ANY_ENCODER))
    return len(pictures)


def check(source: RecordSource, spec: SampleSpec | None = None, progress: Progress | None = None) -> Report:
    """Examines every record of a source. Raises RuntimeError, naming the record, if that fails."""

    def look(index: int) -> tuple[str, str, int, bool, BadSample | None]:
        id = name = ""
        try:
            record = source[index]
            id, name = record.id, str(record.data.get("source", ""))
            return id, name, examine(record, index, spec), opens_with_answer(record), None
        except BadSample as bad:
            return id, name, 0, False, bad
        except Exception as error:
            what = f"examining record {index} of {source.path} failed"
            raise RuntimeError(f"{what}: {type(error).__name__}: {error}") from error

    sources, ids, problems, images, opening = collections.Counter(), collections.Counter(), [], 0, 0
    for index, (id, name, count, opens, bad) in enumerate(map_ahead(look, range(len(source)))):
        sources[name] += 1
        ids[id] += bool(id)
        images += count
        opening += opens
        if bad:
            problems.append(Problem(index, name, bad))
        if progress:
            progress(index + 1, len(source))
    duplicates = {id: count for id, count in ids.items() if count > 1}
    return Report(source.path, len(source), images, dict(sources), problems, duplicates, opening)


def check_run(run: Run, stages: Sequence[Stage], progress: Progress | None = None) -> list[tuple[str, Report]]:
    """(name of the stage, report) of every source of some stages, as they are trained.

    A source that two stages read alike is examined once. Raises ValueError as training does before its first step.
    """
    known: list[tuple[tuple[Source, Data], Report]] = []
    found = []
    for stage in stages:
        spec, sources = sample_spec(run, stage), weighted_sources(stage)
        normalized(sources)
        for config, (source, _) in zip(stage.sources, sources):
            key = dataclasses.replace(config, weight=1.0), run.data_of(stage)
            report = next((report for other, report in known if other == key), None) or check(source, spec, progress)
            known.append((key, report))
            found.append((stage.name, report))
    return found


def write_usable(source: LlavaSource, report: Report, path: str | Path) -> None:
    """Writes the usable records of a JSON or JSONL source as JSONL. Raises FileExistsError."""
    partial = Path(f"{path}.partial")
    if Path(path).exists():
        raise FileExistsError(f"{path} exists; remove it or choose another name")
    partial.parent.mkdir(parents=True, exist_ok=True)
    with open(partial, "w", encoding="utf-8") as file:
        for index in report.usable():
            file.write(json.dumps(source[index].data, ensure_ascii=False) + "\n")
    partial.replace(path)


def stats(source: RecordSource, spec: SampleSpec, limit: int = MEASURED, progress: Progress | None = None) -> Stats:
    """Lengths of at most `limit` records, spread over the source, and how well they pack.

    Only the sizes of pictures are read. Raises ValueError if no record is usable.
    """
    return summarize(sample_sizes(source, spec, limit, progress), spec)


def summarize(found: MeasuredSource, spec: SampleSpec, packing: bool = True) -> Stats:
    """The figures of a source that has been measured; without packing each sample has a row of its own."""
    lengths = [size.tokens for size in found.usable]
    rows = packed_rows(found.usable, spec) if packing else [[size] for size in found.usable]
    names = ("min", *(f"p{p}" for p in PERCENTILES[1:-1]), "max")
    percentiles = np.percentile(lengths, PERCENTILES, method="nearest").tolist()
    return Stats(
        used=len(found.usable),
        bad=found.bad,
        tokens={**dict(zip(names, percentiles)), "mean": round(float(np.mean(lengths)))},
        trained=sum(size.trained for size in found.usable),
        images=dict(sorted(collections.Counter(size.images for size in found.usable).items())),
        packing=sum(size.tokens for row in rows for size in row) / (len(rows) * spec.seq_len),
    )


def show_report(report: Report) -> str:
    """What `check` found as text: totals, then counts by the field `source`, by problem, and of duplicate ids."""
    lines = [f"{report.records} records, {report.images} pictures, {report.bad} records unusable"]
    for source, count in sorted(report.sources.items(), key=lambda item: -item[1]):
        bad = sum(problem.source == source for problem in report.problems)
        lines.append(
            f"{count:>9} {shown(source) or '(no source named)'}" + (f", {bad} of them unusable" if bad else "")
        )
    for kind, count in report.kinds.items():
        first = next(problem.bad for problem in report.problems if problem.bad.kind == kind)
        lines.append(f"{count:>9} {kind}; the first: {first}")
    if report.opening_answers:
        lines.append(
            f"{report.opening_answers:>9} begin with an answer, which is left out: no question comes before it"
        )
    if report.duplicates:
        first = shown(next(iter(report.duplicates)))
        lines.append(f"{len(report.duplicates):>9} ids occur more than once; the first: {first}")
    return "\n".join(lines)


def show_stats(found: Stats) -> str:
    """What `stats` found as one line of text."""
    tokens = ", ".join(f"{name} {value:.0f}" for name, value in found.tokens.items())
    return f"{found.used} usable, {found.bad} not; tokens {tokens}; rows filled {found.packing:.1%}"
