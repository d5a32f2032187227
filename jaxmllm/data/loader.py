"""From records to batches of packed rows: the same for any number of processes, and resumable after any batch.

The shuffled data is dealt to `num_shards` virtual shards. Each has its own mixture of the sources (mixture.py) and its
own open rows (packing.py), and provides `rows / num_shards` rows of every batch, in the order of the shards:

    shard    0     1     2     3       process 0 of 2 makes the rows of shards 0 and 1, process 1 the others;
    rows    0 1   2 3   4 5   6 7      a single process makes them all

So neither a batch nor the position in the data depends on the number of processes, as long as it divides the shards.
"""

from __future__ import annotations

import collections
import os
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np

from jaxmllm.batch import Batch, empty_batch
from jaxmllm.data import position
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.mixture import Mixture, SampleMaker, normalized
from jaxmllm.data.packing import MAX_SAMPLES, OPEN_ROWS, ShardRows
from jaxmllm.data.samples import Sample, SampleSpec
from jaxmllm.data.sources.record import RecordSource
from jaxmllm.processes import say

AHEAD = 4  # samples that are made ahead, per thread


class Loader:
    """Endless iterator over (Batch of numpy arrays, info); every epoch has another order.

    Each process gets its share of the rows. info: "sample_ids" int32[B, samples], the index of each sample (counted on
    from one source to the next), -1 where there is none; "tokens", "images" = how many of each are not padding;
    "dropped" = distinct bad samples in the ledger.

    Memory of a process: `prefetch` batches and the one in use; the samples of OPEN_ROWS rows per shard; and the samples
    made ahead, which are fewer than AHEAD * threads + shards of the process. A sample takes at most what a row takes.

    Args:
      sources: data sets, each with its weight: shares of the samples that are trained.
      spec: how records become samples.
      ledger: where bad samples are noted.
      rows: B, rows of the global batch; a multiple of num_shards.
      num_shards: virtual shards; a multiple of process_count. Another number gives other batches.
      seed: of the order.
      packing: several samples per row; otherwise one.
      threads: how many samples are made at once, in all shards of this process together (default: the number of cores
        minus two). With 0 they are made one by one, in the thread that makes batches. The batches do not depend on it.
      prefetch: batches made ahead.
      accept_changed: whether `set_state` accepts sources that have changed.

    Raises ValueError for numbers that do not divide, for sources without records and for weights that are not positive;
    `next` raises TooManyBadSamples, and RuntimeError, naming the record, if making a sample fails.
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
        accept_changed: bool = False,
    ):
        if rows % num_shards or num_shards % process_count:
            raise ValueError(
                f"the rows ({rows}) must be a multiple of the virtual shards ({num_shards}), "
                f"and the virtual shards a multiple of the processes ({process_count})"
            )
        shares, self.speaks = normalized(sources), process_index == 0
        if threads is None:
            threads = max((os.cpu_count() or 1) - 2, 0)
        self.spec, self.ledger, self.prefetch, self.accept_changed = spec, ledger, prefetch, accept_changed
        self.rows_per_shard = rows // num_shards
        self.max_samples = MAX_SAMPLES if packing else 1
        maker = SampleMaker([source for source, _ in sources], spec, seed)
        self.sources = position.describe(maker.sources)
        self.pool = ThreadPoolExecutor(threads, thread_name_prefix="samples") if threads else None
        count = num_shards // process_count
        own_shards = range(process_index * count, (process_index + 1) * count)
        ahead = -(-AHEAD * threads // count)
        capacity, open_rows = (spec.seq_len, spec.image_slots, self.max_samples), OPEN_ROWS if packing else 1
        self.shards: dict[str, ShardRows] = {}
        for shard in own_shards:
            mixture = Mixture(shares, maker, ledger, shard, num_shards, self.pool, ahead)
            self.shards[str(shard)] = ShardRows(mixture, capacity, open_rows)
        self.state = self._position()
        self.batch_thread: ThreadPoolExecutor | None = None
        self.pending: collections.deque[Future] = collections.deque()

    def __iter__(self) -> Loader:
        return self

    def __next__(self) -> tuple[Batch, dict[str, Any]]:
        if not self.shards:
            raise ValueError("this loader is closed")
        if self.batch_thread is None:
            self.batch_thread = ThreadPoolExecutor(1, thread_name_prefix="loader")
        self._make_ahead()
        try:
            batch, info, self.state = self.pending.popleft().result()
        except BaseException as error:  # the batches made after the failure would skip rows
            self._end(wait=isinstance(error, Exception))  # a signal may have ended a wait that has no end
            raise
        self._make_ahead()
        return batch, info

    def get_state(self) -> dict[str, Any]:
        """The position after the last batch handed out, for the shards of this process: JSON data (position.py)."""
        return self.state

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position, so that the next batch is the one that followed it. `state` may hold other shards too.

        The samples that waited in open rows are read again. Raises ValueError if a shard of this process is missing,
        for other sources, and for sources that have changed unless the loader accepts that.
        """
        if missing := self.shards.keys() - state["shards"].keys():
            names = ", ".join(sorted(missing))
            raise ValueError(f"the saved data position lacks the virtual shards {names}; data.shards must not change")
        if changed := position.changes(state["sources"], self.sources):
            text = "; ".join(changed)
            if not self.accept_changed:
                raise ValueError(f"{text}: `jaxmllm train .. --accept-changed-data` goes on with the data as it is now")
            if self.speaks:
                follows = "until the epoch ends, records may be seen twice or never; open rows are read again by place"
                say(f"{text}: {follows}")
        self._stop()
        for shard, rows in self.shards.items():
            rows.set_state(state["shards"][shard])
        self.state = self._position()

    def close(self) -> None:
        """Stops the threads. The position stays readable."""
        if self.shards:
            self._end(wait=True)

    def _end(self, wait: bool) -> None:
        self._stop(wait)
        if self.pool:
            self.pool.shutdown(wait, cancel_futures=True)
        self.shards = {}

    def __enter__(self) -> Loader:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _stop(self, wait: bool = True) -> None:
        if self.batch_thread:
            self.batch_thread.shutdown(wait, cancel_futures=True)
        self.batch_thread = None
        self.pending.clear()

    def _make_ahead(self) -> None:
        while len(self.pending) < self.prefetch:
            self.pending.append(self.batch_thread.submit(self._make))

    def _make(self) -> tuple[Batch, dict[str, Any], dict[str, Any]]:
        """The next batch, its info, and the position after it. The shards take turns, a sample each, so that the
        samples of all of them can be made at the same time."""
        rows: dict[str, list[list[Sample]]] = {shard: [] for shard in self.shards}
        unfinished = [*self.shards]
        while unfinished:
            for shard in unfinished:
                if row := self.shards[shard].add_sample():
                    rows[shard].append(row)
            unfinished = [shard for shard in unfinished if len(rows[shard]) < self.rows_per_shard]
        batch, info = make_batch([row for part in rows.values() for row in part], self.spec, self.max_samples)
        return batch, {**info, "dropped": self.ledger.count}, self._position()

    def _position(self) -> dict[str, Any]:
        return {"sources": self.sources, "shards": {shard: rows.get_state() for shard, rows in self.shards.items()}}


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
