"""Values and gradients of the vocabulary loss in chunks against the plain form (on meshes: test_meshes.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.batch import IGNORE_LABEL
from jaxmllm.objectives.next_token import next_token

B, S, H, V = 4, 6, 16, 320


def inputs() -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    labels = jax.random.randint(keys[2], (B, S), 0, V)
    labels = jnp.where(jax.random.bernoulli(keys[4], 0.7, (B, S)), labels, IGNORE_LABEL).at[0, 0].set(V - 1)
    hidden, table = jax.random.normal(keys[0], (B, S, H)), jax.random.normal(keys[1], (V, H))
    return hidden, table.at[V - 1].set(9 * hidden[0, 0]), labels, jax.random.uniform(keys[3], (B, S))


def plain(hidden, table, labels, weight, cap=None):
    logits = jnp.einsum("bsh,vh->bsv", hidden, table)
    logits = cap * jnp.tanh(logits / cap) if cap else logits
    nll = jax.nn.logsumexp(logits, -1) - jnp.take_along_axis(logits, jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return jnp.sum(jnp.where(labels != IGNORE_LABEL, nll, 0) * weight), logits.argmax(-1) == labels


def ours(hidden, table, labels, weight, chunk, cap=None):
    term, hit = next_token(hidden, table, labels, chunk, cap)
    return jnp.sum(jnp.where(term.mask, term.values, 0) * weight), hit


def check(ours, plain):
    ((loss, hit), grads), ((true_loss, true_hit), true_grads) = ours, plain
    mask = np.asarray(inputs()[2]) != IGNORE_LABEL
    np.testing.assert_array_equal(np.asarray(hit)[mask], np.asarray(true_hit)[mask])
    assert np.asarray(hit)[0, 0] and not np.asarray(hit).all()
    np.testing.assert_allclose(loss, true_loss, rtol=1e-6)
    for grad, true in zip(grads, true_grads):
        np.testing.assert_allclose(grad, true, atol=2e-6 * np.abs(true).max())


# One chunk, four, chunks that overlap, the smallest possible, and a size above V.
@pytest.mark.parametrize("chunk", [V, 80, 100, 7, 10**6])
def test_loss_in_chunks_equals_the_plain_form(chunk):
    hidden, table, labels, weight = inputs()
    grad = jax.value_and_grad(ours, (0, 1), has_aux=True)(hidden, table, labels, weight, chunk)
    check(grad, jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, table, labels, weight))


@pytest.mark.parametrize("chunk", [V, 100])
def test_capped_logits(chunk):
    """With gradients; chunks overlap."""
    hidden, table, labels, weight = inputs()
    grad = jax.value_and_grad(ours, (0, 1), has_aux=True)(hidden, table, labels, weight, chunk, 5.0)
    (true, _), true_grads = jax.value_and_grad(plain, (0, 1), has_aux=True)(hidden, table, labels, weight, 5.0)
    np.testing.assert_allclose(grad[0][0], true, rtol=1e-6)
    for found, wanted in zip(grad[1], true_grads):
        np.testing.assert_allclose(found, wanted, atol=2e-6 * np.abs(wanted).max())
