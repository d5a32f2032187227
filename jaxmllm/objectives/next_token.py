"""Next-token cross-entropy with the vocabulary in chunks: no [B, S, V] array ever exists."""

from __future__ import annotations

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.batch import Term

IGNORE = -100
ROWS = 8  # chunks are whole tiles of TPU memory


def next_token(hidden: jax.Array, table: jax.Array, labels: jax.Array, chunk: int) -> tuple[Term, jax.Array]:
    """hidden [B, S, H], table [V, H], labels int32[B, S] (IGNORE = none) -> (negative log-likelihood, hits bool[B, S]).

    About `chunk` entries of the vocabulary become logits at a time (float32), and again in the backward pass; their
    gradients are summed over all tokens in one product. The table comes as it is stored: split over fsdp, it is gathered
    chunk by chunk, and so are its gradients scattered. A hit is a label that is the most likely token.
    """
    hidden, labels = mesh.shard(hidden, "batch", "length", None), mesh.shard(labels, "batch", "length")
    table = mesh.in_parts(table)
    nll, hit = losses(hidden, table, labels, Chunks.of(table.shape[1], chunk / table.shape[0]))
    return Term(nll, labels != IGNORE), hit


class Chunks(NamedTuple):
    """How the `total` rows that each part of the table has are taken `rows` at a time, `count` times."""

    total: int
    rows: int
    count: int

    @classmethod
    def of(cls, total: int, rows: float) -> Chunks:
        count = math.ceil(total / max(rows, ROWS))
        return cls(total, min(total, math.ceil(total / count / ROWS) * ROWS), count)

    def start(self, i: jax.Array) -> jax.Array:
        """First row of chunk i; the last one ends with the table, so it may begin with rows that were already taken."""
        return jnp.minimum(i * self.rows, self.total - self.rows)

    def fold(self, step, carry):
        """carry = step(carry, i) for every chunk."""
        if self.count == 1:
            return step(carry, jnp.int32(0))
        return jax.lax.scan(lambda carry, i: (step(carry, i), None), carry, jnp.arange(self.count))[0]


def chunk_logits(x: jax.Array, table: jax.Array, chunks: Chunks, i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """x [B, S, H], table [parts, V / parts, H] -> (logits float32[B, S, C] of chunk i, their entries int32[C], weights
    [C, H]); entries that were already taken have number -1 and logit -inf."""
    first, (parts, _, width) = chunks.start(i), table.shape
    weights = mesh.shard(jax.lax.dynamic_slice_in_dim(table, first, chunks.rows, 1), "vocab", None, None)
    weights = mesh.reshape_to(weights, (parts * chunks.rows, width), "vocab", None)
    row = first + jnp.arange(chunks.rows)
    entry = jnp.arange(parts)[:, None] * chunks.total + row
    entry = jnp.where(row >= i * chunks.rows, entry, -1).reshape(-1)
    with jax.named_scope("logits"):
        logits = jnp.einsum("bsh,vh->bsv", x, weights, preferred_element_type=jnp.float32)
    return jnp.where(entry >= 0, logits, -jnp.inf), entry, weights


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def losses(x: jax.Array, table: jax.Array, labels: jax.Array, chunks: Chunks) -> tuple[jax.Array, jax.Array]:
    """x [B, S, H], table [parts, V / parts, H], labels int32[B, S] -> (float32[B, S], bool[B, S])."""
    return _forward(x, table, labels, chunks)[0]


def _forward(x, table, labels, chunks):
    def step(carry, i):
        top, total, own = carry
        logits, entry, _ = chunk_logits(x, table, chunks, i)
        new = jnp.maximum(top, logits.max(-1))
        total = total * jnp.exp(top - new) + jnp.exp(logits - new[..., None]).sum(-1)
        # A comparison instead of a gather: with the vocabulary split over `tensor` it stays a local masked sum.
        return new, total, own + jnp.sum(jnp.where(labels[..., None] == entry, logits, 0.0), -1)

    zero = jnp.zeros_like(labels, jnp.float32)
    top, total, own = chunks.fold(step, (zero - jnp.inf, zero, zero))
    lse = top + jnp.log(total)
    return (lse - own, own >= top), (x, table, labels, lse)


def _backward(chunks, saved, cotangents):
    (x, table, labels, lse), (g, _) = saved, cotangents

    def step(carry, i):
        dx, dtable = carry
        logits, entry, weights = chunk_logits(x, table, chunks, i)
        d = g[..., None] * (jnp.exp(logits - lse[..., None]) - (labels[..., None] == entry))
        d = d.astype(x.dtype)
        with jax.named_scope("logits"):
            dx += mesh.einsum("bsv,vh->bsh", d, weights, "batch", "length", None, dtype=jnp.float32)
            more = mesh.einsum("bsv,bsh->vh", d, x, "vocab", None)
        more = mesh.reshape_to(more, (table.shape[0], chunks.rows, x.shape[-1]), "vocab", None, None)
        first = chunks.start(i)
        more = mesh.like(more, table) + jax.lax.dynamic_slice_in_dim(dtable, first, chunks.rows, 1)
        return dx, jax.lax.dynamic_update_slice_in_dim(dtable, more, first, 1)

    dx, dtable = chunks.fold(step, (jnp.zeros_like(x, jnp.float32), jnp.zeros_like(table)))
    return dx.astype(x.dtype), dtable, None


losses.defvjp(_forward, _backward)
