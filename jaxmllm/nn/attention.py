"""Scaled dot-product attention behind one function, and the multi-head layer built on it.

Who attends to whom, for a row with two samples (segments 1 and 2) and padding (0), causal:

    segment  1 1 1 2 2 0
    1        1 . . . . .
    1        1 1 . . . .
    1        1 1 1 . . .
    2        . . . 1 . .
    2        . . . 1 1 .
    0        . . . . . .      a query with nothing to attend to gets the mean of the values, which nobody reads
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.nn.primitives import Init, Linear
from jaxmllm.nn.rope import rotate

MASKED = -1e30  # finite: a fully masked row must not become NaN


def dot_product_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    causal: bool = False,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    q_offset: jax.Array | int = 0,
) -> jax.Array:
    """Softmax(q k^T / sqrt(D)) v in float32 with grouped keys.

    q [B, S, K, G, D]; k, v [B, T, K, D]: query head (k, g) reads key head k. Returns [B, S, K, G, D], q's dtype.
    causal: query s sees keys t <= s + q_offset. q_segments int32[B, S], kv_segments int32[B, T]: a query sees keys
    of its own segment; key segment 0 is seen by nobody.
    """
    k, v = (shard_kv(x) for x in (k, v))
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    seen = None
    if causal:
        seen = (jnp.arange(q.shape[1])[:, None] + q_offset >= jnp.arange(k.shape[1]))[None]
    if q_segments is not None:
        kv_segments = mesh.shard(kv_segments, "batch", None)[:, None, :]
        same = (q_segments[:, :, None] == kv_segments) & (kv_segments > 0)
        seen = same if seen is None else seen & same
    if seen is not None:
        scores = jnp.where(seen[:, None, None], scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("bkgst,btkd->bskgd", weights, v)


def shard_kv(x: jax.Array) -> jax.Array:
    """Keys and values [B, T, K, D] whole along the sequence: each context shard attends to all of it."""
    return mesh.shard(x, "batch", None, "heads", None)


class Attention(nn.Module):
    """Multi-head self-attention. Returns (y, cache).

    heads = query heads; kv_heads divides heads (grouped-query attention). rope_theta: rotary positions, else none.
    x [B, S, H]; positions int32[B, S]; segments int32[B, S] or a pair (queries, keys).
    cache: None, or {"k", "v": [B, T, kv_heads, head_dim], "segments": int32[B, T]} of T slots, written from
    `cache_index` on; the S queries then attend to all slots written so far.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    causal: bool = False
    use_bias: bool = True
    out_bias: bool = True
    rope_theta: float | None = None
    kernel_init: Init | None = None

    @nn.compact
    def __call__(self, x, positions=None, segments=None, cache=None, cache_index=0):
        kv = self.kv_heads or self.heads
        common = dict(use_bias=self.use_bias, kernel_init=self.kernel_init)
        q = Linear((kv, self.heads // kv, self.head_dim), out_axes=("heads", None, None), name="q", **common)(x)
        k = Linear((kv, self.head_dim), out_axes=("heads", None), name="k", **common)(x)
        v = Linear((kv, self.head_dim), out_axes=("heads", None), name="v", **common)(x)
        if self.rope_theta is not None:
            q, k = rotate(q, positions, self.rope_theta), rotate(k, positions, self.rope_theta)
        q_segments, kv_segments = segments if isinstance(segments, tuple) else (segments, segments)
        if cache is not None:
            new = {"k": shard_kv(k), "v": shard_kv(v), "segments": mesh.shard(kv_segments, "batch", None)}
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), cache_index, 1)
                for name, x in new.items()
            }
            k, v, kv_segments = cache["k"], cache["v"], cache["segments"]
        with jax.named_scope("causal" if self.causal else "full"):  # a plan counts half the FLOPs of a causal one
            y = dot_product_attention(
                q, k, v, causal=self.causal, q_segments=q_segments, kv_segments=kv_segments, q_offset=cache_index
            )
        out = Linear(
            (x.shape[-1],),
            in_axes=("heads", None, None),
            out_axes=("embed",),
            use_bias=self.out_bias,
            kernel_init=self.kernel_init,
            name="out",
        )
        return out(y), cache
