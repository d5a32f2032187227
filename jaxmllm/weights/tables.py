"""Tables of tokens: here with more rows than in a file, for added tokens and padding; exports have no padding."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

TABLES = ("llm/embedding/embedding", "llm/lm_head/embedding")
Shape = tuple[int, ...]
BLOCK = 4096  # rows that are summed at a time


class Grown:
    """A table [V, H] of a file with `rows` rows: the new ones are the mean of all rows that are there.

    So a new token has the logit of an average one, and the logits of old ones do not change. Nothing but the mean is
    held: an index, a tuple of two slices, reads its rows from the file.
    """

    def __init__(self, table: np.ndarray, rows: int):
        self.table, self.rows = table, rows
        self.shape, self.dtype = (rows, *table.shape[1:]), table.dtype

    @functools.cached_property
    def mean(self) -> np.ndarray:
        """[H], summed in float64."""
        blocks = (self.table[i : i + BLOCK] for i in range(0, len(self.table), BLOCK))
        total = sum(np.asarray(block).astype(np.float64).sum(0) for block in blocks)
        return (total / len(self.table)).astype(self.dtype)

    def __getitem__(self, index: tuple[slice, slice]) -> np.ndarray:
        start, stop, _ = index[0].indices(self.rows)
        old = self.table[start:stop, index[1]]
        return np.concatenate([old, np.broadcast_to(self.mean[index[1]], (stop - start - len(old), old.shape[1]))])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return self[:, :].astype(dtype or self.dtype, copy=False)


def grows(path: str, there: Shape, here: Shape) -> bool:
    """Whether a parameter is a table that only has more rows here than in the file."""
    return path in TABLES and len(there) == len(here) and 0 < there[0] < here[0] and there[1:] == here[1:]


def unpadded(path: str, x: np.ndarray, vocab: int | None) -> np.ndarray:
    """A parameter; of a table, the rows of the `vocab` tokens."""
    return x[:vocab] if path in TABLES else x


def unpadded_shapes(shapes: Mapping[str, Shape], vocab: int) -> dict[str, Shape]:
    """The shapes of `unpadded` parameters."""
    return {path: (vocab, *shape[1:]) if path in TABLES else shape for path, shape in shapes.items()}
