"""From a picture to square pixels of an encoder's size, and which tokens show only padding.

Pixels stay 0..255; encoders normalise them. Padding follows Cambrian-1's arithmetic exactly (tests/goldens).
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from PIL import Image

from jaxmllm.batch import EncoderInput
from jaxmllm.data.picture import MAX_PIXELS

STRIP = 1 << 22  # pixels of a padded picture that are held at once


def size_after_fit(size: tuple[int, int], encoder: EncoderInput, grid: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """(width, height) of a picture after it is resized for an encoder, without padding; grid: of its tiles."""
    if any(grid):
        return size_in_tiles(size, grid, encoder.size)
    if encoder.fit == "squash":
        return encoder.size, encoder.size
    scale = (encoder.edge or encoder.size) / min(size) if encoder.fit == "crop" else encoder.size / max(size)
    return tuple(math.ceil(side * scale) for side in size)


def prepare(image: Image.Image, encoder: EncoderInput, size: tuple[int, int] | None = None) -> np.ndarray:
    """An RGB picture -> uint8[px, px, 3], made square as encoder.fit says.

    Equal to what transformers' PIL processors return before they normalise ("pad" is LLaVA's padding, then CLIP's
    processor). size: (width, height) of the original picture, if `image` was decoded smaller.
    """
    width, height = size or image.size
    method = Image.Resampling[encoder.filter.upper()]
    if encoder.fit == "crop":
        width, height = size_before_crop((width, height), encoder)
        left, top = (width - encoder.size) // 2, (height - encoder.size) // 2
        resized = image.resize((width, height), method)
        return np.asarray(resized.crop((left, top, left + encoder.size, top + encoder.size)))
    if encoder.fit == "pad" and width != height:
        return np.asarray(resized_square(image, encoder.size, encoder.pad_color, method))
    return np.asarray(image.resize((encoder.size, encoder.size), method))


def size_before_crop(size: tuple[int, int], encoder: EncoderInput) -> tuple[int, int]:
    """(width, height) to which a picture is resized before its middle is kept. Raises ValueError if it is too large."""
    edge, short = encoder.edge or encoder.size, min(size)
    width, height = (edge if side == short else int(edge * side / short) for side in size)
    if width * height > MAX_PIXELS:
        of = f"{size[0]} x {size[1]} pixels; with a shorter side of {edge} they would be {width} x {height}"
        raise ValueError(f"{of}, and the limit is {MAX_PIXELS} pixels")
    return width, height


def resized_square(image: Image.Image, px: int, color: tuple[int, int, int], method: int) -> Image.Image:
    """A picture in the middle of a square of `color`, resized to (px, px), without holding the whole square.

    Pillow resizes rows first, then columns, and rounds between, so the same can be done one after the other: a wide
    picture needs only its own rows of the square, a tall one some rows at a time.
    """
    width, height = image.size
    side = max(width, height)
    if width > height:
        square = Image.new("RGB", (px, side), color)
        square.paste(image.resize((px, height), method), (0, (side - height) // 2))
        return square.resize((px, px), method)
    narrow, rows = Image.new("RGB", (px, side)), max(STRIP // side, 1)
    for top in range(0, side, rows):
        part = image.crop((0, top, width, min(top + rows, side)))
        strip = Image.new("RGB", (side, part.height), color)
        strip.paste(part, ((side - width) // 2, 0))
        narrow.paste(strip.resize((px, part.height), method), (0, top))
    return narrow.resize((px, px), method)


@dataclasses.dataclass(frozen=True)
class View:
    """Which part of a picture the encoders see."""

    size: tuple[int, int]  # (width, height) of the upright picture
    encoder: EncoderInput

    def matches(self, width: int, height: int) -> bool:
        """Whether a map of this size has the picture's proportions, up to one pixel."""
        return abs(width * self.size[1] - height * self.size[0]) <= max(self.size)

    def square(self, width: int, height: int) -> tuple[float, float, float, float]:
        """(left, top, right, bottom) of what the encoders' grids cover, in the pixels of a map of the picture."""
        if self.encoder.fit == "squash":
            return 0, 0, width, height
        if self.encoder.fit == "pad":
            side = max(width, height)
            left, top = -((side - width) // 2), -((side - height) // 2)
            return left, top, left + side, top + side
        sides, px = size_before_crop(self.size, self.encoder), self.encoder.size
        starts = [(side - px) // 2 * length / side for side, length in zip(sides, (width, height))]
        return (*starts, *(start + px * length / side for start, side, length in zip(starts, sides, (width, height))))


def size_in_tiles(size: tuple[int, int], grid: tuple[int, int], tile: int) -> tuple[int, int]:
    """(width, height) of a picture that is resized, in proportion, to fit in a grid of tiles."""
    (width, height), (rows, columns) = size, grid
    across, down = columns * tile / width, rows * tile / height
    if across < down:
        return columns * tile, min(math.ceil(height * across), rows * tile)
    return min(math.ceil(width * down), columns * tile), rows * tile


def views(image: Image.Image, encoder: EncoderInput, grid: tuple[int, int], size: tuple[int, int]) -> np.ndarray:
    """The whole picture, then its tiles row by row: uint8[1 + rows * columns, px, px, 3].

    grid: (rows, columns) of tiles; (0, 0) for the whole picture alone. size: (width, height) of the original picture;
    `image` may have been decoded smaller.
    """
    (rows, columns), px = grid, encoder.size
    whole = prepare(image, encoder, size)[None]
    if not rows:
        return whole
    width, height = size_in_tiles(size, grid, px)
    canvas = Image.new("RGB", (columns * px, rows * px))
    place = (columns * px - width) // 2, (rows * px - height) // 2
    canvas.paste(image.resize((width, height), Image.Resampling[encoder.filter.upper()]), place)
    tiles = np.asarray(canvas).reshape(rows, px, columns, px, 3).swapaxes(1, 2).reshape(-1, px, px, 3)
    return np.concatenate([whole, tiles])


def padding(width: int, height: int, grid: int, min_used: int = 1) -> tuple[int, int]:
    """(columns, rows) of a grid x grid map that show only padding of a width x height picture, on each side.

    The quotient comes first, in float64; the other order differs for a few sizes (88 x 55). At least `min_used` rows or
    columns are kept; Cambrian-1's rule is 0, which leaves nothing of a picture whose aspect exceeds grid : 1.
    """
    used = max(int(min(width, height) * (grid / max(width, height))), min_used)
    pad = (grid - used) // 2
    return (0, pad) if width > height else (pad, 0)


def key_mask(pad: tuple[int, int], grid: int) -> np.ndarray:
    """bool[grid, grid]: True where a cell shows part of the picture; pad: as `padding` returns it."""
    columns, rows = pad
    mask = np.zeros((grid, grid), bool)
    mask[rows : grid - rows, columns : grid - columns] = True
    return mask


def token_mask(width: int, height: int, grid: int, newline: bool, min_used: int = 1, per_cell: int = 1) -> np.ndarray:
    """bool[grid, grid * per_cell + newline]: which tokens of a picture have a place in the row.

    A row of padding loses its newline too; a column of padding leaves all newlines.
    """
    mask = key_mask(padding(width, height, grid, min_used), grid).repeat(per_cell, 1)
    return np.concatenate([mask, mask.any(1, keepdims=True)], 1) if newline else mask
