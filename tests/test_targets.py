"""Target maps: ranges of their types, what encoders see of them, and pictures that lie on their side."""

import dataclasses
import json

import numpy as np
import pytest
from PIL import Image

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout
from jaxmllm.data.images import View
from jaxmllm.data.samples import SampleSpec, make_sample
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.record import BadSample
from jaxmllm.data.targets import MapTargets, area_means
from jaxmllm.data.templates import TOY
from jaxmllm.data.tokenizer import train_word_tokenizer
from tests.records import WORDS, chat

GRID = 4
TARGETS = MapTargets(GRID, cells=1, depth_mean=0.0, depth_std=1.0)
RAMP = np.tile(np.linspace(0, 1, 40), (40, 1))
COLUMNS = RAMP[0].reshape(GRID, -1).mean(1)  # the means of the columns of cells


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_word_tokenizer([WORDS], tmp_path_factory.mktemp("words"))


def spec_of(tokenizer, fit="pad", edge=None) -> SampleSpec:
    layout = VisualLayout({"a": EncoderInput(16, GRID, (1, 2, 3), fit, edge)}, TokenLayout(grid=GRID), 0)
    return SampleSpec(tokenizer, TOY, layout, seq_len=100, image_slots=1, targets=TARGETS)


def sample(folder, tokenizer, fit="pad", edge=None, **data):
    """The sample of a record about "a.png", which must exist."""
    record = {"id": "r", "image": "a.png", "conversations": chat("<image> a", "one"), **data}
    (folder / "d.jsonl").write_text(json.dumps(record) + "\n")
    return make_sample(LlavaSource(folder / "d.jsonl")[0], 0, spec_of(tokenizer, fit, edge))


def depth(found) -> np.ndarray:
    assert found.target_mask["depth"].all()
    return found.targets["depth"][0].reshape(GRID, GRID)


@pytest.mark.parametrize(
    "name, top, dtype",
    [("d.png", 255, np.uint8), ("d.png", 65535, np.uint16), ("d.tif", 2**31 - 1, np.int32), ("d.tif", 1, np.float32)],
)
def test_depth_counts_in_the_range_of_its_type(tmp_path, tokenizer, name, top, dtype):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    Image.fromarray((RAMP * top).astype(dtype)).save(tmp_path / name)
    found = depth(sample(tmp_path, tokenizer, depth=name))
    np.testing.assert_allclose(found, np.tile(COLUMNS, (GRID, 1)), atol=0.003)


@pytest.mark.parametrize(
    "values, says",
    [((RAMP * 65535).astype(np.int32), "its values reach 65535, and white is 2.14748e+09"),
     ((RAMP * 255).astype(np.float32), "its values are 0 to 255, not 0 to 1"),
     (np.zeros((40, 40, 3), np.uint8), "its mode is RGB, not greyscale"),
     (np.zeros((40, 20), np.uint8), "target map of another shape: it has 20 x 40 pixels, and"),
     (np.zeros((20, 40), np.uint8), "target map of another shape: it has 40 x 20 pixels")],
)  # fmt: skip
def test_other_depth_maps_are_refused(tmp_path, tokenizer, values, says):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "d.tif")
    with pytest.raises(BadSample) as caught:
        sample(tmp_path, tokenizer, depth="d.tif")
    assert says in caught.value.reason and caught.value.path.endswith("d.tif")


@pytest.mark.parametrize(
    "values, objects, says",
    [(np.full((40, 40), 1, np.float32), ["frog"], "its mode is F, not whole numbers"),
     (np.full((40, 40), 3, np.uint8), ["frog"], "instance 3, but there are 1 objects"),
     (np.full((40, 40), 1, np.uint8), "frog", "`objects` is no list of nouns"),
     (np.full((40, 40), 1, np.uint8), [1], "`objects` is no list of nouns")],
)  # fmt: skip
def test_other_instance_maps_are_refused(tmp_path, tokenizer, values, objects, says):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    Image.fromarray(values).save(tmp_path / "i.tif")
    with pytest.raises(BadSample) as caught:
        sample(tmp_path, tokenizer, instances="i.tif", objects=objects)
    assert says in caught.value.reason


def test_palettes_are_instances(tmp_path, tokenizer):
    Image.new("RGB", (40, 40), "red").save(tmp_path / "a.png")
    image = Image.fromarray((RAMP > 0.5).astype(np.uint8))
    image.save(tmp_path / "grey.png")
    image.putpalette([0, 0, 0, 255, 0, 0])  # the mode is P
    image.save(tmp_path / "palette.png")
    grey, palette = (
        sample(tmp_path, tokenizer, instances=name, objects=["frog"]).targets["seg"]
        for name in ("grey.png", "palette.png")
    )
    assert grey.any()
    np.testing.assert_array_equal(grey, palette)


