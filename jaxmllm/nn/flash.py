"""Attention of one device on a TPU: two kernels that keep all keys of a head on the chip.

Scores stand with keys down and queries across, [keys, queries], so that the softmax reduces over rows of registers and
every product with the weights has them as its right side: head size x keys times keys x queries. The matrix units of
256 x 256 of a v6e are full then; the usual form, queries x keys times keys x head size, half fills them at head size
128 (docs/performance.md). Softmax with running maxima: FlashAttention-2 (arXiv 2307.08691), algorithms 1 and 2, with
queries in the outer loop backward too: the gradients of keys and values are summed on the chip over all queries of a
key head.

A block of queries is worked on with the blocks of keys it sees. Those that all its queries see whole need no mask.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxmllm.nn.primitives import pad

SAVED = "attention"  # checkpoint_name of the output and of the softmax's normalisers
MASKED, NOTHING = -1e30, -7e29  # a score that is not seen, and the maximum of none: exp2 of their difference is 0
CHUNK = 512  # keys, queries whose scores are one piece of work; chosen by the cycles the compiler schedules
VMEM = 60 * 2**20  # bytes a kernel may take of the on-chip memory; a v5p's core has 64 MiB
MAX_KEYS = 16384  # with their values and gradients they fit there: compiled for a v5p
FIELDS = 5  # of a block of queries in `bounds`

NT, TN = ((((a,), (a,)), ((), ())) for a in (1, 0))  # a b^T, a^T b
dot = functools.partial(jax.lax.dot_general, preferred_element_type=jnp.float32)


@dataclasses.dataclass(frozen=True)
class Blocks:
    """How many queries and keys are worked on together, multiples of 128. Causal: equal."""

    queries: int
    keys: int
    causal: bool
    interpret: bool | pltpu.InterpretParams = False


def bounds(blocks: Blocks, shape: tuple[int, int, int], ids: tuple | None, first: jax.Array | int) -> jax.Array:
    """int32[B * blocks of queries * FIELDS]: for each block of queries the blocks of keys start..stop it sees, of which
    open..close without a mask, and the place of its first query among the keys.

    shape: B, S, T. ids: segments int32[B, S] and [B, T], in whole blocks. first: place of the first query among the
    keys.
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
def attend(blocks: Blocks, q: jax.Array, k: jax.Array, v: jax.Array, ids: tuple | None, bound: jax.Array) -> jax.Array:
    """q [B, K, G, S, D], scaled by log2(e) / sqrt(D); k, v [B, K, T, D]; ids: segments int32[B, S] and [B, T] in whole
    blocks, or None; bound: of `bounds` -> [B, K, G, S, D]. A query that sees nothing gets 0.

    Where the last block reaches past the keys, ids or causality must hide what is there.
    """
    return _forward(blocks, q, k, v, ids, bound)[0]


def _forward(blocks, q, k, v, ids, bound):
    y, total = _call(_forward_kernel, blocks, bound, (q, k, v), ids)
    y, total = (checkpoint_name(x, SAVED) for x in (y, total))
    return y, (q, k, v, ids, bound, y, total)


def _backward(blocks, saved, dy):
    q, k, v, ids, bound, y, total = saved
    s, t = q.shape[-2], k.shape[-2]
    # Memory behind the last query and key would get into sums, unlike forward.
    q, y, dy = (pad(x, -2, -s % blocks.queries) for x in (q, y, dy))
    k, v = (pad(x, -2, -t % blocks.keys) for x in (k, v))
    total = pad(total, -1, -s % blocks.queries)
    dq, dk, dv = _call(_backward_kernel, blocks, bound, (q, k, v, y, dy, total), ids)
    return dq[..., :s, :], dk[..., :t, :], dv[..., :t, :], None, None


attend.defvjp(_forward, _backward)


