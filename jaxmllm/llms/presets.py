"""Published language models by name, and those of any Hugging Face folder.

Sizes are those of `config.json` of the Hugging Face repository named in each function. Other fields of
Decoder may be given or replaced.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from jaxmllm.llms.decoder import Decoder
from jaxmllm.nn.rope import Llama3Scaling
from jaxmllm.weights import hf_config


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


def phi3_mini(**fields: Any) -> Decoder:
    """microsoft/Phi-3-mini-4k-instruct (weights: key_maps.phi3).

    It attends to the last 2047 tokens only; this decoder has no such window, so it is the same model up to
    that length.
    """
    return Decoder(**dict(vocab=32064, width=3072, layers=32, heads=32, kv_heads=32, mlp=8192) | fields)


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


def from_folder(path: str | Path, length: int | None = None, **fields: Any) -> Decoder:
    """The language model of a Hugging Face folder, also of a LLaVA's: sizes and everything else from its config.json.

    length: tokens of your longest sequence (default: the folder's max_position_embeddings); a sliding window that is
    shorter is refused. Raises ValueError, in one line that names the fields, for what Decoder cannot do.
    """
    described = hf_config.decoder(hf_config.read_config(path), length)
    if described.refused:
        raise ValueError(f"{path}: {'; '.join(described.refused)}")
    return Decoder(**described.fields | fields)
