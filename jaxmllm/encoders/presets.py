"""Published Vision Transformers by name.

Sizes are those of `config.json` of the Hugging Face repository named in each function, normalisation that of
its `preprocessor_config.json`.

taps are hidden-state indices; blocks after the last one are not built. Other fields of ViT may be given or
replaced.
"""

from __future__ import annotations

from typing import Any

from jaxmllm.encoders.vit import HALF, IMAGENET_MEAN, IMAGENET_STD, ViT


def clip_l_336(taps: tuple[int, ...] = (23,), **fields: Any) -> ViT:
    """CLIP ViT-L/14 at 336 pixels: openai/clip-vit-large-patch14-336. LLaVA-1.5 reads tap 23 of 0..24."""
    preset = dict(
        size=336, patch=14, width=1024, layers=24, heads=16, mlp=4096, activation="quick_gelu",
        class_token=True, pre_norm=True, patch_bias=False,
    )  # fmt: skip
    return ViT(taps=taps, **preset | fields)


def siglip_so400m_384(taps: tuple[int, ...] = (27,), **fields: Any) -> ViT:
    """SigLIP SO400M/14 at 384 pixels: google/siglip-so400m-patch14-384.

    Its 27 patches a side leave 6 pixels unread. Cambrian-1 reads tap 27 with `final_norm` and pads with
    CLIP's colour (122, 116, 104).
    """
    preset = dict(
        size=384, patch=14, width=1152, layers=27, heads=16, mlp=4304, activation="gelu_tanh", eps=1e-6,
        mean=HALF, std=HALF,
    )  # fmt: skip
    return ViT(taps=taps, **preset | fields)


def dinov2_l(taps: tuple[int, ...] = (24,), **fields: Any) -> ViT:
    """DINOv2 ViT-L/14 at 518 pixels: facebook/dinov2-large."""
    preset = dict(width=1024, layers=24, heads=16, mlp=4096)
    return _dinov2(taps, preset | fields)


def dinov2_g(taps: tuple[int, ...] = (40,), **fields: Any) -> ViT:
    """DINOv2 ViT-g/14 at 518 pixels: facebook/dinov2-giant.

    SwiGLU of two thirds of 4 * width, rounded up to a multiple of 8 (Hugging Face's Dinov2SwiGLUFFN).
    """
    preset = dict(width=1536, layers=40, heads=24, mlp=(6144 * 2 // 3 + 7) // 8 * 8, gated=True, activation="silu")
    return _dinov2(taps, preset | fields)


def _dinov2(taps: tuple[int, ...], fields: dict[str, Any]) -> ViT:
    preset = dict(
        size=518, patch=14, eps=1e-6, class_token=True, layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD
    )
    return ViT(taps=taps, **preset | fields)
