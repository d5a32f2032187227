"""From records to batches of packed rows: the same for any number of processes, and resumable after any batch.

The shuffled data is dealt to `num_shards` virtual shards. Each has its own Grain iterator and its own open rows
(packing.py), and provides `rows / num_shards` rows of every batch, in the order of the shards:

    shard    0     1     2     3       process 0 of 2 makes the rows of shards 0 and 1, process 1 the others;
    rows    0 1   2 3   4 5   6 7      a single process makes them all

So neither a batch nor the position in the data depends on the number of processes, as long as it divides the shards.
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

from jaxmllm.batch import Batch, empty_batch
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.packing import ShardRows
from jaxmllm.data.samples import Sample, SampleSpec, make_sample
from jaxmllm.data.sources.record import BadSample, RecordSource

OPEN_ROWS = 4  # of a shard; more of them leave less padding, but more samples to read again on resume
MAX_SAMPLES = 64  # of a packed row; also the width of info["sample_ids"]


class Loader:
    """Endless iterator over (Batch of numpy arrays, info); every epoch has another order.

    Each process gets its share of the rows. info: "sample_ids" int32[B, samples], the index of each sample (counted on
    from one source to the next), -1 where there is none; "tokens", "images" = how many of each are not padding;
    "dropped" = distinct bad samples in the ledger.

    Memory: `prefetch` batches and the one in use; and, per shard, the samples of OPEN_ROWS rows and 2 * threads more.

    Args:
      sources: data sets, each with its share of the samples.
      spec: how records become samples.
      ledger: where bad samples are noted.
      rows: B, rows of the global batch; a multiple of num_shards.
      num_shards: virtual shards; a multiple of process_count. Another number gives other batches.
      seed: of the order.
      packing: several samples per row; otherwise one.
      threads: how many samples are made at once (default: the number of cores minus two). With 0 they are made one by
        one, in the thread that makes batches. The batches do not depend on it.
      prefetch: batches made ahead.

    Raises ValueError for numbers that do not divide and for sources without records; `next` raises TooManyBadSamples.
    """

    def __init__(
        self,
        sources: Sequence[tuple[RecordSource, float]],
        spec: SampleSpec,
        ledger: Ledger,
        *,
        rows: int,
        num_shards: int = 8,
        seed: int = 0,
        packing: bool = True,
        threads: int | None = None,
        prefetch: int = 2,
        process_index: int = 0,
        process_count: int = 1,
    ):
        if rows % num_shards or num_shards % process_count:
            raise ValueError(
                f"the rows ({rows}) must be a multiple of the virtual shards ({num_shards}), "
                f"and the virtual shards a multiple of the processes ({process_count})"
            )
        if not sources or not all(len(source) for source, _ in sources):
            raise ValueError("each data source must have records, and there must be at least one source")
        if threads is None:
            threads = max((os.cpu_count() or 1) - 2, 0)
        self.spec, self.ledger, self.prefetch = spec, ledger, prefetch
        self.rows_per_shard = rows // num_shards
        self.max_samples = MAX_SAMPLES if packing else 1
        shards_per_process = num_shards // process_count
        self.shards: dict[str, ShardRows] = {}
        for shard in range(process_index * shards_per_process, (process_index + 1) * shards_per_process):
            samples = shard_samples(sources, spec, ledger, seed, shard, num_shards)
            capacity = (spec.seq_len, spec.image_slots, self.max_samples)
            self.shards[str(shard)] = ShardRows(samples, capacity, OPEN_ROWS if packing else 1, threads)
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
            self.close()  # the batches made after the failure would skip rows
            raise
        self._make_ahead()
        return batch, info

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out, for the shards of this process: JSON data."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position, so that the next batch is the one that followed it. `state` may hold other shards too.

        The samples that waited in open rows are read again. Raises ValueError if a shard of this process is missing.
        """
        if missing := self.shards.keys() - state.keys():
            names = ", ".join(sorted(missing))
            raise ValueError(f"the saved data position lacks the virtual shards {names}; data.shards must not change")
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
        rows = [next(shard) for shard in self.shards.values() for _ in range(self.rows_per_shard)]
        batch, info = make_batch(rows, self.spec, self.max_samples)
        return batch, {**info, "dropped": self.ledger.count}, self._positions()

    def _positions(self) -> dict[str, Any]:
        return {shard: rows.get_state() for shard, rows in self.shards.items()}


def shard_samples(
    sources: Sequence[tuple[RecordSource, float]],
    spec: SampleSpec,
    ledger: Ledger,
    seed: int,
    shard: int,
    num_shards: int,
) -> grain.MapDataset:
    """The endless samples of one shard; bad ones are None, which Grain skips.

    Sources are mixed within each shard: if a mixture were dealt to the shards, a shard could get every second sample,
    and so a single source.
    """
    parts, first = [], 0
    for number, (source, _) in enumerate(sources):
        part = grain.MapDataset.range(len(source)).shuffle(seed + number).repeat()[shard::num_shards]
        parts.append(part.map(functools.partial(load_sample, source, first, spec, ledger)))
        first += len(source)
    return grain.MapDataset.mix(parts, [weight for _, weight in sources]) if len(parts) > 1 else parts[0]


def load_sample(source: RecordSource, first: int, spec: SampleSpec, ledger: Ledger, index: int) -> Sample | None:
    """Sample `index` of a source whose ids start at `first`; None if it is bad, which is noted in the ledger."""
    try:
        return make_sample(source[index], first + index, spec)
    except BadSample as bad:
        ledger.add(bad)
        return None


def make_batch(
    rows: Sequence[Sequence[Sample]], spec: SampleSpec, max_samples: int = MAX_SAMPLES
) -> tuple[Batch, dict[str, Any]]:
    """Rows of samples -> (Batch, info without "dropped"); max_samples: the width of "sample_ids"."""
    batch = empty_batch(spec.layout, len(rows), spec.seq_len, spec.image_slots, spec.target_shapes)
    ids, tokens, images = np.full((len(rows), max_samples), -1, np.int32), 0, 0
    for row, samples in enumerate(rows):
        place = slot = 0
        for number, sample in enumerate(samples):
            ids[row, number] = sample.id
            end, end_slot = place + len(sample.tokens), slot + sample.image_count
            span, slots = (row, slice(place, end)), (row, slice(slot, end_slot))
            batch.tokens[span] = sample.tokens
            batch.labels[span] = sample.labels
            batch.segment_ids[span] = number + 1
            batch.positions[span] = np.arange(len(sample.tokens))
            moved = sample.visual_index + slot * spec.layout.block
            batch.visual_index[span] = np.where(sample.visual_index < 0, -1, moved)
            for field in ("images", "padding", "targets", "target_mask"):
                for name, value in getattr(sample, field).items():
                    getattr(batch, field)[name][slots] = value
            place, slot = end, end_slot
        tokens, images = tokens + place, images + slot
    row, place = np.nonzero(batch.visual_index >= 0)
    slot, token = np.divmod(batch.visual_index[row, place], spec.layout.block)
    batch.visual_positions[row, slot, token] = place
    return batch, {"sample_ids": ids, "tokens": tokens, "images": images}
