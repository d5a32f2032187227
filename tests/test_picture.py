"""Picture files: orientation, transparency, ranges of types, and limits; what `make_sample` shows to an encoder."""

import io
import struct
import zlib
from functools import partial

import numpy as np
import pytest
from PIL import Image, ImageCms, ImageOps

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout
from jaxmllm.data import picture as pictures
from jaxmllm.data.picture import decode, open_image
from jaxmllm.data.samples import SampleSpec, make_sample
from jaxmllm.data.sources.record import BadSample, Blob, Record
from jaxmllm.data.templates import TOY
from jaxmllm.data.tokenizer import train_word_tokenizer
from jaxmllm.eval.answer import Question

RECORD = Record("r", "d.jsonl", {}, [], {})
RNG = np.random.default_rng(0)


def blob_of(content: bytes, name: str = "a.png") -> Blob:
    return Blob(name, lambda: content)


def saved(image: Image.Image, format: str = "PNG", **options) -> Blob:
    file = io.BytesIO()
    image.save(file, format, **options)
    return blob_of(file.getvalue())


def seen(blob: Blob, **options) -> np.ndarray:
    """uint8[h, w, 3]: the pixels that encoders are given."""
    return np.asarray(decode(RECORD, blob, open_image(RECORD, blob), **options))


def refusal(blob: Blob) -> BadSample:
    with pytest.raises(BadSample) as caught:
        seen(blob)
    assert "\n" not in str(caught.value)
    return caught.value


def turned(format: str, orientation: int, image: Image.Image, **options) -> Blob:
    exif = image.getexif()
    exif[0x0112] = orientation
    return saved(image, format, exif=exif, **options)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    "format, options",
    [("PNG", {}), ("WEBP", {"lossless": True}), ("TIFF", {}), ("JPEG", {}), ("AVIF", {"quality": 100})],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_pictures_are_turned_upright(format, options, orientation):
    """As Pillow's own exif_transpose does, and the size is known before the pixels are."""
    if format not in pictures.known_formats():
        pytest.skip(f"this Pillow cannot read {format}")
    corners = np.zeros((16, 40, 3), np.uint8)
    corners[:8, :20], corners[8:, :20], corners[:8, 20:] = (255, 0, 0), (0, 255, 0), (0, 0, 255)
    blob = turned(format, orientation, Image.fromarray(corners), **options)
    expected = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(blob.read()))).convert("RGB"))
    assert expected.shape == ((16, 40, 3) if orientation < 5 else (40, 16, 3))
    assert open_image(RECORD, blob).size == expected.shape[1::-1]
    np.testing.assert_array_equal(seen(blob), expected)


@pytest.mark.parametrize("orientation", [1, 3, 5, 6, 8])
def test_a_fast_jpeg_is_turned_too(orientation):
    noise = Image.fromarray(RNG.integers(0, 255, (20, 50, 3), np.uint8)).resize((1600, 640))
    blob = turned("JPEG", orientation, noise)
    exact = seen(blob)
    fast = seen(blob, min_sizes=[(100, 40) if orientation < 5 else (40, 100)], fast_jpeg=True)
    assert (8 * fast.shape[0], 8 * fast.shape[1]) == exact.shape[:2]
    small = np.asarray(Image.fromarray(exact).resize(fast.shape[1::-1], Image.Resampling.BOX)).astype(int)
    assert np.abs(small - fast).mean() < 3


def test_questions_of_chat_and_eval_are_turned_too(tmp_path):
    layout = VisualLayout({"a": EncoderInput(8, 2, (9, 9, 9))}, TokenLayout(grid=2), 0)
    spec = SampleSpec(train_word_tokenizer(["why"], tmp_path / "words"), TOY, layout, seq_len=64, image_slots=1)
    halves = np.zeros((8, 16, 3), np.uint8)
    halves[:, :8, 0], halves[:, 8:, 2] = 255, 255
    (tmp_path / "a.jpg").write_bytes(turned("JPEG", 6, Image.fromarray(halves), quality=100).read())
    sample = make_sample(Question("why", (str(tmp_path / "a.jpg"),)).record(), 0, spec, reply_open=True)
    shown = sample.images["a"][0]
    assert np.abs(shown[:, [0, 7]].astype(int) - 9).max() < 5  # the padding is left and right
    assert (shown[0, 3:5, 0] > 200).all() and (shown[7, 3:5, 2] > 200).all()


