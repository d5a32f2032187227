"""Pixels equal those of transformers' image processors, padding that of Cambrian-1; a fast JPEG is close."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.convnext.image_processing_pil_convnext import ConvNextImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout
from jaxmllm.data.images import key_mask, padding, prepare, size_after_fit, token_mask
from jaxmllm.data.picture import Picture, decode
from jaxmllm.data.samples import visual_indices
from tests.conftest import ROOT

PHOTOS = sorted((ROOT / "tests" / "photos").glob("*.jpg"))
RAW = dict(do_rescale=False, do_normalize=False)
SIZES = [(320, 213), (213, 320), (101, 333), (57, 40), (64, 64), (1, 90), (333, 335)]


def edge(size, crop=None):
    """Arguments of a processor that resizes the shorter side and crops the middle."""
    return dict(size={"shortest_edge": size}, crop_size={"height": crop or size, "width": crop or size}, **RAW)


def square(size):
    """Arguments of a processor that resizes to a square."""
    return dict(size={"height": size, "width": size}, **RAW)


@pytest.mark.parametrize(
    "processor, encoder",
    [
        (CLIPImageProcessorPil(**edge(336)), EncoderInput(336, 24, (0, 0, 0), "crop")),
        (BitImageProcessorPil(**edge(256, 224)), EncoderInput(224, 16, (0, 0, 0), "crop", 256)),  # DINOv2
        (SiglipImageProcessorPil(**square(384)), EncoderInput(384, 27, (0, 0, 0), "squash")),
        (  # SigLIP2, fixed size
            SiglipImageProcessorPil(**square(384), resample=2),
            EncoderInput(384, 27, (0, 0, 0), "squash", None, "bilinear"),
        ),
        (
            ConvNextImageProcessorPil(size={"shortest_edge": 224}, **RAW),
            EncoderInput(224, 7, (0, 0, 0), "crop", 256),
        ),
        (ConvNextImageProcessorPil(size={"shortest_edge": 384}, **RAW), EncoderInput(384, 12, (0, 0, 0), "squash")),
    ],
    ids=["clip", "dinov2", "siglip", "siglip2", "convnext-224", "convnext-384"],
)
def test_pixels_equal_those_of_transformers(processor, encoder):
    for picture in pictures():
        theirs = processor(picture, return_tensors="np")["pixel_values"][0]
        assert theirs.dtype == np.uint8
        np.testing.assert_array_equal(prepare(picture, encoder), theirs.transpose(1, 2, 0))


def pictures():
    """Noise of many shapes, and three photographs."""
    rng = np.random.default_rng(0)
    noise = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES]
    return noise + [Image.open(photo).convert("RGB") for photo in PHOTOS[:3]]


def test_padding_equals_llavas():
    """LLaVA-1.5 and Cambrian-1 pad to a square of the mean colour; CLIP's processor then only resizes."""
    color = (122, 116, 104)
    for picture in pictures():
        width, height = picture.size
        canvas = np.full((max(picture.size), max(picture.size), 3), color, np.uint8)
        top, left = (len(canvas) - height) // 2, (len(canvas) - width) // 2
        canvas[top : top + height, left : left + width] = picture
        theirs = CLIPImageProcessorPil(**edge(336))(Image.fromarray(canvas), return_tensors="np")["pixel_values"][0]
        ours = prepare(picture, EncoderInput(336, 24, color))
        np.testing.assert_array_equal(ours, theirs.transpose(1, 2, 0))


def pixels(file, encoder, fast_jpeg):
    """A JPEG file, decoded and prepared for an encoder."""
    image = Image.open(file)
    size = image.size
    picture = Picture(image, None, size)
    return prepare(decode(None, None, picture, [size_after_fit(size, encoder)], fast_jpeg), encoder, size)


@pytest.mark.parametrize("fit", ["pad", "crop", "squash"])
def test_fast_jpeg(fit):
    """Pixels of a large JPEG differ a little (bounds: twice the measured values), those of a small one not at all."""
    encoder = EncoderInput(64, 4, (122, 116, 104), fit)
    photo = Image.open(ROOT / "tests" / "photos" / "chelsea.jpg").convert("RGB")
    for scale in (2, 5):  # the photo is 320 pixels wide
        content = io.BytesIO()
        photo.resize((320 * scale, 212 * scale), Image.Resampling.BICUBIC).save(content, "JPEG", quality=95)
        exact, fast = (pixels(content, encoder, fast_jpeg).astype(int) for fast_jpeg in (False, True))
        difference = np.abs(exact - fast)
        assert 0 < difference.max() <= 56 and difference.mean() <= 4.4
    small = io.BytesIO()
    photo.resize((100, 70)).save(small, "JPEG")
    np.testing.assert_array_equal(*(pixels(small, encoder, fast_jpeg) for fast_jpeg in (False, True)))


