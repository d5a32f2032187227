"""The fields of our encoders as the config.json of a Hugging Face folder gives them (hf_config.py)."""

from __future__ import annotations

from collections.abc import Sequence
from math import isqrt
from typing import Any

from jaxmllm.weights.hf_config import ACTIVATIONS, Description, only, part_config, select_strategy

VIT = {
    "patch": "patch_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "eps": "layer_norm_eps", "activation": "hidden_act",
}  # fmt: skip
CHOICES = ("size", "taps", "interpolation")  # fields that may differ from the folder's


def encoder(config: Any, taps: Sequence[int] | None = None, size: int | None = None) -> Description:
    """The encoder of a folder.

    taps: indices of hidden states, negative ones from the end; default: LLaVA's vision_feature_layer, else the last.
    size: pixels per side; default: image_size.
    """
    vision = part_config(config, "encoder")
    kinds = {"convnext": convnext, "swin": swin}
    fields, refused = kinds.get(vision.model_type, vit)(vision)
    if "size" not in fields:
        fields["size"] = square(vision, "image_size")
    refused += only(vision, num_channels=3)
    if taps is None and config.model_type == "llava":
        layers = config.vision_feature_layer
        taps = [layers] if isinstance(layers, int) else layers
        refused += only(config, **select_strategy(config))
    count = 1 + (len(fields["depths"]) if "depths" in fields else fields["layers"])
    fields["taps"] = tuple(t + count if t < 0 else t for t in taps or (-1,))
    fields["size"] = size or fields["size"]
    if config.model_type == "oneformer":
        fields["norms"] = True
    kind = {"convnext": "ConvNeXt", "swin": "Swin"}.get(vision.model_type, "ViT")
    if kind == "Swin" and not fields["norms"]:
        refused += small_maps(fields)
    theirs = VIT | {"table": "image_size // patch_size", "registers": "num_register_tokens"}
    names = {field: theirs.get(field, field) for field in fields if field not in CHOICES}
    return Description(kind, fields, names, refused)


def square(config: Any, name: str) -> int:
    """A size that transformers gives as a number or as (height, width). Raises ValueError unless it is square."""
    value = getattr(config, name)
    sides = set(value) if isinstance(value, (list, tuple)) else {value}
    if len(sides) > 1:
        raise ValueError(f"{name} {value} is not square")
    return sides.pop()


def vit(vision: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Vision Transformers: -> (fields, what cannot be built)."""
    name, patch = vision.model_type, square(vision, "patch_size")
    fields = {ours: getattr(vision, theirs) for ours, theirs in VIT.items() if ours != "activation"} | {"patch": patch}
    refused = ()
    if vision.hidden_act in ACTIVATIONS:
        fields["activation"] = ACTIVATIONS[vision.hidden_act]
    else:
        refused = (f"hidden_act {vision.hidden_act!r} cannot be built here, only one of {', '.join(ACTIVATIONS)}",)
    dino, clip = name.startswith("dino"), name == "clip_vision_model"
    fields |= dict(class_token=dino or clip, pre_norm=clip, patch_bias=not clip, layer_scale=dino)
    fields |= dict(gated=False, registers=getattr(vision, "num_register_tokens", 0), rope_theta=None, key_bias=True)
    if name == "siglip2_vision_model":  # NaFlex: any shape of picture, here squares of as many patches as the table
        side = isqrt(vision.num_patches)
        refused += only(vision, num_patches=side**2)
        fields |= dict(size=side * patch, table=side, interpolation="bilinear_antialias")
    elif name != "dinov3_vit":
        fields["table"] = square(vision, "image_size") // patch
    if not dino:
        return fields | {"mlp": vision.intermediate_size}, refused
    if name == "dinov3_vit":
        fields |= dict(mlp=vision.intermediate_size, rope_theta=vision.rope_theta, key_bias=vision.key_bias)
        fields |= dict(gated=vision.use_gated_mlp)
        return fields, refused + only(vision, query_bias=True, value_bias=True, proj_bias=True, mlp_bias=True)
    hidden = int(vision.hidden_size * vision.mlp_ratio)
    if vision.use_swiglu_ffn:  # transformers' Dinov2SwiGLUFFN
        fields |= dict(gated=True, activation="silu")
        hidden = (int(hidden * 2 / 3) + 7) // 8 * 8
    fields |= dict(mlp=hidden, interpolation="bicubic_antialias" if fields["registers"] else "bicubic")
    return fields, refused + only(vision, qkv_bias=True)


def convnext(vision: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """ConvNextModel, whose blocks have LayerNorms with eps 1e-6 whatever its layer_norm_eps, which is for the head."""
    refused = only(vision, patch_size=4, hidden_act="gelu")
    if not vision.layer_scale_init_value > 0:
        refused += (f"layer_scale_init_value {vision.layer_scale_init_value} cannot be built here, only positive ones",)
    return dict(widths=tuple(vision.hidden_sizes), depths=tuple(vision.depths), eps=1e-6), refused


def swin(vision: Any) -> tuple[dict[str, Any], tuple[str, ...]]:
    """SwinBackbone, which has norms after its stages, or SwinModel, which has none."""
    refused = only(vision, patch_size=4, hidden_act="gelu", qkv_bias=True, use_absolute_embeddings=False)
    norms = "SwinBackbone" in (vision.architectures or ())
    fields = dict(
        width=vision.embed_dim, depths=tuple(vision.depths), heads=tuple(vision.num_heads), window=vision.window_size,
        mlp_ratio=int(vision.mlp_ratio), eps=vision.layer_norm_eps, norms=norms,
    )  # fmt: skip
    return fields, refused + only(vision, mlp_ratio=float(fields["mlp_ratio"]))


def small_maps(fields: dict[str, Any]) -> tuple[str, ...]:
    """SwinModel shifts no windows on maps that are not larger than a window; our Swin and SwinBackbone always do."""
    side, window, stage = -(-fields["size"] // 4), fields["window"], max(fields["taps"])
    side = -(-side // 2 ** max(stage - 1, 0))
    if stage == 0 or side > window:
        return ()
    where = f"at {fields['size']} pixels, stage {stage} has a map of {side} x {side}"
    return (f"window_size {window}: {where}, where SwinModel does not shift its windows; take a larger size",)
