"""From a picture file to square pixels of an encoder's size, and which tokens show only padding.

Pixels stay 0..255; encoders normalise them. Padding follows Cambrian-1's arithmetic exactly (tests/goldens).
"""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from jaxmllm.batch import EncoderInput
from jaxmllm.data.sources.record import BadSample, Blob, Record


def open_image(record: Record, blob: Blob) -> Image.Image:
    """The picture, opened: its size is known, its pixels are not decoded yet. Raises BadSample."""
    content = record.read(blob)
    try:
        return Image.open(io.BytesIO(content))
    except Exception as error:
        raise unreadable(record, blob, error) from None


def decode(
    record: Record, blob: Blob, image: Image.Image, min_sizes: Sequence[tuple[int, int]] = (), fast_jpeg: bool = False
) -> Image.Image:
    """The picture as RGB, its pixels decoded. Raises BadSample for a truncated or broken file.

    fast_jpeg: decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as that is at least twice each (width, height) in
    `min_sizes`. Large JPEGs take a quarter of the time; pixels differ by 0.5 of 255 on average, by up to 62 at edges
    (docs/log.md).
    """
    try:
        if fast_jpeg:
            image.draft("RGB", tuple(2 * max(sides) for sides in zip(*min_sizes)))  # no effect on other formats
        return image.convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
        raise unreadable(record, blob, error) from None


def size_after_fit(size: tuple[int, int], encoder: EncoderInput, grid: tuple[int, int] = (0, 0)) -> tuple[int, int]:
    """(width, height) of a picture after it is resized for an encoder, without padding; grid: of its tiles."""
    if any(grid):
        return size_in_tiles(size, grid, encoder.size)
    if encoder.fit == "squash":
        return encoder.size, encoder.size
    scale = (encoder.edge or encoder.size) / min(size) if encoder.fit == "crop" else encoder.size / max(size)
    return tuple(math.ceil(side * scale) for side in size)


def unreadable(record: Record, blob: Blob, error: Exception) -> BadSample:
    """The error that says why a picture cannot be decoded."""
    reason = re.sub(r"<_io\.BytesIO[^>]*>", "it", str(error)) or type(error).__name__
    return record.bad("unreadable picture", reason, blob.path)


def prepare(image: Image.Image, encoder: EncoderInput, size: tuple[int, int] | None = None) -> np.ndarray:
    """An RGB picture -> uint8[px, px, 3], made square as encoder.fit says.

    Equal to what transformers' PIL processors return before they normalise ("pad" is LLaVA's padding, then CLIP's
    processor). size: (width, height) of the original picture, if `image` was decoded smaller.
    """
    width, height = size or image.size
    method = Image.Resampling[encoder.filter.upper()]
    if encoder.fit == "crop":
        edge, short = encoder.edge or encoder.size, min(width, height)
        width, height = (edge if side == short else int(edge * side / short) for side in (width, height))
        left, top = (width - encoder.size) // 2, (height - encoder.size) // 2
        resized = image.resize((width, height), method)
        return np.asarray(resized.crop((left, top, left + encoder.size, top + encoder.size)))
    if encoder.fit == "pad" and width != height:
        width, height = image.size
        side = max(width, height)
        square = Image.new("RGB", (side, side), encoder.pad_color)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image.resize((encoder.size, encoder.size), method))


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
