"""A visual layer that runs after some decoder layers only, and its rematerialisation.

`layer(weights, patches [B, M, H], memory) -> patches` works on the patch tokens of a row; `places` are (positions,
index) of these tokens as in inverse_gather.py.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import VisualMemory
from jaxmllm.nn import inverse_gather


def apply_if(
    layer: Callable, here: jax.Array, weights, x: jax.Array, memory: VisualMemory, *places: jax.Array
) -> jax.Array:
    """x [B, S, H], whose patches the layer has updated if `here` (a bool scalar) is true."""

    def update():
        patches = layer(weights, inverse_gather.take(x, *places), memory)
        return inverse_gather.replace(x, patches, *places)

    return jax.lax.cond(here, update, lambda: x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def apply_if_remat(layer, here, weights, x, passed, memory, *places) -> tuple[jax.Array, VisualMemory]:
    """-> (apply_if(..), passed). The backward pass computes the layer again; only its patches are saved.

    `passed` equals the memory and carries its gradient: each layer adds its own share to the gradient of `passed`.
    """
    return apply_if(layer, here, weights, x, memory, *places), passed


def _forward(layer, here, weights, x, passed, memory, *places):
    def update():
        patches = inverse_gather.take(x, *places)
        return inverse_gather.replace(x, layer(weights, patches, memory), *places), patches

    count = places[0].shape[1]
    none = sharded.shard(jnp.zeros((x.shape[0], count, x.shape[2]), x.dtype), *inverse_gather.PLACES)
    y, patches = jax.lax.cond(here, update, lambda: (x, none))
    return (y, passed), (here, weights, patches, memory, places)


def _backward(layer, saved, gradients):
    (here, weights, patches, memory, places), (dy, passed) = saved, gradients

    def run(weights, patches, windows, context):
        return layer(weights, patches, dataclasses.replace(memory, windows=windows, context=context))

    def update():
        _, back = jax.vjp(run, weights, patches, memory.windows, memory.context)
        d_weights, d_patches, *d_memory = back(inverse_gather.take(dy, *places))
        d_memory = jax.tree.map(jnp.add, d_memory, [passed.windows, passed.context])
        return inverse_gather.replace(dy, d_patches, *places), d_weights, *d_memory

    dx, d_weights, windows, context = jax.lax.cond(
        here, update, lambda: (dy, jax.tree.map(jnp.zeros_like, weights), passed.windows, passed.context)
    )
    return None, d_weights, dx, dataclasses.replace(passed, windows=windows, context=context), None, None, None


apply_if_remat.defvjp(_forward, _backward)
