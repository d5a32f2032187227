"""Next-token cross-entropy with the vocabulary in chunks: no [B, S, V] array ever exists."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.batch import Term

IGNORE = -100


def next_token(hidden: jax.Array, table: jax.Array, labels: jax.Array, chunk: int) -> tuple[Term, jax.Array]:
    """hidden [B, S, H], table [V, H], labels int32[B, S] (IGNORE = none) -> (negative log-likelihood, hits bool[B, S]).

    `chunk` positions of every row are turned into logits at a time (float32), and again in the backward pass. A hit is
    a label that is the most likely token.
    """
    b, s, h = hidden.shape
    chunk = min(chunk, s)
    pad = -s % chunk
    hidden = mesh.shard(hidden, "batch", None, None)
    x = jnp.pad(hidden, ((0, 0), (0, pad), (0, 0)))
    y = jnp.pad(mesh.shard(labels, "batch", None), ((0, 0), (0, pad)), constant_values=IGNORE)
    x = mesh.reshape(x, b, (s + pad) // chunk, chunk, h).swapaxes(0, 1)
    y = mesh.reshape(y, b, (s + pad) // chunk, chunk).swapaxes(0, 1)

    @jax.checkpoint
    def one_chunk(_, part):
        nll, hit = token_nll(*part, table)
        return None, (nll, hit)

    if x.shape[0] == 1:
        nll, hit = (a[None] for a in token_nll(x[0], y[0], table))
    else:
        _, (nll, hit) = jax.lax.scan(one_chunk, None, (x, y))
    nll, hit = (mesh.reshape(a.swapaxes(0, 1), b, s + pad)[:, :s] for a in (nll, hit))
    return Term(nll, labels != IGNORE), hit


def token_nll(x: jax.Array, y: jax.Array, table: jax.Array) -> tuple[jax.Array, jax.Array]:
    """x [B, C, H], y int32[B, C], table [V, H] -> (float32[B, C], bool[B, C])."""
    with jax.named_scope("logits"):
        logits = jnp.einsum("bch,vh->bcv", x, table, preferred_element_type=jnp.float32)
    vocab = jnp.arange(table.shape[0])
    # A comparison instead of a gather: with the vocabulary split over `tensor` it stays a local masked sum.
    own = jnp.sum(jnp.where(y[..., None] == vocab, logits, 0.0), -1)
    top = jax.lax.stop_gradient(logits.max(-1))
    lse = top + jnp.log(jnp.exp(logits - top[..., None]).sum(-1))
    return lse - own, own >= top
