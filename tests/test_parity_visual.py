"""Parts of the visual path, compared with PyTorch's operations and with transformers' modules with random weights."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.aggregators.c_abstractor import RegBlock
from jaxmllm.aggregators.pixel_shuffle import PixelShuffle
from jaxmllm.aggregators.qformer import QFormer
from jaxmllm.aggregators.resampler import Resampler
from jaxmllm.batch import FeatureMap
from jaxmllm.nn.maps import adaptive_pool, resize
from jaxmllm.nn.primitives import Conv
from jaxmllm.weights import key_maps
from jaxmllm.weights.convert import CONV, copy, export_weights, import_weights
from tests.golden_case import shapes
from tests.parity import apply, close, randomise

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

F = torch.nn.functional


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def channels_first(x: np.ndarray):
    return torch.from_numpy(np.ascontiguousarray(x)).permute(0, 3, 1, 2)


def tokens(aggregator, params, cells, mask=None):
    mask = np.ones(cells.shape[:3], bool) if mask is None else mask
    return apply(aggregator, params, {"a": FeatureMap(jnp.asarray(cells))}, {"a": jnp.asarray(mask)}).tokens


@pytest.mark.parametrize("size", [(24, 24), (27, 27), (16, 11), (5, 40)])
def test_resize_and_pool(size):
    x = random(2, 27, 16, 3)
    theirs = channels_first(x)
    found = F.interpolate(theirs, size=size, mode="bilinear", align_corners=False)
    close(resize(jnp.asarray(x), *size), found.permute(0, 2, 3, 1))
    nearest = F.interpolate(theirs, size=size, mode="nearest-exact")
    close(resize(jnp.asarray(x), *size, "nearest"), nearest.permute(0, 2, 3, 1))
    close(adaptive_pool(jnp.asarray(x), *size), F.adaptive_avg_pool2d(theirs, size).permute(0, 2, 3, 1))


@pytest.mark.parametrize("depthwise", [False, True])
@pytest.mark.parametrize("side", [3, 5])
def test_convolution(side, depthwise):
    x, kernel, bias = random(2, 7, 6, 4), random(side, side, 1 if depthwise else 4, 4, seed=1), random(4, seed=2)
    ours = apply(Conv(4, side, depthwise=depthwise), {"kernel": kernel, "bias": bias}, jnp.asarray(x))
    groups = 4 if depthwise else 1
    weight = torch.from_numpy(CONV.save(kernel).copy())
    theirs = F.conv2d(channels_first(x), weight, torch.from_numpy(bias), padding=side // 2, groups=groups)
    close(ours, theirs.permute(0, 2, 3, 1))


def test_qformer():
    """Layers with and without cross-attention to the image."""
    sizes = dict(hidden_size=24, num_hidden_layers=5, num_attention_heads=3, intermediate_size=40)
    config = transformers.Blip2QFormerConfig(
        **sizes, encoder_hidden_size=16, cross_attention_frequency=2, hidden_act="gelu"
    )
    theirs = randomise(transformers.Blip2QFormerModel(config))
    queries, image = torch.from_numpy(random(1, 4, 24)), random(2, 3, 5, 16, seed=1)
    linear = randomise(torch.nn.Linear(24, 12))
    weights = {f"qformer.{k}": v for k, v in theirs.state_dict().items()}
    weights |= {"query_tokens": queries} | {f"language_projection.{k}": v for k, v in linear.state_dict().items()}
    ours = QFormer(tokens=4, width=24, depth=5, heads=3, mlp=40)
    mask = np.ones((2, 3, 5), bool)
    mask[1, 0] = False
    example = {"a": FeatureMap(jnp.asarray(image))}, {"a": jnp.asarray(mask)}
    key_map, foreign = key_maps.qformer(ours), {k: v.numpy() for k, v in weights.items()}
    params = import_weights(key_map, foreign, shapes(ours, *example))
    assert all(np.array_equal(x, foreign[k]) for k, x in export_weights(key_map, params).items())
    states = theirs(
        query_embeds=queries.expand(2, -1, -1),
        encoder_hidden_states=torch.from_numpy(image).flatten(1, 2),
        encoder_attention_mask=torch.from_numpy(mask).flatten(1).long(),
    )
    close(tokens(ours, params, image, mask), linear(states.last_hidden_state))


def test_resampler():
    from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

    config = transformers.IdeficsConfig(vision_config={"embed_dim": 16})
    theirs = randomise(IdeficsPerceiverResampler(config, 16, depth=2, n_heads=3, head_dim=8, n_latents=5))
    image = random(2, 4, 3, 16)
    ours = Resampler(16, tokens=5, depth=2, heads=3, head_dim=8)
    example = {"a": FeatureMap(jnp.asarray(image))}, {"a": jnp.ones((2, 4, 3), bool)}
    key_map = key_maps.resampler(2) + copy("eye", "projector/kernel") + copy("zero", "projector/bias")
    foreign = {k: v.numpy() for k, v in theirs.state_dict().items()}
    last = {"eye": np.eye(16, dtype=np.float32), "zero": np.zeros(16, np.float32)}
    params = import_weights(key_map, foreign | last, shapes(ours, *example))
    close(tokens(ours, params, image), theirs(torch.from_numpy(image).flatten(1, 2)))


def test_pixel_shuffle():
    from transformers.models.idefics3.modeling_idefics3 import Idefics3Connector

    text = {"hidden_size": 8, "num_attention_heads": 2, "model_type": "llama"}
    config = transformers.Idefics3Config(vision_config={"hidden_size": 6}, text_config=text, scale_factor=3)
    theirs, image = randomise(Idefics3Connector(config)), random(2, 6, 6, 6)
    kernel = theirs.modality_projection.proj.weight.detach().numpy().T
    params = {"projector/linear_0/kernel": kernel, "projector/linear_0/bias": np.zeros(8, np.float32)}
    close(tokens(PixelShuffle(2, 3, depth=1), params, image), theirs(torch.from_numpy(image).flatten(1, 2)))


def test_block_of_c_abstractor():
    """Compares with timm's RegNet bottleneck (depthwise, squeeze and excitation), written in PyTorch's operations."""
    x, block = random(2, 5, 6, 8), RegBlock(12)
    ours = {path: random(*s, seed=i) * 0.5 for i, (path, s) in enumerate(shapes(block, jnp.asarray(x)).items())}

    def weight(path):
        return torch.from_numpy(ours[path])

    def conv1x1(y, name, bias=None):
        return F.conv2d(y, weight(f"{name}/kernel").T[:, :, None, None], bias)

    def norm(y, name):
        y = F.layer_norm(y.permute(0, 2, 3, 1), (12,), weight(f"{name}/scale"), weight(f"{name}/bias"))
        return y.permute(0, 3, 1, 2)

    theirs = channels_first(x)
    y = F.silu(norm(conv1x1(theirs, "conv1"), "norm1"))
    kernel = torch.from_numpy(CONV.save(ours["conv2/kernel"]).copy())
    y = F.silu(norm(F.conv2d(y, kernel, padding=1, groups=12), "norm2"))
    gate = F.silu(conv1x1(y.mean((2, 3), keepdim=True), "gate_down", weight("gate_down/bias")))
    y = y * torch.sigmoid(conv1x1(gate, "gate_up", weight("gate_up/bias")))
    y = F.silu(norm(conv1x1(y, "conv3"), "norm3") + norm(conv1x1(theirs, "shortcut"), "shortcut_norm"))
    close(apply(block, ours, jnp.asarray(x)), y.permute(0, 2, 3, 1))
