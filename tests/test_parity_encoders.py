"""Tiny random Hugging Face encoders: the same numbers here, and the same model after a round trip."""

from __future__ import annotations

import numpy as np
import pytest

from jaxmllm.encoders.common import HALF, IMAGENET_MEAN, IMAGENET_STD, INTERPOLATIONS, resample_table
from jaxmllm.encoders.convnext import ConvNeXt
from jaxmllm.encoders.swin import Swin
from jaxmllm.encoders.vit import ViT
from jaxmllm.weights import encoder_tables
from jaxmllm.weights.convert import export_weights, import_weights
from jaxmllm.weights.safetensors import open_folder, write_folder
from tests.golden_case import shapes
from tests.parity import apply, close, randomised, reopened

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
    return transformers.CLIPVisionModel(config), fields, encoder_tables.clip_vision


def siglip(size):
    config = transformers.SiglipVisionConfig(**SIZES, image_size=size, patch_size=14, intermediate_size=48)
    return transformers.SiglipVisionModel(config), SIGLIP, encoder_tables.siglip_vision


def siglip2(size):
    """NaFlex: its table of 4 x 4 positions is resampled to the 3 x 3 patches."""
    config = transformers.Siglip2VisionConfig(**SIZES, num_patches=16, patch_size=14, intermediate_size=48)
    fields = SIGLIP | dict(table=4, interpolation="bilinear_antialias")
    return transformers.Siglip2VisionModel(config), fields, encoder_tables.siglip2_vision


def dinov2(size):
    config = transformers.Dinov2Config(**SIZES, image_size=size, patch_size=14, mlp_ratio=2)
    return transformers.Dinov2Model(config), DINO | dict(mlp=64), encoder_tables.dinov2


def dinov2_swiglu(size):
    config = transformers.Dinov2Config(**SIZES, image_size=size, patch_size=14, mlp_ratio=2, use_swiglu_ffn=True)
    fields = dict(mlp=48, gated=True, activation="silu")  # 48: two thirds of 64, rounded up to a multiple of 8
    return transformers.Dinov2Model(config), DINO | fields, encoder_tables.dinov2


def dinov2_registers(size):
    config = transformers.Dinov2WithRegistersConfig(
        **SIZES, image_size=size, patch_size=14, mlp_ratio=2, num_register_tokens=3
    )
    fields = DINO | dict(mlp=64, registers=3, interpolation="bicubic_antialias")
    return transformers.Dinov2WithRegistersModel(config), fields, encoder_tables.dinov2


def dinov3(size):
    config = transformers.DINOv3ViTConfig(
        **SIZES, image_size=size, patch_size=14, intermediate_size=48, num_register_tokens=3
    )
    fields = DINO | dict(eps=1e-5, registers=3, rope_theta=100.0, key_bias=False)
    return transformers.DINOv3ViTModel(config), fields, encoder_tables.dinov3_vit


def dinov3_swiglu(size):
    config = transformers.DINOv3ViTConfig(
        **SIZES, image_size=size, patch_size=14, intermediate_size=48, num_register_tokens=3,
        use_gated_mlp=True, hidden_act="silu", key_bias=True,
    )  # fmt: skip
    fields = DINO | dict(eps=1e-5, registers=3, rope_theta=100.0, gated=True, activation="silu")
    return transformers.DINOv3ViTModel(config), fields, encoder_tables.dinov3_vit


def pixels_of(encoder, images):
    """What transformers' processors make of pictures that have the right size already."""
    pixels = (images.astype(np.float32) / 255 - np.float32(encoder.mean)) / np.float32(encoder.std)
    return torch.tensor(pixels.transpose(0, 3, 1, 2))


def call(model, encoder, images):
    """The model's outputs with all hidden states."""
    pixels = pixels_of(encoder, images)
    if not isinstance(model, transformers.Siglip2VisionModel):
        options = {"interpolate_pos_encoding": True} if isinstance(model, SIZED) and encoder.table else {}
        return model(pixels, output_hidden_states=True, **options)
    grid, patch = encoder.grid, encoder.patch
    cells = pixels[:, :, : grid * patch, : grid * patch].unfold(2, patch, patch).unfold(3, patch, patch)
    cells = cells.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(1, 2)
    mask, shape = torch.ones(len(cells), grid**2), torch.full((len(cells), 2), grid)
    return model(cells, pixel_attention_mask=mask, spatial_shapes=shape, output_hidden_states=True)


SIZED = (transformers.CLIPVisionModel, transformers.SiglipVisionModel)  # resample their table only when told to
VITS = [clip, siglip, siglip2, dinov2, dinov2_swiglu, dinov2_registers, dinov3, dinov3_swiglu]


def pictures(size):
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)


