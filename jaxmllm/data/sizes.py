"""Sizes of samples, measured without decoding a picture, and what follows: how they pack, how long an epoch is."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np

from jaxmllm.data.mixture import furthest_behind, normalized
from jaxmllm.data.packing import MAX_SAMPLES, OPEN_ROWS, Bins
from jaxmllm.data.picture import open_image
from jaxmllm.data.samples import SampleSpec, make_tokens
from jaxmllm.data.sources.record import BadSample, RecordSource

Progress = Callable[[int, int], None]  # (records done, records in all)
MEASURED = 10_000  # records of a source that are measured at most
THREADS = 16  # reading the head of a picture is mostly waiting
PACKED = 20_000  # samples that are packed for an estimate


@dataclasses.dataclass(frozen=True)
class SampleSize:
    """What a sample takes of a row."""

    tokens: int
    images: int  # image slots
    trained: int  # tokens with a label


@dataclasses.dataclass(frozen=True)
class MeasuredSource:
    """The sizes of the usable records of a source, in a random order, and how many others there were."""

    usable: list[SampleSize]
    bad: int

    @property
    def usable_share(self) -> Fraction:
        """The share of the examined records that are usable."""
        return Fraction(len(self.usable), len(self.usable) + self.bad)


def sample_sizes(
    source: RecordSource, spec: SampleSpec, limit: int = MEASURED, progress: Progress | None = None
) -> MeasuredSource:
    """Measures at most `limit` records, spread over the source; the same ones each time.

    Raises ValueError, naming the source, if none of them is usable.
    """

    def measure(index: int) -> SampleSize | None:
        try:
            record = source[index]
            pictures = [open_image(record, blob).size for blob in record.images]
            tokens, labels, _ = make_tokens(record, pictures, spec)
        except BadSample:
            return None
        return SampleSize(len(tokens), sum(map(spec.slots, pictures)), int((labels >= 0).sum()))

    order = np.random.default_rng(0).permutation(len(source))[:limit].tolist()
    sizes = []
    with ThreadPoolExecutor(THREADS) as pool:
        for size in pool.map(measure, order):
            sizes.append(size)
            if progress:
                progress(len(sizes), len(order))
    usable = [size for size in sizes if size]
    if not usable:
        raise ValueError(
            f"none of the {len(order)} records examined in {source.path} is usable; `jaxmllm data check` says why"
        )
    return MeasuredSource(usable, len(sizes) - len(usable))


def packed_rows(sizes: Iterable[SampleSize], spec: SampleSpec) -> list[list[SampleSize]]:
    """The rows that the loader's packer makes of samples in this order; rows that stay open count only if all do."""
    packer = Bins((spec.seq_len, spec.image_slots, MAX_SAMPLES), OPEN_ROWS)
    rows = [packer.add(size, (size.tokens, size.images, 1)) for size in sizes]
    return [row for row in rows if row] or [row for row, _ in packer.rows]


def steps_of_epochs(
    epochs: float, rows: int, sources: Sequence[tuple[RecordSource, float]], spec: SampleSpec, packing: bool
) -> int:
    """The number of steps, of `rows` rows each, that `epochs` epochs take, rounded up.

    One epoch is as many trained samples as the sources hold usable records together. The weights decide which samples
    these are: a source with a larger share of the mixture than of the records is seen more than once in an epoch, one
    with a smaller share less than once. Only with weights in proportion to the records is each seen exactly once.

    The number is exact if all records are usable or were measured, and rows are not packed; it is always the same for
    the same data (epoch_size). Raises ValueError for epochs that are not positive and for a source without usable
    records.
    """
    if not 0 < epochs < math.inf:
        raise ValueError(f"epochs must be positive and finite, not {epochs}")
    samples, per_row = epoch_size(sources, spec, packing)
    return math.ceil(Fraction(str(epochs)) * samples / (rows * per_row))


def epoch_size(
    sources: Sequence[tuple[RecordSource, float]], spec: SampleSpec, packing: bool
) -> tuple[Fraction, Fraction]:
    """(usable records of weighted sources, samples in a row).

    Measured are up to MEASURED records of a source: how many are usable, and, with packing, how many samples a row
    holds, by packing PACKED samples in the order of the mixture. Raises ValueError for a source without usable records.
    """
    shares = normalized(sources)
    measured = [sample_sizes(source, spec) for source, _ in sources]
    samples = sum(len(source) * found.usable_share for (source, _), found in zip(sources, measured))
    if not packing:
        return samples, Fraction(1)
    packed = packed_rows(mixed([found.usable for found in measured], shares, PACKED), spec)
    return samples, Fraction(sum(map(len, packed)), len(packed))


def mixed(parts: Sequence[Sequence[SampleSize]], shares: Sequence[float], count: int) -> Iterable[SampleSize]:
    """`count` samples of several sources in the order of their mixture; each source is repeated without end."""
    endless, counts = [itertools.cycle(part) for part in parts], [0] * len(parts)
    for _ in range(count):
        source = furthest_behind(counts, shares)
        counts[source] += 1
        yield next(endless[source])
