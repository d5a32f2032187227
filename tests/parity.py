"""What the comparisons with PyTorch share. torch is imported where it is used: without it, this still imports."""

from __future__ import annotations

import jax
import numpy as np

from jaxmllm.train.state import unflatten
from jaxmllm.weights.convert import export_weights
from jaxmllm.weights.safetensors import open_folder, write_folder

TOLERANCE = 1e-5


def randomised(model, scale=0.1):
    """Every parameter random, also those that start at zero or one."""
    import torch

    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        p.data += scale * torch.randn(p.shape, generator=generator)
    return model.eval()


def reopened(model, tmp_path, table, params):
    """The model as transformers reads it from what we write; every tensor must be as it was."""
    import torch

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


def apply(module, params, *args, **options):
    """The module's output in full float32."""
    run = jax.jit(lambda params, *args: module.apply({"params": params}, *args, **options))
    with jax.default_matmul_precision("highest"):
        return run(unflatten(params), *args)


def close(ours, theirs):
    np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=TOLERANCE)
