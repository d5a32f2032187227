"""Where teacher targets of a picture come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import io
from typing import Protocol

import numpy as np
from PIL import Image

from jaxmllm.data.sources import Record


class Targets(Protocol):
    """What auxiliary objectives must predict. A frozen dataclass of plain values: it stands in configs."""

    def spec(self) -> dict[str, tuple[int, int]]:
        """Teacher name -> (n, d)."""

    def __call__(self, record: Record, image: int) -> dict[str, np.ndarray]:
        """Teacher name -> float32[n, d] for picture number `image`, if it has a target. Raises BadSample."""


@dataclasses.dataclass(frozen=True)
class MapTargets:
    """Dense targets from the maps of a record with one picture.

    "depth": `depth` is a 16-bit PNG; a visual token's target is the mean of value / 65535 in each of its
    cells x cells parts (row-major), minus `depth_mean`, divided by `depth_std`. "seg": `instances` is an
    8-bit PNG, 0 for the background and k for the k-th noun of the record's `objects`; the target is the mean
    over the token's pixels of `noun_code`, 0 for the background. Maps are padded to a square with zeros, as
    pictures are; their size need not be the picture's.
    """

    grid: int  # side of the grid of visual tokens
    codes: int = 16  # length of a noun's code
    cells: int = 2
    depth_mean: float = 0.15  # as measured on composed scenes, which have much flat ground at 0
    depth_std: float = 0.25

    def spec(self) -> dict[str, tuple[int, int]]:
        return {"depth": (self.grid**2, self.cells**2), "seg": (self.grid**2, self.codes)}

    def __call__(self, record: Record, image: int) -> dict[str, np.ndarray]:
        if len(record.images) != 1:
            return {}
        found = {}
        if "depth" in record.maps:
            found["depth"] = self._depth(self._read(record, "depth"))
        if "instances" in record.maps:
            found["seg"] = self._seg(record, self._read(record, "instances"))
        return found

    def _read(self, record: Record, field: str) -> np.ndarray:
        blob = record.maps[field]
        content = record.read(blob)
        try:
            values = np.asarray(Image.open(io.BytesIO(content)))
        except Exception as error:  # see images.prepare_all
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
    """float32[length] of +-1, a fixed random-looking function of the noun's text."""
    digest = hashlib.shake_256(noun.encode()).digest(-(-length // 8))
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:length].astype(np.float32) * 2 - 1


def area_means(maps: np.ndarray, cells: int) -> np.ndarray:
    """float32[..., h, w] -> float32[..., cells, cells]: area-weighted means over the padded square."""
    height, width = maps.shape[-2:]
    return area_weights(height, width, cells) @ maps @ area_weights(width, height, cells).T


@functools.lru_cache(maxsize=256)
def area_weights(length: int, other: int, cells: int) -> np.ndarray:
    """float32[cells, length]: the share of each cell that each pixel covers; padding has the rest."""
    side = max(length, other)
    pixels = np.arange(length + 1) + (side - length) // 2
    edges = np.arange(cells + 1) * (side / cells)
    low, high = np.maximum(edges[:-1, None], pixels[:-1]), np.minimum(edges[1:, None], pixels[1:])
    return (np.maximum(high - low, 0) * (cells / side)).astype(np.float32)
