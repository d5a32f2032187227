"""The attention of answers over their pictures, which the page of a run shows."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.batch import TokenLayout
from jaxmllm.eval.answer import Answerer, Question
from jaxmllm.eval.attend import answer_attention, attention_weights, cells_of
from jaxmllm.llms.decoder import Decoder
from tests.tiny_run import abstract, tiny_run


@pytest.mark.parametrize("window, cap", [(7, None), (2, 0.5)])
def test_weights_are_a_plain_softmax_over_what_a_query_sees(window, cap):
    """Of a decoder's first layer, computed once more from its parameters in numpy."""
    model = Decoder(
        vocab=20, width=16, layers=2, heads=4, kv_heads=2, mlp=16, remat="none", window=window, attention_cap=cap
    )
    tokens = jax.random.randint(jax.random.key(0), (2, 7), 0, 20)
    segments = jnp.array([[1, 1, 1, 1, 2, 2, 0], [1, 1, 1, 1, 1, 1, 1]])
    positions = jnp.array([[0, 1, 2, 3, 0, 1, 0], [0, 1, 2, 3, 4, 5, 6]])
    cache = model.empty_cache(2, 7, jnp.float32) | {"q": jnp.zeros((2, 2, 7, 2, 2, 4))}

    def run(m, cache):
        return m(m.embed(tokens), positions, segments, cache=cache)

    params = jax.jit(lambda: model.init(jax.random.key(1), cache, method=run))()
    apply = jax.jit(lambda cache: model.apply(params, cache, method=run))
    (with_q, _, kept, _) = apply(cache)
    del cache["q"]
    np.testing.assert_allclose(with_q, apply(cache)[0], atol=1e-6)
    found = np.asarray(attention_weights(kept["q"][0], kept["k"][0], segments, window, cap))

    block = jax.tree.map(lambda x: np.asarray(x, np.float64)[0], params["params"]["blocks"]["layers"]["block"])
    x = np.asarray(params["params"]["embedding"]["embedding"], np.float64)[tokens]
    x = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-5) * block["norm1"]["scale"]
    q = np.einsum("bsh,hkgd->bskgd", x, block["attn"]["q"]["kernel"].reshape(16, 2, 2, 4))
    k = np.einsum("bsh,hkd->bskd", x, block["attn"]["k"]["kernel"].reshape(16, 2, 4))
    angle = np.asarray(positions)[..., None] * 10000.0 ** (-np.arange(2) / 2)

    def turn(x):
        cos, sin = (f(angle).reshape(2, 7, *[1] * (x.ndim - 3), 2) for f in (np.cos, np.sin))
        return np.concatenate([x[..., :2] * cos - x[..., 2:] * sin, x[..., 2:] * cos + x[..., :2] * sin], -1)

    q, k = turn(q), turn(k)
    for b, s, h, g in np.ndindex(2, 7, 2, 2):
        sees = [t for t in range(max(0, s - window + 1), s + 1) if segments[b, t] == segments[b, s] > 0]
        expected = np.zeros(7)
        if sees:
            scores = np.array([q[b, s, h, g] @ k[b, t, h] / 2 for t in sees])
            e = np.exp(cap * np.tanh(scores / cap) if cap else scores)
            expected[sees] = e / e.sum()
        np.testing.assert_allclose(found[b, h, g, s], expected, atol=1e-5)


def test_weights_go_to_the_cells_of_their_tokens():
    layout = TokenLayout(grid=2, newline=True, per_cell=2, extra=1)
    places = np.array([3, 4, 5, 6, 7, -1, -1, 8, 9, 10, 11])  # lines of 4 tokens and a newline; the third cell has none
    weights = np.arange(12) / 100
    found = cells_of(weights, places, layout)
    np.testing.assert_allclose(found, [[0.07, 0.11], [np.nan, 0.17]])


def test_attention_of_answers(scenes):
    """Of a model with random numbers for parameters, which need no program to be compiled."""
    run, random = tiny_run(scenes), np.random.default_rng(0)
    params = {
        k: jax.device_put(random.normal(0, 0.2, x.shape).astype(x.dtype), x.sharding) for k, x in abstract(run).items()
    }
    answerer = Answerer(run, params)
    rows = [json.loads(line) for line in open(scenes / "heldout.jsonl")][:2]
    questions = [Question(row["prompt"], (str(scenes / row["image"]),), place=row["prompt"]) for row in rows]
    same = [(questions[0], "2 ducks."), (questions[0], "1 dog."), (questions[0], "2 ducks.")]
    first, other, again, empty = answer_attention(answerer, [*same, (questions[1], "")])
    for each in (first, other, empty):
        assert each.picture.shape == (48, 48, 3) and each.cells.shape == (6, 6)
        assert 0 < each.cells.sum() < each.share < 1, "newlines and task tokens belong to the picture, but to no cell"
    np.testing.assert_allclose(first.cells, again.cells, rtol=1e-5)
    assert abs(first.cells - other.cells).max() > 1e-6
