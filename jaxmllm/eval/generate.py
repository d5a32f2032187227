"""Batched greedy generation with a key-value cache.

Prompts are padded on the left, so that all rows write their next token into the same slot of the cache. Images enter in
the prefill only; the visual layers inside the language model do not run in the decode steps.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import sharded
from jaxmllm.batch import Batch


def make_generate(model, max_new_tokens: int, stop_token: int) -> Callable:
    """-> jitted generate(params, batch) -> int32[B, max_new_tokens] on every device, filled up with stop_token.

    batch: one left-padded prompt per row (`left_pad`). Recompiles only for another batch shape.
    """

    @jax.jit
    def generate(params, batch: Batch):
        apply = partial(model.apply, {"params": params})
        b, s = batch.tokens.shape
        table = sharded.shard(apply(method=lambda m: m.llm.output_table()), "vocab", None)
        cache = jax.tree.map(shard_cache, model.llm.empty_cache(b, s + max_new_tokens, table.dtype))
        states, _, cache, _ = apply(batch, (), cache, method="hidden")
        first = likeliest_token(states[:, -1], table)
        lengths = batch.positions[:, -1] + 1

        def step(carry):
            i, token, done, cache, out = carry
            out = jnp.where(jnp.arange(max_new_tokens) == i, token[:, None], out)
            states, _, cache, _ = apply(token, lengths + i, cache, s + i, method=decode_step)
            new = jnp.where(done, stop_token, likeliest_token(states[:, 0], table))
            return i + 1, new, done | (new == stop_token), cache, out

        def unfinished(carry):
            i, _, done, _, out = carry
            return (i < max_new_tokens) & ~done.all()

        out = sharded.shard(jnp.full((b, max_new_tokens), stop_token, jnp.int32), "batch", None)
        carry = (jnp.int32(0), first, first == stop_token, cache, out)
        return sharded.shard(jax.lax.while_loop(unfinished, step, carry)[-1], None, None)

    return generate


def decode_step(model, token: jax.Array, position: jax.Array, cache, index: jax.Array):
    """One token per row, int32[B], at its position, int32[B] -> (states [B, 1, H], taps, cache)."""
    segments = jnp.ones_like(token)[:, None]
    return model.llm(model.llm.embed(token[:, None]), position[:, None], segments, cache=cache, cache_index=index)


def likeliest_token(states: jax.Array, table: jax.Array) -> jax.Array:
    """The most likely next token: states [B, H], table [V, H] -> int32[B]."""
    logits = jnp.einsum("bh,vh->bv", states, table, preferred_element_type=jnp.float32)
    return sharded.shard(logits, "batch", None).argmax(-1).astype(jnp.int32)


def shard_cache(x: jax.Array) -> jax.Array:
    """Shards a leaf of the cache, [layers.., B, T, K, D] or int32[layers.., B, T]: B over batch axes, K over tensor."""
    tail = ("batch", None, "heads", None) if x.dtype != jnp.int32 else ("batch", None)
    return sharded.shard(x, *[None] * (x.ndim - len(tail)), *tail)


def left_pad(batch: Batch) -> Batch:
    """Moves the padding of rows of one sample each (numpy) from the right to the left; drops the targets."""
    s = batch.tokens.shape[1]
    shift = s - (batch.segment_ids > 0).sum(1)
    index = (np.arange(s)[None] - shift[:, None]) % s

    def roll(x):
        return np.take_along_axis(x, index, 1)

    places = batch.visual_positions
    return Batch(
        tokens=roll(batch.tokens),
        labels=roll(batch.labels),
        segment_ids=roll(batch.segment_ids),
        positions=roll(batch.positions),
        visual_index=roll(batch.visual_index),
        visual_positions=np.where(places >= 0, places + shift[:, None, None].astype(places.dtype), -1),
        images=batch.images,
        padding=batch.padding,
        targets={},
        target_mask={},
    )
