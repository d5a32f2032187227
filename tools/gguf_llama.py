"""Reads a Llama out of a GGUF file of llama.cpp and writes it as a Hugging Face folder, weights in float32.

    python tools/gguf_llama.py SmolLM2-135M-Instruct.Q4_1.gguf data/real/smollm2

Quantised blocks become exactly the numbers that they stand for. llama.cpp turns neighbouring pairs of a head, Hugging
Face the two halves, so the rows of q and k are put back into the order of the halves.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors

from jaxmllm.weights.safetensors import write_folder

NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
LAYER_NAMES = {
    "attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
CONTROL = 3  # llama.cpp's kind of token
PRETOKENIZERS = {  # its names -> the parts of a Hugging Face pre-tokenizer
    "smollm": lambda: [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
    "gpt-2": lambda: [pre_tokenizers.ByteLevel(add_prefix_space=False)],
}


def convert(source: str | Path, folder: str | Path) -> None:
    """GGUF file -> folder with config.json, model.safetensors, tokenizer.json and tokenizer_config.json.

    Raises ValueError for another architecture than llama, and for tokenizers that are not known here.
    """
    reader = GGUFReader(source)
    fields = {name: field.contents() for name, field in reader.fields.items()}
    if fields["general.architecture"] != "llama":
        raise ValueError(f"{source} holds a {fields['general.architecture']}; only llama can be converted")
    backend = tokenizer_of(fields)
    heads = fields["llama.attention.head_count"]
    groups = {"attn_q": heads, "attn_k": fields.get("llama.attention.head_count_kv", heads)}
    tensors = {}
    for x in reader.tensors:
        name, values = x.name.removesuffix(".weight"), dequantize(x.data, x.tensor_type).astype(np.float32)
        layer, kind = name.split(".")[1:] if name.startswith("blk.") else (None, name)
        known = NAMES if layer is None else LAYER_NAMES
        if kind not in known or not x.name.endswith(".weight"):
            raise ValueError(f"{source}: tensor {x.name!r} has no place in a Llama of transformers")
        values = halves(values, groups[kind]) if kind in groups else values
        tensors[f"model.layers.{layer}.{known[kind]}.weight" if layer else f"{known[kind]}.weight"] = values
    write_folder(folder, tensors)
    folder = Path(folder)
    config = config_of(fields, tensors)
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")
    backend.save(str(folder / "tokenizer.json"))
    tokens = fields["tokenizer.ggml.tokens"]
    special = {
        f"{ours}_token": tokens[fields[f"tokenizer.ggml.{theirs}_token_id"]]
        for ours, theirs in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding"))
        if f"tokenizer.ggml.{theirs}_token_id" in fields
    }
    settings = {"tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": config["max_position_embeddings"]}
    settings |= special | {"clean_up_tokenization_spaces": False}
    if "tokenizer.chat_template" in fields:
        settings["chat_template"] = fields["tokenizer.chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def halves(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k [heads * dim, in] from the order of pairs to that of halves: 0 2 4 .. 1 3 5 .. of each head."""
    return w.reshape(heads, -1, 2, w.shape[1]).swapaxes(1, 2).reshape(w.shape)


def config_of(fields: dict[str, Any], tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """config.json of transformers' LlamaForCausalLM."""
    of = lambda name, *default: fields.get(f"llama.{name}", *default)
    rows, width = tensors["model.embed_tokens.weight"].shape
    heads = of("attention.head_count")
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": rows,
        "hidden_size": width,
        "num_hidden_layers": of("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": of("attention.head_count_kv", heads),
        "head_dim": of("rope.dimension_count", width // heads),
        "intermediate_size": of("feed_forward_length"),
        "max_position_embeddings": of("context_length"),
        "rope_theta": of("rope.freq_base", 10000.0),
        "rms_norm_eps": float(f"{of('attention.layer_norm_rms_epsilon'):.6g}"),  # stored as float32
        "hidden_act": "silu",
        "tie_word_embeddings": "lm_head.weight" not in tensors,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id"),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id"),
        "dtype": "float32",
    }


def tokenizer_of(fields: dict[str, Any]) -> Tokenizer:
    """The byte-level BPE tokenizer that a GGUF describes. Raises ValueError for others."""
    kind, pre = fields["tokenizer.ggml.model"], fields.get("tokenizer.ggml.pre")
    if kind != "gpt2" or pre not in PRETOKENIZERS:
        raise ValueError(f"the tokenizer {kind}, {pre} is not known; known: gpt2, {' or '.join(PRETOKENIZERS)}")
    tokens = fields["tokenizer.ggml.tokens"]
    merges = [tuple(line.split(" ")) for line in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.Sequence(PRETOKENIZERS[pre]())
    backend.decoder, backend.post_processor = decoders.ByteLevel(), processors.ByteLevel(trim_offsets=True)
    control = [token for token, type in zip(tokens, fields["tokenizer.ggml.token_type"]) if type == CONTROL]
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in control])
    return backend


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("folder")
    convert(**vars(parser.parse_args()))
