"""Scaled dot-product attention behind one function, and the multi-head layer built on it.

Who attends to whom, for a row with two samples (segments 1 and 2) and padding (0), causal:

    segment  1 1 1 2 2 0
    1        1 . . . . .
    1        1 1 . . . .
    1        1 1 1 . . .
    2        . . . 1 . .
    2        . . . 1 1 .
    0        . . . . . .      what a query of padding gets depends on the kernel: nobody may read it
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmllm import mesh
from jaxmllm.nn import kernels
from jaxmllm.nn.primitives import Init, Linear
from jaxmllm.nn.rope import line_angles, rotate

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
    of its own segment; what one of segment 0, or one that sees nothing, gets is not defined, but finite. On TPU and
    GPU a kernel does it (kernels.py).
    """
    kernel = kernels.choose(q, k, causal, q_offset)
    k, v = (checkpoint_name(x, "projection") for x in (k, v))
    if kernel in ("flash", "splash"):  # they name their own form of q
        return getattr(kernels, kernel)(q, k, v, causal, q_segments, kv_segments)
    q = checkpoint_name(q, "projection")
    if kernel == "cudnn":
        return kernels.cudnn(q, k, v, causal, q_segments, kv_segments)
    k, v = (shard_kv(x) for x in (k, v))
    seen = None
    if causal:
        seen = (jnp.arange(q.shape[1])[:, None] + q_offset >= jnp.arange(k.shape[1]))[None]
    if q_segments is not None:
        kv_segments = mesh.shard(kv_segments, "batch", None)[:, None, :]
        same = (q_segments[:, :, None] == kv_segments) & (kv_segments > 0)
        seen = same if seen is None else seen & same
    if seen is not None:
        seen = seen[:, None, :, None]
    blocks = causal_blocks(q, k) if causal and isinstance(q_offset, int) and not q_offset else 1
    q, k, v = q.transpose(0, 2, 1, 3, 4) * q.shape[-1] ** -0.5, k.swapaxes(1, 2), v.swapaxes(1, 2)
    y, size = [], q.shape[2] // blocks
    for start in range(0, q.shape[2], size):  # a block of queries sees no keys behind its last one
        own = slice(start, start + size)
        keys = slice(start + size) if blocks > 1 else slice(None)
        own_seen = None if seen is None else seen[:, :, own, :, keys]
        y.append(_attend(q[:, :, own], k[:, :, keys], v[:, :, keys], own_seen))
    return jnp.concatenate(y, 2).transpose(0, 2, 1, 3, 4)


