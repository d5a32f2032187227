"""Bilinear sampling: the plain form against a loop over pixels; the TPU kernels, interpreted on a CPU, against it."""

import itertools
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmllm import mesh, sharded
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.nn import compiler
from jaxmllm.nn.sampling import choose
from jaxmllm.nn.sampling.plain import plain_sample
from jaxmllm.nn.sampling.tpu import tpu_sample, vmem_available, vmem_needed
from jaxmllm.train.state import flatten, unflatten
from tests import visual_zoo as zoo
from tests.conftest import ROOT, simulated

NAN = pltpu.InterpretParams(uninitialized_memory="nan")  # a simulation of a TPU's memory


def kernel(*x, interpret=True):
    return tpu_sample(*x, interpret=interpret)


def example(sizes: list[tuple[int, int]], n=2, queries=150, heads=3, d=8, dtype=jnp.float32):
    """Values (consecutive levels of the same size in one array), places (every other one on a pixel), weights, and a
    cotangent."""
    rng = np.random.default_rng(0)
    runs = [(size, len(list(run))) for size, run in itertools.groupby(sizes)]
    values = [jnp.asarray(rng.normal(size=(count, n, *size, heads * d)), dtype) for size, count in runs]
    at = rng.uniform(-2, max(map(max, sizes)) + 2, size=(n, queries, heads, len(sizes), 4, 2)).astype(np.float32)
    at[:, ::2] = np.round(at[:, ::2])
    weights = rng.uniform(size=at.shape[:-1]).astype(np.float32)
    return values, jnp.asarray(at), jnp.asarray(weights), jnp.asarray(rng.normal(size=(n, queries, heads * d)), dtype)


def value_and_gradients(form, values, at, weights, g):
    """Output and gradients."""
    y, vjp = jax.vjp(form, values, at, weights)
    return y, vjp(g)


def test_plain_form_equals_a_loop_over_pixels():
    values, at, weights, _ = example([(3, 4), (3, 4), (5, 2)], n=1, queries=7, heads=2, d=2)
    levels, expected = [level for value in values for level in value], np.zeros((7, 2, 2))
    for q, m, level, k in np.ndindex(7, 2, 3, 4):
        x, y = at[0, q, m, level, k]
        for i, j in np.ndindex(levels[level].shape[1:3]):
            near = max(0, 1 - abs(x - j)) * max(0, 1 - abs(y - i))
            expected[q, m] += weights[0, q, m, level, k] * near * levels[level][0, i, j].reshape(2, 2)[m]
    np.testing.assert_allclose(plain_sample(values, at, weights)[0], expected.reshape(7, 4), atol=1e-5)


@pytest.mark.parametrize("form", [plain_sample, kernel])
def test_gradients_of_places_are_finite_differences_to_both_sides(form):
    """Between pixels and on them, inside the map and outside."""
    keys = jax.random.split(jax.random.key(0), 3)
    values = [jax.random.normal(keys[0], (1, 1, 4, 5, 3))]
    spots = jnp.array(list(itertools.product([-2, -1.5, -1, -0.25, 0, 1.5, 3, 4, 4.75, 5], repeat=2)))
    at, weights = spots[None, :, None, None, None], jax.random.normal(keys[1], (1, len(spots), 1, 1, 1))
    g, step = jax.random.normal(keys[2], (1, len(spots), 3)), 2.0**-6
    _, (_, by_place, by_weight) = value_and_gradients(form, values, at, weights, g)
    for axis in range(2):
        right, left = (plain_sample(values, at.at[..., axis].add(by), weights) for by in (step, -step))
        moved = (right - left) / (2 * step)
        np.testing.assert_allclose(by_place[0, :, 0, 0, 0, axis], (moved * g).sum(-1)[0], atol=1e-4)
    unweighted = plain_sample(values, at, jnp.ones_like(weights))
    np.testing.assert_allclose(by_weight[0, :, 0, 0, 0], (unweighted * g).sum(-1)[0], atol=1e-5)


# Sizes of levels, queries, heads, channels of a head. First case: a block has all three heads, and the last block has
# few queries. Second: a block has two of four heads, and maps have several pieces. Third: the channels of the one head
# are no multiple of 128.
CASES = [
    ([(5, 6), (7, 9), (6, 5)], 150, 3, 8),
    ([(37, 37), (37, 37)], 128, 4, 64),
    ([(24, 24)], 60, 1, 40),
]