def test_an_orientation_after_the_pixels_or_in_xmp_counts():
    image = Image.new("RGB", (8, 4))
    content = turned("PNG", 6, image).read()
    start = content.index(b"eXIf") - 4
    length = struct.unpack(">I", content[start : start + 4])[0] + 12
    chunk, rest = content[start : start + length], content[:start] + content[start + length :]
    end = rest.index(b"IEND") - 4
    assert open_image(RECORD, blob_of(rest[:end] + chunk + rest[end:])).size == (4, 8)
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:Description tiff:Orientation="8"/></x:xmpmeta>'
    assert open_image(RECORD, saved(image, "JPEG", xmp=xmp)).size == (4, 8)


def test_damaged_exif_is_no_orientation():
    assert open_image(RECORD, saved(Image.new("RGB", (8, 4)), "JPEG", exif=b"Exif\x00\x00broken")).size == (8, 4)
    assert open_image(RECORD, turned("JPEG", 9, Image.new("RGB", (8, 4)))).size == (8, 4)


def png(kind: int, bits: int, rows: np.ndarray, **chunks: bytes) -> Blob:
    """A PNG file of a color type and depth; rows: uint8[h, bytes of a row]."""
    height, width = rows.shape[0], rows.shape[1] * 8 // (bits * {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[kind])
    parts = {"IHDR": struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0), **chunks}
    parts |= {"IDAT": zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows)), "IEND": b""}
    content = b"\x89PNG\r\n\x1a\n"
    for name, body in parts.items():
        named = name.encode() + body
        content += struct.pack(">I", len(body)) + named + struct.pack(">I", zlib.crc32(named))
    return blob_of(content)


