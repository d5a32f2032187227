"""Batched generation with a static key-value cache: prefill, then one token a step.

Prompts are padded on the left, so that all rows write their next token into the same slot of the cache. Images, and the
visual layers inside the language model, are worked on in the prefill only.
"""

from __future__ import annotations

import dataclasses
import operator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import sharded
from jaxmllm.batch import Batch
from jaxmllm.eval.sampling import Settings, next_token
from jaxmllm.nn import compiler
from jaxmllm.nn.stack import split_cache, split_layers


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class State:
    """What was generated so far. out holds the stop token where nothing was generated."""

    cache: dict | tuple[dict, ...]  # see Decoder.empty_cache; a tuple of one for each layer where these are apart
    slot: jax.Array  # int32; where the cache is written next
    position: jax.Array  # int32[B]; of the last token of out, which is not in the cache yet
    out: jax.Array  # int32[B, N]
    count: jax.Array  # int32; tokens in out, of the rows that are not done
    done: jax.Array  # bool[B]
    settings: Settings

    @property
    def slots(self) -> int:
        """Slots of the cache for each row."""
        return (self.cache[0] if isinstance(self.cache, tuple) else self.cache)["segments"].shape[-1]


class Generator:
    """The compiled programs of one model; they are compiled again for other batch shapes only.

    most: N, the tokens that a reply may have. stops: the tokens that end a reply; the first one fills up `State.out`.
    vocab: entries of the table beyond this number are never chosen, since the tokenizer does not have them.
    """

    def __init__(self, model, most: int, stops: tuple[int, ...], vocab: int):
        self.model, self.most, self.stops, self.vocab = model, most, stops, vocab
        self.prefill = jax.jit(self._prefill, static_argnums=3)
        self.compiled_extend = jax.jit(self._extend, donate_argnums=1)
        self.compiled_decode = jax.jit(self._decode, donate_argnums=1)
        self._apart: tuple[Any, Any] = None, None

    def extend(self, params, cache, *inputs) -> State:
        """See _extend."""
        return self.compiled_extend(self._by_layer(params), cache, *inputs)

    def decode(self, params, state: State, steps: jax.Array | int) -> State:
        """See _decode."""
        return self.compiled_decode(self._by_layer(params), state, steps)

    def _by_layer(self, params) -> Any:
        """The parameters with those of each decoder layer apart, where that is faster. The last copy is kept."""
        if not compiler.loops_copy_weights():
            return params
        stack = params["llm"]["blocks"]
        given, made = self._apart
        if given is None or not all(map(operator.is_, jax.tree.leaves(given), jax.tree.leaves(stack))):
            self._apart = _, made = stack, jax.jit(split_layers)(stack)
        return {**params, "llm": {**params["llm"], "blocks": made}}

    def _prefill(self, params, batch: Batch, settings: Settings, more: int) -> State:
        """Left-padded prompts (`left_pad`), one a row -> the state with the first token of each reply.

        more: slots of the cache after the prompts.
        """
        apply = partial(self.model.apply, {"params": params})
        b, s = batch.tokens.shape
        cache = self.model.llm.empty_cache(b, s + more, self._table(params).dtype)
        states, _, cache, _ = apply(batch, (), jax.tree.map(shard_cache, cache), method="hidden")
        cache = split_cache(cache) if compiler.loops_copy_weights() else cache
        return self._first(params, states[:, -1], cache, jnp.int32(s), batch.positions[:, -1] + 1, settings)

    def _extend(self, params, cache, slot, tokens, first, count, settings: Settings) -> State:
        """The same prompt in every row goes on after `slot` slots of a cache -> the state with the reply's first token.

        tokens: int32[B, S], right-padded, of which `count` are text; first: the position of the first.
        """
        places = jnp.arange(tokens.shape[1])
        positions = sharded.shard(jnp.broadcast_to(first + places, tokens.shape), "batch", None)
        segments = sharded.shard(jnp.broadcast_to((places < count).astype(jnp.int32), tokens.shape), "batch", None)
        apply = partial(self.model.apply, {"params": params})
        states, _, cache, _ = apply(tokens, positions, segments, cache, slot, method=decode_step)
        last = jax.lax.dynamic_index_in_dim(states, count - 1, 1, keepdims=False)
        position = sharded.shard(jnp.full(tokens.shape[:1], first + count, jnp.int32), "batch")
        return self._first(params, last, cache, slot + count, position, settings)

    def _first(self, params, states, cache, slot, position, settings: Settings) -> State:
        out = jnp.full((states.shape[0], self.most), self.stops[0], jnp.int32)
        done = sharded.shard(jnp.zeros(states.shape[:1], bool), "batch")
        state = State(cache, slot, position, sharded.shard(out, None, None), jnp.int32(0), done, settings)
        return self._choose(params, states, state)

    def _decode(self, params, state: State, steps: jax.Array) -> State:
        """Up to `steps` further tokens, until all rows are done."""
        apply = partial(self.model.apply, {"params": params})

        def step(carry):
            i, state = carry
            last = jax.lax.dynamic_index_in_dim(state.out, state.count - 1, 1)
            token, position = sharded.shard(last, "batch", None), state.position[:, None]
            states, _, cache, _ = apply(
                token, position, jnp.ones_like(token), state.cache, state.slot, method=decode_step
            )
            state = dataclasses.replace(state, cache=cache, slot=state.slot + 1, position=state.position + 1)
            return i + 1, self._choose(params, states[:, 0], state)

        def unfinished(carry):
            i, state = carry
            return (i < steps) & ~state.done.all() & (state.count < self.most)

        return jax.lax.while_loop(unfinished, step, (jnp.int32(0), state))[1]

    def _choose(self, params, states: jax.Array, state: State) -> State:
        """The state with one more token in each row that is not done, chosen from the last states [B, H]."""
        table = sharded.shard(self._table(params), "vocab", None)
        logits = jnp.einsum("bh,vh->bv", states, table, preferred_element_type=jnp.float32)
        logits = sharded.shard(logits, "batch", None)[:, : self.vocab]
        token, settings = next_token(logits, self.model.llm.logit_cap, state.settings, state.count)
        token = jnp.where(state.done, self.stops[0], token)
        stopped = (token[:, None] == jnp.array(self.stops)).any(1) | (state.count + 1 >= settings.limit)
        whole = sharded.shard(token, None)[:, None]
        out = jnp.where(jnp.arange(self.most) == state.count, whole, state.out)
        return dataclasses.replace(state, out=out, count=state.count + 1, done=state.done | stopped, settings=settings)

    def _table(self, params) -> jax.Array:
        return self.model.apply({"params": params}, method=lambda m: m.llm.output_table())


def decode_step(model, tokens: jax.Array, positions: jax.Array, segments: jax.Array, cache, slot: jax.Array):
    """Text, int32[B, S], that goes on after a cache -> (states [B, S, H], taps, cache, aux)."""
    return model.llm(model.llm.embed(tokens), positions, segments, cache=cache, cache_index=slot)


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
