"""Tiny random Hugging Face ViTs give the same numbers here and are unchanged by a round trip."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmllm.encoders.common import HALF, IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, resample_table
from jaxmllm.encoders.vit import ViT
from jaxmllm.weights import encoder_key_maps
from jaxmllm.weights.convert import export_weights, import_weights
from jaxmllm.weights.safetensors import open_folder, write_folder
from tests.golden_case import shapes
from tests.parity import apply, close, pictures, pixels_of, randomise, reopen

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


SIZES = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4)
DINO = dict(eps=1e-6, class_token=True, layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)
SIGLIP = dict(activation="gelu_tanh", eps=1e-6, mean=HALF, std=HALF)


def clip(size):
    config = transformers.CLIPVisionConfig(**SIZES, image_size=size, patch_size=14, intermediate_size=48)
    fields = dict(activation="quick_gelu", class_token=True, pre_norm=True, patch_bias=False)
    return transformers.CLIPVisionModel(config), fields, encoder_key_maps.clip_vision


def siglip(size):
    config = transformers.SiglipVisionConfig(**SIZES, image_size=size, patch_size=14, intermediate_size=48)
    return transformers.SiglipVisionModel(config), SIGLIP, encoder_key_maps.siglip_vision


def siglip2(size):
    """NaFlex, whose table of 4 x 4 positions is resampled to 3 x 3 patches."""
    config = transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=14, intermediate_size=48)
    fields = SIGLIP | dict(table=4, interpolation="bilinear_antialias")
    return transformers.Siglip2VisionModel(config), fields, encoder_key_maps.siglip2_vision


def dinov2(size):
    config = transformers.Dinov2Config(**SIZES, image_size=size, patch_size=14, mlp_ratio=2)
    return transformers.Dinov2Model(config), DINO | dict(mlp=64), encoder_key_maps.dinov2


def dinov2_swiglu(size):
    config = transformers.Dinov2Config(**SIZES, image_size=size, patch_size=14, mlp_ratio=2, use_swiglu_ffn=True)
    fields = dict(mlp=48, gated=True, activation="silu")  # 48: two thirds of 64, rounded up to a multiple of 8
    return transformers.Dinov2Model(config), DINO | fields, encoder_key_maps.dinov2


def dinov2_registers(size):
    config = transformers.Dinov2WithRegistersConfig(
        **SIZES, image_size=size, patch_size=14, mlp_ratio=2, num_register_tokens=3
    )
    fields = DINO | dict(mlp=64, registers=3, interpolation="bicubic_antialias")
    return transformers.Dinov2WithRegistersModel(config), fields, encoder_key_maps.dinov2


def dinov3(size):
    config = transformers.DINOv3ViTConfig(
        **SIZES, image_size=size, patch_size=14, intermediate_size=48, num_register_tokens=3
    )
    fields = DINO | dict(eps=1e-5, registers=3, rope_theta=100.0, key_bias=False)
    return transformers.DINOv3ViTModel(config), fields, encoder_key_maps.dinov3_vit


def dinov3_swiglu(size):
    config = transformers.DINOv3ViTConfig(
        **SIZES, image_size=size, patch_size=14, intermediate_size=48, num_register_tokens=3,
        use_gated_mlp=True, hidden_act="silu", key_bias=True,
    )  # fmt: skip
    fields = DINO | dict(eps=1e-5, registers=3, rope_theta=100.0, gated=True, activation="silu")
    return transformers.DINOv3ViTModel(config), fields, encoder_key_maps.dinov3_vit


def call(model, encoder, images):
    """The outputs of the Hugging Face model, with all hidden states."""
    pixels = pixels_of(encoder, images)
    if not isinstance(model, transformers.Siglip2VisionModel):
        options = {"interpolate_pos_encoding": True} if isinstance(model, SIZED) and encoder.table else {}
        return model(pixels, output_hidden_states=True, **options)
    grid, patch = encoder.grid, encoder.patch
    cells = pixels[:, :, : grid * patch, : grid * patch].unfold(2, patch, patch).unfold(3, patch, patch)
    cells = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    mask, shape = torch.ones(len(cells), grid**2), torch.full((len(cells), 2), grid)
    return model(cells, pixel_attention_mask=mask, spatial_shapes=shape, output_hidden_states=True)


SIZED = (transformers.CLIPVisionModel, transformers.SiglipVisionModel)  # these resample their table only if asked to
VITS = [clip, siglip, siglip2, dinov2, dinov2_swiglu, dinov2_registers, dinov3, dinov3_swiglu]


@pytest.mark.parametrize("family", VITS)
@pytest.mark.parametrize("size", [42, 48], ids=["whole patches", "pixels left over"])
def test_vit(family, size, tmp_path):
    """The embedding and all hidden states; 48 pixels are 3 patches of 14 and a remainder, as in SigLIP at 384."""
    model, fields, key_map_of = family(size)
    model = randomise(model, 0.05)
    model.save_pretrained(tmp_path / "theirs")
    vit = ViT(size, 14, 32, 4, 4, **{"mlp": 48} | fields, taps=(0, 1, 2, 3, 4), remat="none")
    images, key_map = pictures(size), key_map_of(vit)
    params = import_weights(key_map, open_folder(tmp_path / "theirs"), shapes(vit, images))
    taps, theirs = apply(vit, params, images), call(model, vit, images)
    extra = vit.class_token + vit.registers
    assert len(theirs.hidden_states) == len(taps)
    for ours, state in zip(taps, theirs.hidden_states):
        close(ours.reshape(2, 9, 32), state[:, extra:])
    again = reopen(model, tmp_path, key_map, params)
    assert torch.equal(call(again, vit, images).last_hidden_state, theirs.last_hidden_state)


@pytest.mark.parametrize("family", VITS)
def test_vit_with_final_norm(family, tmp_path):
    """The last tap after the final norm, and a ViT whose taps need fewer blocks than the checkpoint has."""
    model, fields, key_map_of = family(42)
    model = randomise(model, 0.05)
    model.save_pretrained(tmp_path / "theirs")
    images = pictures(42)
    for taps, final_norm in (((4,), True), ((2,), False)):
        vit = ViT(42, 14, 32, 4, 4, **{"mlp": 48} | fields, taps=taps, final_norm=final_norm, remat="none")
        params = import_weights(key_map_of(vit), open_folder(tmp_path / "theirs"), shapes(vit, images))
        theirs = call(model, vit, images)
        state = theirs.last_hidden_state if final_norm and family is not clip else theirs.hidden_states[max(taps)]
        if final_norm and family is clip:  # transformers norms only the class token
            state = model.post_layernorm(state)
        close(apply(vit, params, images)[0].reshape(2, 9, 32), state[:, vit.class_token + vit.registers :])


@pytest.mark.parametrize("family", [clip, siglip, dinov2, dinov2_registers, dinov3])
@pytest.mark.parametrize("size", [28, 84], ids=["smaller", "larger"])
def test_other_resolution(family, size, tmp_path):
    """A checkpoint for 56 pixels at another size: its table of positions is resampled as in transformers."""
    model, fields, key_map_of = family(56)
    model = randomise(model, 0.05)
    model.save_pretrained(tmp_path / "theirs")
    vit = ViT(size, 14, 32, 4, 4, **{"mlp": 48} | fields, table=4, taps=(0, 4), remat="none")
    images = pictures(size)
    params = import_weights(key_map_of(vit), open_folder(tmp_path / "theirs"), shapes(vit, images))
    theirs = call(model, vit, images).hidden_states
    for ours, state in zip(apply(vit, params, images), (theirs[0], theirs[4])):
        close(ours.reshape(2, -1, 32), state[:, vit.class_token + vit.registers :])


def timm_names(tensors):
    """The tensors of a Hugging Face SigLIP with the names that they have in timm and open_clip."""
    names = {
        "embeddings.patch_embedding": "patch_embed.proj",
        "embeddings.position_embedding.weight": "pos_embed",
        "encoder.layers": "blocks",
        "layer_norm": "norm",
        "self_attn.out_proj": "attn.proj",
        "post_layernorm": "norm",
    }
    result = {}
    for key, x in tensors.items():
        if ".k_proj." in key or ".v_proj." in key or key.startswith("head."):
            continue
        if ".q_proj." in key:
            x = np.concatenate([tensors[key.replace(".q_proj.", f".{n}_proj.")] for n in "qkv"])
            key = key.replace("self_attn.q_proj", "attn.qkv")
        for theirs, name in names.items():
            key = key.replace(theirs, name)
        result["visual.trunk." + key] = x[None] if key == "pos_embed" else x
    return result


def test_timm_layout(tmp_path):
    """A SigLIP in open_clip's layout gives the same outputs as in Hugging Face's."""
    model, fields, key_map_of = siglip(42)
    randomise(model, 0.05).save_pretrained(tmp_path / "theirs")
    theirs = open_folder(tmp_path / "theirs")
    write_folder(tmp_path / "timm", timm_names(theirs))
    vit = ViT(42, 14, 32, 4, 4, 48, **fields, taps=(2, 4), final_norm=True, remat="none")
    ours, images = shapes(vit, pictures(42)), pictures(42)
    key_map = encoder_key_maps.timm_vit(vit).under("visual.trunk.", "")
    params = import_weights(key_map, open_folder(tmp_path / "timm"), ours)
    same = import_weights(key_map_of(vit), theirs, ours)
    np.testing.assert_array_equal(apply(vit, params, images), apply(vit, same, images))
    again = export_weights(key_map, params)
    for key, x in open_folder(tmp_path / "timm").items():
        np.testing.assert_array_equal(again[key], x)


@pytest.mark.parametrize("old, new", [(37, 24), (37, 27), (16, 27), (27, 24), (4, 3)])
@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_resampled_positions(kind, old, new):
    """Compares with torch's resampling; the offset is passed in the scale factor, as in DINOv2."""
    table = np.random.default_rng(0).standard_normal((old, old, 8), np.float32)
    mode, _, extra = kind.partition("_")
    scale = (new + 0.1) / old
    size = dict(scale_factor=(scale, scale)) if extra == "offset" else dict(size=(new, new))
    theirs = torch.nn.functional.interpolate(
        torch.tensor(table).permute(2, 0, 1)[None],
        mode=mode,
        align_corners=False,
        antialias=extra == "antialias",
        **size,
    )
    close(resample_table(table, new, kind), theirs[0].permute(1, 2, 0))
