"""Records -> batches of packed rows, the same on any number of processes, and resumable after any batch.

The shuffled data is dealt to `num_shards` virtual shards. Each has its own Grain iterator and its own packer
and gives `rows / num_shards` rows of every batch, in the order of the shards:

    shard     0     1     2     3          process 0 of 2 makes the rows of shards 0 and 1, process 1 the
    others; rows    0 1 2 3 4 5 6 7 8 9 ...        one process makes them all

so neither a batch nor the position in the data depends on how many processes there are, if they divide the
shards.
"""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import grain
import numpy as np

from jaxmllm.batch import Batch
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.samples import IGNORE, SampleSpec, make_sample
from jaxmllm.data.sources import BadSample, Source

SAMPLES = 64  # at most so many samples in a packed row; the width of info["sample_ids"]
FILLER = {"labels": IGNORE, "visual": -1, "sample_id": -1}  # what unused places of a row hold; elsewhere 0


class Loader:
    """Iterator over (Batch of numpy arrays, info), without end: every epoch in another order.

    A process gives its share of the rows. info: "sample_ids" int32[B, k], the index of each sample in its
    source (sources are numbered on, one behind the other), -1 where there is none; "tokens", "images" = how
    many of them are no padding; "dropped" = distinct bad samples known to the ledger.

    Memory: besides the batches, each shard holds two sets of `bins * rows / num_shards` rows with their
    pictures, and 2 * threads samples: with bins = 4 about 8 + prefetch batches in all.

    Args:
      sources: data sets with their shares of the samples. spec: how records become samples. ledger: where
      bad samples are noted. rows: B, rows of the global batch; a multiple of num_shards. num_shards: virtual
      shards; a multiple of process_count. Another number gives other batches. seed: of the order. packing:
      several samples per row; otherwise one. bins: rows that are filled side by side, in units of the rows
      of a batch; more bins, less padding. threads: how many pictures are decoded at once; 0 decodes in the
      thread that packs. Never changes the batches. prefetch: batches made ahead.

    Raises ValueError for numbers that do not divide or sources without records; `next` raises
    TooManyBadSamples.
    """

    def __init__(
        self,
        sources: Sequence[tuple[Source, float]],
        spec: SampleSpec,
        ledger: Ledger,
        *,
        rows: int,
        num_shards: int = 8,
        seed: int = 0,
        packing: bool = True,
        bins: int = 4,
        threads: int | None = None,
        prefetch: int = 2,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if rows % num_shards or num_shards % process_count:
            raise ValueError(
                f"the rows ({rows}) must be a multiple of the virtual shards ({num_shards}), "
                f"and these of the processes ({process_count})"
            )
        if not sources or not all(len(source) for source, _ in sources):
            raise ValueError("each data source must have records, and there must be one at least")
        if threads is None:
            threads = max((os.cpu_count() or 1) - 2, 0)
        self.spec, self.ledger, self.prefetch = spec, ledger, prefetch
        self.shard_rows = rows // num_shards
        own = num_shards // process_count
        self.shards = {}
        for shard in range(process_index * own, (process_index + 1) * own):
            samples = shard_samples(sources, spec, ledger, seed, shard, num_shards)
            read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
            limits = capacities(spec, SAMPLES if packing else 1)
            packed = pack(samples.to_iter_dataset(read), limits, self.shard_rows * bins, seed + shard)
            self.shards[str(shard)] = iter(packed)
        self.state = self._positions()
        self.maker: ThreadPoolExecutor | None = None
        self.pending: collections.deque[Future] = collections.deque()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        if not self.shards:
            raise ValueError("this loader is closed")
        if self.maker is None:
            self.maker = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._make_ahead()
        try:
            batch, info, self.state = self.pending.popleft().result()
        except BaseException:
            self.close()  # what was made after the failure would skip rows
            raise
        self._make_ahead()
        return batch, info

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out, for the shards of this process: JSON data."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position: the next batch is the one that followed it. `state` may hold other shards too.

        Rows whose bins were partly used are packed anew, so the first batch takes up to `bins` times as long.
        Raises ValueError if a shard of this process is missing.
        """
        if missing := self.shards.keys() - state.keys():
            names = ", ".join(sorted(missing))
            raise ValueError(f"the saved data position lacks the virtual shards {names}; keep data.shards")
        self._stop()
        for shard, rows in self.shards.items():
            rows.set_state(state[shard])
        self.state = self._positions()

    def close(self) -> None:
        """Stops the threads. The position stays readable."""
        self._stop()
        for rows in self.shards.values():
            rows.close()
        self.shards = {}

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _stop(self) -> None:
        if self.maker:
            self.maker.shutdown(cancel_futures=True)
        self.maker = None
        self.pending.clear()

    def _make_ahead(self) -> None:
        while len(self.pending) < self.prefetch:
            self.pending.append(self.maker.submit(self._make))

    def _make(self) -> tuple[Batch, dict[str, Any], dict[str, Any]]:
        rows = [next(shard) for shard in self.shards.values() for _ in range(self.shard_rows)]
        batch, info = join(rows, self.spec)
        return batch, {**info, "dropped": self.ledger.count}, self._positions()

    def _positions(self) -> dict[str, Any]:
        return {shard: rows.get_state() for shard, rows in self.shards.items()}


def shard_samples(
    sources: Sequence[tuple[Source, float]],
    spec: SampleSpec,
    ledger: Ledger,
    seed: int,
    shard: int,
    num_shards: int,
) -> grain.MapDataset:
    """The endless samples of one shard; bad ones are None, which Grain skips.

    Sources are mixed within the shard: dealing out a mixture could give a shard every second sample, and so
    one source.
    """
    parts, first = [], 0
    for number, (source, _) in enumerate(sources):
        part = grain.MapDataset.range(len(source)).shuffle(seed + number).repeat()[shard::num_shards]
        parts.append(part.map(functools.partial(load, source, first, spec, ledger)))
        first += len(source)
    return grain.MapDataset.mix(parts, [weight for _, weight in sources]) if len(parts) > 1 else parts[0]


def load(
    source: Source, first: int, spec: SampleSpec, ledger: Ledger, index: int
) -> dict[str, np.ndarray] | None:
    """Sample `index` of a source whose ids start at `first`; None if it is bad: the ledger then knows."""
    try:
        return make_sample(source[index], first + index, spec)
    except BadSample as bad:
        ledger.add(bad)
        return None


def capacities(spec: SampleSpec, samples: int) -> dict[str, int]:
    """Feature of a sample -> how much of it a row holds."""
    per_image = [f"{kind}/{name}" for kind in ("images", "padding") for name in spec.layout.encoders]
    per_image += [f"{kind}/{name}" for kind in ("targets", "target_mask") for name in spec.target_shapes]
    return {
        **dict.fromkeys(("tokens", "labels", "visual"), spec.seq_len),
        **dict.fromkeys(per_image, spec.image_slots),
        **dict.fromkeys(("sample_id", "image_count"), samples),
    }


def pack(samples: grain.IterDataset, limits: dict[str, int], bins: int, seed: int) -> grain.IterDataset:
    """Rows of whole samples, by first fit, with "tokens_segment_ids" (from 1) and "tokens_positions"."""
    packed = grain.experimental.FirstFitPackIterDataset(
        samples,
        length_struct=limits,
        num_packing_bins=bins,
        seed=seed,
        shuffle_bins=True,  # bins filled last hold less: spread them over the batches
        meta_features=[name for name in limits if name != "tokens"],
        padding_struct={name: FILLER.get(name) for name in limits},
    )
    # A shard whose samples are all bad would be searched forever.
    options = grain.experimental.DatasetOptions(filter_raise_threshold_ratio=0.999)
    return grain.experimental.WithOptionsIterDataset(packed, options)


def join(rows: list[dict[str, np.ndarray]], spec: SampleSpec) -> tuple[Batch, dict[str, Any]]:
    """Packed rows -> (Batch, info without "dropped")."""
    stacked = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    block, segments, visual = spec.layout.block, stacked["tokens_segment_ids"], stacked["visual"]
    counts = stacked["image_count"]
    first_slot = np.cumsum(counts, 1) - counts  # of each sample
    slot = np.take_along_axis(first_slot, np.maximum(segments - 1, 0), 1)
    index = np.where(visual >= 0, visual + slot * block, -1).astype(np.int32)
    places = np.full((len(rows), spec.image_slots * block), -1, np.int32)
    row, place = np.nonzero(index >= 0)
    places[row, index[row, place]] = place
    batch = Batch(
        tokens=stacked["tokens"],
        labels=stacked["labels"],
        segment_ids=segments,
        positions=stacked["tokens_positions"],
        visual_index=index,
        visual_positions=places.reshape(len(rows), spec.image_slots, block),
        images={name: stacked[f"images/{name}"] for name in spec.layout.encoders},
        padding={name: stacked[f"padding/{name}"] for name in spec.layout.encoders},
        targets={name: stacked[f"targets/{name}"] for name in spec.target_shapes},
        target_mask={name: stacked[f"target_mask/{name}"] for name in spec.target_shapes},
    )
    real = {"tokens": int((segments > 0).sum()), "images": int(counts.sum())}
    return batch, {"sample_ids": stacked["sample_id"], **real}
