"""A Decoder as the config.json of a language model of transformers: hf_decoders.py backwards."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxmllm.hf_library import transformers
from jaxmllm.llms.decoder import Decoder
from jaxmllm.nn.rope import LongRope
from jaxmllm.weights.hf_config import ACTIVATIONS, GEMMAS, differences, effective
from jaxmllm.weights.hf_decoders import ROPES, SLIDING
from jaxmllm.weights.hf_decoders import decoder as described

ROPE_TYPES = {type(None) if ours is None else ours: theirs for theirs, ours in ROPES.items()}
ARCHITECTURES = {  # model_type -> the class that opens it
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "phi3": "Phi3ForCausalLM", "smollm3": "SmolLM3ForCausalLM",
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3_text": "Gemma3ForCausalLM",
}  # fmt: skip
# Of several names that transformers has for an activation, the one that its models have
ACTIVATION_NAMES = {ours: theirs for theirs, ours in reversed(ACTIVATIONS.items())} | {"gelu_tanh": "gelu_pytorch_tanh"}


def text_config(decoder: Any, length: int) -> dict[str, Any] | None:
    """config.json of a language model. length: tokens of its longest sequence."""
    if type(decoder) is not Decoder or decoder.inserts or type(decoder.rope_scaling) not in ROPE_TYPES:
        return None
    name = model_type(decoder)
    activation = ACTIVATION_NAMES.get(decoder.activation, decoder.activation)
    config = {
        "architectures": [ARCHITECTURES[name]],
        "model_type": name,
        "vocab_size": decoder.vocab,
        "hidden_size": decoder.width,
        "num_hidden_layers": decoder.layers,
        "num_attention_heads": decoder.heads,
        "num_key_value_heads": decoder.kv_heads,
        "intermediate_size": decoder.mlp,
        "head_dim": effective(decoder, "head_dim"),
        "hidden_act": activation,
        "rms_norm_eps": decoder.eps,
        "rope_parameters": rope_parameters(decoder, name),
        "tie_word_embeddings": decoder.tied,
        "max_position_embeddings": length,
        "sliding_window": decoder.window,
        "use_sliding_window": bool(decoder.window),
        "pad_token_id": None,  # else that of the family's first model, which smaller tables do not have
    }
    if name in ("qwen2", "qwen3", "smollm3", "gemma2", "gemma3_text"):
        windowed = [bool(decoder.window and each) for each in decoder.layer_kinds("windowed")]
        config["layer_types"] = [SLIDING if each else "full_attention" for each in windowed]
    if name == "smollm3":
        config["no_rope_layers"] = [int(each) for each in decoder.layer_kinds("rotary")]
    if name == "phi3" and isinstance(decoder.rope_scaling, LongRope):
        config["original_max_position_embeddings"] = decoder.rope_scaling.original_max_position_embeddings
    if name in GEMMAS:
        config |= {
            "hidden_activation": activation,
            "query_pre_attn_scalar": round((decoder.query_scale or effective(decoder, "head_dim") ** -0.5) ** -2),
            "attn_logit_softcapping": decoder.attention_cap,
            "final_logit_softcapping": decoder.logit_cap,
        }
    try:
        found = described(transformers().AutoConfig.for_model(**config), length)
    except Exception:  # transformers' classes refuse what they cannot be with almost any error
        return None
    return None if differences(found, decoder) else config


def model_type(decoder: Decoder) -> str:
    """The name of the family whose fields come nearest; whether they are all there, `text_config` finds out."""
    if decoder.zero_centred:
        return ("gemma3_text" if decoder.qk_norm else "gemma2") if decoder.post_norms else "gemma"
    if decoder.qkv_bias or decoder.qk_norm:
        return "qwen2" if decoder.qkv_bias else "qwen3"
    if isinstance(decoder.rope_scaling, LongRope) or decoder.rotary_dim:
        return "phi3"
    if not all(decoder.rotary):
        return "smollm3"
    return "mistral" if decoder.window else "llama"


def rope_parameters(decoder: Decoder, name: str) -> dict[str, Any]:
    """The rotary parameters; for Gemma 3, those of each kind of layers."""
    scaling = decoder.rope_scaling
    rope = {"rope_theta": decoder.rope_theta, "rope_type": ROPE_TYPES[type(scaling)]}
    for key, value in (dataclasses.asdict(scaling) if scaling else {}).items():
        rope[key] = list(value) if isinstance(value, tuple) else value
    if decoder.rotary_dim:
        rope["partial_rotary_factor"] = decoder.rotary_dim / effective(decoder, "head_dim")
    if name != "gemma3_text":
        return rope
    local = {"rope_theta": decoder.local_theta or decoder.rope_theta, "rope_type": "default"}
    return {"full_attention": rope, SLIDING: local}