@pytest.mark.parametrize("fit, edge", [("pad", None), ("squash", None), ("crop", None), ("crop", 20)])
@pytest.mark.parametrize("size", [(80, 40), (40, 80), (90, 50), (48, 48), (31, 77)])
def test_targets_show_what_the_encoder_sees(tmp_path, tokenizer, fit, edge, size):
    """A picture of the depth map itself, prepared for the encoder, has in its cells the means that are the targets."""
    width, height = size
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    near = np.rint((0.2 + 0.5 * across + 0.3 * down) * 255).astype(np.uint8)
    Image.fromarray(near).convert("RGB").save(tmp_path / "a.png")
    Image.fromarray(near).save(tmp_path / "depth.png")
    found = sample(tmp_path, tokenizer, fit, edge, depth="depth.png")
    shown = found.images["a"][0, ..., 0] / 255
    shown[(found.images["a"][0] == (1, 2, 3)).all(-1)] = 0  # padding
    cells = shown.reshape(GRID, 4, GRID, 4).mean((1, 3))
    inside = cells > 0.15 if fit == "pad" else np.ones((GRID, GRID), bool)  # the filter blurs the border of the padding
    assert inside.any()
    whole = np.abs(depth(found) - cells)[inside]
    assert np.median(whole) < 0.01 and whole.max() < (0.06 if fit == "pad" else 0.02)


def test_the_map_may_have_another_size(tmp_path, tokenizer):
    Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
    near = np.tile(np.linspace(0, 255, 40), (20, 1)).astype(np.uint8)
    for scale in (1, 3):
        Image.fromarray(np.kron(near, np.ones((scale, scale), np.uint8))).save(tmp_path / f"{scale}.png")
    one, three = (depth(sample(tmp_path, tokenizer, depth=f"{scale}.png")) for scale in (1, 3))
    np.testing.assert_allclose(one, three, atol=1e-5)
    assert not one[[0, 3]].any()


def test_maps_beside_a_picture_that_lies_on_its_side(tmp_path, tokenizer):
    """The map is upright; only its own EXIF turns it."""
    lying = Image.new("RGB", (80, 40))
    exif = lying.getexif()
    exif[0x0112] = 6
    lying.save(tmp_path / "a.png", exif=exif)
    upright = np.tile(np.linspace(0, 255, 80)[:, None], (1, 40)).astype(np.uint8)
    image = Image.fromarray(upright)
    image.save(tmp_path / "upright.png")
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "turned.png", exif=exif)
    image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "lying.png")
    expected = depth(sample(tmp_path, tokenizer, depth="upright.png"))
    assert (np.diff(expected[:, 1]) > 0.2).all() and not expected[:, 0].any()
    np.testing.assert_array_equal(depth(sample(tmp_path, tokenizer, depth="turned.png")), expected)
    with pytest.raises(BadSample, match="it has 80 x 40 pixels, and the upright picture 40 x 80"):
        sample(tmp_path, tokenizer, depth="lying.png")


def test_area_means_of_a_part():
    """Cells of half a pixel, and cells that reach beyond the map."""
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    np.testing.assert_allclose(area_means(values, 2, (1, 1, 2, 2)), [[5, 5], [5, 5]])
    np.testing.assert_allclose(area_means(values, 1, (0.5, 0, 2.5, 1)), [[(0 * 0.5 + 1 + 2 * 0.5) / 2]])
    np.testing.assert_allclose(area_means(values, 1, (-1, 0, 1, 2)), [[(0 + 4) / 4]])


def test_crops_of_different_parts_have_no_common_targets(tokenizer):
    encoders = {str(edge): EncoderInput(16, GRID, (0, 0, 0), "crop", edge) for edge in (16, 20)}
    layout = VisualLayout(encoders, TokenLayout(grid=GRID), 0)
    spec = dataclasses.replace(spec_of(tokenizer), targets=None, layout=layout)
    with pytest.raises(ValueError, match="targets need encoders that see the same part of a picture"):
        dataclasses.replace(spec, targets=TARGETS)


def test_the_square_of_a_view():
    view = View((80, 40), EncoderInput(20, GRID, (0, 0, 0), "crop", 25))
    assert view.square(40, 20) == (12, 1.6, 28, 17.6)  # resized to 50 x 25, of which 15..35 and 2..22 are kept