def _call(kernel, blocks: Blocks, bound: jax.Array, arrays: tuple, ids: tuple | None) -> tuple:
    """Runs a kernel over batch, key heads, query heads of each, blocks of queries."""
    q, k = arrays[:2]
    bq, bk, f32 = blocks.queries, blocks.keys, jnp.float32
    (b, heads, group, s, d), t = q.shape, pl.cdiv(k.shape[2], bk) * bk
    own = pl.BlockSpec((None, None, None, bq, d), lambda b, h, g, i, _: (b, h, g, i, 0))
    line = pl.BlockSpec((None, None, None, 1, bq), lambda b, h, g, i, _: (b, h, g, 0, i))
    # Fetched once for all its queries, so a second buffer would stand empty most of the time.
    keys = pl.BlockSpec((None, None, t, d), lambda b, h, g, i, _: (b, h, 0, 0), pipeline_mode=pl.Buffered(1))
    segments = pl.BlockSpec((None, 1, bq), lambda b, h, g, i, _: (b, 0, i))
    all_segments = pl.BlockSpec((None, 1, t), lambda b, h, g, i, _: (b, 0, 0))
    like = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype)
    if kernel is _forward_kernel:
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
        # The two cores of a v5p share batch and key heads.
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=VMEM
        ),
        interpret=blocks.interpret,
        name=f"{kernel.__name__.strip('_').replace('kernel', 'flash')}_{bq}x{bk}",  # read by plan/kernels.py
    )(bound, *arrays)


