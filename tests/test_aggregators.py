"""Aggregators: formulas that no golden file shows, and the places of their tokens in the row."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.aggregators.mlp import MLPProjector, Projector
from jaxmllm.aggregators.mof import AdditiveMoF, InterleavedMoF
from jaxmllm.aggregators.sva import SVALayer, to_memory
from jaxmllm.batch import EncoderInput, FeatureMap, MapShape, TokenLayout, VisualLayout
from jaxmllm.data.samples import visual_indices
from tests.visual_zoo import apply, random_maps


def test_extra_tokens_follow_the_grid():
    fused, aggregator = FeatureMap(random_maps(2, 4, 4, 5), random_maps(2, 3, 5)), MLPProjector(4)
    assert aggregator.layout({"a": MapShape(4, 4, 5, 3)}).count == 19
    params = aggregator.init(jax.random.key(0), {"a": fused}, {}, 7)["params"]
    tokens = apply(aggregator, params, {"a": fused}, {}, 7).tokens
    whole = jnp.concatenate([fused.cells.reshape(2, 16, 5), fused.extra], 1)
    np.testing.assert_allclose(tokens, apply(Projector(7), params["projector"], whole), atol=1e-6)


def test_mixture_of_features():
    a, b = random_maps(2, 4, 4, 5), random_maps(2, 4, 4, 5)[::-1]
    maps = {"a": FeatureMap(a), "b": FeatureMap(b)}
    mof = AdditiveMoF(alpha=0.25)
    params = mof.init(jax.random.key(0), maps, {}, 7)["params"]
    expected = apply(Projector(7), params["projector"], (0.25 * a + 0.75 * b).reshape(2, 16, 5))
    np.testing.assert_allclose(apply(mof, params, maps, {}, 7).tokens, expected, atol=1e-6)
    mof = InterleavedMoF(newline=True)
    params = mof.init(jax.random.key(0), maps, {}, 7)["params"]
    tokens = np.asarray(apply(mof, params, maps, {}, 7).tokens).reshape(2, 4, 9, 7)
    second = np.asarray(apply(Projector(7), params["projector_b"], b))
    np.testing.assert_allclose(tokens[:, :, 1:8:2], second, atol=1e-6)
    np.testing.assert_allclose(tokens[0, :, 8], np.tile(params["newline"]["value"], (4, 1)), atol=0)


def test_gated_sva_starts_as_the_identity():
    layer, query = SVALayer(8, 2, gate=True), random_maps(2, 16, 6)
    memory = to_memory([random_maps(2, 8, 8, 8)], [jnp.ones((2, 8, 8), bool)], random_maps(2, 8), 4)
    np.testing.assert_array_equal(layer.init_with_output(jax.random.key(0), query, memory)[0], query)


def test_places_of_tokens_in_the_row():
    """unpad leaves out all tokens of cells that show only padding; other tokens always have a place."""
    encoders = {"a": EncoderInput(16, 4, (0, 0, 0))}
    wide = (200, 100)  # rows 0 and 3 of 4 are padding
    layout = VisualLayout(encoders, TokenLayout(4, newline=True, unpad=True, per_cell=2, extra=3), 2)
    assert layout.tokens.columns == 9 and layout.tokens.count == 39 and layout.block == 41
    assert visual_indices(1, wide, layout) == [*range(41 + 9, 41 + 27), *range(41 + 36, 41 + 41)]
    tall = visual_indices(0, (100, 200), layout)
    assert [t for t in tall if t < 9] == [2, 3, 4, 5, 8], "columns 0 and 3 are left out, the newline stays"
    kept = VisualLayout(encoders, TokenLayout(4, newline=True, extra=3), 2)
    assert visual_indices(0, wide, kept) == list(range(4 * 5 + 3 + 2))
    assert visual_indices(0, wide, VisualLayout(encoders, TokenLayout(extra=5), 0)) == [0, 1, 2, 3, 4]
