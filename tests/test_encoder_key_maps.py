"""The key layouts of timm and open_clip at full size: all names and shapes, written down apart from our key maps."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from jaxmllm.encoders import presets
from jaxmllm.weights import encoder_key_maps
from jaxmllm.weights.convert import KeyMap
from tests.golden_case import shapes


def foreign_shapes(key_map: KeyMap, ours: dict) -> dict[str, tuple[int, ...]]:
    """Key -> shape of each tensor that a key map reads."""
    parts = {}
    for entry in key_map.entries:
        parts.setdefault(entry.key, []).append(entry.transform.shape(tuple(ours[entry.path][len(entry.index) :])))
    return {key: (sum(s[0] for s in found), *found[0][1:]) if found[0] else () for key, found in parts.items()}


def siglip_so400m() -> dict[str, tuple[int, ...]]:
    """timm/ViT-SO400M-14-SigLIP-384 in open_clip, without its pooling head."""
    c, hidden = 1152, 4304
    block = {
        "norm1.weight": (c,), "norm1.bias": (c,), "norm2.weight": (c,), "norm2.bias": (c,),
        "attn.qkv.weight": (3 * c, c), "attn.qkv.bias": (3 * c,), "attn.proj.weight": (c, c), "attn.proj.bias": (c,),
        "mlp.fc1.weight": (hidden, c), "mlp.fc1.bias": (hidden,), "mlp.fc2.weight": (c, hidden), "mlp.fc2.bias": (c,),
    }  # fmt: skip
    trunk = {
        "pos_embed": (1, 27 * 27, c), "patch_embed.proj.weight": (c, 3, 14, 14), "patch_embed.proj.bias": (c,),
        "norm.weight": (c,), "norm.bias": (c,),
    }  # fmt: skip
    trunk |= {f"blocks.{i}.{key}": shape for i in range(27) for key, shape in block.items()}
    return {f"visual.trunk.{key}": shape for key, shape in trunk.items()}


def convnext_xxlarge() -> dict[str, tuple[int, ...]]:
    """laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup in open_clip, without its head."""
    widths, depths = (384, 768, 1536, 3072), (3, 4, 30, 3)
    trunk = {"stem.0.weight": (384, 3, 4, 4), "stem.0.bias": (384,), "stem.1.weight": (384,), "stem.1.bias": (384,)}
    for i, (c, depth) in enumerate(zip(widths, depths)):
        if i:
            previous = widths[i - 1]
            down = {"0.weight": (previous,), "0.bias": (previous,), "1.weight": (c, previous, 2, 2), "1.bias": (c,)}
            trunk |= {f"stages.{i}.downsample.{key}": shape for key, shape in down.items()}
        block = {
            "gamma": (c,), "conv_dw.weight": (c, 1, 7, 7), "conv_dw.bias": (c,), "norm.weight": (c,), "norm.bias": (c,),
            "mlp.fc1.weight": (4 * c, c), "mlp.fc1.bias": (4 * c,), "mlp.fc2.weight": (c, 4 * c), "mlp.fc2.bias": (c,),
        }  # fmt: skip
        trunk |= {f"stages.{i}.blocks.{j}.{key}": shape for j in range(depth) for key, shape in block.items()}
    return {f"visual.trunk.{key}": shape for key, shape in trunk.items()}


@pytest.mark.parametrize(
    "name, key_map_of, expected, tensors, head",
    [  # tensors: their number in timm 1.0.31's models without heads
        ("siglip", encoder_key_maps.timm_vit, siglip_so400m(), 329, "attn_pool.latent"),
        ("convnext", encoder_key_maps.timm_convnext, convnext_xxlarge(), 376, "head.norm.weight"),
    ],
)
def test_open_clip_layout(name, key_map_of, expected, tensors, head):
    encoder = presets.cambrian()[name]
    ours = shapes(encoder, jax.ShapeDtypeStruct((1, encoder.size, encoder.size, 3), jnp.uint8))
    key_map = key_map_of(encoder).under("visual.trunk.", "")
    assert foreign_shapes(key_map, ours) == expected
    assert len(expected) == tensors
    assert key_map.ignores(f"visual.trunk.{head}")
