"""The two flash kernels of one TPU device. See tpu_flash.py for their grid and their operands."""

from __future__ import annotations

import dataclasses
import itertools
import math

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from jaxmllm.nn.attention.plain import MASKED
from jaxmllm.nn.tpu import LANES, NT, TN, dot

NOTHING = -7e29  # the maximum over no scores: exp2(MASKED - NOTHING) is 0
CHUNK = 512  # keys, and queries, whose scores are one piece of work; chosen by the cycles the compiler schedules
FIELDS = 5  # numbers in `bounds` for each block of queries


@dataclasses.dataclass(frozen=True)
class Blocks:
    """The number of queries and of keys in a block, multiples of 128; equal if causal."""

    queries: int
    keys: int
    causal: bool
    interpret: bool | pltpu.InterpretParams = False


class Masks:
    """What a kernel must know about its block of queries: the keys it sees, and which of those need a mask."""

    def __init__(self, blocks: Blocks, bounds_ref, ids):
        at = (pl.program_id(0) * pl.num_programs(3) + pl.program_id(3)) * FIELDS
        self.start, self.opened, self.close, self.stop, self.place = (bounds_ref[at + k] for k in range(FIELDS))
        self.blocks, self.ids = blocks, ids

    def scores(self, scores: jax.Array, first: jax.Array, column: int, causal: bool) -> jax.Array:
        """scores [k, n] of the keys from `first` on and of the block's queries from `column` on; unseen ones MASKED."""
        (k, n), seen = scores.shape, None
        if causal:
            key, query = (jax.lax.broadcasted_iota(jnp.int32, (k, n), axis) for axis in (0, 1))
            seen = key - query <= self.place + column - first
        if self.ids:
            of_queries, of_keys = self.ids
            down = jnp.broadcast_to(of_keys[:, pl.ds(first, k)], (LANES, k)).T
            same = jnp.concatenate([down] * (n // LANES), 1) == of_queries[:, column : column + n]
            seen = same if seen is None else seen & same
        return scores if seen is None else jnp.where(seen, scores, MASKED)

    def for_each_masked(self, work) -> None:
        """work([(first key, number of keys, slice of queries, causal), ..]) for each block that needs a mask."""
        before, size = self.opened - self.start, self.blocks.queries
        starts = range(0, size, CHUNK), range(0, self.blocks.keys, CHUNK)

        def block(x, _):
            j = jnp.where(x < before, self.start + x, self.close + x - before) * self.blocks.keys

            def run(diagonal: bool):
                work([
                    (
                        pl.multiple_of(j + r, LANES),
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


def forward_kernel(blocks, length, segmented, bounds_ref, *refs):
    """The output of a block of queries, and log2 of the sum of its exponentiated scores. length: T."""
    ids, refs = (refs[:2], refs[2:]) if segmented else (None, refs)
    q_ref, k_ref, v_ref, y_ref, total_ref, m_ref, l_ref, y_sum, s_ref = refs
    masks = Masks(blocks, bounds_ref, ids)
    m_ref[...] = jnp.full_like(m_ref, NOTHING)
    l_ref[...], y_sum[...] = jnp.zeros_like(l_ref), jnp.zeros_like(y_sum)

    def score(first, keys, queries):
        return dot(k_ref[pl.ds(first, keys), :], q_ref[queries, :], NT)

    def add(first, keys, queries, scores, ragged=False):
        old, values = m_ref[:, queries], v_ref[pl.ds(first, keys), :]
        if ragged:  # memory after the last value may hold NaN, and 0 x NaN is NaN
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
        # The products of the next block keep the matrix units busy during the softmax of this one.
        first, then = (pl.multiple_of(jnp.minimum(x, masks.close - 1) * blocks.keys, LANES) for x in (j, j + 1))
        for queries in chunks:
            scores = s_ref[:, queries]
            s_ref[:, queries] = score(then, blocks.keys, queries)
            add(first, blocks.keys, queries, scores)

    @pl.when(masks.opened < masks.close)
    def _():
        for queries in chunks:
            s_ref[:, queries] = score(pl.multiple_of(masks.opened * blocks.keys, LANES), blocks.keys, queries)
        jax.lax.fori_loop(masks.opened, masks.close, block, None)

    def masked(chunks):
        scores = score(*chunks[0][:3])
        for (first, n, queries, causal), then in zip(chunks, [*chunks[1:], None]):
            following = then and score(*then[:3])
            ragged = length % blocks.keys > 0
            add(first, n, queries, masks.scores(scores, first, queries.start, causal), ragged)
            scores = following

    masks.for_each_masked(masked)
    some = l_ref[...] > 0
    total = jnp.where(some, l_ref[...], 1)
    y_ref[...] = (y_sum[...] / total).T.astype(y_ref.dtype)
    total_ref[...] = jnp.where(some, m_ref[...] + jnp.log2(total), -MASKED)


def backward_kernel(blocks, _, segmented, bounds_ref, *refs):
    """The gradient of a block of queries; those of all keys and values once their last query is done."""
    ids, refs = (refs[:2], refs[2:]) if segmented else (None, refs)
    q_ref, k_ref, v_ref, y_ref, dy_ref, total_ref, dq_ref, dk_ref, dv_ref, *refs = refs
    q_turned, dy_turned, mean_ref, dq_sum, dk_sum, dv_sum = refs
    masks = Masks(blocks, bounds_ref, ids)
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
        place = pl.multiple_of(j * blocks.keys, LANES), blocks.keys, slice(0, blocks.queries)
        add(*place, *products(*place))

    def masked(chunks):
        made = products(*chunks[0][:3])
        for (*place, causal), then in zip(chunks, [*chunks[1:], None]):
            scores, d_weights = made
            made = then and products(*then[:3])
            add(*place, masks.scores(scores, place[0], place[2].start, causal), d_weights)

    jax.lax.fori_loop(masks.opened, masks.close, block, None)
    masks.for_each_masked(masked)
    # d_scores is the gradient with respect to base-e scores; our scores are base 2, so theirs is ln 2 times that.
    dq_ref[...] = (dq_sum[...].T * math.log(2)).astype(dq_ref.dtype)

    @pl.when((group == pl.num_programs(2) - 1) & (i == pl.num_programs(3) - 1))
    def _():
        dk_ref[...] = (dk_sum[...].T * math.log(2)).astype(dk_ref.dtype)
        dv_ref[...] = dv_sum[...].T.astype(dv_ref.dtype)
