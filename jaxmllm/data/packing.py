"""Rows of whole samples, filled in the order in which the samples arrive.

A shard keeps a few rows open. A sample goes to the fullest open row that has room for it; if none has, the fullest row
is closed and handed out, and the sample opens a new one. (Grain's packers close all their rows at once. For as little
padding they need about eight times as many rows, and they do the work of many batches in one burst, during which
training would wait.)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Generic, TypeVar

import grain

from jaxmllm.data.ledger import TooManyBadSamples
from jaxmllm.data.samples import Sample

T = TypeVar("T")
MAX_BAD_RUN = 1000  # consecutive bad samples after which a shard is assumed to have no good ones


class Bins(Generic[T]):
    """At most `count` open rows with the same capacities, such as (tokens, images)."""

    def __init__(self, capacity: Sequence[int], count: int):
        self.capacity, self.count = capacity, count
        self.rows: list[tuple[list[T], list[int]]] = []  # items, and how much of each capacity they use

    def add(self, item: T, size: Sequence[int]) -> list[T] | None:
        """Puts an item in a row; it must fit in an empty one. Returns the items of the row closed for it, if any."""
        closed = None
        fitting = [row for row in self.rows if self._has_room(row, size)]
        if fitting:
            items, used = max(fitting, key=self._fullness)
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
        return all(used + needed <= limit for used, needed, limit in zip(row[1], size, self.capacity))

    def _fullness(self, row: tuple[list[T], list[int]]) -> float:
        # By the scarcest capacity: a row with no image slots left must not stay open because it has few tokens.
        return max(used / max(limit, 1) for used, limit in zip(row[1], self.capacity))  # a text model has 0 slots


class ShardRows:
    """Endless iterator over the rows (lists of samples) of one shard, with an exact position.

    samples: the shard's samples, None where one is bad. capacity: of a row, in the units of `Sample.size`. threads: how
    many samples are made at once, ahead of use; with 0 each is made when it is needed.
    """

    def __init__(self, samples: grain.MapDataset, capacity: Sequence[int], open_rows: int, threads: int):
        self.samples = samples
        read = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        self.iterator = iter(samples.to_iter_dataset(read, allow_nones=True))
        self.next_index = 0
        self.bins: Bins[tuple[int, Sample]] = Bins(capacity, open_rows)

    def __next__(self) -> list[Sample]:
        """The samples of the next row. Raises TooManyBadSamples if the shard seems to have no good ones."""
        bad_run = 0
        while bad_run < MAX_BAD_RUN:
            index, sample = self.next_index, next(self.iterator)
            self.next_index += 1
            bad_run = bad_run + 1 if sample is None else 0
            row = self.bins.add((index, sample), sample.size) if sample else None
            if row:
                return [sample for _, sample in row]
        raise TooManyBadSamples(f"{MAX_BAD_RUN} consecutive samples were bad; see the ledger of bad samples")

    def get_state(self) -> dict[str, Any]:
        """The next sample to read, and the samples that wait in open rows: JSON data."""
        return {
            "next": self.next_index,
            "open": [[index for index, _ in items] for items, _ in self.bins.rows],
        }

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position. Samples that were in open rows are read again."""
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
