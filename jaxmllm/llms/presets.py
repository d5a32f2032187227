"""Published language models by name, and those of any Hugging Face folder.

Sizes are those of `config.json` of the Hugging Face repository named in each function. Other fields of
Decoder may be given or replaced.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from jaxmllm.llms.decoder import Decoder
from jaxmllm.nn.rope import LinearScaling, Llama3Scaling
from jaxmllm.weights import hf_config, hf_decoders


def llama3_8b(**fields: Any) -> Decoder:
    """meta-llama/Meta-Llama-3-8B and its Instruct version (of 3.0: rotary angles are not scaled)."""
    preset = dict(vocab=128256, width=4096, layers=32, heads=32, kv_heads=8, mlp=14336, rope_theta=500000.0)
    return Decoder(**preset | fields)


def llama3_1_8b(**fields: Any) -> Decoder:
    """meta-llama/Llama-3.1-8B and its Instruct version: Llama-3-8B's sizes, rotary angles scaled for longer rows."""
    return llama3_8b(**dict(rope_scaling=_llama3_scaling(8.0)) | fields)


def llama3_2_1b(**fields: Any) -> Decoder:
    """meta-llama/Llama-3.2-1B and its Instruct version."""
    preset = dict(vocab=128256, width=2048, layers=16, heads=32, kv_heads=8, mlp=8192, rope_theta=500000.0, tied=True)
    return Decoder(**preset | dict(rope_scaling=_llama3_scaling(32.0)) | fields)


def _llama3_scaling(factor: float) -> Llama3Scaling:
    return Llama3Scaling(
        factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
    )


def vicuna_7b(**fields: Any) -> Decoder:
    """lmsys/vicuna-7b-v1.5: Llama-2-7B's sizes."""
    return Decoder(**dict(vocab=32000, width=4096, layers=32, heads=32, kv_heads=32, mlp=11008) | fields)


def vicuna_13b(**fields: Any) -> Decoder:
    """lmsys/vicuna-13b-v1.5: Llama-2-13B's sizes."""
    return Decoder(**dict(vocab=32000, width=5120, layers=40, heads=40, kv_heads=40, mlp=13824) | fields)


def yi_34b(**fields: Any) -> Decoder:
    """01-ai/Yi-34B and its Chat version."""
    preset = dict(vocab=64000, width=7168, layers=60, heads=56, kv_heads=8, mlp=20480, rope_theta=5000000.0)
    return Decoder(**preset | fields)


def mistral_7b(**fields: Any) -> Decoder:
    """mistralai/Mistral-7B-Instruct-v0.3; v0.1 has vocab=32000, rope_theta=10000.0 and window=4096."""
    preset = dict(vocab=32768, width=4096, layers=32, heads=32, kv_heads=8, mlp=14336, rope_theta=1000000.0)
    return Decoder(**preset | fields)


def phi3_mini(**fields: Any) -> Decoder:
    """microsoft/Phi-3-mini-4k-instruct (weights: key_maps.phi3). For its 128k version, see `from_folder`."""
    preset = dict(vocab=32064, width=3072, layers=32, heads=32, kv_heads=32, mlp=8192, window=2047)
    return Decoder(**preset | fields)


def gemma_2b(**fields: Any) -> Decoder:
    """google/gemma-2b and its it version."""
    preset = dict(vocab=256000, width=2048, layers=18, heads=8, kv_heads=1, mlp=16384, head_dim=256)
    return _gemma(preset | fields)


def gemma2_2b(**fields: Any) -> Decoder:
    """google/gemma-2-2b and its it version."""
    preset = dict(vocab=256000, width=2304, layers=26, heads=8, kv_heads=4, mlp=9216, head_dim=256)
    return _gemma2(preset | fields)


def gemma2_9b(**fields: Any) -> Decoder:
    """google/gemma-2-9b and its it version."""
    preset = dict(vocab=256000, width=3584, layers=42, heads=16, kv_heads=8, mlp=14336, head_dim=256)
    return _gemma2(preset | fields)


