"""Multi-head attention layers."""

from __future__ import annotations

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from jaxmllm import sharded
from jaxmllm.nn.attention.choose import dot_product_attention
from jaxmllm.nn.attention.plain import shard_kv
from jaxmllm.nn.primitives import Init, Linear, Norm
from jaxmllm.nn.rope import line_angles, rotate


class Attention(nn.Module):
    """Multi-head self-attention: x [B, S, H] -> (y [B, S, H], cache).

    heads: query heads, a multiple of kv_heads (grouped-query attention). rope_theta: base of rotary positions; None: no
    positions. rope_scaling: see nn/rope.py. key_bias=False: keys have no bias even if queries and values have one
    (DINOv3). norm_eps: queries and keys of each head pass an RMS norm first (Qwen3); None: no norm; zero_centred: see
    primitives.Norm. rotary_dim: entries of a head that are rotated; None: all. window: a query sees only the last
    `window` keys, its own included. local_theta: the rotary base, unscaled, where there is a window. query_scale: of
    the products of queries and keys; None: 1 / sqrt(head_dim). cap: see primitives.soft_cap.
    positions int32[B, S]; segments int32[B, S], or a pair of those of queries and keys. angles float32[1, S, D/2]:
    rotations to use instead of those of the positions. cache: None, or {"k", "v": [B, T, K, D], "segments":
    int32[B, T]}, which is written from slot `cache_index` on; the queries then attend to all slots written so far. If
    it also has "q" [B, T, K, G, D], the queries are kept there, as they meet the keys.
    kind: {"windowed", "rotary"}, bool scalars: whether this layer of a stack has the window, and whether it rotates;
    those that are left out are true.
    """

    heads: int
    head_dim: int
    kv_heads: int | None = None
    causal: bool = False
    use_bias: bool = True
    out_bias: bool = True
    key_bias: bool = True
    rope_theta: float | None = None
    rope_scaling: Any = None
    norm_eps: float | None = None
    zero_centred: bool = False
    rotary_dim: int | None = None
    window: int | None = None
    local_theta: float | None = None
    query_scale: float | None = None
    cap: float | None = None
    kernel_init: Init | None = None

    @nn.compact
    def __call__(self, x, positions=None, segments=None, cache=None, cache_index=0, angles=None, kind=None):
        kind = kind or {}
        kv = self.kv_heads or self.heads
        common = dict(use_bias=self.use_bias, kernel_init=self.kernel_init)
        key = common | dict(use_bias=self.use_bias and self.key_bias)
        q = Linear((kv, self.heads // kv, self.head_dim), out_axes=("heads", None, None), name="q", **common)(x)
        k = Linear((kv, self.head_dim), out_axes=("heads", None), name="k", **key)(x)
        v = Linear((kv, self.head_dim), out_axes=("heads", None), name="v", **common)(x)
        if self.norm_eps is not None:
            norm = partial(Norm, "rms", self.norm_eps, self.zero_centred)
            q, k = norm(name="q_norm")(q), norm(name="k_norm")(k)
        if self.rope_theta is not None:
            angles = self.angles(positions, kind)
        if angles is not None:
            factor = getattr(self.rope_scaling, "attention_factor", None)
            q, k = rotate(q, angles, factor), rotate(k, angles, factor)
        if self.query_scale is not None:
            q = q * (self.query_scale * self.head_dim**0.5)
        q_segments, kv_segments = segments if isinstance(segments, tuple) else (segments, segments)
        if cache is not None:
            new = {"k": shard_kv(k), "v": shard_kv(v), "segments": sharded.shard(kv_segments, "batch", None)}
            if "q" in cache:
                new["q"] = sharded.shard(q, "batch", None, "heads", None, None)
            cache = {
                name: jax.lax.dynamic_update_slice_in_dim(cache[name], x.astype(cache[name].dtype), cache_index, 1)
                for name, x in new.items()
            }
            k, v, kv_segments = cache["k"], cache["v"], cache["segments"]
        offset = 0 if cache is None else cache_index
        segments = dict(q_segments=q_segments, kv_segments=kv_segments)
        attend = partial(dot_product_attention, q, k, v, causal=self.causal, q_offset=offset, cap=self.cap, **segments)

        def windowed():
            with jax.named_scope(f"window_{self.window}_of_{k.shape[1]}"):
                return attend(window=self.window)

        with jax.named_scope("causal" if self.causal else "full"):  # a plan reads from scopes which pairs count
            if "windowed" in kind:
                y = jax.lax.cond(kind["windowed"], windowed, attend)
            else:
                y = windowed() if self.window else attend()
        out = Linear(
            (x.shape[-1],),
            in_axes=("heads", None, None),
            out_axes=("embed",),
            use_bias=self.out_bias,
            kernel_init=self.kernel_init,
            name="out",
        )
        return checkpoint_name(out(y), "projection"), cache

    def angles(self, positions: jax.Array, kind: dict[str, jax.Array]) -> jax.Array:
        """float32[B, S, rotary_dim / 2] of a layer of a kind; 0 where it does not rotate."""
        dim = self.rotary_dim or self.head_dim
        angles = line_angles(positions, dim, self.rope_theta, self.rope_scaling)
        if self.local_theta is not None:
            local = line_angles(positions, dim, self.local_theta)
            angles = jnp.where(kind["windowed"], local, angles) if "windowed" in kind else local
        return jnp.where(kind["rotary"], angles, 0) if "rotary" in kind else angles


class CrossAttention(nn.Module):
    """Multi-head attention from x [B, S, C] to keys [B, T, width] -> [B, S, C]; mask bool[B, T]: the keys that are
    seen.

    It has no causality and no positions. Each row must have a key that is seen, else its result is undefined.
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
            segments = sharded.shard(jnp.ones(x.shape[:2], jnp.int32), "batch", None), mask.astype(jnp.int32)
        y = dot_product_attention(q, k, v, q_segments=segments and segments[0], kv_segments=segments and segments[1])
        out_axes = ("heads", None, None)
        return Linear((x.shape[-1],), out_axes, ("embed",), name="out", **common)(y)
