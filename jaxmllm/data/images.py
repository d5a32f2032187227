"""Pictures: padded to a square, resized, and which tokens show only padding.

Pixels stay 0..255; encoders normalise them. Padding follows Cambrian's arithmetic exactly (tests/goldens).
"""

from __future__ import annotations

import io
import re

import numpy as np
from PIL import Image

from jaxmllm.batch import EncoderInput
from jaxmllm.data.sources import Blob, Record


def open_image(record: Record, blob: Blob) -> Image.Image:
    """The picture with its size known and its pixels not yet decoded. Raises BadSample."""
    content = record.read(blob)
    try:
        return Image.open(io.BytesIO(content))
    except Exception as error:
        raise unreadable(record, blob, error) from None


def prepare_all(
    record: Record, blob: Blob, image: Image.Image, encoders: dict[str, EncoderInput]
) -> dict[str, np.ndarray]:
    """Encoder name -> uint8[size, size, 3]; decodes once. Raises BadSample for a truncated or broken file."""
    try:
        image = image.convert("RGB")
    except Exception as error:  # PIL raises OSError, SyntaxError, ValueError, struct.error and more
        raise unreadable(record, blob, error) from None
    return {name: prepare(image, encoder) for name, encoder in encoders.items()}


def unreadable(record: Record, blob: Blob, error: Exception) -> Exception:
    reason = re.sub(r"<_io\.BytesIO[^>]*>", "it", str(error)) or type(error).__name__
    return record.bad("unreadable picture", reason, blob.path)


def prepare(image: Image.Image, encoder: EncoderInput) -> np.ndarray:
    """An RGB picture, centred on a square of `pad_color` and resized (bicubic): uint8[size, size, 3]."""
    width, height = image.size
    side = max(width, height)
    if width != height:
        square = Image.new("RGB", (side, side), encoder.pad_color)
        square.paste(image, ((side - width) // 2, (side - height) // 2))
        image = square
    return np.asarray(image.resize((encoder.size, encoder.size), Image.Resampling.BICUBIC))


def padding(width: int, height: int, grid: int, least: int = 1) -> tuple[int, int]:
    """(columns, rows) of a grid x grid map that show only padding of a width x height picture, on each side.

    The quotient comes first, in float64; the other order differs for a few sizes (88 x 55). At least `least` rows or
    columns stay; Cambrian-1's rule is 0, which leaves nothing of a picture above an aspect of grid : 1.
    """
    used = max(int(min(width, height) * (grid / max(width, height))), least)
    pad = (grid - used) // 2
    return (0, pad) if width > height else (pad, 0)


def key_mask(pad: tuple[int, int], grid: int) -> np.ndarray:
    """bool[grid, grid]: True where a cell shows some of the picture; pad: as from `padding`."""
    columns, rows = pad
    mask = np.zeros((grid, grid), bool)
    mask[rows : grid - rows, columns : grid - columns] = True
    return mask


def token_mask(width: int, height: int, grid: int, newline: bool, least: int = 1, per_cell: int = 1) -> np.ndarray:
    """bool[grid, grid * per_cell + newline]: which tokens of a picture stand in the row.

    A padded row loses its newline too; a padded column leaves the newlines.
    """
    mask = key_mask(padding(width, height, grid, least), grid).repeat(per_cell, 1)
    return np.concatenate([mask, mask.any(1, keepdims=True)], 1) if newline else mask
