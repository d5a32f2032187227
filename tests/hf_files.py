"""config.json and preprocessor_config.json of published models: the fields that matter, as they are published."""

from __future__ import annotations

import json
from pathlib import Path

IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
CLIP = {
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
    "do_center_crop": True,
    "do_normalize": True,
    "do_resize": True,
    "resample": 3,
}
LLAMA_3_8B = {
    "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 8192, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0,
    "tie_word_embeddings": False, "vocab_size": 128256,
}  # fmt: skip
LLAMA_3_1 = {
    "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}  # fmt: skip
QWEN2_5_0_5B = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 24, "num_attention_heads": 14, "num_hidden_layers": 24,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
    "tie_word_embeddings": True, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_8B = {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 12288, "max_position_embeddings": 40960, "max_window_layers": 36, "num_attention_heads": 32,
    "num_hidden_layers": 36, "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
PHI3_MINI = {
    "model_type": "phi3", "hidden_act": "silu", "hidden_size": 3072, "intermediate_size": 8192,
    "max_position_embeddings": 4096, "original_max_position_embeddings": 4096, "num_attention_heads": 32,
    "num_hidden_layers": 32, "num_key_value_heads": 32, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 10000.0, "sliding_window": 2047, "tie_word_embeddings": False, "vocab_size": 32064,
    "auto_map": {"AutoConfig": "configuration_phi3.Phi3Config"},
}  # fmt: skip
MISTRAL_7B = {
    "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 14336,
    "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096, "tie_word_embeddings": False,
    "vocab_size": 32000,
}  # fmt: skip
SU = {
    "type": "su", "short_factor": [1.0 + i / 100 for i in range(48)], "long_factor": [1.0 + i for i in range(48)],
}  # fmt: skip
YI_34B = {
    "model_type": "llama", "attention_bias": False, "hidden_act": "silu", "hidden_size": 7168,
    "intermediate_size": 20480, "max_position_embeddings": 4096, "num_attention_heads": 56, "num_hidden_layers": 60,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 5000000.0,
    "tie_word_embeddings": False, "vocab_size": 64000,
}  # fmt: skip
GEMMA_2B = {
    "model_type": "gemma", "attention_bias": False, "head_dim": 256, "hidden_act": "gelu", "hidden_activation": None,
    "hidden_size": 2048, "intermediate_size": 16384, "max_position_embeddings": 8192, "num_attention_heads": 8,
    "num_hidden_layers": 18, "num_key_value_heads": 1, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 10000.0, "vocab_size": 256000,
}  # fmt: skip
GEMMA2_9B = {
    "model_type": "gemma2", "attention_bias": False, "attn_logit_softcapping": 50.0, "cache_implementation": "hybrid",
    "final_logit_softcapping": 30.0, "head_dim": 256, "hidden_act": "gelu_pytorch_tanh",
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 3584, "intermediate_size": 14336,
    "max_position_embeddings": 8192, "num_attention_heads": 16, "num_hidden_layers": 42, "num_key_value_heads": 8,
    "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_theta": 10000.0, "sliding_window": 4096,
    "sliding_window_size": 4096, "vocab_size": 256000,
}  # fmt: skip
GEMMA3_1B = {
    "model_type": "gemma3_text", "attention_bias": False, "attn_logit_softcapping": None, "head_dim": 256,
    "final_logit_softcapping": None, "hidden_activation": "gelu_pytorch_tanh", "hidden_size": 1152,
    "intermediate_size": 6912, "max_position_embeddings": 32768, "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06, "rope_local_base_freq": 10000,
    "rope_scaling": None, "rope_theta": 1000000, "sliding_window": 512, "sliding_window_pattern": 6,
    "vocab_size": 262144,
}  # fmt: skip
GEMMA3_4B = {
    "model_type": "gemma3",
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
SMOLLM3_3B = {
    "model_type": "smollm3", "attention_bias": False, "hidden_act": "silu", "hidden_size": 2048,
    "intermediate_size": 11008, "layer_types": ["full_attention"] * 36, "max_position_embeddings": 65536,
    "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
    "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False,
    "vocab_size": 128256,
}  # fmt: skip
CLIP_L_336 = {
    "model_type": "clip",
    "projection_dim": 768,
    "text_config": {"model_type": "clip_text_model", "hidden_size": 768, "num_hidden_layers": 12},
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 1024, "image_size": 336,
        "intermediate_size": 4096, "layer_norm_eps": 1e-05, "num_attention_heads": 16, "num_hidden_layers": 24,
        "patch_size": 14, "projection_dim": 768,
    },
}  # fmt: skip
CLIP_L_336_PICTURES = CLIP | {"crop_size": 336, "size": 336, "feature_extractor_type": "CLIPFeatureExtractor"}
LLAVA_1_5 = {
    "model_type": "llava", "ignore_index": -100, "image_token_index": 32000, "projector_hidden_act": "gelu",
    "text_config": {
        "model_type": "llama", "_name_or_path": "lmsys/vicuna-7b-v1.5", "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05, "vocab_size": 32064,
    },
    "vision_config": {
        "model_type": "clip_vision_model", "hidden_size": 1024, "image_size": 336, "intermediate_size": 4096,
        "num_attention_heads": 16, "num_hidden_layers": 24, "patch_size": 14, "projection_dim": 768,
        "vocab_size": 32000,
    },
    "vision_feature_layer": -2, "vision_feature_select_strategy": "default", "tie_word_embeddings": False,
}  # fmt: skip
SIGLIP_SO400M = {
    "model_type": "siglip",
    "text_config": {"model_type": "siglip_text_model", "hidden_size": 1152, "num_hidden_layers": 27},
    "vision_config": {
        "model_type": "siglip_vision_model", "hidden_size": 1152, "image_size": 384, "intermediate_size": 4304,
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14,
    },
}  # fmt: skip
SIGLIP_PICTURES = {
    "image_processor_type": "SiglipImageProcessor", "do_normalize": True, "do_rescale": True, "do_resize": True,
    "image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5], "resample": 3, "rescale_factor": 0.00392156862745098,
    "size": {"height": 384, "width": 384},
}  # fmt: skip
DINOV2_G = {
    "model_type": "dinov2", "hidden_act": "gelu", "hidden_size": 1536, "image_size": 518, "layer_norm_eps": 1e-06,
    "mlp_ratio": 4, "num_attention_heads": 24, "num_hidden_layers": 40, "patch_size": 14, "qkv_bias": True,
    "use_swiglu_ffn": True, "layerscale_value": 1.0,
}  # fmt: skip
DINOV2_L_REGISTERS = DINOV2_G | {
    "model_type": "dinov2_with_registers", "hidden_size": 1024, "num_attention_heads": 16, "num_hidden_layers": 24,
    "use_swiglu_ffn": False, "num_register_tokens": 4,
}  # fmt: skip
DINOV2_PICTURES = IMAGENET | {
    "image_processor_type": "BitImageProcessor", "crop_size": {"height": 224, "width": 224}, "do_center_crop": True,
    "do_normalize": True, "do_rescale": True, "do_resize": True, "resample": 3, "size": {"shortest_edge": 256},
    "rescale_factor": 0.00392156862745098,
}  # fmt: skip
DINOV3_H_PLUS = {
    "model_type": "dinov3_vit", "hidden_act": "silu", "hidden_size": 1280, "image_size": 224, "key_bias": False,
    "intermediate_size": 5120, "layer_norm_eps": 1e-05, "num_attention_heads": 20, "num_hidden_layers": 32,
    "num_register_tokens": 4, "patch_size": 16, "rope_theta": 100.0, "use_gated_mlp": True,
}  # fmt: skip
DINOV3_PICTURES = IMAGENET | {
    "image_processor_type": "DINOv3ViTImageProcessorFast", "do_normalize": True, "do_rescale": True, "resample": 2,
    "do_resize": True, "size": {"height": 224, "width": 224}, "do_center_crop": None, "crop_size": None,
}  # fmt: skip
CONVNEXT_L = {
    "model_type": "convnext", "depths": [3, 3, 27, 3], "hidden_sizes": [192, 384, 768, 1536], "hidden_act": "gelu",
    "image_size": 224, "layer_norm_eps": 1e-12, "layer_scale_init_value": 1e-06, "patch_size": 4, "num_stages": 4,
}  # fmt: skip
CONVNEXT_PICTURES = IMAGENET | {
    "image_processor_type": "ConvNextImageProcessor", "do_normalize": True, "do_rescale": True, "do_resize": True,
    "crop_pct": 0.875, "resample": 3, "size": {"shortest_edge": 224},
}  # fmt: skip
SWIN_L = {
    "model_type": "swin", "architectures": ["SwinForImageClassification"], "depths": [2, 2, 18, 2], "embed_dim": 192,
    "hidden_act": "gelu", "image_size": 384, "layer_norm_eps": 1e-05, "mlp_ratio": 4.0, "num_heads": [6, 12, 24, 48],
    "patch_size": 4, "qkv_bias": True, "use_absolute_embeddings": False, "window_size": 12,
}  # fmt: skip
SWIN_PICTURES = IMAGENET | {
    "feature_extractor_type": "ViTFeatureExtractor", "do_normalize": True, "do_resize": True, "resample": 2,
    "size": 384,
}  # fmt: skip


def write(folder: Path, config: dict, pictures: dict | None = None) -> Path:
    """Writes both files into a folder and returns it."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if pictures is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(pictures))
    return folder