def gemma3_1b(**fields: Any) -> Decoder:
    """google/gemma-3-1b-pt and its it version."""
    preset = dict(vocab=262144, width=1152, layers=26, heads=4, kv_heads=1, mlp=6912, head_dim=256, window=512)
    return _gemma3(preset | fields)


def gemma3_4b(**fields: Any) -> Decoder:
    """The language model of google/gemma-3-4b-pt and its it version."""
    preset = dict(vocab=262208, width=2560, layers=34, heads=8, kv_heads=4, mlp=10240, head_dim=256, window=1024)
    return _gemma3(preset | dict(rope_scaling=LinearScaling(factor=8.0)) | fields)


def _gemma(fields: dict[str, Any]) -> Decoder:
    preset = dict(tied=True, eps=1e-6, activation="gelu_tanh", zero_centred=True)
    return Decoder(**preset | dict(embed_scale=math.sqrt(fields["width"])) | fields)


def _gemma2(fields: dict[str, Any]) -> Decoder:
    preset = dict(post_norms=True, window=4096, windowed=(True, False), attention_cap=50.0, logit_cap=30.0)
    return _gemma(preset | fields)


def _gemma3(fields: dict[str, Any]) -> Decoder:
    preset = dict(post_norms=True, windowed=(True,) * 5 + (False,), rope_theta=1000000.0, local_theta=10000.0)
    return _gemma(preset | dict(qk_norm=True) | fields)


def qwen2_5_0_5b(**fields: Any) -> Decoder:
    """Qwen/Qwen2.5-0.5B and its Instruct version."""
    preset = dict(vocab=151936, width=896, layers=24, heads=14, kv_heads=2, mlp=4864, tied=True)
    return _qwen2(preset | fields)


def qwen2_5_7b(**fields: Any) -> Decoder:
    """Qwen/Qwen2.5-7B and its Instruct version."""
    preset = dict(vocab=152064, width=3584, layers=28, heads=28, kv_heads=4, mlp=18944)
    return _qwen2(preset | fields)


def qwen3_8b(**fields: Any) -> Decoder:
    """Qwen/Qwen3-8B."""
    preset = dict(vocab=151936, width=4096, layers=36, heads=32, kv_heads=8, mlp=12288, head_dim=128, qk_norm=True)
    return Decoder(**preset | dict(rope_theta=1000000.0, eps=1e-6) | fields)


def _qwen2(fields: dict[str, Any]) -> Decoder:
    return Decoder(**dict(rope_theta=1000000.0, eps=1e-6, qkv_bias=True) | fields)


def smollm2_135m(**fields: Any) -> Decoder:
    """HuggingFaceTB/SmolLM2-135M and its Instruct version."""
    preset = dict(vocab=49152, width=576, layers=30, heads=9, kv_heads=3, mlp=1536, rope_theta=100000.0, tied=True)
    return Decoder(**preset | fields)


def smollm3_3b(**fields: Any) -> Decoder:
    """HuggingFaceTB/SmolLM3-3B: every fourth layer has no positions."""
    preset = dict(vocab=128256, width=2048, layers=36, heads=16, kv_heads=4, mlp=11008, rope_theta=5000000.0, eps=1e-6)
    return Decoder(**preset | dict(tied=True, rotary=(True, True, True, False)) | fields)


def from_folder(path: str | Path, length: int | None = None, **fields: Any) -> Decoder:
    """The language model of a Hugging Face folder, also of a LLaVA's: sizes and everything else from its config.json.

    length: tokens of your longest sequence (default: the folder's max_position_embeddings); a sliding window that is
    not shorter is left out, so that kernels without windows can be used. Raises ValueError, in one line that names the
    fields, for what Decoder cannot do.
    """
    described = hf_decoders.decoder(hf_config.read_config(path), length)
    if described.refused:
        raise ValueError(f"{path}: {'; '.join(described.refused)}")
    return Decoder(**described.fields | fields)
