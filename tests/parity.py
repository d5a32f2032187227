"""What the comparisons with PyTorch share. This module imports torch only where it uses it."""

from __future__ import annotations

import jax
import numpy as np

from jaxmllm.train.state import unflatten
from jaxmllm.weights.convert import export_weights
from jaxmllm.weights.safetensors import open_folder, write_folder

TOLERANCE = 1e-5


def randomise(model, scale=0.1):
    """Adds noise to each parameter, so that those that start at zero or one become random too; returns the model."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)
    return model.eval()


def reopen(model, tmp_path, key_map, params):
    """Writes our params and reads them with transformers; each tensor must equal the model's. Returns the new model."""
    import torch

    kept = {key: x for key, x in open_folder(tmp_path / "theirs").items() if key_map.ignores(key)}
    write_folder(tmp_path / "ours", export_weights(key_map, params) | kept)
    model.config.save_pretrained(tmp_path / "ours")
    attention = model.config._attn_implementation  # not part of what is saved
    again = type(model).from_pretrained(tmp_path / "ours", attn_implementation=attention).eval()
    before, after = model.state_dict(), again.state_dict()
    assert before.keys() == after.keys()
    for key, x in before.items():
        assert torch.equal(x, after[key]), key
    return again


def apply(module, params, *args, **options):
    """The module's output, with full float32 products."""
    run = jax.jit(lambda params, *args: module.apply({"params": params}, *args, **options))
    with jax.default_matmul_precision("highest"):
        return run(unflatten(params), *args)


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=TOLERANCE)


def pixels_of(encoder, images):
    """What transformers' processors make of pictures that already have the right size: [N, 3, size, size]."""
    import torch

    pixels = (images.astype(np.float32) / 255 - np.float32(encoder.mean)) / np.float32(encoder.std)
    return torch.tensor(pixels.transpose(0, 3, 1, 2))


def pictures(size):
    """Two random pictures, uint8[2, size, size, 3]."""
    return np.random.default_rng(0).integers(0, 256, (2, size, size, 3), np.uint8)
