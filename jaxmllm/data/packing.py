"""Rows of whole samples, filled in the order in which the samples arrive.

A shard keeps a few rows open. A sample goes to the fullest open row that has room for it; if none has, the fullest row
is closed and handed out, and the sample opens a new one. (Grain's packers close all their rows at once. For as little
padding they need about eight times as many rows, and they do the work of many batches in one burst, during which
training would wait.)
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Generic, TypeVar

from jaxmllm.data.mixture import Mixture, Placed
from jaxmllm.data.samples import Sample

T = TypeVar("T")
OPEN_ROWS = 4  # of a shard; more of them leave less padding, but more samples to read again on resume
MAX_SAMPLES = 64  # of a packed row; also the width of info["sample_ids"]


class Bins(Generic[T]):
    """Open rows with the same capacities, such as (tokens, images); at most `count`, unless `reopen` opens more."""

    def __init__(self, capacity: Sequence[int], count: int):
        self.capacity, self.count = capacity, count
        self.rows: list[tuple[list[T], list[int]]] = []  # items, and how much of each capacity they use

    def reopen(self, rows: Iterable[Iterable[tuple[T, Sequence[int]]]]) -> None:
        """Opens rows that hold these (item, size). Items that have grown, so that they no longer fit in their row, open
        another one."""
        self.rows = []
        for row in rows:
            used = list(self.capacity)  # as of a full row, so that the first item opens one
            for item, size in row:
                if not self._has_room(([], used), size):
                    used = [0] * len(self.capacity)
                    self.rows.append(([], used))
                self.rows[-1][0].append(item)
                used[:] = map(int.__add__, used, size)

    def add(self, item: T, size: Sequence[int]) -> list[T] | None:
        """Puts an item in a row; it must fit in an empty one. Returns the items of the row closed for it, if any."""
        closed = None
        fitting = [row for row in self.rows if self._has_room(row, size)]
        if fitting:
            items, used = max(fitting, key=self._fullness)
            items.append(item)
            used[:] = map(int.__add__, used, size)
        else:
            if len(self.rows) >= self.count:
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
    """The packed rows of one virtual shard, with an exact position.

    capacity: of a row, in the units of `Sample.size`. open_rows: how many rows wait for more samples.
    """

    def __init__(self, mixture: Mixture, capacity: Sequence[int], open_rows: int):
        self.mixture = mixture
        self.bins: Bins[Placed] = Bins(capacity, open_rows)

    def add_sample(self) -> list[Sample] | None:
        """Puts the next sample in a row. Returns the samples of the row closed for it, if any."""
        placed = next(self.mixture)
        closed = self.bins.add(placed, placed.sample.size)
        return closed and [placed.sample for placed in closed]

    def get_state(self) -> dict[str, Any]:
        """The position of the mixture, and the (source, place) of the samples that wait in open rows: JSON data."""
        rows = [[[placed.source, placed.place] for placed in items] for items, _ in self.bins.rows]
        return {**self.mixture.get_state(), "open": rows}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position. Samples that were in open rows are read again."""
        self.mixture.set_state(state)
        rows = [self.mixture.read_again(places) for places in state["open"]]
        self.bins.reopen([(placed, placed.sample.size) for placed in row] for row in rows)
