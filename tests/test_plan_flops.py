"""The FLOPs that a model needs, counted in jaxprs of the installed version of JAX."""

import dataclasses
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl

from jaxmllm import jax_internals, recipes
from jaxmllm.plan import flops


def flops_of(f, *shapes, trained):
    """FLOPs of training f; trained: which of its arguments are trained weights."""
    counts = Counter()
    jaxpr = jax_internals.trace(f, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    flops.count(jaxpr, trained, 1, "jit(f)", counts)
    return sum(counts.values())


def test_flops_count_what_training_needs():
    mlp = lambda x, u, v: jnp.tanh(x @ u) @ v
    shapes, one = ((8, 16), (16, 32), (32, 4)), 2 * 8 * 32 * np.array([16, 4])
    assert flops_of(mlp, *shapes, trained=[False, False, False]) == one.sum()
    assert flops_of(mlp, *shapes, trained=[False, True, True]) == 2 * one[0] + 3 * one[1]  # x needs no gradient
    assert flops_of(mlp, *shapes, trained=[False, False, True]) == one[0] + 2 * one[1]
    assert flops_of(jax.checkpoint(mlp), *shapes, trained=[True] * 3) == 3 * one.sum()

    def layers(x, w):
        return jax.lax.scan(lambda x, w: (x @ w, None), x, w)[0]

    # The first x needs no gradient, but a loop is one program, and from the second turn on its carry depends on w.
    assert flops_of(layers, (8, 16), (5, 16, 16), trained=[False, True]) == 5 * 3 * 2 * 8 * 16 * 16

    def scoped(x, y):
        with jax.named_scope("causal"):
            z = x @ y
        with jax.named_scope("gather"):
            return z @ y

    assert flops_of(scoped, (8, 8), (8, 8), trained=[False, False]) == 8**3

    def seldom(x, y):
        with jax.named_scope("1_of_4"):
            return jax.lax.cond(x[0, 0] > 0, lambda: x @ y, lambda: x)

    assert flops_of(seldom, (8, 8), (8, 8), trained=[False, False]) == 2 * 8**3 / 4


def test_flops_of_the_8b_recipe():
    """6 FLOPs per token and parameter of all matrices except the embedding, and the causal triangle of attention."""
    run = recipes.load("configs/llama3_8b.py")
    by_component = flops.model_flops(run, run.stages[0])
    tokens, layer = 256 * 2048, 4096 * (4096 + 2 * 1024 + 4096 + 3 * 14336)
    assert by_component["head"] == 6 * tokens * 4096 * 128256
    assert by_component["llm"] == 6 * tokens * 32 * layer + 32 * 12 * tokens * 2048 * 4096 / 2


@pytest.mark.parametrize(
    "window, windowed, pairs",
    [
        (None, (True,), 3 * [1 / 2]),
        (64, (True,), 3 * [1 / 2]),  # no row is longer
        (16, (True,), 3 * [1 / 4 * (1 - 1 / 8)]),
        (16, (True, True, False), [*2 * [1 / 4 * (1 - 1 / 8)], 1 / 2]),
    ],
)
def test_flops_of_attention_with_a_window(window, windowed, pairs):
    run = recipes.load("configs/toy.py:tiny")
    llm = run.model.llm.clone(window=window, windowed=windowed, inserts=None, unroll=1)
    model = run.model.clone(llm=llm, objectives={"next_token": run.model.objectives["next_token"]})
    data = dataclasses.replace(run.data, seq_len=64, image_slots=1, targets=None)
    stage = dataclasses.replace(run.stages[0], losses={"next_token": 1.0}, rows=1)
    found = flops.model_flops(dataclasses.replace(run, model=model, data=data, stages=(stage,)), stage)
    matrices = 3 * llm.width * (4 * llm.width + 3 * llm.mlp)
    assert found["llm"] == 6 * 64 * matrices + sum(3 * 2 * 2 * 64 * 64 * llm.width * share for share in pairs)


def test_scans_tell_constants_carries_and_slices_apart():
    def f(x, w, b):
        return jax.lax.scan(lambda carry, w: ((carry[0] @ w + b, carry[1] + 1), carry[0]), (x, 0), w)

    shapes = (8, 16), (5, 16, 16), (16,)
    jaxpr = jax_internals.trace(f, *(jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes))
    (eqn,) = (eqn for eqn in jaxpr.eqns if eqn.primitive.name == "scan")
    loop = jax_internals.scan(eqn)
    assert (loop.length, loop.constants, loop.carries, len(loop.body.invars)) == (5, 1, 2, 4)


@pytest.mark.parametrize("wrap", ["jit", "checkpoint", "custom_jvp", "custom_vjp"])
def test_calls_of_every_kind_are_counted(wrap):
    def f(x, y):
        return x @ y

    wrapped = getattr(jax, wrap)(f)
    if wrap == "custom_jvp":
        wrapped.defjvp(lambda primals, tangents: (f(*primals), f(*tangents)))
    if wrap == "custom_vjp":
        wrapped.defvjp(lambda x, y: (f(x, y), (x, y)), lambda saved, gradient: saved)
    assert flops_of(wrapped, (8, 8), (8, 8), trained=[True, False]) == 2 * 2 * 8**3


def test_pallas_kernels_are_refused():
    def kernel(x, y):
        y[...] = x[...]

    copy = pl.pallas_call(kernel, out_shape=jax.ShapeDtypeStruct((8, 8), jnp.float32))
    with pytest.raises(ValueError, match="Pallas"):
        flops_of(copy, (8, 8), trained=[False])