@pytest.mark.parametrize("family", VITS)
@pytest.mark.parametrize("size", [42, 48], ids=["whole patches", "pixels left over"])
def test_vit(family, size, tmp_path):
    """Every hidden state and the embedding; 48 pixels are 3 patches of 14 and a rest, as in SigLIP at 384."""
    model, fields, table = family(size)
    model = randomised(model, 0.05)
    model.save_pretrained(tmp_path / "theirs")
    vit = ViT(size, 14, 32, 4, 4, **{"mlp": 48} | fields, taps=(0, 1, 2, 3, 4), remat="none")
    images, table = pictures(size), table(vit)
    params = import_weights(table, open_folder(tmp_path / "theirs"), shapes(vit, images))
    taps, theirs = apply(vit, params, images), call(model, vit, images)
    extra = vit.class_token + vit.registers
    assert len(theirs.hidden_states) == len(taps)
    for ours, state in zip(taps, theirs.hidden_states):
        close(ours.reshape(2, 9, 32), state[:, extra:])
    again = reopened(model, tmp_path, table, params)
    assert torch.equal(call(again, vit, images).last_hidden_state, theirs.last_hidden_state)


@pytest.mark.parametrize("family", VITS)
def test_vit_with_final_norm(family, tmp_path):
    """The last tap behind the final norm; fewer blocks than the checkpoint has are taken with fewer taps."""
    model, fields, table = family(42)
    model = randomised(model, 0.05)
    model.save_pretrained(tmp_path / "theirs")
    images = pictures(42)
    for taps, final_norm in (((4,), True), ((2,), False)):
        vit = ViT(42, 14, 32, 4, 4, **{"mlp": 48} | fields, taps=taps, final_norm=final_norm, remat="none")
        params = import_weights(table(vit), open_folder(tmp_path / "theirs"), shapes(vit, images))
        theirs = call(model, vit, images)
        state = theirs.last_hidden_state if final_norm and family is not clip else theirs.hidden_states[max(taps)]
        if final_norm and family is clip:  # transformers norms only the class token
            state = model.post_layernorm(state)
        close(apply(vit, params, images)[0].reshape(2, 9, 32), state[:, vit.class_token + vit.registers :])


@pytest.mark.parametrize("family", [clip, siglip, dinov2, dinov2_registers, dinov3])
@pytest.mark.parametrize("size", [28, 84], ids=["smaller", "larger"])
def test_other_resolution(family, size, tmp_path):
    """A checkpoint for 56 pixels at another size: its table of positions is resampled as transformers does."""
    model, fields, table = family(56)
    model = randomised(model, 0.05)
    model.save_pretrained(tmp_path / "theirs")
    vit = ViT(size, 14, 32, 4, 4, **{"mlp": 48} | fields, table=4, taps=(0, 4), remat="none")
    images = pictures(size)
    params = import_weights(table(vit), open_folder(tmp_path / "theirs"), shapes(vit, images))
    theirs = call(model, vit, images).hidden_states
    for ours, state in zip(apply(vit, params, images), (theirs[0], theirs[4])):
        close(ours.reshape(2, -1, 32), state[:, vit.class_token + vit.registers :])


def timm_names(tensors):
    """The tensors of a Hugging Face SigLIP under the names that timm and open_clip give them."""
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
    """A SigLIP as open_clip stores it gives the outputs of the same SigLIP as Hugging Face stores it."""
    model, fields, table = siglip(42)
    randomised(model, 0.05).save_pretrained(tmp_path / "theirs")
    theirs = open_folder(tmp_path / "theirs")
    write_folder(tmp_path / "timm", timm_names(theirs))
    vit = ViT(42, 14, 32, 4, 4, 48, **fields, taps=(2, 4), final_norm=True, remat="none")
    ours, images = shapes(vit, pictures(42)), pictures(42)
    layout = encoder_tables.timm_vit(vit).under("visual.trunk.", "")
    params = import_weights(layout, open_folder(tmp_path / "timm"), ours)
    same = import_weights(table(vit), theirs, ours)
    np.testing.assert_array_equal(apply(vit, params, images), apply(vit, same, images))
    again = export_weights(layout, params)
    for key, x in open_folder(tmp_path / "timm").items():
        np.testing.assert_array_equal(again[key], x)


def convnext(**fields):
    sizes = dict(hidden_sizes=[8, 12, 16, 24], depths=[1, 2, 2, 1])
    config = transformers.ConvNextConfig(**sizes, layer_scale_init_value=0.5)
    model = randomised(transformers.ConvNextModel(config), 0.1)
    return model, ConvNeXt(64, (8, 12, 16, 24), (1, 2, 2, 1), **fields, remat="none")


