"""Parts built from config.json and preprocessor_config.json: published models give their presets."""

from __future__ import annotations

import json

import pytest

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.aggregators.resampler import Resampler
from jaxmllm.encoders import presets as encoders
from jaxmllm.encoders.common import IMAGENET_MEAN, IMAGENET_STD
from jaxmllm.llms import presets as llms
from jaxmllm.weights import hf_config
from jaxmllm.weights.families import ENCODERS, LLMS, PREFIXES, check_sizes
from tests import hf_files
from tests.hf_files import write

CROP = dict(fit="crop")
SQUASH = dict(fit="squash")
IMAGENET = dict(mean=IMAGENET_MEAN, std=IMAGENET_STD)


@pytest.mark.parametrize(
    "config, pictures, taps, preset",
    [
        (hf_files.CLIP_L_336, hf_files.CLIP_L_336_PICTURES, (-2,), encoders.clip_l_336(**CROP)),
        (hf_files.LLAVA_1_5, hf_files.CLIP_L_336_PICTURES, None, encoders.clip_l_336(**CROP)),
        (hf_files.SIGLIP_SO400M, hf_files.SIGLIP_PICTURES, None, encoders.siglip_so400m_384(**SQUASH)),
        (
            hf_files.DINOV2_G, hf_files.DINOV2_PICTURES, (3, -1),
            encoders.dinov2_g((3, 40), size=224, edge=256, interpolation="bicubic", **CROP),
        ),
        (
            hf_files.DINOV2_L_REGISTERS, hf_files.DINOV2_PICTURES, (24,),
            encoders.dinov2_l(registers=4, size=224, edge=256, **CROP),
        ),
        (hf_files.DINOV3_H_PLUS, hf_files.DINOV3_PICTURES, None, encoders.dinov3_h_plus(**SQUASH, filter="bilinear")),
        (
            hf_files.CONVNEXT_L, hf_files.CONVNEXT_PICTURES, (4,),
            encoders.convnext_xxl(
                size=224, widths=(192, 384, 768, 1536), depths=(3, 3, 27, 3), eps=1e-6, edge=256, **CROP, **IMAGENET
            ),
        ),
        (hf_files.SWIN_L, hf_files.SWIN_PICTURES, (3,), encoders.swin_l((3,), size=384, norms=False)),
    ],
)  # fmt: skip
def test_encoder(config, pictures, taps, preset, tmp_path):
    folder = write(tmp_path, config, pictures)
    assert encoders.from_folder(folder, taps) == preset
    assert check_sizes(folder, "encoders.a", preset) == []
    (tmp_path / "preprocessor_config.json").unlink()  # transformers 5 may keep it inside processor_config.json
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": pictures}))
    assert encoders.from_folder(folder, taps) == preset


def test_naflex(tmp_path):
    """Square pictures of as many patches as the table holds."""
    vision = {"model_type": "siglip2_vision_model", "num_patches": 256, "patch_size": 16}
    pictures = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2}
    folder = write(tmp_path, {"model_type": "siglip2", "vision_config": vision}, pictures)
    vit = encoders.from_folder(folder, **SQUASH, size=192)
    assert (vit.size, vit.table, vit.grid, vit.interpolation) == (192, 16, 12, "bilinear_antialias")
    with pytest.raises(ValueError, match="num_patches 250 cannot be built here, only 225"):
        write(tmp_path, {"model_type": "siglip2", "vision_config": vision | {"num_patches": 250}}, pictures)
        encoders.from_folder(folder, **SQUASH, size=192)


def test_oneformer(tmp_path):
    """The backbone has norms after its stages, and windows that keep their size."""
    config = {"model_type": "oneformer", "backbone_config": hf_files.SWIN_L}
    folder = write(tmp_path, config, hf_files.SWIN_PICTURES)
    assert encoders.from_folder(folder, (4,), size=768) == encoders.swin_l()


def test_fields_replace_what_the_folder_says(tmp_path):
    """An edge belongs to the folder's own size."""
    folder = write(tmp_path, hf_files.DINOV2_G, hf_files.DINOV2_PICTURES)
    vit = encoders.from_folder(folder, size=518)
    assert (vit.size, vit.fit, vit.edge, vit.table) == (518, "crop", None, 37)
    vit = encoders.from_folder(folder, fit="pad", mean=(0.1, 0.2, 0.3), remat="none")
    assert (vit.size, vit.fit, vit.edge, vit.mean, vit.remat) == (224, "pad", None, (0.1, 0.2, 0.3), "none")


def test_a_folder_without_pictures(tmp_path):
    folder = write(tmp_path, hf_files.CLIP_L_336)
    with pytest.raises(ValueError, match=r"no preprocessor_config.json in .*; give mean=, fit= of the encoder"):
        encoders.from_folder(folder, std=(1.0, 1.0, 1.0))
    assert encoders.from_folder(folder, **IMAGENET, fit="pad").size == 336


LLAVA_PICTURES = hf_files.CLIP_L_336_PICTURES | {
    "image_processor_type": "LlavaImageProcessor", "do_pad": True, "size": {"shortest_edge": 336},
}  # fmt: skip


@pytest.mark.parametrize(
    "pictures, fit, edge",
    [
        (LLAVA_PICTURES, "pad", None),
        (LLAVA_PICTURES | {"do_pad": False}, "crop", None),
        (hf_files.CLIP_L_336_PICTURES | {"size": {"height": 336, "width": 336}}, "squash", None),
        (hf_files.CLIP_L_336_PICTURES | {"size": {"shortest_edge": 400}}, "crop", 400),
        (hf_files.CONVNEXT_PICTURES | {"size": {"shortest_edge": 384}}, "squash", None),
    ],
)
def test_fit(pictures, fit, edge, tmp_path):
    encoder = encoders.from_folder(write(tmp_path, hf_files.CLIP_L_336, pictures))
    assert (encoder.fit, encoder.edge) == (fit, edge)


