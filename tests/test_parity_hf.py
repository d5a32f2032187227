"""Tiny random Hugging Face language models, read from their folders, give the same numbers here and are unchanged by a
round trip. Sizes are in no preset."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.llms.presets import from_folder
from jaxmllm.nn.primitives import soft_cap
from jaxmllm.nn.rope import LongRope
from jaxmllm.weights.convert import import_weights
from jaxmllm.weights.families import check_sizes, key_map
from jaxmllm.weights.hf_config import read_config
from jaxmllm.weights.safetensors import open_folder
from tests.golden_case import shapes
from tests.parity import apply, close, randomise, reopen

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

SIZES = dict(
    vocab_size=60, hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4,
    num_key_value_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=64,
)  # fmt: skip
# Samples of 11 tokens are longer than the original rows of the scaled frequencies, 8, and than the windows, 4 and 5.
LLAMA3 = dict(factor=4.0, low_freq_factor=1.0, high_freq_factor=2.0, original_max_position_embeddings=8)
SU = dict(
    rope_type="longrope", rope_theta=100.0, original_max_position_embeddings=8, factor=4.0,
    short_factor=[1.0, 1.1, 1.2, 1.3], long_factor=[1.5, 2.0, 3.0, 4.0],
)  # fmt: skip
PARTIAL = SU | dict(short_factor=[1.0, 1.2, 1.3], long_factor=[2.0, 3.0, 4.0], partial_rotary_factor=0.75)
LINEAR = dict(rope_type="linear", factor=2.5, rope_theta=1e4)
GEMMA3 = {
    "full_attention": dict(rope_type="linear", factor=8.0, rope_theta=1e6),
    "sliding_attention": dict(rope_type="default", rope_theta=1e4),
}
FAMILIES = {
    "llama2": ("Llama", dict(rms_norm_eps=1e-5)),
    "llama3": ("Llama", dict(rope_theta=5e5)),
    "llama3_1": ("Llama", dict(rope_parameters=LLAMA3 | dict(rope_type="llama3", rope_theta=100.0))),
    "linear": ("Llama", dict(rope_parameters=LINEAR)),
    "head_dim": ("Llama", dict(head_dim=12)),
    "mistral": ("Mistral", dict(sliding_window=None)),
    "mistral_window": ("Mistral", dict(sliding_window=5)),
    "qwen2": ("Qwen2", {}),
    "qwen2_window": ("Qwen2", dict(use_sliding_window=True, sliding_window=4, max_window_layers=3)),
    "qwen3": ("Qwen3", dict(head_dim=12)),
    "phi3": ("Phi3", dict(sliding_window=4)),
    "phi3_long": ("Phi3", dict(rope_parameters=SU, original_max_position_embeddings=8)),
    "phi4_mini": ("Phi3", dict(rope_parameters=PARTIAL, original_max_position_embeddings=8)),
    "gemma": ("Gemma", dict(head_dim=16, hidden_act="gelu")),
    "gemma2": ("Gemma2", dict(head_dim=16, query_pre_attn_scalar=24, sliding_window=4, attn_logit_softcapping=2.0)),
    "gemma3": ("Gemma3Text", dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=4, rope_parameters=GEMMA3)),
    "gemma3_pattern": ("Gemma3Text", dict(head_dim=16, sliding_window=5, sliding_window_pattern=2)),
    "smollm3": ("SmolLM3", dict(no_rope_layer_interval=3)),
}


def theirs(name: str, folder, tied: bool = False):
    """A random model of a family, saved in a folder."""
    kind, fields = FAMILIES[name]
    config = getattr(transformers, f"{kind}Config")(**SIZES | dict(tie_word_embeddings=tied) | fields)
    classes = {"Gemma3Text": "Gemma3"}
    model = getattr(transformers, f"{classes.get(kind, kind)}ForCausalLM")
    model = randomise(model._from_config(config, attn_implementation="eager"))
    model.save_pretrained(folder)
    return model


def run(decoder, ids, positions, segments):
    states, taps, *_ = decoder(decoder.embed(ids), positions, segments, taps=tuple(range(1, 6)))
    logits = jnp.einsum("bsh,vh->bsv", states, decoder.output_table())
    return soft_cap(logits, decoder.logit_cap), taps


def opened(folder):
    """(decoder, key map, parameters) of a folder."""
    decoder = from_folder(folder, remat="none")
    assert check_sizes(folder, "llm", decoder) == []
    tensors = open_folder(folder)
    keys = key_map(read_config(folder), "llm", decoder, tensors.keys())
    ids = np.zeros((1, 4), np.int32)
    return decoder, keys, import_weights(keys, tensors, shapes(decoder, ids, ids, ids, method=run))


def rows(samples: list[list[np.ndarray]], length: int, left: bool = False):
    """ids, positions, segments [rows, length] of rows of samples; and the places (row, start) of the samples."""
    ids, positions, segments = np.zeros((3, len(samples), length), np.int32)
    places = []
    for i, row in enumerate(samples):
        at = length - sum(map(len, row)) if left else 0
        for j, sample in enumerate(row):
            part = slice(at, at + len(sample))
            ids[i, part], positions[i, part], segments[i, part] = sample, np.arange(len(sample)), j + 1
            places.append((i, at))
            at += len(sample)
    return (ids, positions, segments), places


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("family", FAMILIES)
def test_language_model(family, tied, tmp_path):
    model = theirs(family, tmp_path / "theirs", tied)
    decoder, keys, params = opened(tmp_path / "theirs")
    rng = np.random.default_rng(0)
    samples = [rng.integers(3, 60, n, np.int32) for n in (11, 6, 4)]
    wanted = [model(torch.tensor(x[None], dtype=torch.long), output_hidden_states=True) for x in samples]
    padded_right, padded_left = (rows([[x] for x in samples], 12, left) for left in (False, True))
    packed = rows([samples[:1], samples[1:]], 12)
    for arrays, places in (padded_right, padded_left, packed):
        logits, taps = apply(decoder, params, *arrays, method=run)
        for sample, (row, start), output in zip(samples, places, wanted):
            part = slice(start, start + len(sample))
            close(logits[row, part], output.logits[0])
            for i, x in taps.items():
                close(x[row, part], output.hidden_states[i][0])
    again = reopen(model, tmp_path, keys, params)
    assert torch.equal(again(torch.tensor(samples[0][None], dtype=torch.long)).logits, wanted[0].logits)


def test_every_special_field_matters(tmp_path):
    """A model without one of its special fields gives other numbers, so that the comparison above can fail."""
    changes = {
        "qwen2_window": dict(window=None), "phi3_long": dict(rope_scaling=None),
        "phi4_mini": dict(rotary_dim=None), "mistral_window": dict(window=6),
        "gemma2": dict(attention_cap=None), "gemma3": dict(local_theta=None), "smollm3": dict(rotary=(True,)),
        "gemma": dict(embed_scale=None), "gemma3_pattern": dict(windowed=(False, True)),
    }  # fmt: skip
    also = {"gemma2": [dict(logit_cap=None), dict(query_scale=None), dict(activation="silu")]}
    for name, change in changes.items():
        model = theirs(name, tmp_path / name)
        decoder, _, params = opened(tmp_path / name)
        (arrays, _) = rows([[np.random.default_rng(0).integers(3, 60, 11, np.int32)]], 11)
        wanted = model(torch.tensor(arrays[0], dtype=torch.long)).logits.detach().numpy()
        for fields in [change, *also.get(name, [])]:
            if name == "phi4_mini":
                scaling = decoder.rope_scaling
                long = LongRope(
                    short_factor=(1.0,) * 4, long_factor=(*scaling.long_factor, 4.0),
                    original_max_position_embeddings=8, attention_factor=scaling.attention_factor,
                )  # fmt: skip
                fields = fields | dict(rope_scaling=long)
            logits, _ = apply(decoder.clone(**fields), params, *arrays, method=run)
            assert np.abs(logits - wanted).max() > 1e-3, (name, fields)


def test_gemma3_with_a_tower(tmp_path):
    """The language model inside Gemma3ForConditionalGeneration."""
    text = transformers.Gemma3TextConfig(**SIZES | FAMILIES["gemma3"][1])
    vision = transformers.SiglipVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, image_size=28, patch_size=14
    )
    config = transformers.Gemma3Config(text_config=text, vision_config=vision, image_token_index=59)
    model = transformers.Gemma3ForConditionalGeneration._from_config(config, attn_implementation="eager")
    model = randomise(model)
    model.save_pretrained(tmp_path)
    decoder, _, params = opened(tmp_path)
    ids = np.random.default_rng(0).integers(3, 59, (1, 11), np.int32)
    logits, _ = apply(decoder, params, *rows([[ids[0]]], 11)[0], method=run)
    close(logits, model(torch.tensor(ids, dtype=torch.long)).logits)