def causal_blocks(q: jax.Array, k: jax.Array) -> int:
    """Into how many blocks of 256 queries or more a CPU cuts causal attention of q [B, S, ...] to k [B, S, ...]."""
    s = q.shape[1]
    if mesh.platform() != "cpu" or s != k.shape[1] or mesh.parts(q, 1) > 1:
        return 1
    return max(n for n in (1, 2, 4, 8) if s % n == 0 and (n == 1 or s // n >= 256))


_HEADS = ((0, 1), (0, 1))  # batch and key heads


@jax.custom_vjp
def _attend(q: jax.Array, k: jax.Array, v: jax.Array, seen: jax.Array | None) -> jax.Array:
    """q [B, K, S, G, D], already scaled; k, v [B, K, T, D]; seen bool[B or 1, 1, S, 1, T] -> [B, K, S, G, D].

    The derivative is written out so that no product needs a transposed copy of the [S, T] weights: XLA's CPU backend
    makes several of them from jax.grad's order of operands, and takes four times as long.
    """
    return _attend_forward(q, k, v, seen)[0]


def _attend_forward(q, k, v, seen):
    scores = jax.lax.dot_general(q, k.swapaxes(2, 3), (((4,), (2,)), _HEADS), preferred_element_type=jnp.float32)
    if seen is not None:
        scores = jnp.where(seen, scores, MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    y = jax.lax.dot_general(weights, v, (((4,), (2,)), _HEADS))
    return y, (q, k, v, seen, weights, y)


def _attend_backward(saved, dy):
    q, k, v, seen, weights, y = saved
    dw = jax.lax.dot_general(dy, v.swapaxes(2, 3), (((4,), (2,)), _HEADS), preferred_element_type=jnp.float32)
    ds = weights * (dw - (dy * y).sum(-1, keepdims=True, dtype=jnp.float32))
    if seen is not None:
        ds = jnp.where(seen, ds, 0)  # of a query that sees nothing
    ds = ds.astype(q.dtype)
    over_queries = (((2, 3), (2, 3)), _HEADS)
    out = mesh.spec("batch", "heads", None, None) if mesh.has_mesh() else None
    dq = jax.lax.dot_general(ds, k, (((4,), (2,)), _HEADS))
    dk = jax.lax.dot_general(q, ds, over_queries, out_sharding=out)
    dv = jax.lax.dot_general(dy, weights, over_queries, out_sharding=out)
    return dq, dk.swapaxes(2, 3), dv.swapaxes(2, 3), None


_attend.defvjp(_attend_forward, _attend_backward)


def shard_kv(x: jax.Array) -> jax.Array:
    """Keys and values [B, T, K, D] whole along the sequence: each context shard attends to all of it."""
    return mesh.shard(x, "batch", None, "heads", None)


class Attention(nn.Module):
    """Multi-head self-attention. Returns (y, cache).

    heads = query heads; kv_heads divides heads (grouped-query attention). rope_theta: rotary positions, else none.
    key_bias: False takes the bias from the keys alone (DINOv3).
    x [B, S, H]; positions int32[B, S]; segments int32[B, S] or a pair (queries, keys).
    angles: float32[1, S, head_dim/2], rotations given instead of made from positions.
    cache: None, or {"k", "v": [B, T, kv_heads, head_dim], "segments": int32[B, T]} of T slots, written from
    `cache_index` on; the S queries then attend to all slots written so far.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    causal: bool = False
    use_bias: bool = True
    out_bias: bool = True
    key_bias: bool = True
    rope_theta: float | None = None
    kernel_init: Init | None = None

    @nn.compact
    def __call__(self, x, positions=None, segments=None, cache=None, cache_index=0, angles=None):
        kv = self.kv_heads or self.heads
        common = dict(use_bias=self.use_bias, kernel_init=self.kernel_init)
        key = common | dict(use_bias=self.use_bias and self.key_bias)
        q = Linear((kv, self.heads // kv, self.head_dim), out_axes=("heads", None, None), name="q", **common)(x)
        k = Linear((kv, self.head_dim), out_axes=("heads", None), name="k", **key)(x)
        v = Linear((kv, self.head_dim), out_axes=("heads", None), name="v", **common)(x)
        if self.rope_theta is not None:
            angles = line_angles(positions, self.head_dim, self.rope_theta)
        if angles is not None:
            q, k = rotate(q, angles), rotate(k, angles)
        q_segments, kv_segments = segments if isinstance(segments, tuple) else (segments, segments)
        if cache is not None:
            new = {"k": shard_kv(k), "v": shard_kv(v), "segments": mesh.shard(kv_segments, "batch", None)}
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), cache_index, 1)
                for name, x in new.items()
            }
            k, v, kv_segments = cache["k"], cache["v"], cache["segments"]
        offset = 0 if cache is None else cache_index
        with jax.named_scope("causal" if self.causal else "full"):  # a plan counts half the FLOPs of a causal one
            y = dot_product_attention(
                q, k, v, causal=self.causal, q_segments=q_segments, kv_segments=kv_segments, q_offset=offset
            )
        out = Linear(
            (x.shape[-1],),
            in_axes=("heads", None, None),
            out_axes=("embed",),
            use_bias=self.out_bias,
            kernel_init=self.kernel_init,
            name="out",
        )
        return checkpoint_name(out(y), "projection"), cache


class CrossAttention(nn.Module):
    """Multi-head attention from x [B, S, C] to keys [B, T, D] -> [B, S, C]; mask bool[B, T]: which keys may be seen.

    No causality and no positions. At least one key of a row must be usable, else the result means nothing.
    """

    heads: int
    head_dim: int
    use_bias: bool = True
    kernel_init: Init | None = None

    @nn.compact
    def __call__(self, x: jax.Array, keys: jax.Array, mask: jax.Array | None = None) -> jax.Array:
        common = dict(use_bias=self.use_bias, kernel_init=self.kernel_init)
        q = Linear((self.heads, 1, self.head_dim), out_axes=("heads", None, None), name="q", **common)(x)
        k = Linear((self.heads, self.head_dim), out_axes=("heads", None), name="k", **common)(keys)
        v = Linear((self.heads, self.head_dim), out_axes=("heads", None), name="v", **common)(keys)
        segments = None
        if mask is not None:
            segments = mesh.shard(jnp.ones(x.shape[:2], jnp.int32), "batch", None), mask.astype(jnp.int32)
        y = dot_product_attention(q, k, v, q_segments=segments and segments[0], kv_segments=segments and segments[1])
        out_axes = ("heads", None, None)
        return Linear((x.shape[-1],), out_axes, ("embed",), name="out", **common)(y)
