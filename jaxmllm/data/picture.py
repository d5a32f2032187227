"""Picture files and target maps: opened within bounds, turned upright, and reduced to 8 bits a channel.

What a file says about itself is followed: its EXIF orientation, its transparency, the range of its type. Of a file with
several pictures (GIF, APNG, TIFF) the first is read.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import re
import warnings
from collections.abc import Sequence

import numpy as np
from PIL import ExifTags, Image

from jaxmllm.data.sources.record import BadSample, Blob, Record

MAX_PIXELS = 1 << 26  # of a picture; decoding one takes up to 16 bytes a pixel
MAX_SIDE = 1 << 14  # pixels of its longer side
GROUND = (255, 255, 255)  # what shows through transparent pixels
FORMATS = (
    "JPEG",
    "PNG",
    "WEBP",
    "GIF",
    "BMP",
    "TIFF",
    "PPM",
    "JPEG2000",
    "AVIF",
    "ICO",
    "TGA",
)  # others may run programs
TURNS = {  # EXIF orientation -> what makes the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
warnings.filterwarnings("ignore", module=r"PIL\.")  # of large and damaged pictures; a record that is refused is named


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture file, opened: its size is known, its pixels are not decoded yet."""

    image: Image.Image
    turn: Image.Transpose | None  # what makes it upright
    size: tuple[int, int]  # (width, height) when upright


def open_image(record: Record, blob: Blob, kind: str = "unreadable picture") -> Picture:
    """A picture, opened. Raises BadSample, of this kind if the file is no picture."""
    content = record.read(blob)
    try:
        image = Image.open(io.BytesIO(content), formats=known_formats())
        turn = TURNS.get(orientation(image, content)) if fits(image.size) else None
    except Exception as error:  # Pillow raises OSError, SyntaxError, ValueError, struct.error and more
        raise unreadable(record, blob, error, kind) from None
    width, height = image.size
    if not fits(image.size):
        detail = f"{width} x {height} pixels; the limits are {MAX_PIXELS} pixels, and {MAX_SIDE} along a side"
        raise record.bad("too large picture", detail, blob.path)
    across = turn is not None and turn not in (TURNS[2], TURNS[3], TURNS[4])
    return Picture(image, turn, (height, width) if across else (width, height))


def fits(size: tuple[int, int]) -> bool:
    """Whether a picture of (width, height) is within the limits."""
    return size[0] * size[1] <= MAX_PIXELS and max(size) <= MAX_SIDE


@functools.cache
def known_formats() -> list[str]:
    """Those of FORMATS that the installed Pillow reads."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def orientation(image: Image.Image, content: bytes) -> int:
    """The EXIF orientation of a file, 1 if it has none that can be read."""
    if image.format == "TIFF":  # Pillow turns it when it decodes
        return 1
    if image.format == "PNG":
        if not any(word in content for word in (b"eXIf", b"exif", b"xmp")):
            return 1
        image.load()  # EXIF may follow the pixels
    try:
        return image.getexif().get(ExifTags.Base.Orientation, 1)
    except Exception:  # as any viewer, which shows a picture with damaged EXIF as it is
        return 1


def decode(
    record: Record,
    blob: Blob,
    picture: Picture,
    min_sizes: Sequence[tuple[int, int]] = (),
    fast_jpeg: bool = False,
) -> Image.Image:
    """A picture as upright RGB, its pixels decoded. Raises BadSample for a truncated or broken file.

    fast_jpeg: decode a JPEG at 1/2, 1/4 or 1/8 of its size, as long as that is at least twice each (width, height) in
    `min_sizes`. Large JPEGs take a quarter of the time; pixels differ by 0.5 of 255 on average, by up to 62 at edges
    (docs/log.md).
    """
    image = picture.image
    try:
        if fast_jpeg:
            needed = [2 * max(sides) for sides in zip(*min_sizes)]
            # The file's width is the picture's height if it lies across. `draft` has no effect on other formats.
            image.draft("RGB", tuple(needed if picture.size == image.size else needed[::-1]))
        image = rgb(image)
        return image if picture.turn is None else image.transpose(picture.turn)
    except Exception as error:
        raise unreadable(record, blob, error) from None


def unreadable(record: Record, blob: Blob, error: Exception, kind: str = "unreadable picture") -> BadSample:
    """The error that says why a file cannot be decoded."""
    reason = re.sub(r"<_io\.BytesIO[^>]*>", "it", str(error)) or type(error).__name__
    return record.bad(kind, reason, blob.path)


def rgb(image: Image.Image) -> Image.Image:
    """A picture of any mode as RGB, composed on GROUND where it is transparent. Raises ValueError for values out of
    range, and whatever Pillow raises."""
    key = image.info.get("transparency") if image.mode in ("1", "L", "I;16", "RGB") else None
    raw_mode = image.tile[0].args if key is not None and image.tile else ""
    if image.mode[0] in "IF":
        values, top = grey_values(image)
        image, hidden = Image.fromarray(np.rint(values * np.float32(255 / top)).astype(np.uint8)), values == key
    elif key is not None:
        # Pillow widens grey of 2 and 4 bits to 8 and narrows colours of 16, but leaves the transparent value as it is.
        image = image.convert("RGB" if image.mode == "RGB" else "L")
        key = {"L;2": 85, "L;4": 17}.get(raw_mode, 1) * np.array(key) >> (8 if raw_mode == "RGB;16B" else 0)
        hidden = (np.asarray(image).reshape(*image.size[::-1], -1) == key).all(-1)
    elif image.has_transparency_data:
        layer = image.convert("RGBA")
        image = Image.new("RGB", image.size, GROUND)
        image.paste(layer, mask=layer.getchannel("A"))
    image = image.convert("RGB")
    if key is not None:
        image.paste(GROUND, mask=Image.fromarray(np.uint8(hidden) * 255))
    return image


def grey_values(image: Image.Image) -> tuple[np.ndarray, float]:
    """[h, w] values of a greyscale picture, and the largest one of its type, which is white; 0 is black.

    Floats count from 0 to 1. Raises ValueError for colours, for values out of range, and for those that all lie within
    one of the 255 steps of 8 bits, which would be lost: their range is another than the type's.
    """
    image.load()
    tags = getattr(image, "tag_v2", {})  # of a TIFF file
    if image.mode in ("1", "L"):
        top = 255
        values = np.asarray(image.convert("L"))
    elif image.mode == "F":
        values, top = np.asarray(image), 1.0
    elif image.mode == "I" and image.format == "PPM":  # Pillow scales it
        values, top = np.asarray(image), 65535
    elif image.mode[0] == "I":
        bits, signed = tags.get(ExifTags.Base.BitsPerSample, (16,))[0], tags.get(339, (1,))[0] == 2  # 339: SampleFormat
        values, top = np.asarray(image), 2 ** (bits - signed) - 1
        if image.mode == "I" and not signed:
            values = values.astype(np.int32).view(np.uint32)  # Pillow has signed numbers of 32 bits only
    else:
        raise ValueError(f"its mode is {image.mode}, not greyscale")
    least, most = float(values.min()), float(values.max())
    if not 0 <= least <= most <= top:  # also if one is not a number
        raise ValueError(f"its values are {least:g} to {most:g}, not 0 to {top:g}")
    if 0 < most < top / 255:
        raise ValueError(f"its values reach {most:g}, and white is {top:g}: scale them to the range of their type")
    if tags.get(ExifTags.Base.PhotometricInterpretation) == 0 and image.mode not in ("1", "L"):
        values = values.dtype.type(top) - values  # 0 is white; Pillow does that for 8 bits only
    return values, top
