"""The teacher targets of a picture, and where they come from."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Callable
from typing import Protocol

import numpy as np
from PIL import Image

from jaxmllm.data.images import View
from jaxmllm.data.picture import Picture, grey_values, open_image, unreadable
from jaxmllm.data.sources.record import Record
from jaxmllm.fields import Positive

BAD_MAP = "unreadable target map"


class Targets(Protocol):
    """What auxiliary objectives must predict. A frozen dataclass of plain values, because configs contain it."""

    def spec(self) -> dict[str, tuple[int, int]]:
        """Teacher name -> (queries, dim)."""

    def __call__(self, record: Record, image: int, view: View) -> dict[str, np.ndarray]:
        """Teacher name -> float32[queries, dim] for picture number `image`, if it has a target. Raises BadSample.

        view: which part of the picture the encoders see.
        """


@dataclasses.dataclass(frozen=True)
class MapTargets:
    """Dense targets, one query per visual token, from the maps of a record with one picture.

    "depth": the field `depth` is a greyscale file, black far and white near, whatever its type (picture.grey_values); a
    token's target is the mean of value / white in each of its cells x cells parts (row-major), minus `depth_mean`,
    divided by `depth_std`.
    "seg": the field `instances` is a greyscale or palette file of whole numbers, 0 for the background, k for the k-th
    noun of the record's `objects`; a token's target is the mean over its pixels of `noun_code`, which is 0 for the
    background.
    Maps have the proportions of the upright picture, and any size. They are padded with zeros, cropped or squashed as
    the encoders' pictures are. Their own EXIF turns them; that of the picture does not.
    """

    grid: Positive  # side of the grid of visual tokens
    codes: Positive = 16  # length of a noun's code
    cells: Positive = 2  # parts of a token's area, per side, whose depths are separate targets
    depth_mean: float = 0.15  # this and the next as measured on composed scenes, where much of the depth map is 0
    depth_std: float = 0.25

    def spec(self) -> dict[str, tuple[int, int]]:
        return {"depth": (self.grid**2, self.cells**2), "seg": (self.grid**2, self.codes)}

    def __call__(self, record: Record, image: int, view: View) -> dict[str, np.ndarray]:
        if len(record.images) != 1:
            return {}
        makers = {"depth": ("depth", self._depth), "seg": ("instances", self._seg)}
        return {
            name: self._target(record, field, view, make)
            for name, (field, make) in makers.items()
            if field in record.maps
        }

    def _target(self, record: Record, field: str, view: View, make: Callable) -> np.ndarray:
        """What `make` makes of the map in a field. Raises BadSample, naming the file, for whatever is wrong with it."""
        blob = record.maps[field]
        picture = open_image(record, blob, BAD_MAP)
        (width, height), (of_width, of_height) = picture.size, view.size
        if not view.matches(width, height):
            detail = f"it has {width} x {height} pixels, and the upright picture {of_width} x {of_height}"
            raise record.bad("target map of another shape", detail, blob.path)
        try:
            return make(record, picture, view)
        except Exception as error:  # Pillow raises many types, see picture.open_image
            raise unreadable(record, blob, error, BAD_MAP) from None

    def _depth(self, record: Record, picture: Picture, view: View) -> np.ndarray:
        values, white = grey_values(picture.image)
        shares = upright(values, picture).astype(np.float32) / np.float32(white)
        fine = area_means(shares, self.grid * self.cells, view.square(*picture.size))
        blocks = fine.reshape(self.grid, self.cells, self.grid, self.cells).swapaxes(1, 2)
        return (blocks.reshape(self.grid**2, -1) - self.depth_mean) / self.depth_std

    def _seg(self, record: Record, picture: Picture, view: View) -> np.ndarray:
        values, nouns = upright(np.asarray(picture.image), picture), record.data.get("objects", [])
        if values.ndim != 2 or values.dtype.kind not in "iub":
            raise ValueError(f"its mode is {picture.image.mode}, not whole numbers in one channel")
        if not isinstance(nouns, list) or not all(isinstance(noun, str) for noun in nouns):
            raise ValueError("the record's `objects` is no list of nouns")
        if not 0 <= values.min() <= values.max() <= len(nouns):
            raise ValueError(f"instance {values.max()}, but there are {len(nouns)} objects")
        square, targets = view.square(*picture.size), np.zeros((self.grid**2, self.codes), np.float32)
        for k in np.unique(values[values > 0]):
            share = area_means((values == k).astype(np.float32), self.grid, square)
            targets += share.reshape(-1, 1) * noun_code(nouns[int(k) - 1], self.codes)
        return targets


def upright(values: np.ndarray, picture: Picture) -> np.ndarray:
    """The decoded values [h, w] of a map, turned as its file says."""
    return values if picture.turn is None else np.asarray(Image.fromarray(values).transpose(picture.turn))


@functools.lru_cache(maxsize=4096)
def noun_code(noun: str, length: int) -> np.ndarray:
    """float32[length] of +-1: a fixed, random-looking code for a noun."""
    digest = hashlib.shake_256(noun.encode()).digest(-(-length // 8))
    return np.unpackbits(np.frombuffer(digest, np.uint8))[:length].astype(np.float32) * 2 - 1


def area_means(maps: np.ndarray, cells: int, square: tuple[float, float, float, float]) -> np.ndarray:
    """float32[h, w] -> float32[cells, cells]: area-weighted means over a square, 0 outside the map.

    square: (left, top, right, bottom) in pixels of the map.
    """
    height, width = maps.shape
    left, top, right, bottom = square
    return area_weights(height, top, bottom, cells) @ maps @ area_weights(width, left, right, cells).T


@functools.lru_cache(maxsize=64)
def area_weights(length: int, start: float, end: float, cells: int) -> np.ndarray:
    """float32[cells, length]: the share of each cell of start..end that each of `length` pixels covers."""
    pixels, edges = np.arange(length + 1) - start, np.arange(cells + 1) * ((end - start) / cells)
    low, high = np.maximum(edges[:-1, None], pixels[:-1]), np.minimum(edges[1:, None], pixels[1:])
    return (np.maximum(high - low, 0) * (cells / (end - start))).astype(np.float32)
