"""Tiny random Hugging Face language models give the same numbers here and are unchanged by a round trip."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.llms.decoder import Decoder
from jaxmllm.nn.rope import LinearScaling, Llama3Scaling
from jaxmllm.weights import key_maps
from jaxmllm.weights.convert import import_weights
from jaxmllm.weights.safetensors import open_folder
from tests.golden_case import shapes
from tests.parity import apply, close, randomise, reopen

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


def llama(**fields):
    config = transformers.LlamaConfig(rope_theta=5e5, rms_norm_eps=1e-5, **fields)
    return transformers.LlamaForCausalLM(config), dict(rope_theta=5e5), key_maps.llama


def qwen2(**fields):
    config = transformers.Qwen2Config(rms_norm_eps=1e-6, **fields)
    return transformers.Qwen2ForCausalLM(config), dict(eps=1e-6, qkv_bias=True), key_maps.llama


def llama3_1(**fields):
    """Rows of 11 tokens, longer than the original 8 of the scaled frequencies."""
    scaling = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position_embeddings=8)
    rope = scaling | dict(rope_type="llama3", rope_theta=100.0)
    config = transformers.LlamaConfig(rope_parameters=rope, rms_norm_eps=1e-5, **fields)
    ours = dict(rope_theta=100.0, rope_scaling=Llama3Scaling(**scaling))
    return transformers.LlamaForCausalLM(config), ours, key_maps.llama


def linear(**fields):
    config = transformers.LlamaConfig(
        rope_parameters=dict(rope_type="linear", factor=2.5, rope_theta=1e4), rms_norm_eps=1e-5, **fields
    )
    return transformers.LlamaForCausalLM(config), dict(rope_scaling=LinearScaling(factor=2.5)), key_maps.llama


def qwen3(**fields):
    config = transformers.Qwen3Config(rms_norm_eps=1e-6, head_dim=12, **fields)
    return transformers.Qwen3ForCausalLM(config), dict(eps=1e-6, qk_norm=True, head_dim=12), key_maps.llama


def phi3(**fields):
    config = transformers.Phi3Config(rms_norm_eps=1e-5, **fields)
    return transformers.Phi3ForCausalLM(config), {}, key_maps.phi3


@pytest.mark.parametrize("family", [llama, llama3_1, linear, qwen2, qwen3, phi3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_language_model(family, tied, tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=60, pad_token_id=0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    model, fields, key_map_of = family(**sizes, **heads, tie_word_embeddings=tied, attn_implementation="eager")
    model = randomise(model)
    model.save_pretrained(tmp_path / "theirs")
    decoder = Decoder(60, 32, 3, 4, 2, 48, tied=tied, remat="none", **fields)
    ids = np.random.default_rng(0).integers(0, 60, (2, 11), np.int32)
    positions, ones = np.broadcast_to(np.arange(11), ids.shape), np.ones_like(ids)

    def run(decoder, ids):
        states, taps, *_ = decoder(decoder.embed(ids), positions, ones, taps=(1, 2, 3))
        return jnp.einsum("bsh,vh->bsv", states, decoder.output_table()), taps

    key_map = key_map_of(decoder)
    params = import_weights(key_map, open_folder(tmp_path / "theirs"), shapes(decoder, ids, method=run))
    logits, taps = apply(decoder, params, ids, method=run)
    theirs = model(torch.tensor(ids, dtype=torch.long), output_hidden_states=True)
    close(logits, theirs.logits)
    for i, x in taps.items():
        close(x, theirs.hidden_states[i])
    again = reopen(model, tmp_path, key_map, params)
    assert torch.equal(again(torch.tensor(ids, dtype=torch.long)).logits, theirs.logits)