class _Masks:
    """What a kernel needs to know of its block of queries."""

    def __init__(self, blocks: Blocks, bound_ref, ids):
        at = (pl.program_id(0) * pl.num_programs(3) + pl.program_id(3)) * FIELDS
        self.start, self.opened, self.close, self.stop, self.place = (bound_ref[at + k] for k in range(FIELDS))
        self.blocks, self.ids = blocks, ids

    def scores(self, scores: jax.Array, first: jax.Array, column: int, causal: bool) -> jax.Array:
        """scores [k, n] of the keys from `first` on and the block's queries from `column` on, MASKED if not seen."""
        (k, n), seen = scores.shape, None
        if causal:
            key, query = (jax.lax.broadcasted_iota(jnp.int32, (k, n), axis) for axis in (0, 1))
            seen = key - query <= self.place + column - first
        if self.ids:
            of_queries, of_keys = self.ids
            down = jnp.broadcast_to(of_keys[:, pl.ds(first, k)], (128, k)).T
            same = jnp.concatenate([down] * (n // 128), 1) == of_queries[:, column : column + n]
            seen = same if seen is None else seen & same
        return scores if seen is None else jnp.where(seen, scores, MASKED)

    def each(self, work) -> None:
        """work([(first key, keys, queries as a slice, causal), ..]) for the blocks that need a mask, in chunks."""
        before, size = self.opened - self.start, self.blocks.queries
        starts = range(0, size, CHUNK), range(0, self.blocks.keys, CHUNK)

        def block(x, _):
            j = jnp.where(x < before, self.start + x, self.close + x - before) * self.blocks.keys

            def run(diagonal: bool):
                work([
                    (
                        pl.multiple_of(j + r, 128),
                        min(CHUNK, self.blocks.keys - r),
                        slice(c, min(c + CHUNK, size)),
                        diagonal and r == c,
                    )
                    for c, r in itertools.product(*starts)
                    if not diagonal or r <= c
                ])  # fmt: skip

            if self.blocks.causal:
                pl.when(j == self.place)(lambda: run(True))
                pl.when(j != self.place)(lambda: run(False))
            else:
                run(False)

        jax.lax.fori_loop(0, before + self.stop - self.close, block, None)


def _forward_kernel(blocks, length, segmented, bound_ref, *refs):
    ids, refs = (refs[:2], refs[2:]) if segmented else (None, refs)
    q_ref, k_ref, v_ref, y_ref, total_ref, m_ref, l_ref, y_sum, s_ref = refs
    masks = _Masks(blocks, bound_ref, ids)
    m_ref[...] = jnp.full_like(m_ref, NOTHING)
    l_ref[...], y_sum[...] = jnp.zeros_like(l_ref), jnp.zeros_like(y_sum)

    def score(first, keys, queries):
        return dot(k_ref[pl.ds(first, keys), :], q_ref[queries, :], NT)

    def add(first, keys, queries, scores, ragged=False):
        old, values = m_ref[:, queries], v_ref[pl.ds(first, keys), :]
        if ragged:  # what lies behind the last value may be NaN, which a weight of 0 keeps
            key = jax.lax.broadcasted_iota(jnp.int32, values.shape, 0)
            values = jnp.where(key < length - first, values, 0)
        m = jnp.maximum(old, scores.max(0, keepdims=True))
        weights, fade = jnp.exp2(scores - m), jnp.exp2(old - m)
        m_ref[:, queries] = m
        l_ref[:, queries] = fade * l_ref[:, queries] + weights.sum(0, keepdims=True)
        more = dot(values, weights.astype(v_ref.dtype), TN)
        y_sum[:, queries] = fade * y_sum[:, queries] + more

    chunks = [slice(c, min(c + CHUNK, blocks.queries)) for c in range(0, blocks.queries, CHUNK)]

    def block(j, _):
        # The next block's products keep the matrix units busy during this one's softmax.
        first, then = (pl.multiple_of(jnp.minimum(x, masks.close - 1) * blocks.keys, 128) for x in (j, j + 1))
        for queries in chunks:
            scores = s_ref[:, queries]
            s_ref[:, queries] = score(then, blocks.keys, queries)
            add(first, blocks.keys, queries, scores)

    @pl.when(masks.opened < masks.close)
    def _():
        for queries in chunks:
            s_ref[:, queries] = score(pl.multiple_of(masks.opened * blocks.keys, 128), blocks.keys, queries)
        jax.lax.fori_loop(masks.opened, masks.close, block, None)

    def masked(chunks):
        scores = score(*chunks[0][:3])
        for (first, n, queries, causal), then in zip(chunks, [*chunks[1:], None]):
            following = then and score(*then[:3])
            ragged = length % blocks.keys > 0
            add(first, n, queries, masks.scores(scores, first, queries.start, causal), ragged)
            scores = following

    masks.each(masked)
    some = l_ref[...] > 0
    total = jnp.where(some, l_ref[...], 1)
    y_ref[...] = (y_sum[...] / total).T.astype(y_ref.dtype)
    total_ref[...] = jnp.where(some, m_ref[...] + jnp.log2(total), -MASKED)


def _backward_kernel(blocks, _, segmented, bound_ref, *refs):
    ids, refs = (refs[:2], refs[2:]) if segmented else (None, refs)
    q_ref, k_ref, v_ref, y_ref, dy_ref, total_ref, dq_ref, dk_ref, dv_ref, *refs = refs
    q_turned, dy_turned, mean_ref, dq_sum, dk_sum, dv_sum = refs
    masks = _Masks(blocks, bound_ref, ids)
    group, i = pl.program_id(2), pl.program_id(3)

    @pl.when((group == 0) & (i == 0))
    def _():
        dk_sum[...], dv_sum[...] = jnp.zeros_like(dk_sum), jnp.zeros_like(dv_sum)

    dq_sum[...] = jnp.zeros_like(dq_sum)
    q_turned[...], dy_turned[...] = q_ref[...].T, dy_ref[...].T
    mean_ref[...] = (y_ref[...].astype(jnp.float32) * dy_ref[...].astype(jnp.float32)).T.sum(0, keepdims=True)

    def products(first, n, queries):
        keys = pl.ds(first, n)
        return dot(k_ref[keys, :], q_ref[queries, :], NT), dot(v_ref[keys, :], dy_ref[queries, :], NT)

    def add(first, n, queries, scores, d_weights):
        keys = pl.ds(first, n)
        weights = jnp.exp2(scores - total_ref[:, queries])
        d_scores = (weights * (d_weights - mean_ref[:, queries])).astype(k_ref.dtype)
        dv_sum[:, keys] += dot(dy_turned[:, queries], weights.astype(v_ref.dtype), NT)
        dk_sum[:, keys] += dot(q_turned[:, queries], d_scores, NT)
        dq_sum[:, queries] += dot(k_ref[keys, :], d_scores, TN)

    def block(j, _):
        place = pl.multiple_of(j * blocks.keys, 128), blocks.keys, slice(0, blocks.queries)
        add(*place, *products(*place))

    def masked(chunks):
        made = products(*chunks[0][:3])
        for (*place, causal), then in zip(chunks, [*chunks[1:], None]):
            scores, d_weights = made
            made = then and products(*then[:3])
            add(*place, masks.scores(scores, place[0], place[2].start, causal), d_weights)

    jax.lax.fori_loop(masks.opened, masks.close, block, None)
    masks.each(masked)
    # d_scores is the gradient of scores in base e: those of base 2 have ln 2 times it.
    dq_ref[...] = (dq_sum[...].T * math.log(2)).astype(dq_ref.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_sum[...].T * math.log(2)).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].T.astype(dv_ref.dtype)
