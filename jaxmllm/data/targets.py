"""The teacher targets of a picture, and where they come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from typing import Protocol

import numpy as np
from PIL import Image

from jaxmllm.data.sources.record import Record


class Targets(Protocol):
    """What auxiliary objectives must predict. A frozen dataclass of plain values, because configs contain it."""

    def spec(self) -> dict[str, tuple[int, int]]:
        """Teacher name -> (queries, dim)."""

    def __call__(self, record: Record, image: int) -> dict[str, np.ndarray]:
        """Teacher name -> float32[queries, dim] for picture number `image`, if it has a target. Raises BadSample."""


@dataclasses.dataclass(frozen=True)
class MapTargets:
    """Dense targets, one query per visual token, from the maps of a record with one picture.

    "depth": the field `depth` is a 16-bit PNG; a token's target is the mean of value / 65535 in each of its
    cells x cells parts (row-major), minus `depth_mean`, divided by `depth_std`.
    "seg": the field `instances` is an 8-bit PNG, 0 for the background, k for the k-th noun of the record's `objects`; a
    token's target is the mean over its pixels of `noun_code`, which is 0 for the background.
    Maps are padded to a square with zeros, as pictures are; their size may differ from the picture's.
    """

    grid: int  # side of the grid of visual tokens
    codes: int = 16  # length of a noun's code
    cells: int = 2  # parts of a token's area, per side, whose depths are separate targets
    depth_mean: float = 0.15  # this and the next as measured on composed scenes, where much of the depth map is 0
    depth_std: float = 0.25

    def spec(self) -> dict[str, tuple[int, int]]:
        return {"depth": (self.grid**2, self.cells**2), "seg": (self.grid**2, self.codes)}

    def __call__(self, record: Record, image: int) -> dict[str, np.ndarray]:
        if len(record.images) != 1:
            return {}
        targets = {}
        if "depth" in record.maps:
            targets["depth"] = self._depth(self._read(record, "depth"))
        if "instances" in record.maps:
            targets["seg"] = self._seg(record, self._read(record, "instances"))
        return targets

    def _read(self, record: Record, field: str) -> np.ndarray:
        blob = record.maps[field]
        content = record.read(blob)
        try:
            values = np.asarray(Image.open(io.BytesIO(content)))
        except Exception as error:  # PIL raises many types, see images.decode
            raise record.bad("unreadable target map", type(error).__name__, blob.path) from None
        if values.ndim != 2:
            raise record.bad("unreadable target map", f"it has {values.ndim} dimensions, not 2", blob.path)
        return values

    def _depth(self, values: np.ndarray) -> np.ndarray:
        fine = area_means(values.astype(np.float32), self.grid * self.cells) / 65535
        blocks = fine.reshape(self.grid, self.cells, self.grid, self.cells).swapaxes(1, 2)
        return (blocks.reshape(self.grid**2, -1) - self.depth_mean) / self.depth_std

    def _seg(self, record: Record, values: np.ndarray) -> np.ndarray:
        nouns = record.data.get("objects", [])
        if values.max() > len(nouns):
            detail = f"instance {values.max()}, but there are {len(nouns)} objects"
            raise record.bad("unreadable target map", detail, record.maps["instances"].path)
        if not nouns:
            return np.zeros((self.grid**2, self.codes), np.float32)
        is_noun = values == np.arange(1, len(nouns) + 1, dtype=values.dtype)[:, None, None]
        shares = area_means(is_noun.astype(np.float32), self.grid).reshape(len(nouns), -1)
        return shares.T @ np.stack([noun_code(noun, self.codes) for noun in nouns])


@functools.lru_cache(maxsize=4096)
def noun_code(noun: str, length: int) -> np.ndarray:
    """float32[length] of +-1: a fixed, random-looking code for a noun."""
    digest = hashlib.shake_256(noun.encode()).digest(-(-length // 8))
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:length].astype(np.float32) * 2 - 1


def area_means(maps: np.ndarray, cells: int) -> np.ndarray:
    """float32[..., h, w] -> float32[..., cells, cells]: area-weighted means over the map padded to a square."""
    height, width = maps.shape[-2:]
    return area_weights(height, width, cells) @ maps @ area_weights(width, height, cells).T


@functools.lru_cache(maxsize=256)
def area_weights(length: int, other_length: int, cells: int) -> np.ndarray:
    """float32[cells, length]: the share of each cell that each pixel covers; the rest is padding."""
    side = max(length, other_length)
    pixels = np.arange(length + 1) + (side - length) // 2
    edges = np.arange(cells + 1) * (side / cells)
    low, high = np.maximum(edges[:-1, None], pixels[:-1]), np.minimum(edges[1:, None], pixels[1:])
    return (np.maximum(high - low, 0) * (cells / side)).astype(np.float32)
