"""Tiny random ConvNeXts and Swins of Hugging Face give the same numbers here and are unchanged by a round trip."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmllm.encoders.convnext import ConvNeXt
from jaxmllm.encoders.swin import Swin
from jaxmllm.weights import encoder_key_maps
from jaxmllm.weights.convert import import_weights
from jaxmllm.weights.safetensors import open_folder, write_folder
from tests.golden_case import shapes
from tests.parity import apply, close, pictures, pixels_of, randomise, reopen

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def call(model, net, images):
    """The outputs of the Hugging Face model, with all hidden states."""
    return model(pixels_of(net, images), output_hidden_states=True)


def convnext(**fields):
    sizes = dict(hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 2, 1])
    config = transformers.ConvNextConfig(**sizes, layer_scale_init_value=0.5)
    model = randomise(transformers.ConvNextModel(config), 0.1)
    return model, ConvNeXt(64, (8, 12, 16, 24), (1, 2, 2, 1), **fields, remat="none")


@pytest.mark.parametrize("tap", range(5))
def test_convnext(tap, tmp_path):
    model, net = convnext(taps=(tap,))
    model.save_pretrained(tmp_path / "theirs")
    images = pictures(64)
    params = import_weights(encoder_key_maps.convnext(net), open_folder(tmp_path / "theirs"), shapes(net, images))
    theirs = call(model, net, images)
    close(apply(net, params, images)[0].transpose(0, 3, 1, 2), theirs.hidden_states[tap])
    if tap == 4:
        again = reopen(model, tmp_path, encoder_key_maps.convnext(net), params)
        assert torch.equal(call(again, net, images).last_hidden_state, theirs.last_hidden_state)


def test_convnext_as_cambrian_joins_it(tmp_path):
    """Four stages, resized in float32 without antialias from sides 16, 8, 4, 2 to 6 and joined along channels."""
    model, net = convnext(taps=(1, 2, 3, 4), resize=6)
    model.save_pretrained(tmp_path / "theirs")
    images = pictures(64)
    params = import_weights(encoder_key_maps.convnext(net), open_folder(tmp_path / "theirs"), shapes(net, images))
    states = call(model, net, images).hidden_states[1:]
    resized = [torch.nn.functional.interpolate(s, (6, 6), mode="bilinear", align_corners=False) for s in states]
    close(apply(net, params, images)[0].transpose(0, 3, 1, 2), torch.cat(resized, 1))


def test_convnext_timm_layout(tmp_path):
    """A ConvNeXt in open_clip's layout gives the same outputs as in Hugging Face's."""
    model, net = convnext(taps=(1, 2, 3, 4), resize=4)
    model.save_pretrained(tmp_path / "theirs")
    theirs, images = open_folder(tmp_path / "theirs"), pictures(64)
    names = {
        "embeddings.patch_embeddings": "stem.0",
        "embeddings.layernorm": "stem.1",
        "encoder.stages": "stages",
        "downsampling_layer": "downsample",
        "layers": "blocks",
        "dwconv": "conv_dw",
        "layernorm": "norm",
        "pwconv1": "mlp.fc1",
        "pwconv2": "mlp.fc2",
        "layer_scale_parameter": "gamma",
    }
    renamed = {}
    for key, x in theirs.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed["visual.trunk." + ("head." + key if key.startswith("norm.") else key)] = x
    write_folder(tmp_path / "timm", renamed)
    key_map = encoder_key_maps.timm_convnext(net).under("visual.trunk.", "")
    params = import_weights(key_map, open_folder(tmp_path / "timm"), shapes(net, images))
    same = import_weights(encoder_key_maps.convnext(net), theirs, shapes(net, images))
    np.testing.assert_array_equal(apply(net, params, images), apply(net, same, images))


@pytest.mark.parametrize("size", [64, 70], ids=["whole windows", "odd sides"])
@pytest.mark.parametrize("norms", [True, False])
def test_swin(size, norms, tmp_path):
    """OneFormer's backbone: 70 pixels are 18 patches, and 9 and 5 after halving, in padded windows of 4."""
    stages = ["stage1", "stage2", "stage3"]
    config = transformers.SwinConfig(
        embed_dim=12, depths=[2, 4, 2], num_heads=[2, 3, 4], window_size=4, image_size=size, out_features=stages
    )
    model = randomise(transformers.SwinBackbone(config), 0.05)
    model.save_pretrained(tmp_path / "theirs")
    images, sizes = pictures(size), (size, 12, (2, 4, 2), (2, 3, 4), 4)
    theirs = call(model, Swin(*sizes, taps=(1,)), images)
    states = theirs.feature_maps if norms else theirs.hidden_states[1:]
    for tap, state in zip((1, 2, 3), states):
        net = Swin(*sizes, taps=(tap,), norms=norms, remat="none")
        params = import_weights(
            encoder_key_maps.swin_backbone(net), open_folder(tmp_path / "theirs"), shapes(net, images)
        )
        close(apply(net, params, images)[0].transpose(0, 3, 1, 2), state)
    net = Swin(*sizes, taps=(1, 2, 3), resize=4, norms=norms)
    key_map = encoder_key_maps.swin_backbone(net)
    params = import_weights(key_map, open_folder(tmp_path / "theirs"), shapes(net, images))
    again = reopen(model, tmp_path, key_map, params)
    for before, after in zip(theirs.feature_maps, call(again, net, images).feature_maps):
        assert torch.equal(before, after)
