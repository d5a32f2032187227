"""What is wrong with a data set, and how full its rows will be, before a run instead of during it."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable

import numpy as np

from jaxmllm.data.images import decode, open_image
from jaxmllm.data.loader import OPEN_ROWS, SAMPLES
from jaxmllm.data.packing import Bins
from jaxmllm.data.samples import BadSample, SampleSpec, exchanges, make_tokens
from jaxmllm.data.sources import Source

Progress = Callable[[int, int], None]  # (records done, records in all)
PERCENTILES = (0, 50, 90, 99, 100)


@dataclasses.dataclass(frozen=True)
class Report:
    """What `check` found."""

    records: int
    images: int  # pictures that could be decoded
    sources: dict[str, int]  # value of the field `source` ("" if absent) -> records
    problems: dict[str, list[BadSample]]  # kind -> one per record: a record's first problem
    duplicates: dict[str, int]  # ids that occur more than once -> how often

    @property
    def bad(self) -> int:
        """Records that training would drop."""
        return sum(map(len, self.problems.values()))


@dataclasses.dataclass(frozen=True)
class Stats:
    """How the usable records of a source fit rows."""

    used: int  # records looked at that are usable
    bad: int  # those that are not
    tokens: dict[str, int]  # "min", "p50", "p90", "p99", "max", and "mean": tokens of a sample, pictures included
    trained: int  # tokens with a label, of all samples
    images: dict[int, int]  # image slots of a record -> records
    packing: float  # share of a row's places that are no padding


def check(source: Source, progress: Progress | None = None) -> Report:
    """Reads every record and decodes every picture of a source; nothing is tokenised."""
    sources, ids, problems, images = collections.Counter(), collections.Counter(), {}, 0
    for index in range(len(source)):
        try:
            record = source[index]
            ids[record.id] += 1
            sources[str(record.data.get("source", ""))] += 1
            exchanges(record, len(record.images))
            for blob in record.images:
                decode(record, blob, open_image(record, blob))
                images += 1
        except BadSample as bad:
            problems.setdefault(bad.kind, []).append(bad)
        if progress:
            progress(index + 1, len(source))
    duplicates = {id: count for id, count in ids.items() if count > 1}
    return Report(len(source), images, dict(sources), problems, duplicates)


def stats(source: Source, spec: SampleSpec, limit: int = 10_000, progress: Progress | None = None) -> Stats:
    """Lengths of at most `limit` records, spread over the source, and how well they pack.

    Of pictures only the sizes are read. Raises ValueError if no record is usable.
    """
    order = np.random.default_rng(0).permutation(len(source))[:limit]
    lengths, counts, trained, bad = [], [], 0, 0
    for done, index in enumerate(order.tolist()):
        try:
            record = source[index]
            sizes = [open_image(record, blob).size for blob in record.images]
            tokens, labels, _ = make_tokens(record, sizes, spec)
            lengths.append(len(tokens))
            counts.append(sum(map(spec.slots, sizes)))
            trained += int((labels >= 0).sum())
        except BadSample:
            bad += 1
        if progress:
            progress(done + 1, len(order))
    if not lengths:
        raise ValueError(f"none of the {bad} records looked at is usable; `jaxmllm data check` says why")
    names = ("min", *(f"p{p}" for p in PERCENTILES[1:-1]), "max")
    found = np.percentile(lengths, PERCENTILES, method="nearest").tolist()
    return Stats(
        used=len(lengths),
        bad=bad,
        tokens={**dict(zip(names, found)), "mean": round(float(np.mean(lengths)))},
        trained=trained,
        images=dict(sorted(collections.Counter(counts).items())),
        packing=packing(lengths, counts, spec),
    )


def packing(lengths: list[int], images: list[int], spec: SampleSpec) -> float:
    """Share of places that are filled, by the loader's packer, for samples in this order."""
    packer = Bins((spec.seq_len, spec.image_slots, SAMPLES), OPEN_ROWS)
    rows = [packer.add(length, (length, pictures, 1)) for length, pictures in zip(lengths, images)]
    rows = [row for row in rows if row] or [row for row, _ in packer.rows]
    return sum(map(sum, rows)) / (len(rows) * spec.seq_len)
