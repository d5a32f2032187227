"""Rows of whole samples, made as the samples come.

A shard keeps a few rows open. A sample goes to the fullest open row that has room for it; if none has, the
fullest row is closed and handed out, and the sample opens a new one. (Grain's packers close all their rows
together. They need some eight times as many for as little padding, and do the work of many batches in one
burst, for which training would wait.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import grain

from jaxmllm.data.ledger import TooManyBadSamples
from jaxmllm.data.samples import Sample

T = TypeVar("T")
GIVE_UP = 1000  # bad samples in a row after which a shard is taken to have no good ones


class Bins(Generic[T]):
    """At most `count` open rows with the same capacities, such as (tokens, images)."""

    def __init__(self, capacity: Sequence[int], count: int):
        self.capacity, self.count = capacity, count
        self.rows: list[tuple[list[T], list[int]]] = []  # items, and how much of each capacity they take

    def add(self, item: T, size: Sequence[int]) -> list[T] | None:
        """Puts an item in a row; it must fit an empty one. Returns the items of a row closed for it."""
        closed = None
        room = [row for row in self.rows if self._has_room(row, size)]
        if room:
            items, used = max(room, key=self._fullness)
            items.append(item)
            used[:] = map(int.__add__, used, size)
        else:
            if len(self.rows) == self.count:
                fullest = max(self.rows, key=self._fullness)
                self.rows.remove(fullest)
                closed = fullest[0]
            self.rows.append(([item], list(size)))
        return closed

    def _has_room(self, row: tuple[list[T], list[int]], size: Sequence[int]) -> bool:
        return all(used + more <= limit for used, more, limit in zip(row[1], size, self.capacity))

    def _fullness(self, row: tuple[list[T], list[int]]) -> float:
        # By the scarcest capacity: a row without image slots left must not stay open for lack of tokens.
        return max(u / max(c, 1) for u, c in zip(row[1], self.capacity))  # text alone has no image slots


class ShardRows:
    """Endless iterator over the rows (lists of samples) of one shard, with an exact position.

    samples: the shard's samples, None where one is bad. capacity: of a row, in the terms of `Sample.size`.
    threads: samples made at once, ahead of use; 0 makes them when they are needed.
    """

    def __init__(self, samples: grain.MapDataset, capacity: Sequence[int], open_rows: int, threads: int):
        self.samples = samples
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        self.iterator = iter(samples.to_iter_dataset(read, allow_nones=True))
        self.next_index = 0
        self.bins: Bins[tuple[int, Sample]] = Bins(capacity, open_rows)

    def __next__(self) -> list[Sample]:
        """Raises TooManyBadSamples if there seem to be no good ones."""
        bad_run = 0
        while bad_run < GIVE_UP:
            index, sample = self.next_index, next(self.iterator)
            self.next_index += 1
            bad_run = bad_run + 1 if sample is None else 0
            row = self.bins.add((index, sample), sample.size) if sample else None
            if row:
                return [sample for _, sample in row]
        raise TooManyBadSamples(f"{GIVE_UP} samples in a row were bad; see the ledger of bad samples")

    def get_state(self) -> dict[str, Any]:
        """JSON data: the next sample to read, and those that wait in open rows."""
        return {
            "next": self.next_index,
            "open": [[index for index, _ in items] for items, _ in self.bins.rows],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position; samples that were in open rows are read again."""
        self.next_index = state["next"]
        grain.experimental.set_next_index(self.iterator, self.next_index)
        self.bins = Bins(self.bins.capacity, self.bins.count)
        for indices in state["open"]:
            row = [(index, sample) for index in indices if (sample := self.samples[index])]
            if row:
                sizes = [sample.size for _, sample in row]
                self.bins.rows.append((row, [sum(column) for column in zip(*sizes)]))

    def close(self) -> None:
        self.iterator.close()