def test_encoders_must_see_the_same_part():
    encoders = {fit: EncoderInput(64, 4, (0, 0, 0), fit) for fit in ("pad", "crop")}
    with pytest.raises(ValueError, match="all encoders of a model must have the same fit, not {'pad': 'pad', 'crop'"):
        VisualLayout(encoders, TokenLayout(4), 0)


def test_only_padding_takes_tokens_away():
    for fit, tokens in (("pad", 24), ("crop", 36), ("squash", 36)):
        layout = VisualLayout({"a": EncoderInput(60, 6, (0, 0, 0), fit)}, TokenLayout(6, unpad=True), 0)
        assert len(visual_indices(0, (60, 40), layout)) == tokens


def test_padding_equals_the_golden_masks():
    golden = np.load(ROOT / "tests" / "goldens" / "cambrian_masks_a.npz")
    config = json.loads(str(golden["meta"]))["config"]
    coarse, fine = config["query_grid_side"], config["encoder_grid_side"]
    for k, (width, height) in enumerate(golden["inputs/image_sizes"].tolist()):
        (x, y), (fine_x, fine_y) = padding(width, height, coarse), padding(width, height, fine)
        assert golden["outputs/padding"][k].tolist() == [x, x, y, y, fine_x, fine_x, fine_y, fine_y]
        assert (token_mask(width, height, coarse, True) == golden["outputs/token_mask"][k]).all()
        assert (key_mask((fine_x, fine_y), fine) == golden["outputs/key_mask"][k]).all()


@pytest.mark.parametrize("size", [(3000, 10), (10, 3000), (1, 1)])
def test_some_tokens_stay_at_any_aspect(size):
    for grid in (1, 2, 4, 24, 27):
        assert token_mask(*size, grid, newline=False).any()


def test_prepare_pads_in_the_middle():
    encoder = EncoderInput(5, 1, (1, 2, 3))
    prepared = prepare(Image.new("RGB", (5, 2), (200, 200, 200)), encoder)
    assert (prepared[1:3] == 200).all() and (prepared[[0, 3, 4]] == (1, 2, 3)).all()
    assert prepare(Image.new("RGB", (300, 100)), EncoderInput(48, 1, (9, 9, 9))).shape == (48, 48, 3)


@pytest.mark.parametrize("size", [(3000, 7), (7, 3000), (1000, 999), (999, 1000), (1, 40), (40, 1), (30, 2500), (3, 5)])
@pytest.mark.parametrize("filter", ["bicubic", "bilinear"])
def test_padding_without_the_square_gives_the_same_pixels(size, filter, monkeypatch):
    monkeypatch.setattr("jaxmllm.data.images.STRIP", 100_000)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size[::-1], 3), np.uint8))
    encoder, side = EncoderInput(48, 6, (122, 116, 104), filter=filter), max(size)
    square = Image.new("RGB", (side, side), encoder.pad_color)
    square.paste(picture, ((side - size[0]) // 2, (side - size[1]) // 2))
    whole = np.asarray(square.resize((48, 48), Image.Resampling[filter.upper()]))
    np.testing.assert_array_equal(prepare(picture, encoder), whole)


@pytest.mark.parametrize("size", [(16000, 1), (1, 16000), (16000, 40)])
def test_thin_pictures_take_little_memory(size, monkeypatch):
    """No picture that is made has more pixels than a strip, or than the picture resized along one side."""
    made, new = [], Image.new
    monkeypatch.setattr(Image, "new", lambda mode, size, *args: made.append(size) or new(mode, size, *args))
    prepare(new("RGB", size, (200, 0, 0)), EncoderInput(48, 6, (0, 0, 0)))
    assert max(width * height for width, height in made) <= 1 << 22


def test_a_crop_of_a_thin_picture_is_refused():
    with pytest.raises(ValueError, match="with a shorter side of 336 they would be 4032000 x 336, and the limit is"):
        prepare(Image.new("RGB", (12000, 1)), EncoderInput(336, 24, (0, 0, 0), "crop"))


def test_unknown_fit_is_refused():
    with pytest.raises(ValueError, match="fit must be one of pad, crop, squash, not 'stretch'"):
        EncoderInput(64, 4, (0, 0, 0), "stretch")
    with pytest.raises(ValueError, match='edge 32 is for fit="crop" and must be 64'):
        EncoderInput(64, 4, (0, 0, 0), "crop", 32)