@pytest.mark.parametrize(
    "change, says",
    [
        ({"resample": 1}, "resample 1 cannot be done here"),
        ({"do_normalize": False}, "do_normalize"),
        ({"do_rescale": False}, "do_rescale"),
        ({"rescale_factor": 1.0}, "rescale_factor"),
        ({"do_resize": False}, "do_resize"),
        ({"do_center_crop": False, "size": {"shortest_edge": 336}}, "pictures must be square"),
        ({"crop_size": {"height": 336, "width": 224}}, "crop_size 336 x 224 is not square"),
        ({"size": {"height": 300, "width": 300}}, "with another crop_size"),
        ({"size": {"longest_edge": 336}}, "has no usable shortest_edge"),
        ({"image_mean": None}, "has no usable"),
    ],
)
def test_preparation_is_refused_by_name(change, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        encoders.from_folder(write(tmp_path, hf_files.CLIP_L_336, hf_files.CLIP_L_336_PICTURES | change))
    assert "preprocessor_config.json" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config, change, says",
    [
        (hf_files.SWIN_L, {}, "window_size 12: at 384 pixels, stage 4 has a map of 12 x 12"),
        (hf_files.SWIN_L, {"use_absolute_embeddings": True, "qkv_bias": False}, "qkv_bias False.*; use_absolute_emb"),
        (hf_files.CONVNEXT_L, {"patch_size": 2, "layer_scale_init_value": 0.0}, "patch_size 2.*; layer_scale_init"),
        (hf_files.DINOV2_G, {"qkv_bias": False, "num_channels": 1}, "qkv_bias False.*; num_channels 1"),
        (hf_files.DINOV3_H_PLUS, {"mlp_bias": False}, "mlp_bias False cannot be built here, only True"),
        (hf_files.DINOV3_H_PLUS, {"hidden_act": "mish"}, "hidden_act 'mish' cannot be built here, only one of gelu"),
        (hf_files.DINOV2_G, {"image_size": [518, 224]}, r"image_size \[518, 224\] is not square"),
        (hf_files.LLAVA_1_5, {"vision_feature_select_strategy": "full"}, "strategy 'full' cannot be built here"),
        (hf_files.LLAMA_3_8B, {}, "a llama folder holds llm, not encoder"),
    ],
)
def test_encoder_is_refused_by_name(config, change, says, tmp_path):
    pictures = hf_files.SWIN_PICTURES
    with pytest.raises(ValueError, match=says) as error:
        encoders.from_folder(write(tmp_path, config | change, pictures))
    assert "\n" not in str(error.value)


# Sizes


def test_all_differences_are_listed(tmp_path):
    folder = write(tmp_path, hf_files.LLAMA_3_8B)
    other = llms.qwen2_5_0_5b()
    assert check_sizes(folder, "llm", other) == [
        "vocab_size 128256 there, vocab 151936 here",
        "hidden_size 4096 there, width 896 here",
        "num_hidden_layers 32 there, layers 24 here",
        "num_attention_heads 32 there, heads 14 here",
        "num_key_value_heads 8 there, kv_heads 2 here",
        "intermediate_size 14336 there, mlp 4864 here",
        "rms_norm_eps 1e-05 there, eps 1e-06 here",
        "head_dim 128 there, head_dim 64 here",
        "rope_theta 500000.0 there, rope_theta 1000000.0 here",
        "tie_word_embeddings False there, tied True here",
        "qkv_bias False there, qkv_bias True here",
    ]


def test_choices_may_differ(tmp_path):
    """Cambrian's SigLIP and DINOv2: another GELU, other sizes, resampling and preparation."""
    towers = encoders.cambrian()
    assert check_sizes(write(tmp_path / "s", hf_files.SIGLIP_SO400M), "encoders.siglip", towers["siglip"]) == []
    assert check_sizes(write(tmp_path / "d", hf_files.DINOV2_G), "encoders.dinov2", towers["dinov2"]) == []


def test_other_encoders(tmp_path):
    folder = write(tmp_path, hf_files.CLIP_L_336)
    assert check_sizes(folder, "encoders.a", encoders.convnext_xxl()) == ["ViT there, ConvNeXt here"]
    found = check_sizes(folder, "encoders.a", encoders.clip_l_336(size=224, table=None, layers=25, pre_norm=False))
    assert found == [
        "num_hidden_layers 24 there, layers 25 here",
        "pre_norm True there, pre_norm False here",
        "image_size // patch_size 24 there, table 16 here",
    ]


def test_projector(tmp_path):
    folder = write(tmp_path, hf_files.LLAVA_1_5)
    assert check_sizes(folder, "aggregator", MLPProjector(24)) == []
    assert check_sizes(folder, "aggregator", MLPProjector(24, depth=3)) == [
        "depth 2 there, depth 3 here",
    ]
    assert check_sizes(folder, "aggregator", Resampler(1024)) == ["MLPProjector there, Resampler here"]
    write(tmp_path, hf_files.LLAVA_1_5 | {"projector_hidden_act": "relu", "multimodal_projector_bias": False})
    assert len(check_sizes(folder, "aggregator", MLPProjector(24))) == 2
    with pytest.raises(ValueError, match="a llava folder holds llm, encoder, aggregator, not fusers.a"):
        check_sizes(folder, "fusers.a", None)


def test_every_family_has_a_key_map():
    own = {name for name, parts in hf_config.ENCODERS.items() if parts == {"encoder": ""}}
    assert own == ENCODERS.keys() == PREFIXES.keys() and hf_config.LLMS.keys() == LLMS.keys()
