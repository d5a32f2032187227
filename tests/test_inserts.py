"""Visual layers inside the language model against a plain loop over layers, images and patches."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.aggregators.sva import SVALayer, to_memory
from jaxmllm.batch import Visual
from jaxmllm.llms.decoder import Decoder, DecoderBlock
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.nn import inverse_gather
from jaxmllm.nn.primitives import Norm

ROWS, LENGTH, SLOTS, GRID, COLUMNS = 2, 40, 2, 3, 4  # a grid of 3 x 3 patches with a newline after each line
BLOCK = GRID * COLUMNS
LAYER = SVALayer(8, 2)


def decoder(**fields) -> Decoder:
    return Decoder(40, 16, 5, 2, 2, 24, inserts=VisualInserts(LAYER, 1, 2, 2), **fields)


@pytest.fixture(scope="module")
def places() -> tuple[np.ndarray, np.ndarray]:
    """visual_positions and visual_index of a Batch.

    Row 0: an image, text, and an image without its middle line. Row 1: one image; the other slot is empty.
    """
    positions = np.full((ROWS, SLOTS, BLOCK), -1, np.int32)
    positions[0, 0], positions[1, 1] = np.arange(2, 2 + BLOCK), np.arange(20, 20 + BLOCK)
    positions[0, 1, [0, 1, 2, 3, 8, 9, 10, 11]] = np.arange(18, 26)
    index = np.full((ROWS, LENGTH), -1, np.int32)
    for row, slot, token in np.argwhere(positions >= 0):
        index[row, positions[row, slot, token]] = slot * BLOCK + token
    return positions, index


def numbers(*shape: int, seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), shape)


def memory_of(maps: jax.Array):
    return to_memory([maps], [jnp.ones(maps.shape[:3], bool)], maps.mean((1, 2)), GRID)


def layer_weights(stacked: dict, i: int) -> dict:
    return jax.tree.map(lambda w: w[i], stacked)


def plain(params: dict, x: jax.Array, memory, positions: np.ndarray) -> jax.Array:
    """The decoder as a loop over layers, images and patches."""
    block, layers = DecoderBlock(2, 2, 8, 24, 10000.0, 1e-5, False), params["blocks"]["layers"]["block"]
    ones, at = jnp.ones((ROWS, LENGTH), jnp.int32), jnp.tile(jnp.arange(LENGTH), (ROWS, 1))
    for i in range(5):
        x, _ = block.apply({"params": layer_weights(layers, i)}, x, None, at, ones, 0)
        if i not in (1, 3):
            continue
        weights = layer_weights(params["visual"]["layers"]["layer"], (1, 3).index(i))
        patches = [t for t in range(BLOCK) if t % COLUMNS < GRID]
        queries = jnp.zeros((ROWS * SLOTS, GRID**2, 16))
        shown = [
            (b, s, k, positions[b, s, t]) for b in range(ROWS) for s in range(SLOTS) for k, t in enumerate(patches)
        ]
        shown = [each for each in shown if each[3] >= 0]
        for b, s, k, place in shown:
            queries = queries.at[b * SLOTS + s, k].set(x[b, place])
        updated = LAYER.apply({"params": weights}, queries, memory)
        for b, s, k, place in shown:
            x = x.at[b, place].set(updated[b * SLOTS + s, k])
    return Norm("rms", 1e-5).apply({"params": params["norm"]}, x)


@pytest.mark.parametrize("remat", ["none", "full"])
def test_decoder_equals_the_plain_loop(places, remat):
    positions, index = places
    x, maps = numbers(ROWS, LENGTH, 16, seed=0), numbers(ROWS * SLOTS, GRID * 2, GRID * 2, 8, seed=1)
    output_weights = numbers(ROWS, LENGTH, 16, seed=2)
    ones, at = jnp.ones((ROWS, LENGTH), jnp.int32), jnp.tile(jnp.arange(LENGTH), (ROWS, 1))

    def ours(params, x, maps):
        visual = Visual(memory_of(maps), jnp.asarray(positions), jnp.asarray(index), GRID, COLUMNS)
        states, *_ = decoder(remat=remat).apply({"params": params}, x, at, ones, visual)
        return (states * output_weights).sum()

    def init(x, maps):
        visual = Visual(memory_of(maps), jnp.asarray(positions), jnp.asarray(index), GRID, COLUMNS)
        return decoder().init(jax.random.key(3), x, at, ones, visual)["params"]

    def looped(params, x, maps):
        return (plain(params, x, memory_of(maps), positions) * output_weights).sum()

    params = jax.jit(init)(x, maps)
    assert params["visual"]["layers"]["layer"]["proj_in"]["kernel"].shape == (2, 16, 8)
    value, grads = jax.jit(jax.value_and_grad(ours, (0, 1, 2)))(params, x, maps)
    expected, wanted = jax.jit(jax.value_and_grad(looped, (0, 1, 2)))(params, x, maps)
    np.testing.assert_allclose(value, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), grads, wanted)
    assert min(np.abs(g).max() for g in (grads[1], grads[2])) > 1e-3


def test_take_and_replace_equal_a_plain_look_up(places):
    """Their gradients, which are written by hand, do as well."""
    positions, index = places[0].reshape(ROWS, -1), places[1]
    x, tokens = numbers(ROWS, LENGTH, 3, seed=0), numbers(ROWS, SLOTS * BLOCK, 3, seed=1)
    row = np.arange(ROWS)[:, None]

    def take(x):
        return jnp.where((positions >= 0)[..., None], x[row, np.maximum(positions, 0)], 0)

    def replace(x, tokens):
        return jnp.where((index >= 0)[..., None], tokens[row, np.maximum(index, 0)], x)

    pairs = [
        (lambda x: inverse_gather.take(x, positions, index), take, (x,)),
        (lambda x, t: inverse_gather.replace(x, t, positions, index), replace, (x, tokens)),
    ]
    for ours, other, inputs in pairs:
        y, back = jax.vjp(ours, *inputs)
        expected, other_back = jax.vjp(other, *inputs)
        np.testing.assert_array_equal(y, expected)
        for a, b in zip(back(jnp.sin(y)), other_back(jnp.sin(y)), strict=True):
            np.testing.assert_array_equal(a, b)
