"""The factored second moments of Adafactor (Shazeer and Stern 2018, arXiv 1804.04235, algorithms 4 and 5).

optax.scale_by_factored_rms factors the two largest dimensions, whichever they are: it leaves a kernel [1024, 16, 64]
whole. Here the input and output dimensions of a kernel are each taken together, for every layer of a stack.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from jaxmllm.nn.param_info import ParamInfo


class FactoredState(NamedTuple):
    """count: int32 scalar. moments: path -> (means over outputs, means over inputs) of a matrix or embedding, both with
    the dimensions of the parameter, the averaged ones of size 1; (the whole,) of another parameter."""

    count: jax.Array
    moments: dict[str, tuple[jax.Array, ...]]


def scale_by_factored_rms(
    infos: dict[str, ParamInfo], decay: float, eps: float, threshold: float
) -> optax.GradientTransformation:
    """g -> g / sqrt(second moment), scaled down to a root mean square of `threshold` for each layer on its own."""

    def init(params):
        means = {path: mean_squares(x, infos[path], 0.0) for path, x in params.items()}
        return FactoredState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, means))

    def update(grads, state, params=None):
        keep = 1 - (state.count + 1.0) ** -decay
        means = {path: mean_squares(g, infos[path], eps) for path, g in grads.items()}
        moments = jax.tree.map(lambda old, new: keep * old + (1 - keep) * new, state.moments, means)
        updates = {path: scaled(g, infos[path], moments[path], threshold) for path, g in grads.items()}
        return updates, FactoredState(optax.safe_increment(state.count), moments)

    return optax.GradientTransformation(init, update)


def sides(info: ParamInfo) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """(input dimensions, output dimensions) of a parameter; the latter are empty if its moments are not factored."""
    every = range(info.dims.count("layers"), len(info.dims))
    inputs = {"matrix": info.inputs, "embedding": 1}.get(info.kind, len(every))
    return tuple(every[:inputs]), tuple(every[inputs:])


def mean_squares(g: jax.Array, info: ParamInfo, eps: float) -> tuple[jax.Array, ...]:
    """What the moments of a parameter average over the steps."""
    squares, (inputs, outputs) = jnp.square(g) + eps, sides(info)
    if not outputs:
        return (squares,)
    return squares.mean(outputs, keepdims=True), squares.mean(inputs, keepdims=True)


def scaled(g: jax.Array, info: ParamInfo, moments: tuple[jax.Array, ...], threshold: float) -> jax.Array:
    """The update of one parameter."""
    inputs, outputs = sides(info)
    if outputs:
        rows, columns = moments
        u = g * jax.lax.rsqrt(rows / rows.mean(inputs, keepdims=True)) * jax.lax.rsqrt(columns)
    else:
        u = g * jax.lax.rsqrt(moments[0])
    size = jnp.sqrt(jnp.square(u).mean(inputs + outputs, keepdims=True))
    return u / jnp.maximum(1.0, size / threshold)
