"""What a Hugging Face config.json says of a language model: the fields of Decoder, and what Decoder cannot do."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from jaxmllm.nn.rope import LinearScaling, Llama3Scaling, LongRope
from jaxmllm.weights.hf_config import ACTIVATIONS, GEMMAS, Description, only, part_config

ROPES = {  # transformers' rope_type -> ours
    "default": None, "linear": LinearScaling, "llama3": Llama3Scaling, "longrope": LongRope,
}  # fmt: skip
SLIDING = "sliding_attention"


def decoder(config: Any, length: int | None = None) -> Description:
    """The language model of a folder.

    length: tokens of the longest sequence; a window that is not shorter is left out, so that kernels without windows
    can be used. Default: the folder's max_position_embeddings.
    """
    text = part_config(config, "llm")
    names = {
        "vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
        "kv_heads": "num_key_value_heads", "mlp": "intermediate_size", "eps": "rms_norm_eps",
    }  # fmt: skip
    length = length or text.max_position_embeddings
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kinds, ropes = layer_kinds(text, length), rope_parameters(text)
    rope, local = ropes.get("full_attention") or ropes[SLIDING], ropes.get(SLIDING, {})
    activation = getattr(text, "hidden_activation", None) or text.hidden_act
    fields = {ours: getattr(text, theirs) for ours, theirs in names.items()} | {
        "head_dim": head_dim,
        "rope_theta": float(rope.get("rope_theta") or 0),
        "tied": bool(config.tie_word_embeddings),
        "qkv_bias": text.model_type == "qwen2",
        "qk_norm": text.model_type in ("qwen3", "gemma3_text"),
        "rope_scaling": rope_scaling(rope, text),
        "rotary_dim": rotary_dim(rope, head_dim),
        "activation": ACTIVATIONS.get(activation, activation),
        "rotary": shortest([bool(flag) for flag in getattr(text, "no_rope_layers", None) or [True]]),
        **kinds,
        **gemma_fields(text, head_dim),
    }
    if kinds["window"] and local and local != rope:
        fields["local_theta"] = float(local["rope_theta"])
    for name, value in (("local_theta", None), ("query_scale", None), ("attention_cap", None), ("logit_cap", None)):
        fields.setdefault(name, value)
    renamed = {
        "tied": "tie_word_embeddings", "activation": "hidden_act", "window": "sliding_window",
        "windowed": "layer_types", "rotary": "no_rope_layers", "rotary_dim": "partial_rotary_factor",
        "local_theta": "rope_theta of sliding_attention", "query_scale": "query_pre_attn_scalar",
        "attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping",
        "zero_centred": "model_type", "post_norms": "model_type", "embed_scale": "model_type",
    }  # fmt: skip
    names |= {name: renamed.get(name, name) for name in fields if name not in names}
    if not kinds["window"]:
        names.pop("windowed")  # a pattern that means nothing
    return Description("Decoder", fields, names, refused(text, rope, local, activation), length)


def refused(text: Any, rope: Mapping[str, Any], local: Mapping[str, Any], activation: str) -> tuple[str, ...]:
    """What the config says and Decoder cannot do."""
    lines = only(text, attention_bias=False, mlp_bias=False)
    if getattr(text, "use_bidirectional_attention", None):
        lines += ("use_bidirectional_attention cannot be built here, only attention to earlier tokens",)
    if text.model_type in ("gemma", "gemma3_text"):
        lines += only(text, attn_logit_softcapping=None)
    wanted = "gelu_pytorch_tanh" if text.model_type in GEMMAS else "silu"
    if ACTIVATIONS.get(activation) != ACTIVATIONS[wanted]:
        lines += (f"hidden_act {activation!r} cannot be built here, only {wanted!r}",)
    for each in (rope, local):
        if each.get("rope_type", "default") not in ROPES:
            lines += (f"rope_scaling of type {each['rope_type']!r} cannot be built here, only {', '.join(ROPES)}",)
    if local and local.get("rope_type", "default") != "default" and local != rope:
        lines += ("rope_scaling of sliding_attention alone cannot be built here",)
    return lines


def gemma_fields(text: Any, head_dim: int) -> dict[str, Any]:
    """The fields in which Gemma differs from Llama."""
    if text.model_type not in GEMMAS:
        return {"zero_centred": False, "post_norms": False, "embed_scale": None}
    scalar = getattr(text, "query_pre_attn_scalar", None)
    return {
        "zero_centred": True,
        "post_norms": text.model_type != "gemma",
        "embed_scale": math.sqrt(text.hidden_size),
        "query_scale": scalar**-0.5 if scalar and scalar != head_dim else None,
        "attention_cap": getattr(text, "attn_logit_softcapping", None) if text.model_type == "gemma2" else None,
        "logit_cap": getattr(text, "final_logit_softcapping", None),
    }


def layer_kinds(text: Any, length: int) -> dict[str, Any]:
    """The window, and the pattern of layers that have it."""
    window, types = getattr(text, "sliding_window", None), getattr(text, "layer_types", None)
    if text.model_type in ("qwen2", "qwen3", "smollm3") and not text.use_sliding_window:
        window = None
    windowed = shortest([kind == SLIDING for kind in types]) if types else (True,)
    if not window or window >= length or not any(windowed):
        return {"window": None, "windowed": (True,)}
    return {"window": window, "windowed": windowed}


def shortest(values: Sequence[bool]) -> tuple[bool, ...]:
    """The shortest pattern whose repetition gives the values."""
    for n in range(1, len(values) + 1):
        if all(value == values[i % n] for i, value in enumerate(values)):
            return tuple(values[:n])
    raise ValueError("layer_types is empty")


def rope_parameters(text: Any) -> dict[str, dict[str, Any]]:
    """Kind of layer -> its rotary parameters; {"full_attention": ..} if all layers have the same."""
    rope = getattr(text, "rope_parameters", None) or {}
    by_kind = {kind: each for kind, each in rope.items() if isinstance(each, Mapping)}
    return by_kind or {"full_attention": rope}


def rotary_dim(rope: Mapping[str, Any], head_dim: int) -> int | None:
    """The entries of a head that are rotated; None for all."""
    factor = rope.get("partial_rotary_factor") or 1.0
    return None if factor == 1.0 else int(head_dim * factor)


def rope_scaling(rope: Mapping[str, Any], text: Any) -> Any:
    """How the folder scales rotary frequencies, None if it does not. Raises ValueError for what is no number."""
    scaling = ROPES.get(rope.get("rope_type"))
    if scaling is None:
        return None
    found = dict(rope)
    if scaling is LongRope:
        original = found.get("original_max_position_embeddings") or text.max_position_embeddings
        found["original_max_position_embeddings"] = original
        stretch = found.get("factor") or text.max_position_embeddings / original
        given = found.get("attention_factor")
        default = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 else 1.0
        found["attention_factor"] = default if given is None else given
    fields = {field.name: found.get(field.name) for field in dataclasses.fields(scaling)}
    for name, value in fields.items():
        numbers = value if isinstance(value, list) and name in ("short_factor", "long_factor") else [value]
        if not numbers or not all(isinstance(x, int | float) and not isinstance(x, bool) for x in numbers):
            raise ValueError(f"rope_scaling: {name} {value!r} is no number")
        fields[name] = tuple(map(float, value)) if isinstance(value, list) else value
    return scaling(**fields)
