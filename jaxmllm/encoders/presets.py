"""Published encoders by name.

Sizes are those of `config.json` of the Hugging Face repository named in each function, normalisation that of
its `preprocessor_config.json`; `fit` is "pad", as LLaVA-1.5, MMFuser and Cambrian-1 prepare their pictures, unless
given.

taps are hidden-state indices; blocks after the last one are not built. Other fields of the encoder may be given or
replaced.
"""

from __future__ import annotations

from typing import Any

from jaxmllm.encoders.common import HALF, IMAGENET_MEAN, IMAGENET_STD
from jaxmllm.encoders.vit import ViT


def clip_l_336(taps: tuple[int, ...] = (23,), **fields: Any) -> ViT:
    """CLIP ViT-L/14 at 336 pixels: openai/clip-vit-large-patch14-336. LLaVA-1.5 reads tap 23 of 0..24."""
    preset = dict(
        size=336, patch=14, width=1024, layers=24, heads=16, mlp=4096, activation="quick_gelu",
        class_token=True, pre_norm=True, patch_bias=False, table=24,
    )  # fmt: skip
    return ViT(taps=taps, **preset | fields)


def siglip_so400m_384(taps: tuple[int, ...] = (27,), **fields: Any) -> ViT:
    """SigLIP SO400M/14 at 384 pixels: google/siglip-so400m-patch14-384; its 27 patches a side leave 6 pixels unread.

    timm's and open_clip's model of the same weights (timm/ViT-SO400M-14-SigLIP-384) has activation="gelu".
    """
    preset = dict(
        size=384, patch=14, width=1152, layers=27, heads=16, mlp=4304, activation="gelu_tanh", eps=1e-6,
        mean=HALF, std=HALF, table=27,
    )  # fmt: skip
    return ViT(taps=taps, **preset | fields)


def siglip2_so400m_384(taps: tuple[int, ...] = (27,), **fields: Any) -> ViT:
    """SigLIP2 SO400M/14 at 384 pixels: google/siglip2-so400m-patch14-384, stored as a SigLIP."""
    return siglip_so400m_384(taps, **fields)


def dinov2_l(taps: tuple[int, ...] = (24,), registers: int = 0, **fields: Any) -> ViT:
    """DINOv2 ViT-L/14 at 518 pixels: facebook/dinov2-large; with 4 registers dinov2-with-registers-large."""
    return _dinov2(taps, registers, dict(width=1024, layers=24, heads=16, mlp=4096) | fields)


def dinov2_g(taps: tuple[int, ...] = (40,), registers: int = 0, **fields: Any) -> ViT:
    """DINOv2 ViT-g/14 at 518 pixels: facebook/dinov2-giant; with 4 registers dinov2-with-registers-giant.

    SwiGLU of two thirds of 4 * width, rounded up to a multiple of 8 (Hugging Face's Dinov2SwiGLUFFN).
    """
    preset = dict(width=1536, layers=40, heads=24, mlp=(6144 * 2 // 3 + 7) // 8 * 8, gated=True, activation="silu")
    return _dinov2(taps, registers, preset | fields)


def _dinov2(taps: tuple[int, ...], registers: int, fields: dict[str, Any]) -> ViT:
    preset = dict(
        size=518, patch=14, eps=1e-6, class_token=True, layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD,
        table=37, registers=registers, interpolation="bicubic_antialias" if registers else "bicubic",
    )  # fmt: skip
    return ViT(taps=taps, **preset | fields)


def dinov3_l(taps: tuple[int, ...] = (24,), **fields: Any) -> ViT:
    """DINOv3 ViT-L/16: facebook/dinov3-vitl16-pretrain-lvd1689m; any size that is a multiple of 16."""
    return _dinov3(taps, dict(width=1024, layers=24, heads=16, mlp=4096) | fields)


def dinov3_h_plus(taps: tuple[int, ...] = (32,), **fields: Any) -> ViT:
    """DINOv3 ViT-H+/16, with SwiGLU: facebook/dinov3-vith16plus-pretrain-lvd1689m."""
    preset = dict(width=1280, layers=32, heads=20, mlp=5120, gated=True, activation="silu")
    return _dinov3(taps, preset | fields)


def _dinov3(taps: tuple[int, ...], fields: dict[str, Any]) -> ViT:
    preset = dict(
        size=224, patch=16, class_token=True, registers=4, layer_scale=True, key_bias=False, rope_theta=100.0,
        mean=IMAGENET_MEAN, std=IMAGENET_STD,
    )  # fmt: skip
    return ViT(taps=taps, **preset | fields)
