"""Our modules as config.json and preprocessor_config.json of Hugging Face folders: hf_config.py backwards.

A function returns None where no class of transformers that it knows is the same model.
"""

from __future__ import annotations

from typing import Any

from jaxmllm.encoders.vit import ViT
from jaxmllm.weights.hf_config import effective
from jaxmllm.weights.hf_pictures import FILTERS
from jaxmllm.weights.hf_write_decoders import ACTIVATION_NAMES

LLAVA = "LlavaForConditionalGeneration"
# The fields in which a ViT of transformers' classes differs from ours; each has one value
CLIP = dict(class_token=True, pre_norm=True, patch_bias=False)
SIGLIP = dict(class_token=False, pre_norm=False, patch_bias=True)
PLAIN = dict(gated=False, registers=0, layer_scale=False, key_bias=True, rope_theta=None, final_norm=False, stem=())


def vision_config(vit: Any) -> dict[str, Any] | None:
    """config.json of a CLIP or SigLIP tower of LLaVA that ends with the last tap."""
    if not isinstance(vit, ViT) or any(getattr(vit, name) != value for name, value in PLAIN.items()):
        return None
    if effective(vit, "table") != vit.grid or vit.side != vit.grid or vit.activation not in ACTIVATION_NAMES:
        return None
    kinds = {"clip_vision_model": CLIP, "siglip_vision_model": SIGLIP}
    name = next((n for n, fields in kinds.items() if all(getattr(vit, k) == v for k, v in fields.items())), None)
    return name and {
        "model_type": name,
        "image_size": vit.size,
        "patch_size": vit.patch,
        "hidden_size": vit.width,
        "num_hidden_layers": max(vit.taps),
        "num_attention_heads": vit.heads,
        "intermediate_size": vit.mlp,
        "hidden_act": ACTIVATION_NAMES[vit.activation],
        "layer_norm_eps": vit.eps,
        "num_channels": 3,
        **({"vision_use_head": False} if name == "siglip_vision_model" else {"projection_dim": vit.width}),
    }


def llava_config(text: dict[str, Any], vision: dict[str, Any], layers: list[int], image_token: int) -> dict[str, Any]:
    """config.json of a LLaVA. layers: the hidden states of the tower that are joined along channels."""
    return {
        "architectures": [LLAVA],
        "model_type": "llava",
        "text_config": text,
        "vision_config": vision,
        "vision_feature_layer": layers[0] if len(layers) == 1 else layers,
        "vision_feature_select_strategy": select_strategy(vision),
        "image_token_index": image_token,
        "image_seq_length": (vision["image_size"] // vision["patch_size"]) ** 2,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
        "tie_word_embeddings": text["tie_word_embeddings"],
    }


def select_strategy(vision: dict[str, Any]) -> str:
    """What a LLaVA leaves out of a tower's states: CLIP's class token, nothing of SigLIP's."""
    return "default" if vision["model_type"] == "clip_vision_model" else "full"


def picture_config(encoder: Any) -> dict[str, Any]:
    """preprocessor_config.json: how an encoder's pictures are prepared. hf_pictures.py reads it."""
    side, numbers = encoder.size, {name: number for number, name in FILTERS.items()}
    square, fit = {"height": side, "width": side}, encoder.fit
    kind = {"pad": "LlavaImageProcessor", "crop": "CLIPImageProcessor", "squash": "SiglipImageProcessor"}[fit]
    fields = {
        "image_processor_type": kind,
        "do_resize": True,
        "size": square if fit == "squash" else {"shortest_edge": encoder.edge or side},
        "resample": numbers[encoder.filter],
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(encoder.mean),
        "image_std": list(encoder.std),
        "do_convert_rgb": True,
    }
    if fit != "squash":
        fields |= {"do_center_crop": True, "crop_size": square}
    return fields | ({"do_pad": True} if fit == "pad" else {})


def processor_config(vision: dict[str, Any], image_token: str) -> dict[str, Any]:
    """processor_config.json of a LLaVA."""
    return {
        "processor_class": "LlavaProcessor",
        "patch_size": vision["patch_size"],
        "vision_feature_select_strategy": select_strategy(vision),
        "num_additional_image_tokens": int(vision["model_type"] == "clip_vision_model"),
        "image_token": image_token,
    }
