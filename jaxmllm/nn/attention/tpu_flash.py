"""Flash attention of one device on a TPU: two kernels that keep all keys of a head on the chip.

Scores have keys down and queries across, [keys, queries]: the softmax reduces over rows of registers, and in every
product with the weights these are the right side, head size x keys times keys x queries. That fills the 256 x 256
matrix units of a v6e. The usual form, queries x keys times keys x head size, half fills them at head size 128
(docs/performance.md). The softmax keeps running maxima: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, except
that queries are the outer loop backward too, where the gradients of keys and values are summed on the chip over all
queries of a key head.

A block of queries meets only the blocks of keys that it sees. A block of keys that all its queries see needs no mask.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxmllm.mesh import split_count
from jaxmllm.nn.attention.heads import SAVED, block_size, heads_first, padded_segments, per_device_heads
from jaxmllm.nn.attention.tpu_flash_kernels import Blocks, backward_kernel, forward_kernel
from jaxmllm.nn.primitives import pad

VMEM = 60 * 2**20  # bytes of on-chip memory that a kernel may take; a core of a v5p has 64 MiB
MAX_KEYS = 16384  # keys that fit there with their values and gradients: compiled for a v5p


def flash_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    causal: bool,
    q_segments: jax.Array | None = None,
    kv_segments: jax.Array | None = None,
    interpret: bool | pltpu.InterpretParams = False,
) -> jax.Array:
    """Arguments and result as in choose.dot_product_attention. interpret: runs on a CPU, slowly.

    Raises ValueError if the mesh splits queries into parts that are not whole blocks. Whole rows may have any length.
    """
    (b, s, *_), t, parts = q.shape, k.shape[1], split_count(q, 1)
    own_s, length = s // parts, jax.typeof(q).sharding.spec[1]
    bq = block_size(own_s)
    blocks = Blocks(bq, bq if causal else block_size(t), causal, interpret)
    padding = -own_s % blocks.queries, -t % blocks.keys
    if parts > 1 and padding[0]:
        raise ValueError(f"flash attention: a part of {own_s} queries does not consist of whole blocks of {bq}")
    if q_segments is None and padding[1] and not causal:  # in a causal row no query sees the padding after it
        q_segments, kv_segments = jnp.ones((b, s), jnp.int32), jnp.ones((b, t), jnp.int32)

    def own(q, k, v, q_segments, kv_segments):
        q, k, v = heads_first(q, k, v, math.log2(math.e))
        ids = padded_segments(q_segments, kv_segments, padding)
        first = jax.lax.axis_index(length) * own_s if causal and parts > 1 else 0
        bounds = block_bounds(blocks, (q.shape[0], q.shape[3], k.shape[2]), ids, first)
        return attend(blocks, q, k, v, ids, bounds).transpose(0, 3, 1, 2, 4)

    return per_device_heads(own, q, k, v, q_segments, kv_segments)


def block_bounds(blocks: Blocks, shape: tuple[int, int, int], ids: tuple | None, first: jax.Array | int) -> jax.Array:
    """int32[B * blocks of queries * FIELDS]: the keys that each block of queries sees.

    The fields are start, open, close, stop and place: the block sees the blocks of keys start..stop, of which
    open..close need no mask, and its first query stands at `place` among the keys. shape: (B, S, T). ids: segments
    int32[B, S] and [B, T], padded to whole blocks. first: place of the first query among the keys.
    """
    b, n, m = shape[0], pl.cdiv(shape[1], blocks.queries), pl.cdiv(shape[2], blocks.keys)
    place, key = (first + jnp.arange(n) * blocks.queries)[:, None], jnp.arange(m)
    seen = whole = jnp.ones((b, n, m), bool)
    if blocks.causal:
        seen, whole = seen & (key * blocks.keys <= place), whole & (key * blocks.keys < place)
    if ids is not None:
        q, k = (x.reshape(b, -1, size) for x, size in zip(ids, (blocks.queries, blocks.keys)))
        (q_low, k_low), (q_high, k_high) = ([f(x, axis=-1) for x in (q, k)] for f in (jnp.min, jnp.max))
        q_low, q_high, k_low, k_high = q_low[:, :, None], q_high[:, :, None], k_low[:, None], k_high[:, None]
        seen &= (q_low <= k_high) & (k_low <= q_high)
        whole &= (q_low == q_high) & (k_low == k_high) & (q_low == k_low)
    stop = jnp.where(seen, key + 1, 0).max(-1)
    start = jnp.minimum(jnp.where(seen, key, m).min(-1), stop)
    close = jnp.maximum(jnp.where(whole, key + 1, 0).max(-1), start)
    opened = jnp.where(~whole & (key < close[..., None]), key + 1, 0).max(-1).clip(start, close)
    fields = start, opened, close, stop, jnp.broadcast_to(place[:, 0], stop.shape)
    return jnp.stack(fields, -1).astype(jnp.int32).reshape(-1)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend(blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, ids: tuple | None, bounds: jax.Array) -> jax.Array:
    """q [B, K, G, S, D], scaled by log2(e) / sqrt(D); k, v [B, K, T, D] -> [B, K, G, S, D].

    ids: segments int32[B, S] and [B, T], padded to whole blocks, or None. bounds: from `block_bounds`. A query that
    sees nothing gets 0. Where the last block reaches past the keys, ids or causality must hide what is there.
    """
    return _forward(blocks, q, k, v, ids, bounds)[0]


def _forward(blocks, q, k, v, ids, bounds):
    y, total = _call(forward_kernel, blocks, bounds, (q, k, v), ids)
    y, total = (checkpoint_name(x, SAVED) for x in (y, total))
    return y, (q, k, v, ids, bounds, y, total)


def _backward(blocks, saved, dy):
    q, k, v, ids, bounds, y, total = saved
    s, t = q.shape[-2], k.shape[-2]
    # Unlike forward, sums would take in the memory after the last query and key.
    q, y, dy = (pad(x, -2, -s % blocks.queries) for x in (q, y, dy))
    k, v = (pad(x, -2, -t % blocks.keys) for x in (k, v))
    total = pad(total, -1, -s % blocks.queries)
    dq, dk, dv = _call(backward_kernel, blocks, bounds, (q, k, v, y, dy, total), ids)
    return dq[..., :s, :], dk[..., :t, :], dv[..., :t, :], None, None


attend.defvjp(_forward, _backward)


def _call(kernel, blocks: Blocks, bounds: jax.Array, arrays: tuple, ids: tuple | None) -> tuple:
    """Runs a kernel over rows, key heads, the query heads of each, and blocks of queries."""
    q, k = arrays[:2]
    bq, bk, f32 = blocks.queries, blocks.keys, jnp.float32
    (b, heads, group, s, d), t = q.shape, pl.cdiv(k.shape[2], bk) * bk
    own = pl.BlockSpec((None, None, None, bq, d), lambda b, h, g, i, _: (b, h, g, i, 0))
    line = pl.BlockSpec((None, None, None, 1, bq), lambda b, h, g, i, _: (b, h, g, 0, i))
    # Fetched once for all queries, so a second buffer would be idle most of the time.
    keys = pl.BlockSpec((None, None, t, d), lambda b, h, g, i, _: (b, h, 0, 0), pipeline_mode=pl.Buffered(1))
    segments = pl.BlockSpec((None, 1, bq), lambda b, h, g, i, _: (b, 0, i))
    all_segments = pl.BlockSpec((None, 1, t), lambda b, h, g, i, _: (b, 0, 0))
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    if kernel is forward_kernel:
        inputs, outputs = [own, keys, keys], [own, line]
        results = like(q), jax.ShapeDtypeStruct((b, heads, group, 1, s), f32)
        scratch = [((1, bq), f32), ((1, bq), f32), ((d, bq), f32), ((bk, bq), f32)]
    else:
        inputs, outputs = [own, keys, keys, own, own, line], [own, keys, keys]
        results = like(q), like(k), like(k)
        scratch = [((d, bq), q.dtype), ((d, bq), q.dtype), ((1, bq), f32), ((d, bq), f32), ((d, t), f32), ((d, t), f32)]
    if ids is not None:
        inputs, arrays = [segments, all_segments, *inputs], (*(x[:, None] for x in ids), *arrays)
    return pl.pallas_call(
        functools.partial(kernel, blocks, k.shape[2], ids is not None),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(b, heads, group, pl.cdiv(s, bq)),
            in_specs=inputs,
            out_specs=outputs,
            scratch_shapes=[pltpu.VMEM(*each) for each in scratch],
        ),
        out_shape=results,
        # The two cores of a v5p share rows and key heads.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=blocks.interpret,
        name=f"{kernel.__name__.replace('kernel', 'flash')}_{bq}x{bk}",  # read by plan/kernels.py
    )(bounds, *arrays)
