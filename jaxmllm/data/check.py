"""What is wrong with a data set, and how full its rows will be, found before a run rather than during it."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np

from jaxmllm.data.conversation import exchanges, system_text
from jaxmllm.data.picture import decode, open_image
from jaxmllm.data.samples import SampleSpec
from jaxmllm.data.sizes import MEASURED, MeasuredSource, Progress, packed_rows, sample_sizes
from jaxmllm.data.sources.record import BadSample, RecordSource

PERCENTILES = (0, 50, 90, 99, 100)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found."""

    records: int
    images: int  # pictures that could be decoded
    sources: dict[str, int]  # value of the field `source` ("" if absent) -> records
    problems: dict[str, list[BadSample]]  # kind -> bad records; only the first problem of each is listed
    duplicates: dict[str, int]  # id that occurs more than once -> how often

    @property
    def bad(self) -> int:
        """Records that training would drop."""
        return sum(map(len, self.problems.values()))


@dataclasses.dataclass(frozen=True)
class Stats:
    """How well the usable records of a source fill rows."""

    used: int  # usable records among those examined
    bad: int  # unusable ones
    tokens: dict[str, int]  # "min", "p50", "p90", "p99", "max", and "mean": tokens per sample, pictures included
    trained: int  # tokens with a label, in all samples
    images: dict[int, int]  # image slots of a record -> records with that many
    packing: float  # share of a row's places that are not padding


def check(source: RecordSource, progress: Progress | None = None) -> Report:
    """Reads every record and decodes every picture of a source; nothing is tokenised."""
    sources, ids, problems, images = collections.Counter(), collections.Counter(), {}, 0
    for index in range(len(source)):
        try:
            record = source[index]
            ids[record.id] += 1
            sources[str(record.data.get("source", ""))] += 1
            exchanges(record, len(record.images))
            system_text(record)
            for blob in record.images:
                decode(record, blob, open_image(record, blob))
                images += 1
        except BadSample as bad:
            problems.setdefault(bad.kind, []).append(bad)
        if progress:
            progress(index + 1, len(source))
    duplicates = {id: count for id, count in ids.items() if count > 1}
    return Report(len(source), images, dict(sources), problems, duplicates)


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
        lines.append(f"{count:>9} {source or '(no source named)'}")
    for kind, samples in report.problems.items():
        lines.append(f"{len(samples):>9} {kind}; the first: {samples[0]}")
    if report.duplicates:
        first = next(iter(report.duplicates))
        lines.append(f"{len(report.duplicates):>9} ids occur more than once; the first: {first}")
    return "\n".join(lines)


def show_stats(found: Stats) -> str:
    """What `stats` found as one line of text."""
    tokens = ", ".join(f"{name} {value:.0f}" for name, value in found.tokens.items())
    return f"{found.used} usable, {found.bad} not; tokens {tokens}; rows filled {found.packing:.1%}"
