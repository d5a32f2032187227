"""The words of answers as visual tokens: values against a plain loop, gradients, and what is left out."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm import mesh as meshes
from jaxmllm import sharded
from jaxmllm.batch import IGNORE_LABEL, Batch
from jaxmllm.objectives.base import ModelView
from jaxmllm.objectives.visual_words import VisualWords
from tests.conftest import ROOT, simulated

B, S, H, V, SLOTS, BLOCK = 2, 12, 8, 20, 2, 2


def batch() -> Batch:
    """Row 0 holds two samples with a picture each; row 1 one with a picture, and one of text alone."""
    segments = np.array([[1] * 6 + [2] * 5 + [0], [1] * 5 + [2] * 6 + [0]], np.int32)
    places = np.array([[[0, 1], [6, 7]], [[1, 2], [-1, -1]]], np.int32)
    labels = np.full((B, S), IGNORE_LABEL, np.int32)
    labels[0, 2:5] = 3, 4, 5  # 5 ends the answer
    labels[0, 8:10] = 6, 5
    labels[1, 3:5] = 7, 5
    labels[1, 7:10] = 8, 9, 5  # no picture
    return Batch(*map(jnp.asarray, (labels, labels, segments, segments, labels, places)), {}, {}, {}, {})


def at_places(inputs, of: Batch) -> jax.Array:
    """inputs [B, S, H] -> the visual tokens among them [B, J, H]."""
    places = of.visual_positions.reshape(len(inputs), -1)
    return jnp.take_along_axis(inputs, jnp.maximum(places, 0)[..., None], 1)


def view(inputs, table, of: Batch) -> ModelView:
    return view_of(at_places(inputs, of), table, of)


def view_of(visual, table, of: Batch) -> ModelView:
    return ModelView("words", of, None, 0, visual, None, {}, jnp.pad(table, ((0, 4), (0, 0))), V)  # rows of padding


def arrays() -> tuple[jax.Array, jax.Array]:
    keys = jax.random.split(jax.random.key(0))
    return jax.random.normal(keys[0], (B, S, H)), jax.random.normal(keys[1], (V, H))


ASKED = {(0, 2): 3, (0, 3): 4, (0, 8): 6, (1, 3): 7}  # place -> label


def test_values_are_those_of_a_plain_loop():
    (inputs, table), of = arrays(), batch()
    term, metrics = jax.jit(lambda x: VisualWords().apply({}, view(x, table, of)))(inputs)
    mask = np.zeros((B, S), bool)
    for (b, s), label in ASKED.items():
        mask[b, s] = True
        p = []
        for at in np.asarray(of.visual_positions)[b].ravel():
            if at >= 0 and of.segment_ids[b, at] == of.segment_ids[b, s]:
                p.append(jax.nn.softmax(inputs[b, at] @ table.T))
        missing = np.prod([1 - float(each[label]) for each in p])
        np.testing.assert_allclose(term.values[b, s], -np.log(1 - missing), rtol=1e-5)
        assert metrics["hit"].values[b, s] == any(int(each.argmax()) == label for each in p)
    np.testing.assert_array_equal(term.mask, mask)
    assert VisualWords().count("words", of) == len(ASKED)


def test_a_token_that_is_its_word_costs_nothing():
    """Each picture's first token is a large multiple of a word that is asked for; the loss and metric say so."""
    (inputs, table), of = arrays(), batch()
    table = table / jnp.linalg.norm(table, axis=1, keepdims=True)
    for b, at, word in ((0, 0, 3), (0, 1, 4), (0, 6, 6), (1, 1, 7)):
        inputs = inputs.at[b, at].set(200 * table[word])
    term, metrics = VisualWords().apply({}, view(inputs, table, of))
    assert float(jnp.where(term.mask, term.values, 0).max()) < 1e-5
    assert float(jnp.where(term.mask, metrics["hit"].values, 1).min()) == 1


def test_gradients_reach_the_visual_tokens_of_the_sample_only():
    (inputs, table), of = arrays(), batch()

    def loss(x):
        term, _ = VisualWords().apply({}, view(x, table, of))
        return jnp.where(term.mask, term.values, 0).sum()

    grads = np.abs(np.asarray(jax.grad(loss)(inputs))).max(-1)
    reached = np.zeros((B, S), bool)
    for b, at in ((0, 0), (0, 1), (0, 6), (0, 7), (1, 1), (1, 2)):
        reached[b, at] = True
    np.testing.assert_array_equal(grads > 0, reached)
    assert np.isfinite(grads).all()


@pytest.mark.parametrize("far", [1e3, -1e3])
def test_words_that_are_far_from_all_tokens_still_have_gradients(far):
    (inputs, table), of = arrays(), batch()

    def loss(x):
        term, _ = VisualWords().apply({}, view(x, table, of))
        return jnp.where(term.mask, term.values, 0).sum()

    value, grad = jax.value_and_grad(loss)(far * inputs)
    assert np.isfinite(value) and value > 1e3
    assert np.isfinite(np.asarray(grad)).all() and np.abs(np.asarray(grad)).max() > 0.1


def compare_on_a_mesh() -> None:
    """Values, hits and gradients of eight rows on eight devices, over data, fsdp or tensor, and context, and on one."""
    (inputs, table), of = arrays(), batch()
    visual, of = jax.tree.map(lambda x: jnp.concatenate([x] * 4), (at_places(inputs, of), of))

    def loss(visual, table, of):
        given = sharded.shard(visual, "batch", None, None)
        term, metrics = VisualWords().apply({}, view_of(given, table, jax.tree.map(split, of)))
        mask = sharded.shard(term.mask, None, None)
        values, hit = (sharded.shard(x, None, None) * mask for x in (term.values, metrics["hit"].values))
        return values.sum(), (values, hit, mask)

    def split(x):
        return sharded.shard(x, "batch", *["length" if x.shape[1] == S else None] + [None] * (x.ndim - 2))

    def everything(sizes, devices):
        with jax.set_mesh(meshes.Mesh(**sizes).build(devices)):
            step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
            return jax.tree.map(np.asarray, step(visual, table, of))

    one = everything({}, jax.devices()[:1])
    for sizes in ({"data": 2, "fsdp": 2, "context": 2}, {"fsdp": 2, "tensor": 2, "context": 2}):
        several = everything(sizes, jax.devices())
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, several)


def test_a_mesh_gives_the_values_of_one_device():
    code = "from tests.test_visual_words import compare_on_a_mesh; compare_on_a_mesh()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=simulated(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