def composed(color: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    """Colours [h, w, 3] with alpha 0..1 [h, w] on white."""
    return color * alpha[..., None] + 255.0 * (1 - alpha[..., None])


COLOR = RNG.integers(0, 255, (6, 8, 3), np.uint8)
ALPHA = np.where(RNG.random((6, 8)) < 0.3, 0, RNG.integers(0, 256, (6, 8))).astype(np.uint8)
GREY = COLOR[..., 0]


@pytest.mark.parametrize("format", ["PNG", "WEBP", "TIFF"])
def test_transparency_is_composed_on_white(format):
    options = {"lossless": True, "exact": True} if format == "WEBP" else {}
    rgba = Image.fromarray(np.dstack([COLOR, ALPHA]))
    assert np.abs(seen(saved(rgba, format, **options)) - composed(COLOR, ALPHA / 255)).max() <= 1
    opaque = Image.fromarray(np.dstack([COLOR, np.full_like(ALPHA, 255)]))
    np.testing.assert_array_equal(seen(saved(opaque, format, **options)), COLOR)


def test_transparent_grey_is_composed_on_white():
    expected = composed(np.dstack([GREY] * 3), ALPHA / 255)
    assert np.abs(seen(saved(Image.fromarray(np.dstack([GREY, ALPHA])))) - expected).max() <= 1
    wide = np.dstack([GREY, GREY, ALPHA, ALPHA])  # 16 bits
    assert np.abs(seen(png(4, 16, wide.reshape(6, -1))) - expected).max() <= 1


@pytest.mark.parametrize("alphas", [bytes([0]), bytes([255, 0, 255]), bytes([128, 0, 200])])
def test_transparent_palettes(alphas):
    colors = RNG.integers(0, 255, (3, 3), np.uint8)
    index = RNG.integers(0, 3, (6, 8)).astype(np.uint8)
    blob = png(3, 8, index, PLTE=colors.tobytes(), tRNS=alphas)
    alpha = np.array([*alphas, 255, 255][:3])
    assert np.abs(seen(blob) - composed(colors[index], alpha[index] / 255)).max() <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_one_transparent_grey(bits):
    top = 2**bits - 1
    values = RNG.integers(0, top + 1, (6, 16))
    values[0, :5], values[1, 0] = top // 2, top
    if bits == 16:
        rows = values.astype(">u2").view(np.uint8)
    else:
        per_byte = 8 // bits
        packed = values.reshape(6, -1, per_byte) << (np.arange(per_byte)[::-1] * bits)
        rows = packed.sum(-1).astype(np.uint8)
    blob = png(0, bits, rows, tRNS=struct.pack(">H", top // 2))
    expected = np.where(values == top // 2, 255, values * 255 / top)
    assert np.abs(seen(blob) - expected[..., None]).max() <= 0.5


def test_one_transparent_color():
    key = struct.pack(">3H", *COLOR[2, 3])
    expected = np.where((COLOR[2, 3] == COLOR).all(-1, keepdims=True), 255, COLOR)
    np.testing.assert_array_equal(seen(png(2, 8, COLOR.reshape(6, -1), tRNS=key)), expected)
    wide = np.repeat(COLOR, 2, axis=-1)  # 16 bits
    key = struct.pack(">3H", *(COLOR[2, 3].astype(int) * 257))
    np.testing.assert_array_equal(seen(png(2, 16, wide.reshape(6, -1), tRNS=key)), expected)


def test_the_first_picture_of_several_is_read():
    frames = [Image.new("RGB", (8, 6), color) for color in ("red", "blue")]
    for format in ("GIF", "PNG", "TIFF", "WEBP"):
        blob = saved(
            frames[0],
            format,
            save_all=True,
            append_images=frames[1:],
            **({"lossless": True} if format == "WEBP" else {}),
        )
        assert (seen(blob) == (255, 0, 0)).all(), format


def ramp(top: float, dtype) -> np.ndarray:
    return np.tile(np.linspace(0, top, 96), (4, 1)).astype(dtype)


@pytest.mark.parametrize(
    "values, format",
    [(ramp(65535, np.uint16), "PNG"), (ramp(65535, np.uint16), "TIFF"), (ramp(65535, ">u2"), "TIFF"),
     (ramp(65535, np.uint16), "PPM"), (ramp(65535, np.uint16), "JPEG2000"), (ramp(2**31 - 1, np.int32), "TIFF"),
     (ramp(1, np.float32), "TIFF")],
    ids=["png", "tiff", "tiff, big-endian", "ppm", "jpeg2000", "int32", "float"],
)  # fmt: skip
def test_the_range_of_the_type_becomes_8_bits(values, format):
    options = {"irreversible": False} if format == "JPEG2000" else {}
    found = seen(saved(Image.fromarray(values), format, **options))
    assert found.shape == (4, 96, 3)
    assert np.abs(found - np.linspace(0, 255, 96)[None, :, None]).max() <= 1


@pytest.mark.parametrize(
    "values, says",
    [(ramp(65535, np.int32), "its values reach 65535, and white is 2.14748e+09: scale them to the range of their type"),
     (ramp(255, np.uint16), "its values reach 255, and white is 65535"),
     (ramp(-100000, np.int32), "its values are -100000 to 0, not 0 to"),
     (ramp(255, np.float32), "its values are 0 to 255, not 0 to 1"),
     (ramp(-1, np.float32), "its values are -1 to"),
     (ramp(np.nan, np.float32), "not 0 to 1"),
     (ramp(1e-3, np.float32), "its values reach 0.001, and white is 1")],
)  # fmt: skip
def test_values_out_of_range_are_refused(values, says):
    assert says in refusal(saved(Image.fromarray(values), "TIFF")).reason


def test_an_unsigned_tiff_of_32_bits():
    values = ramp(2**32 - 1, np.uint32)
    content = saved(Image.fromarray(values.view(np.int32)), "TIFF").read()
    signed, unsigned = (struct.pack("<HHIHH", 339, 3, 1, kind, 0) for kind in (2, 1))
    assert signed in content
    assert np.abs(seen(blob_of(content.replace(signed, unsigned))) - np.linspace(0, 255, 96)[None, :, None]).max() <= 1


def test_white_is_zero_in_some_tiffs():
    blob = saved(Image.fromarray(ramp(65535, np.uint16)), "TIFF", tiffinfo={262: 0})
    assert np.abs(seen(blob) - np.linspace(255, 0, 96)[None, :, None]).max() <= 1


@pytest.mark.parametrize("mode", ["1", "L", "P", "CMYK", "YCbCr", "HSV"])
def test_other_modes_keep_their_colors(mode):
    image = Image.fromarray(np.kron(COLOR, np.ones((16, 16, 1), np.uint8)))
    format = "JPEG" if mode in ("CMYK", "YCbCr") else "PNG"
    converted = image.convert("RGB" if mode == "HSV" else mode)
    found = seen(saved(converted, format, **({"quality": 100, "subsampling": 0} if format == "JPEG" else {})))
    assert np.abs(found - np.asarray(converted.convert("RGB")).astype(int)).mean() < 2


@pytest.mark.parametrize("size", [(20000, 1), (1, 20000), (9000, 9000)])
def test_too_large_pictures_are_refused_before_they_are_decoded(size, monkeypatch):
    blob = saved(Image.new("1", size))
    monkeypatch.setattr(Image.Image, "load", partial(pytest.fail, "decoded"))
    says = f"too large picture: {size[0]} x {size[1]} pixels; the limits are 67108864 pixels, and 16384 along a side"
    assert refusal(blob).reason == says


def test_formats_that_run_programs_are_refused():
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n"
    assert "cannot identify" in refusal(blob_of(eps)).reason


def test_lab_is_converted():
    image = Image.fromarray(COLOR)
    srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    there = ImageCms.applyTransform(image, ImageCms.buildTransform(srgb, lab, "RGB", "LAB"))
    assert np.abs(seen(saved(there, "TIFF")) - COLOR.astype(int)).mean() < 3  # 8 bits of lightness are coarse
