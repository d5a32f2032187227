"""Gathers whose derivative is a gather.

jax.grad turns a gather into a scatter, which a TPU sorts and adds. Where no element is taken twice, the inverse index
says which element of the gradient belongs where, and a second gather does the same.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmllm import sharded

ROW, PLACES = ("batch", "length", None), ("batch", None, None)  # logical names: tokens of a row, places chosen in it


def take(x: jax.Array, positions: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, S, H] at int32[B, M] positions -> [B, M, H]; 0 where a position is -1.

    index int32[B, S] is the inverse of positions, -1 for none.
    """
    return _take(sharded.shard(x, *ROW), sharded.shard(positions, *PLACES[:2]), sharded.shard(index, *ROW[:2]))


def replace(x: jax.Array, new: jax.Array, positions: jax.Array, index: jax.Array) -> jax.Array:
    """x [B, S, H] with x[b, s] replaced by new[b, index[b, s]] wherever index >= 0; new [B, M, H].

    int32[B, M] positions and int32[B, S] index are each other's inverse, -1 for none.
    """
    new = sharded.shard(new.astype(x.dtype), *PLACES)
    return _replace(sharded.shard(x, *ROW), new, sharded.shard(positions, *PLACES[:2]), sharded.shard(index, *ROW[:2]))


def _look_up(x: jax.Array, index: jax.Array, other: jax.Array | float, names: tuple) -> jax.Array:
    """x[b, index[b, m]], or `other` where index is -1."""
    there = index[..., None] >= 0
    return jnp.where(there, sharded.shard(sharded.take_rows(x, jnp.maximum(index, 0)), *names), other)


@jax.custom_vjp
def _take(x, positions, index):
    return _look_up(x, positions, 0, PLACES)


@jax.custom_vjp
def _replace(x, new, positions, index):
    return _look_up(new, index, x, ROW)


def _take_backward(index, d_taken):
    return _look_up(d_taken, index, 0, ROW), None, None


def _replace_backward(places, dy):
    positions, index = places
    return jnp.where(index[..., None] >= 0, 0, dy), _look_up(dy, positions, 0, PLACES), None, None


_take.defvjp(lambda x, *places: (_take(x, *places), places[1]), _take_backward)
_replace.defvjp(lambda x, new, *places: (_replace(x, new, *places), places), _replace_backward)
