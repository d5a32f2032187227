"""Tiny random Hugging Face models: the same numbers here, and the same model after a round trip."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.encoders.vit import HALF, IMAGENET_MEAN, IMAGENET_STD, ViT
from jaxmllm.llms.decoder import Decoder
from jaxmllm.train.state import unflatten
from jaxmllm.weights import tables
from jaxmllm.weights.convert import export_weights, import_weights
from jaxmllm.weights.safetensors import open_folder, write_folder
from tests.golden_case import shapes

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

TOLERANCE = 1e-5


def randomised(model):
    """Every parameter random, also those that start at zero or one."""
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape, generator=generator)
    return model.eval()


def reopened(model, tmp_path, table, params):
    """The model as transformers reads it from what we write; every tensor must be as it was."""
    kept = {key: x for key, x in open_folder(tmp_path / "theirs").items() if table.ignores(key)}
    write_folder(tmp_path / "ours", export_weights(table, params) | kept)
    model.config.save_pretrained(tmp_path / "ours")
    attention = model.config._attn_implementation  # not among what is saved
    again = type(model).from_pretrained(tmp_path / "ours", attn_implementation=attention).eval()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, x in before.items():
        assert torch.equal(x, after[key]), key
    return again


def apply(module, params, x, **options):
    """The module's output in full float32."""
    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda params, x: module.apply({"params": params}, x, **options))(unflatten(params), x)


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=TOLERANCE)


def llama(**fields):
    config = transformers.LlamaConfig(rope_theta=5e5, rms_norm_eps=1e-5, **fields)
    return transformers.LlamaForCausalLM(config), dict(rope_theta=5e5), tables.llama


def qwen2(**fields):
    config = transformers.Qwen2Config(rms_norm_eps=1e-6, **fields)
    return transformers.Qwen2ForCausalLM(config), dict(eps=1e-6, qkv_bias=True), tables.llama


def phi3(**fields):
    config = transformers.Phi3Config(rms_norm_eps=1e-5, **fields)
    return transformers.Phi3ForCausalLM(config), {}, tables.phi3


@pytest.mark.parametrize("family", [llama, qwen2, phi3])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
def test_language_model(family, tied, tmp_path):
    sizes = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3, vocab_size=60, pad_token_id=0)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, bos_token_id=1, eos_token_id=2)
    model, fields, table = family(**sizes, **heads, tie_word_embeddings=tied, attn_implementation="eager")
    model = randomised(model)
    model.save_pretrained(tmp_path / "theirs")
    decoder = Decoder(60, 32, 3, 4, 2, 48, tied=tied, remat="none", **fields)
    ids = np.random.default_rng(0).integers(0, 60, (2, 11), np.int32)
    positions, ones = np.broadcast_to(np.arange(11), ids.shape), np.ones_like(ids)

    def run(decoder, ids):
        states, taps, _ = decoder(decoder.embed(ids), positions, ones, taps=(1, 2, 3))
        return jnp.einsum("bsh,vh->bsv", states, decoder.output_table()), taps

    table = table(decoder)
    params = import_weights(table, open_folder(tmp_path / "theirs"), shapes(decoder, ids, method=run))
    logits, taps = apply(decoder, params, ids, method=run)
    theirs = model(torch.tensor(ids, dtype=torch.long), output_hidden_states=True)
    close(logits, theirs.logits)
    for i, x in taps.items():
        close(x, theirs.hidden_states[i])
    again = reopened(model, tmp_path, table, params)
    assert torch.equal(again(torch.tensor(ids, dtype=torch.long)).logits, theirs.logits)


def clip(sizes):
    model = transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**sizes, intermediate_size=48))
    fields = dict(activation="quick_gelu", class_token=True, pre_norm=True, patch_bias=False)
    return model, fields, tables.clip_vision


def siglip(sizes):
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**sizes, intermediate_size=48))
    return model, dict(activation="gelu_tanh", eps=1e-6, mean=HALF, std=HALF), tables.siglip_vision


DINO = dict(eps=1e-6, class_token=True, layer_scale=True, mean=IMAGENET_MEAN, std=IMAGENET_STD)


def dinov2(sizes):
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2))
    return model, DINO | dict(mlp=64), tables.dinov2


def dinov2_swiglu(sizes):
    model = transformers.Dinov2Model(transformers.Dinov2Config(**sizes, mlp_ratio=2, use_swiglu_ffn=True))
    fields = dict(mlp=48, gated=True, activation="silu")  # 48: two thirds of 64, rounded up to a multiple of 8
    return model, DINO | fields, tables.dinov2


def dinov2_registers(sizes):
    config = transformers.Dinov2WithRegistersConfig(**sizes, mlp_ratio=2, num_register_tokens=3)
    return transformers.Dinov2WithRegistersModel(config), DINO | dict(mlp=64, registers=3), tables.dinov2


@pytest.mark.parametrize("family", [clip, siglip, dinov2, dinov2_swiglu, dinov2_registers])
@pytest.mark.parametrize("size", [42, 48], ids=["whole patches", "pixels left over"])
def test_encoder(family, size, tmp_path):
    """Every hidden state and the embedding; 48 pixels are 3 patches of 14 and a rest, as in SigLIP at 384."""
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=size, patch_size=14)
    model, fields, table = family(sizes)
    model = randomised(model)
    model.save_pretrained(tmp_path / "theirs")
    vit = ViT(size, 14, 32, 4, 4, **{"mlp": 48} | fields, taps=(0, 1, 2, 3, 4), remat="none")
    images = np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
    table = table(vit)
    params = import_weights(table, open_folder(tmp_path / "theirs"), shapes(vit, images))
    taps = apply(vit, params, images)
    pixels = (images.astype(np.float32) / 255 - np.float32(vit.mean)) / np.float32(vit.std)
    pixels = torch.tensor(pixels.transpose(0, 3, 1, 2))
    theirs = model(pixels, output_hidden_states=True)
    extra = vit.class_token + vit.registers
    assert len(theirs.hidden_states) == len(taps)
    for ours, state in zip(taps, theirs.hidden_states):
        close(ours.reshape(2, 9, 32), state[:, extra:])
    again = reopened(model, tmp_path, table, params)
    assert torch.equal(again(pixels).last_hidden_state, theirs.last_hidden_state)


@pytest.mark.parametrize("family", [siglip, dinov2])
def test_encoder_with_final_norm(family, tmp_path):
    """The last tap behind the final norm; fewer blocks than the checkpoint has are taken with fewer taps."""
    sizes = dict(hidden_size=32, num_hidden_layers=4, num_attention_heads=4, image_size=42, patch_size=14)
    model, fields, table = family(sizes)
    model = randomised(model)
    model.save_pretrained(tmp_path / "theirs")
    images = np.random.default_rng(0).integers(0, 256, (2, 42, 42, 3), np.uint8)
    for taps, final_norm in (((4,), True), ((2,), False)):
        vit = ViT(42, 14, 32, 4, 4, **{"mlp": 48} | fields, taps=taps, final_norm=final_norm, remat="none")
        params = import_weights(table(vit), open_folder(tmp_path / "theirs"), shapes(vit, images))
        ours = apply(vit, params, images)[0]
        pixels = (images.astype(np.float32) / 255 - np.float32(vit.mean)) / np.float32(vit.std)
        theirs = model(torch.tensor(pixels.transpose(0, 3, 1, 2)), output_hidden_states=True)
        state = theirs.last_hidden_state if final_norm else theirs.hidden_states[2]
        close(ours.reshape(2, 9, 32), state[:, int(vit.class_token) :])
