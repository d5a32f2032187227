"""Any resolution: pixels and the order of tokens equal those of LLaVA-NeXT in transformers."""

from __future__ import annotations

import json
import types

import numpy as np
import pytest
from PIL import Image
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout
from jaxmllm.data.images import views
from jaxmllm.data.loader import make_batch
from jaxmllm.data.samples import SampleSpec, make_sample
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.record import BadSample
from jaxmllm.data.targets import MapTargets
from jaxmllm.data.templates import TOY
from jaxmllm.data.tiling import Tiling, tile_padding, tiled_visual_indices
from jaxmllm.data.tokenizer import train_word_tokenizer
from tests.test_images import PHOTOS

SIZES = [(320, 213), (213, 320), (900, 300), (300, 1000), (64, 64), (1, 90), (333, 335), (672, 671), (1000, 250)]
TILING = Tiling(tile=56)
PINPOINTS = [[rows * 56, columns * 56] for rows, columns in TILING.grids]


def test_pixels_equal_those_of_transformers():
    """The whole picture and its tiles, for pictures of many shapes."""
    processor = LlavaNextImageProcessorPil(
        size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56}, image_grid_pinpoints=PINPOINTS,
        do_rescale=False, do_normalize=False,
    )  # fmt: skip
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 256, (h, w, 3), np.uint8)) for w, h in SIZES]
    for picture in [*pictures, *(Image.open(photo).convert("RGB") for photo in PHOTOS[:3])]:
        theirs = processor(picture, return_tensors="np")["pixel_values"][0]
        ours = views(picture, EncoderInput(56, 4, (0, 0, 0), "squash"), TILING.choose(picture.size), picture.size)
        assert theirs.dtype == np.uint8
        np.testing.assert_array_equal(ours, theirs.transpose(0, 2, 3, 1))


def layout(side, newline, tasks=0, unpad=True, **tokens):
    """A layout of one encoder with side x side tokens."""
    tokens = TokenLayout(side, newline, unpad, **tokens)
    return VisualLayout({"a": EncoderInput(56, side, (0, 0, 0), "squash")}, tokens, tasks)


def test_order_of_tokens():
    """A wide picture in 1 x 2 tiles of 2 x 2 tokens: first the whole picture, then lines that run across both tiles."""
    whole, newline = [12, 13, 15, 16], [18, 19, 24, 25, 26, 21, 22, 27, 28, 29]  # slots 2, 3, 4 of 6 tokens each
    assert tiled_visual_indices(2, (100, 50), (1, 2), layout(2, True)) == whole + newline
    plain = [8, 9, 10, 11, 12, 13, 16, 17, 14, 15, 18, 19]
    assert tiled_visual_indices(2, (100, 50), (1, 2), layout(2, False)) == plain
    tasks = tiled_visual_indices(0, (100, 50), (1, 2), layout(2, False, tasks=3))
    assert tasks[-3:] == [4, 5, 6] and len(tasks) == 4 + 8 + 3
    assert tile_padding((100, 25), (1, 2), 4) == (0, 1)  # one of 4 lines above and one below
    assert len(tiled_visual_indices(0, (100, 25), (1, 2), layout(4, True))) == 16 + 2 * 9
    assert len(tiled_visual_indices(0, (100, 25), (1, 2), layout(4, True, unpad=False))) == 16 + 4 * 9


def test_samples_and_rows(tmp_path):
    """A picture takes a slot for the whole and one per tile; targets and task tokens belong to the whole."""
    Image.new("RGB", (100, 50)).save(tmp_path / "wide.png")
    Image.fromarray(np.zeros((50, 100), np.uint8)).save(tmp_path / "map.png")
    turns = [{"from": "human", "value": "<image>\nwhy"}, {"from": "gpt", "value": "because"}]
    pair = [{"from": "human", "value": "<image><image>\nwhy"}, turns[1]]
    records = [
        {"id": "one", "image": "wide.png", "conversations": turns, "instances": "map.png", "objects": ["frog"]},
        {"id": "two", "image": ["wide.png", "wide.png"], "conversations": pair},
    ]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    source, tokenizer = LlavaSource(tmp_path / "data.jsonl"), train_word_tokenizer(["why because"], tmp_path / "words")
    settings = dict(targets=MapTargets(grid=2), tiling=TILING)
    spec = SampleSpec(tokenizer, TOY, layout(2, True, tasks=1), 64, 5, **settings)
    sample = make_sample(source[0], 0, spec)
    assert sample.image_count == 3 == spec.slots((100, 50)) and sample.images["a"].shape == (3, 56, 56, 3)
    assert sample.target_mask["seg"].tolist() == [True, False, False]
    expected = tiled_visual_indices(0, (100, 50), (1, 2), spec.layout)
    assert sample.visual_index[sample.visual_index >= 0].tolist() == expected
    batch, info = make_batch([[sample], []], spec)
    assert batch.images["a"].shape == (2, 5, 56, 56, 3) and info["images"] == 3
    for place, token in zip(np.flatnonzero(sample.visual_index >= 0), expected):
        assert batch.visual_positions[0].ravel()[token] == place
    assert (batch.visual_positions >= 0).sum() == len(expected)
    with pytest.raises(BadSample, match="too many pictures: they need 6 image slots, but a row has 5"):
        make_sample(source[1], 1, spec)
    with pytest.raises(ValueError, match="image_slots must be 5 or more for this tiling, not 4"):
        SampleSpec(tokenizer, TOY, spec.layout, 64, 4, **settings)
    for changes in (dict(per_cell=2), dict(extra=3)):
        with pytest.raises(ValueError, match="tiling needs an aggregator that makes one token per cell and no others"):
            SampleSpec(tokenizer, TOY, layout(2, True, **changes), 64, 5, **settings)


@pytest.mark.torch
@pytest.mark.parametrize("newline", [False, True])
def test_order_equals_that_of_transformers(newline):
    """Compares with LlavaNextModel.pack_image_features, token by token; numbers instead of features tell them apart."""
    torch = pytest.importorskip("torch")
    from transformers import LlavaNextModel

    side = 4
    vision = types.SimpleNamespace(image_size=56, patch_size=14)
    model = types.SimpleNamespace(config=types.SimpleNamespace(vision_config=vision, image_grid_pinpoints=PINPOINTS))
    for size in SIZES:
        grid, place = TILING.choose(size), layout(side, newline)
        slots = 1 + grid[0] * grid[1]
        number = np.arange(slots * place.block).reshape(slots, side, place.tokens.columns)
        features = torch.tensor(number[:, :, :side].reshape(slots, side * side, 1).astype(np.float32))
        end = torch.tensor([-1.0]) if newline else None
        theirs, _ = LlavaNextModel.pack_image_features(
            model, [features], torch.tensor([size[::-1]]), "default", image_newline=end
        )
        ours = np.array(tiled_visual_indices(0, size, grid, place))
        if newline:
            ours = np.where(ours % place.tokens.columns == side, -1, ours)
        np.testing.assert_array_equal(ours, theirs[0][:, 0].numpy())
