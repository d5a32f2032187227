"""Next-token cross-entropy with the vocabulary in chunks: a [B, S, V] array never exists."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import IGNORE_LABEL, Batch, Term
from jaxmllm.fields import Positive
from jaxmllm.nn.primitives import soft_cap
from jaxmllm.objectives.base import ModelView, Objective

ROWS = 8  # a chunk is a multiple of this: whole tiles of TPU memory


class NextToken(Objective):
    """Next-token prediction on all labels of the batch; metric: accuracy. chunk: see `next_token`."""

    chunk: Positive = 32768

    def count(self, name: str, batch: Batch) -> jax.Array:
        """The number of labels."""
        return (batch.labels != IGNORE_LABEL).sum()

    def __call__(self, view: ModelView) -> tuple[Term, dict[str, Term]]:
        labels, cap, vocab = view.batch.labels, view.logit_cap, view.vocab
        term, hit = next_token(view.states, view.output_table, labels, self.chunk, cap, vocab)
        return term, {"accuracy": Term(hit.astype(jnp.float32), term.mask)}


def next_token(
    hidden: jax.Array,
    table: jax.Array,
    labels: jax.Array,
    chunk: int,
    cap: float | None = None,
    vocab: int | None = None,
) -> tuple[Term, jax.Array]:
    """hidden [B, S, H], table [V, H], labels int32[B, S] (IGNORE_LABEL: none) -> (negative log-likelihood, bool[B, S]).

    About `chunk` entries of the vocabulary become float32 logits at a time, and again in the backward pass, which sums
    their gradients over all tokens in one product. The table is passed as it is stored: if it is split over fsdp, it is
    gathered, and its gradient scattered, chunk by chunk. cap: logits pass primitives.soft_cap. vocab: the rows of the
    table that are tokens; those after them are padding, which has no probability and a gradient of zero. The second
    result is true where the label is the most likely token.
    """
    hidden, labels = sharded.shard(hidden, "batch", "length", None), sharded.shard(labels, "batch", "length")
    table = sharded.split_by_device(table)
    chunks = Chunks.of(table.shape[1], chunk / table.shape[0], vocab or table.shape[0] * table.shape[1])
    nll, hit = losses(hidden, table, labels, chunks, cap)
    return Term(nll, labels != IGNORE_LABEL), hit


class Chunks(NamedTuple):
    """How the `total` rows of each part of the table are taken `rows` at a time, `count` times. vocab: see
    next_token."""

    total: int
    rows: int
    count: int
    vocab: int

    @classmethod
    def of(cls, total: int, rows: float, vocab: int) -> Chunks:
        count = math.ceil(total / max(rows, ROWS))
        return cls(total, min(total, math.ceil(total / count / ROWS) * ROWS), count, vocab)

    def start(self, i: jax.Array | int) -> jax.Array:
        """First row of chunk i.

        The last chunk ends with the table, so it may begin with rows that were already taken.
        """
        return jnp.minimum(i * self.rows, self.total - self.rows)

    def weights(self, table: jax.Array, i: jax.Array | int) -> jax.Array:
        """[parts, V / parts, H] -> chunk i, [chunk, H], gathered over fsdp."""
        rows = sharded.shard(jax.lax.dynamic_slice_in_dim(table, self.start(i), self.rows, 1), "vocab", None, None)
        return sharded.reshape_to(rows, (rows.shape[0] * rows.shape[1], rows.shape[2]), "vocab", None)

    def entries(self, parts: int, i: jax.Array | int) -> jax.Array:
        """int32[chunk]: the entries of the vocabulary in chunk i; -1 for padding and for those already taken."""
        row = self.start(i) + jnp.arange(self.rows)
        entry = jnp.arange(parts)[:, None] * self.total + row
        new = row >= i * self.rows
        if parts * self.total > self.vocab:
            new = new & (entry < self.vocab)
        return jnp.where(new, entry, -1).reshape(-1)

    def fold(self, step, carry, table: jax.Array):
        """carry = step(carry, weights [chunk, H], i) for each chunk i."""
        if self.count == 1:
            return step(carry, self.weights(table, 0), 0)

        def turn(state, i):
            carry, weights = state
            following = self.weights(table, i + 1)  # gathered while this chunk is worked on; the last one is not used
            return (step(carry, weights, i), following), None

        return jax.lax.scan(turn, (carry, self.weights(table, 0)), jnp.arange(self.count))[0][0]


def logits_of(x: jax.Array, weights: jax.Array, entry: jax.Array, cap: float | None) -> jax.Array:
    """x [B, S, H], weights [chunk, H], entry int32[chunk] -> float32[B, S, chunk], -inf where the entry is -1."""
    with jax.named_scope("logits"):
        logits = soft_cap(jnp.einsum("bsh,vh->bsv", x, weights, preferred_element_type=jnp.float32), cap)
    return jnp.where(entry >= 0, logits, -jnp.inf)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def losses(
    x: jax.Array, table: jax.Array, labels: jax.Array, chunks: Chunks, cap: float | None
) -> tuple[jax.Array, jax.Array]:
    """x [B, S, H], table [parts, V / parts, H], labels int32[B, S] -> (float32[B, S], bool[B, S])."""
    return _forward(x, table, labels, chunks, cap)[0]


def _forward(x, table, labels, chunks, cap):
    def step(carry, weights, i):
        (top, total, own), entry = carry, chunks.entries(table.shape[0], i)
        logits = logits_of(x, weights, entry, cap)
        new = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new) + jnp.exp(logits - new[..., None]).sum(-1)
        # A comparison instead of a gather: it stays a local masked sum if the vocabulary is split over `tensor`.
        return new, total, own + jnp.sum(jnp.where(labels[..., None] == entry, logits, 0.0), -1)

    zero = jnp.zeros_like(labels, jnp.float32)
    top, total, own = chunks.fold(step, (zero - jnp.inf, zero, zero), table)
    lse = top + jnp.log(total)
    return (lse - own, own >= top), (x, table, labels, lse)


def _backward(chunks, cap, saved, cotangents):
    (x, table, labels, lse), (g, _) = saved, cotangents

    def step(carry, weights, i):
        (dx, dtable), entry = carry, chunks.entries(table.shape[0], i)
        logits = logits_of(x, weights, entry, cap)
        d = g[..., None] * (jnp.exp(logits - lse[..., None]) - (labels[..., None] == entry))
        if cap is not None:
            d = d * (1 - jnp.square(jnp.where(entry >= 0, logits, 0) / cap))
        d = d.astype(x.dtype)
        with jax.named_scope("logits"):
            dx += sharded.einsum("bsv,vh->bsh", d, weights, "batch", "length", None, dtype=jnp.float32)
            more = sharded.einsum("bsv,bsh->vh", d, x, "vocab", None)
        more = sharded.reshape_to(more, (table.shape[0], chunks.rows, x.shape[-1]), "vocab", None, None)
        first = chunks.start(i)
        more = sharded.reshard_like(more, table) + jax.lax.dynamic_slice_in_dim(dtable, first, chunks.rows, 1)
        return dx, jax.lax.dynamic_update_slice_in_dim(dtable, more, first, 1)

    dx, dtable = chunks.fold(step, (jnp.zeros_like(x, jnp.float32), jnp.zeros_like(table)), table)
    return dx.astype(x.dtype), dtable, None


losses.defvjp(_forward, _backward)