@pytest.mark.parametrize("interpret", [True, NAN])
@pytest.mark.parametrize("sizes, queries, heads, d", CASES)
def test_kernels_equal_the_plain_form(sizes, queries, heads, d, interpret):
    """They also read nothing before it is written, or the simulation would give NaN."""
    x = example(sizes, 2 if heads < 4 else 1, queries, heads, d)
    found = jax.jit(lambda *x: value_and_gradients(lambda *x: kernel(*x, interpret=interpret), *x))(*x)
    wanted = jax.jit(lambda *x: value_and_gradients(plain_sample, *x))(*x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, wanted)


def test_kernels_in_bfloat16_equal_the_plain_form_in_float32():
    values, at, weights, g = example([(9, 9)] * 2, 1, 70, 2, 64, jnp.bfloat16)
    found = jax.jit(lambda *x: value_and_gradients(kernel, *x))(values, at, weights, g)
    assert found[0].dtype == found[1][0][0].dtype == jnp.bfloat16
    single = [value.astype(jnp.float32) for value in values]
    wanted = value_and_gradients(plain_sample, single, at, weights, g.astype(jnp.float32))
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.01 * float(jnp.abs(b).max()))


def test_mmfuser_is_the_same_as_on_a_tpu(monkeypatch):
    """There rows are padded to whole tiles and the kernels sample. Maps of one size, and of several."""
    fuser = MMFuser(heads=2)
    for sizes in ([(5, 5)] * 3, [(3, 4), (3, 4), (6, 2), (5, 5)]):
        rng = np.random.default_rng(0)
        taps = [jnp.asarray(rng.normal(size=(2, *size, 16)).astype(np.float32)) for size in sizes]
        taps = jnp.stack(taps) if len(sizes) == 3 else taps
        shapes = flatten(jax.eval_shape(lambda x: fuser.init(jax.random.key(0), x)["params"], taps))
        params = unflatten(zoo.random_like(shapes, 0))

        def run(params, taps):
            y, vjp = jax.vjp(lambda *x: fuser.apply({"params": x[0]}, x[1]).cells, params, taps)
            return y, vjp(jnp.cos(y))

        wanted = jax.jit(run)(params, taps)
        with monkeypatch.context() as tpu:
            tpu.setattr(compiler, "platform", lambda: "tpu")
            tpu.setattr(choose, "tpu_sample", kernel)
            found = jax.jit(lambda *x: run(*x))(params, taps)
        close = lambda a, b: np.testing.assert_allclose(a, b, atol=1e-4 * float(jnp.abs(b).max()))
        jax.tree.map(close, found, wanted)


def test_maps_of_clip_fit_on_the_chip_and_large_maps_do_not():
    """Maps of two heads with 64 channels and their gradients, in bfloat16, are there twice, and float32 sums once."""
    clip = [jax.ShapeDtypeStruct((4, 8, 24, 24, 1024), jnp.bfloat16)]
    assert vmem_needed(clip, 16) == 4 * 24 * 24 * 128 * (2 * 2 + 2 * 2 + 4) < vmem_available()
    assert vmem_needed([jax.ShapeDtypeStruct((5, 8, 96, 96, 1024), jnp.bfloat16)], 16) > vmem_available()


def images_and_heads_split() -> None:
    """Compares both forms on four devices (images over fsdp 2, heads over tensor 2) with the plain form on one."""
    values, at, weights, g = example([(5, 6), (5, 6), (4, 7)], 2, 40, 4, 8)
    wanted = value_and_gradients(plain_sample, values, at, weights, g)
    with jax.set_mesh(mesh.Mesh(fsdp=2, tensor=2).build()):
        values = [sharded.shard(v, None, "batch", None, None, "heads") for v in values]
        at, weights = (sharded.shard(x, "batch", None, "heads", *[None] * (x.ndim - 3)) for x in (at, weights))
        g = sharded.shard(g, "batch", None, "heads")
        for form in (plain_sample, kernel):
            found = jax.jit(lambda *x, form=form: value_and_gradients(form, *x))(values, at, weights, g)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), found, wanted)


def test_both_forms_are_the_same_with_images_and_heads_split():
    code = "from tests.test_sampling import images_and_heads_split; images_and_heads_split()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=simulated(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
