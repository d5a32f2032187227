"""Language models built from config.json: published models give their presets."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest

from jaxmllm import recipes
from jaxmllm.llms import presets as llms
from jaxmllm.nn.rope import LongRope
from jaxmllm.weights.families import check_sizes
from jaxmllm.weights.hf_write_decoders import text_config
from tests import hf_files
from tests.hf_files import write


@pytest.mark.parametrize(
    "config, preset, length",
    [
        (hf_files.LLAMA_3_8B, llms.llama3_8b(), None),
        (hf_files.LLAMA_3_8B | {"rope_scaling": hf_files.LLAMA_3_1}, llms.llama3_1_8b(), None),
        (hf_files.QWEN2_5_0_5B, llms.qwen2_5_0_5b(), None),
        (hf_files.QWEN3_8B, llms.qwen3_8b(), None),
        (hf_files.PHI3_MINI, llms.phi3_mini(), None),
        (hf_files.PHI3_MINI, llms.phi3_mini(window=None), 2047),
        (hf_files.MISTRAL_7B, llms.mistral_7b(vocab=32000, rope_theta=10000.0, window=4096), None),
        (hf_files.MISTRAL_7B, llms.mistral_7b(vocab=32000, rope_theta=10000.0), 4096),
        (hf_files.YI_34B, llms.yi_34b(), None),
        (hf_files.GEMMA_2B, llms.gemma_2b(), None),
        (hf_files.GEMMA2_9B, llms.gemma2_9b(), None),
        (hf_files.GEMMA2_9B, llms.gemma2_9b(window=None, windowed=(True,)), 4096),
        (hf_files.GEMMA3_1B, llms.gemma3_1b(), None),
        (hf_files.GEMMA3_4B, llms.gemma3_4b(), None),
        (hf_files.SMOLLM3_3B, llms.smollm3_3b(), None),
        (hf_files.LLAVA_1_5, llms.vicuna_7b(vocab=32064), None),  # older files leave out what is a default
    ],
)
def test_language_model(config, preset, length, tmp_path):
    folder = write(tmp_path, config)
    assert llms.from_folder(folder, length) == preset.clone(head_dim=preset.head_dim or preset.width // preset.heads)
    assert check_sizes(folder, "llm", preset, length) == []
    assert llms.from_folder(folder, length, remat="none", vocab=7).vocab == 7


@pytest.mark.parametrize(
    "preset",
    [
        llms.llama3_1_8b(), llms.yi_34b(), llms.mistral_7b(window=4096), llms.phi3_mini(), llms.qwen2_5_7b(),
        llms.qwen3_8b(window=9, windowed=(False, True)), llms.gemma_2b(), llms.gemma2_9b(query_scale=1 / 12),
        llms.gemma3_1b(), llms.gemma3_4b(), llms.smollm3_3b(),
        llms.phi3_mini(
            rotary_dim=48,
            rope_scaling=LongRope(
                short_factor=(1.0,) * 24,
                long_factor=(2.0,) * 24,
                original_max_position_embeddings=4096,
                attention_factor=1.2,
            ),
        ),
    ],
)  # fmt: skip
def test_written_configs_describe_the_same_decoder(preset, tmp_path):
    config = text_config(preset, 8192)
    again = llms.from_folder(write(tmp_path, json.loads(json.dumps(config))))
    assert again == preset.clone(head_dim=again.head_dim)


@pytest.mark.parametrize(
    "preset",
    [
        llms.llama3_8b(activation="gelu_tanh"),
        llms.llama3_8b(logit_cap=30.0),
        llms.gemma_2b(embed_scale=None),
        llms.gemma3_1b(attention_cap=50.0),
        llms.qwen3_8b(rotary=(True, False)),
        llms.llama3_8b(window=9, windowed=(True, False)),
    ],
)
def test_no_config_is_written_for_what_no_class_of_transformers_is(preset):
    assert text_config(preset, 8192) is None


@pytest.mark.parametrize(
    "config, change, says",
    [
        (
            hf_files.LLAMA_3_8B,
            {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}},
            "rope_scaling of type 'dynamic' cannot be built here, only default, linear, llama3, longrope",
        ),
        (hf_files.LLAMA_3_8B, {"rope_scaling": {"rope_type": "linear", "factor": "2"}}, "factor '2' is no number"),
        (hf_files.LLAMA_3_8B, {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "low_freq_factor"),
        (hf_files.LLAMA_3_8B, {"hidden_act": "gelu"}, "hidden_act 'gelu' cannot be built here, only 'silu'"),
        (hf_files.LLAMA_3_8B, {"attention_bias": True, "mlp_bias": True}, "attention_bias True.*; mlp_bias True"),
        (hf_files.PHI3_MINI, {"rope_scaling": hf_files.SU | {"short_factor": []}}, "short_factor"),
        (hf_files.PHI3_MINI, {"rope_scaling": hf_files.SU | {"long_factor": ["2"] * 48}}, "long_factor"),
        (hf_files.GEMMA3_1B, {"attn_logit_softcapping": 50.0}, "attn_logit_softcapping 50.0 cannot be built here"),
        (hf_files.GEMMA3_1B, {"use_bidirectional_attention": True}, "use_bidirectional_attention cannot be built"),
        (hf_files.GEMMA2_9B, {"hidden_activation": "relu"}, "hidden_act 'relu' cannot be built here"),
        (hf_files.LLAMA_3_8B, {"hidden_size": "4096"}, "hidden_size"),
        (hf_files.LLAMA_3_8B, {"quantization_config": {"quant_method": "awq"}}, "quantization_config"),
        (
            hf_files.LLAMA_3_8B,
            {"model_type": "gemma9"},
            "'gemma9' is not known; known: clip, .*gemma, gemma2, gemma3, gemma3_text, llama, llava, mistral, .*swin",
        ),
        (hf_files.LLAMA_3_8B, {"model_type": None}, "model_type None is not known"),
        (hf_files.LLAMA_3_8B, {"stages": []}, "is a workdir of jaxmllm; write it as run:"),
        (hf_files.CLIP_L_336, {}, "a clip folder holds encoder, not llm"),
        (hf_files.LLAVA_1_5, {"text_config": {"model_type": "gpt2"}}, "text_config.model_type 'gpt2' is not known"),
    ],
)
def test_language_model_is_refused_by_name(config, change, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        llms.from_folder(write(tmp_path, config | change))
    assert "\n" not in str(error.value)


def test_long_rope(tmp_path):
    """Phi-3-mini-128k: factors for each frequency, which a recipe keeps in JSON."""
    config = hf_files.PHI3_MINI | {"max_position_embeddings": 131072, "sliding_window": 262144}
    decoder = llms.from_folder(write(tmp_path, config | {"rope_scaling": hf_files.SU}))
    scaling = decoder.rope_scaling
    assert decoder.window is None and scaling.original_max_position_embeddings == 4096
    assert (len(scaling.short_factor), len(scaling.long_factor)) == (48, 48)
    assert scaling.attention_factor == pytest.approx((1 + math.log(32) / math.log(4096)) ** 0.5)
    run = recipes.load("configs/llama3_8b.py")
    run = dataclasses.replace(run, model=run.model.clone(llm=decoder))
    assert recipes.from_document(json.loads(json.dumps(recipes.to_document(run))), "config.json") == run


def test_window_of_some_layers(tmp_path):
    config = hf_files.QWEN2_5_0_5B | {"use_sliding_window": True, "sliding_window": 1024, "max_window_layers": 20}
    decoder = llms.from_folder(write(tmp_path, config))
    assert decoder.window == 1024 and decoder.layer_kinds("windowed") == (False,) * 20 + (True,) * 4
    assert check_sizes(tmp_path, "llm", decoder.clone(window=1000)) == ["sliding_window 1024 there, window 1000 here"]
    assert check_sizes(tmp_path, "llm", decoder, 1024) == []


def test_a_folder_without_config(tmp_path):
    with pytest.raises(ValueError, match="no config.json in"):
        llms.from_folder(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="cannot read .*config.json"):
        llms.from_folder(tmp_path)
