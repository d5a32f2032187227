"""Which parts a Hugging Face folder holds, and under which keys: model_type -> key map."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection
from typing import Any

from jaxmllm.weights import encoder_key_maps as encoders
from jaxmllm.weights import hf_config, hf_decoders, hf_encoders, key_maps
from jaxmllm.weights.convert import KeyMap, ignore

LLMS: dict[str, Callable[..., KeyMap]] = {
    "llama": key_maps.llama,
    "mistral": key_maps.llama,
    "qwen2": key_maps.llama,
    "qwen3": key_maps.llama,
    "phi3": key_maps.phi3,
    "smollm3": key_maps.llama,
    "gemma": key_maps.llama,
    "gemma2": key_maps.llama,
    "gemma3_text": key_maps.llama,
}
ENCODERS: dict[str, Callable[..., KeyMap]] = {
    "clip_vision_model": encoders.clip_vision,
    "siglip_vision_model": encoders.siglip_vision,
    "siglip2_vision_model": encoders.siglip2_vision,
    "dinov2": encoders.dinov2,
    "dinov2_with_registers": encoders.dinov2,
    "dinov3_vit": encoders.dinov3_vit,
    "convnext": encoders.convnext,
    "swin": encoders.swin_backbone,
}
# Prefixes that an encoder's keys may have, in a file of its own and below a LLaVA's vision_tower
PREFIXES: dict[str, tuple[str, ...]] = {
    "clip_vision_model": ("vision_model.",),
    "siglip_vision_model": ("vision_model.",),
    "siglip2_vision_model": ("vision_model.",),
    "dinov2": ("dinov2.",),
    "dinov2_with_registers": ("dinov2_with_registers.",),
    "dinov3_vit": (),
    "convnext": ("convnext.",),
    "swin": ("model.pixel_level_module.encoder.", "swin."),
}
# Language model, output table, tower and projector in LLaVA's files, and in state dicts of transformers >= 4.52
LLAVA = (
    ("language_model.model", "language_model.lm_head", "vision_tower.", "multi_modal_projector"),
    ("model.language_model", "lm_head", "model.vision_tower.", "model.multi_modal_projector"),
)
# Language model in Gemma 3's files with a tower, of transformers before and from 4.52 on, and its output table
GEMMA3 = (("language_model.model", "language_model.lm_head"), ("model.language_model", "lm_head"))
BESIDE_GEMMA3 = (r"(model\.)?(vision_tower|multi_modal_projector)\..*",)
# What else a file with an encoder may hold: CLIP's text tower, a classifier, OneFormer's other modules
BESIDE_ENCODER = (r"text_model\..*", r"(visual|text)_projection\.weight", r"logit_(scale|bias)", r"classifier\..*")
BESIDE_ONEFORMER = (r"(?!model\.pixel_level_module\.encoder\.).*",)


def part_kind(part: str) -> str:
    """ "encoders.clip" -> "encoder", others as they are: the name of the part in a folder."""
    return "encoder" if part.startswith("encoders.") else part


def describe(config: Any, part: str, module: Any, length: int | None = None) -> hf_config.Description:
    """What a folder's config says of a part; module: ours, whose taps and size are used."""
    kind = part_kind(part)
    hf_config.part_config(config, kind)
    if kind == "llm":
        return hf_decoders.decoder(config, length)
    if kind == "aggregator":
        return hf_config.projector(config)
    found = hf_encoders.encoder(config, getattr(module, "taps", None), getattr(module, "size", None))
    if found.fields.get("layers") == max(getattr(module, "taps", (0,))) and not getattr(module, "final_norm", True):
        # An exported tower ends with the last tap: it has all the layers that the module builds.
        return dataclasses.replace(found, fields={**found.fields, "layers": module.layers})
    return found


def check_sizes(folder: str, part: str, module: Any, length: int | None = None) -> list[str]:
    """Everything in which a folder's config.json disagrees with our module, e.g. "hidden_size 64 there, width 32 here".

    part: "llm", "encoders.NAME" or "aggregator". length: tokens of the longest sequence, for sliding windows. Fields
    that are choices (taps, size, preparation and resampling of pictures) may differ. Raises ValueError if the folder
    does not hold the part, or if its config.json cannot be read.
    """
    described = describe(hf_config.read_config(folder), part, module, length)
    return hf_config.differences(described, module)


def key_map(config: Any, part: str, module: Any, keys: Collection[str]) -> KeyMap:
    """The key map of a part in a folder, relative to the part. keys: all keys of the folder; they tell its layout."""
    kind = part_kind(part)
    inner = hf_config.part_config(config, kind)
    if config.model_type == "llava":
        return _llava(kind, inner, module, keys)
    if config.model_type == "gemma3":
        body = _first([layout[0] for layout in GEMMA3], keys)
        return LLMS[inner.model_type](module, body, dict(GEMMA3)[body]) + ignore(*BESIDE_GEMMA3)
    if kind == "llm":
        return LLMS[inner.model_type](module)
    beside = BESIDE_ONEFORMER if config.model_type == "oneformer" else BESIDE_ENCODER
    return _encoder(inner.model_type, module, keys) + ignore(*beside)


def _encoder(name: str, module: Any, keys: Collection[str], outer: str = "") -> KeyMap:
    candidates = *(outer + prefix for prefix in PREFIXES[name]), outer
    return ENCODERS[name](module).under(_first(candidates, keys), "")


def _llava(kind: str, inner: Any, module: Any, keys: Collection[str]) -> KeyMap:
    first = _first([layout[0] for layout in LLAVA], keys)
    body, head, tower, projector = next(layout for layout in LLAVA if layout[0] == first)
    own = {
        "llm": lambda: LLMS[inner.model_type](module, body, head),
        "encoder": lambda: _encoder(inner.model_type, module, keys, tower),
        "aggregator": lambda: key_maps.llava_projector(projector),
    }
    places = {"llm": (f"{body}.", f"{head}."), "encoder": (tower,), "aggregator": (f"{projector}.",)}
    others = (prefix for part, prefixes in places.items() if part != kind for prefix in prefixes)
    return own[kind]() + ignore(*(re.escape(prefix) + ".*" for prefix in others))


def _first(prefixes: Collection[str], keys: Collection[str]) -> str:
    """The first prefix that a key has, or the first of all."""
    found = (prefix for prefix in prefixes if any(key.startswith(prefix) for key in keys))
    return next(found, next(iter(prefixes)))
