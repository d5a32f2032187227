"""Fusers: formulas that no golden file shows, and maps of different sizes."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.batch import MapShape
from jaxmllm.fusers.average import Average, WeightedAverage
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.dense_connector import STI, dci
from jaxmllm.fusers.fpn import FPN
from jaxmllm.fusers.level_attention import GlobalAttention
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.nn.maps import FlatMaps
from jaxmllm.train.state import flatten, unflatten
from tests.visual_zoo import apply, random_like, random_maps


def test_averages():
    x = random_maps(3, 2, 4, 4, 5)
    np.testing.assert_allclose(Average().apply({}, x).cells, np.mean(x, 0), atol=1e-6)
    fresh = WeightedAverage().init_with_output(jax.random.key(0), x)[0].cells
    np.testing.assert_allclose(fresh, np.mean(x, 0), atol=1e-6)
    weights = np.array([0.5, 0.3, 0.2])
    y = apply(WeightedAverage(), {"logits": {"value": jnp.log(weights)}}, x).cells
    np.testing.assert_allclose(y, np.tensordot(weights, x, 1), atol=1e-6)
    assert Average().apply({}, x.astype(jnp.bfloat16)).cells.dtype == jnp.bfloat16


def test_dense_connector_of_siglip():
    """27 states without class token; of 27 x 27 cells one is left over, and means run across rows."""
    x = random_maps(27, 1, 27, 27, 2)
    tokens = np.asarray(x).reshape(27, 729, 2)
    fused = STI().apply({}, x[np.array([7, 15, 26])])
    assert fused.extra.shape == (1, 182, 2)
    np.testing.assert_allclose(fused.extra[0, 91:], tokens[15, :728].reshape(91, 8, 2).mean(1), atol=1e-6)
    np.testing.assert_array_equal(fused.cells[0].reshape(729, 2), tokens[26])
    expected = np.concatenate([tokens[26], tokens[:13].mean(0), tokens[13:26].mean(0)], 1)
    np.testing.assert_allclose(dci(13, final=26).apply({}, x).cells[0].reshape(729, 6), expected, atol=1e-6)


def test_fresh_mmfuser_is_the_query():
    """This holds exactly, for each attention, on different grids that are not square."""
    levels = [random_maps(2, 3, 5, 8), random_maps(2, 6, 4, 8), random_maps(2, 2, 7, 8)]
    for attention in ("deformable", "global", "linear"):
        fuser = MMFuser(heads=2, attention=attention, pooled=2)
        fused = jax.jit(fuser.init_with_output)(jax.random.key(0), levels)[0]
        np.testing.assert_array_equal(fused.cells, levels[-1])


@pytest.mark.parametrize(
    "options, used", [({}, [0, 1, 2, 3, 4]), (dict(levels=2), [0, 1, 4]), (dict(query=2, levels=2), [0, 1, 2])]
)
def test_taps_that_mmfuser_reads(options, used):
    fuser, x = MMFuser(heads=2, attention="global", **options), random_maps(5, 1, 2, 2, 8)
    init = lambda x: fuser.init(jax.random.key(0), x)["params"]
    params = unflatten(random_like(flatten(jax.eval_shape(init, x)), 0))
    loss = lambda x: jnp.sum(fuser.apply({"params": params}, x).cells ** 2)
    grad = jax.jit(jax.grad(loss))(x)
    assert np.flatnonzero(np.abs(grad).max((1, 2, 3, 4))).tolist() == used


def test_global_attention_of_mmfuser():
    """Compares with the formula in numpy."""
    query, levels = random_maps(1, 6, 8), [FlatMaps.of(random_maps(1, 1, h, w, 8)) for h, w in ((2, 3), (1, 2))]
    module = GlobalAttention(2)
    params = module.init(jax.random.key(0), query, None, levels)["params"]
    x = np.concatenate([np.asarray(level.x).reshape(1, -1, 8) for level in levels], 1)[0]
    w = {k: np.asarray(v["kernel"], np.float64).reshape(8, -1) for k, v in params["attn"].items()}
    q, k, v = np.asarray(query)[0] @ w["q"], x @ w["k"], x @ w["v"]
    heads = []
    for h in (slice(0, 4), slice(4, 8)):
        e = np.exp(q[:, h] @ k[:, h].T / 2)
        heads.append(e / e.sum(1, keepdims=True) @ v[:, h])
    np.testing.assert_allclose(apply(module, params, query, None, levels)[0], np.hstack(heads) @ w["out"], atol=1e-5)


def test_maps_of_different_sizes():
    """Which fusers accept the maps of a pyramid, if an encoder gives them as a list."""
    pyramid = MapShape(8, 8, 16), MapShape(4, 4, 16), MapShape(2, 2, 16)
    assert FPN().output(pyramid) == (8, 8, 16, 0)
    assert MMFuser(heads=2).output(pyramid) == (2, 2, 16, 0)
    for fuser in (Average(), Concat(), STI(2), WeightedAverage()):
        with pytest.raises(ValueError, match="needs maps of one"):
            fuser.output(pyramid)
    with pytest.raises(ValueError, match="from fine to coarse, not 2 x 2, 4 x 4"):
        FPN().output(pyramid[::-1])
