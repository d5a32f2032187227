"""Attention in plain JAX, with the derivative written out."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp

from jaxmllm import mesh, sharded
from jaxmllm.nn.primitives import soft_cap

MASKED = -1e30  # finite, so that a fully masked row does not become NaN


def plain_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    q_segments: jax.Array | None,
    kv_segments: jax.Array | None,
    q_offset: jax.Array | int,
    blocks: int,
    window: int | None = None,
    cap: float | None = None,
) -> jax.Array:
    """Arguments and result as in choose.dot_product_attention.

    blocks: the queries of causal attention without offset may be worked on in equal blocks, each of which leaves out
    the keys after its last query.
    """
    k, v = (shard_kv(x) for x in (k, v))
    seen = None
    if causal:
        seen = (jnp.arange(q.shape[1])[:, None] + q_offset >= jnp.arange(k.shape[1]))[None]
        if window is not None:
            seen &= (jnp.arange(q.shape[1])[:, None] + q_offset - window < jnp.arange(k.shape[1]))[None]
    if q_segments is not None:
        kv_segments = sharded.shard(kv_segments, "batch", None)[:, None, :]
        same = (q_segments[:, :, None] == kv_segments) & (kv_segments > 0)
        seen = same if seen is None else seen & same
    if seen is not None:
        seen = seen[:, None, :, None]
    q, k, v = q.transpose(0, 2, 1, 3, 4) * q.shape[-1] ** -0.5, k.swapaxes(1, 2), v.swapaxes(1, 2)
    y, size = [], q.shape[2] // blocks
    for start in range(0, q.shape[2], size):
        queries = slice(start, start + size)
        keys = slice(start + size) if blocks > 1 else slice(None)
        block_seen = None if seen is None else seen[:, :, queries, :, keys]
        y.append(_attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], block_seen, cap))
    return jnp.concatenate(y, 2).transpose(0, 2, 1, 3, 4)


def shard_kv(x: jax.Array) -> jax.Array:
    """Makes keys or values [B, T, K, D] whole along the sequence: each context shard attends to all of it."""
    return sharded.shard(x, "batch", None, "heads", None)


_HEADS = ((0, 1), (0, 1))  # batch and key heads


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None, cap: float | None) -> jax.Array:
    """q [B, K, S, G, D], already scaled; k, v [B, K, T, D]; seen bool[B or 1, 1, S, 1, T] -> [B, K, S, G, D].

    In the derivative no product needs a transposed copy of the [S, T] weights. jax.grad's order of operands makes XLA's
    CPU backend copy them several times, which takes four times as long.
    """
    return _attend_forward(q, k, v, seen, cap)[0]


def _scores(q, k):
    return jax.lax.dot_general(q, k.swapaxes(2, 3), (((4,), (2,)), _HEADS), preferred_element_type=jnp.float32)


def _attend_forward(q, k, v, seen, cap):
    scores = soft_cap(_scores(q, k), cap)
    if seen is not None:
        scores = jnp.where(seen, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jax.lax.dot_general(weights, v, (((4,), (2,)), _HEADS))
    return y, (q, k, v, seen, weights, y)


def _attend_backward(cap, saved, dy):
    q, k, v, seen, weights, y = saved
    dw = jax.lax.dot_general(dy, v.swapaxes(2, 3), (((4,), (2,)), _HEADS), preferred_element_type=jnp.float32)
    ds = weights * (dw - (dy * y).sum(-1, keepdims=True, dtype=jnp.float32))
    if cap is not None:
        ds = ds * (1 - jnp.tanh(_scores(q, k) / cap) ** 2)
    if seen is not None:
        ds = jnp.where(seen, ds, 0)  # the weights of a query that sees nothing are not 0
    ds = ds.astype(q.dtype)
    over_queries = (((2, 3), (2, 3)), _HEADS)
    out = mesh.spec("batch", "heads", None, None) if mesh.has_mesh() else None
    dq = jax.lax.dot_general(ds, k, (((4,), (2,)), _HEADS))
    dk = jax.lax.dot_general(q, ds, over_queries, out_sharding=out)
    dv = jax.lax.dot_general(dy, weights, over_queries, out_sharding=out)
    return dq, dk.swapaxes(2, 3), dv.swapaxes(2, 3), None


_attend.defvjp(_attend_forward, _attend_backward)