@pytest.mark.parametrize("tap", range(5))
def test_convnext(tap, tmp_path):
    model, net = convnext(taps=(tap,))
    model.save_pretrained(tmp_path / "theirs")
    images = pictures(64)
    params = import_weights(encoder_tables.convnext(net), open_folder(tmp_path / "theirs"), shapes(net, images))
    theirs = model(pixels_of(net, images), output_hidden_states=True)
    close(apply(net, params, images)[0].transpose(0, 3, 1, 2), theirs.hidden_states[tap])
    if tap == 4:
        again = reopened(model, tmp_path, encoder_tables.convnext(net), params)
        assert torch.equal(again(pixels_of(net, images)).last_hidden_state, theirs.last_hidden_state)


def test_convnext_as_cambrian_joins_it(tmp_path):
    """Four stages, each resized in float32 without antialias, and joined on channels: 16, 8, 4, 2 -> 6 a side."""
    model, net = convnext(taps=(1, 2, 3, 4), resize=6)
    model.save_pretrained(tmp_path / "theirs")
    images = pictures(64)
    params = import_weights(encoder_tables.convnext(net), open_folder(tmp_path / "theirs"), shapes(net, images))
    states = model(pixels_of(net, images), output_hidden_states=True).hidden_states[1:]
    resized = [torch.nn.functional.interpolate(s, (6, 6), mode="bilinear", align_corners=False) for s in states]
    close(apply(net, params, images)[0].transpose(0, 3, 1, 2), torch.cat(resized, 1))


def test_convnext_timm_layout(tmp_path):
    """A ConvNeXt as open_clip stores it gives the outputs of the same ConvNeXt as Hugging Face stores it."""
    model, net = convnext(taps=(1, 2, 3, 4), resize=4)
    model.save_pretrained(tmp_path / "theirs")
    theirs, images = open_folder(tmp_path / "theirs"), pictures(64)
    names = {
        "embeddings.patch_embeddings": "stem.0",
        "embeddings.layernorm": "stem.1",
        "encoder.stages": "stages",
        "downsampling_layer": "downsample",
        "layers": "blocks",
        "dwconv": "conv_dw",
        "layernorm": "norm",
        "pwconv1": "mlp.fc1",
        "pwconv2": "mlp.fc2",
        "layer_scale_parameter": "gamma",
    }
    renamed = {}
    for key, x in theirs.items():
        for old, new in names.items():
            key = key.replace(old, new)
        renamed["visual.trunk." + ("head." + key if key.startswith("norm.") else key)] = x
    write_folder(tmp_path / "timm", renamed)
    layout = encoder_tables.timm_convnext(net).under("visual.trunk.", "")
    params = import_weights(layout, open_folder(tmp_path / "timm"), shapes(net, images))
    same = import_weights(encoder_tables.convnext(net), theirs, shapes(net, images))
    np.testing.assert_array_equal(apply(net, params, images), apply(net, same, images))


@pytest.mark.parametrize("size", [64, 70], ids=["whole windows", "odd sides"])
@pytest.mark.parametrize("norms", [True, False])
def test_swin(size, norms, tmp_path):
    """OneFormer's backbone: 70 pixels are 18 patches, 9 and 5 after halving, in windows of 4 that are filled up."""
    stages = ["stage1", "stage2", "stage3"]
    config = transformers.SwinConfig(
        embed_dim=12, depths=[2, 4, 2], num_heads=[2, 3, 4], window_size=4, image_size=size, out_features=stages
    )
    model = randomised(transformers.SwinBackbone(config), 0.05)
    model.save_pretrained(tmp_path / "theirs")
    images, sizes = pictures(size), (size, 12, (2, 4, 2), (2, 3, 4), 4)
    theirs = call(model, Swin(*sizes, taps=(1,)), images)
    states = theirs.feature_maps if norms else theirs.hidden_states[1:]
    for tap, state in zip((1, 2, 3), states):
        net = Swin(*sizes, taps=(tap,), norms=norms, remat="none")
        params = import_weights(
            encoder_tables.swin_backbone(net), open_folder(tmp_path / "theirs"), shapes(net, images)
        )
        close(apply(net, params, images)[0].transpose(0, 3, 1, 2), state)
    net = Swin(*sizes, taps=(1, 2, 3), resize=4, norms=norms)
    table = encoder_tables.swin_backbone(net)
    params = import_weights(table, open_folder(tmp_path / "theirs"), shapes(net, images))
    again = reopened(model, tmp_path, table, params)
    for before, after in zip(theirs.feature_maps, call(again, net, images).feature_maps):
        assert torch.equal(before, after)


@pytest.mark.parametrize("old, new", [(37, 24), (37, 27), (16, 27), (27, 24), (4, 3)])
@pytest.mark.parametrize("kind", INTERPOLATIONS)
def test_resampled_positions(kind, old, new):
    """torch's own resampling; the offset is passed to it as DINOv2 does, in the scale factor."""
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
