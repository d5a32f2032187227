"""Words of the answer as visual tokens: each word must be near some visual token of its sample, before any layer.

A visual token v [H] stands for the words of the language model's own table E [V, H] with p = softmax(v E^T), and a word
is there if any visual token of the sample stands for it (noisy-or, as Fang et al. 2015, arXiv 1411.4952, find words of
captions in regions). No layer of the language model takes part, so a stage with this loss alone costs little more than
the encoders; a frozen language model can then read what the connector writes.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import IGNORE_LABEL, Batch, Term, VisualLayout
from jaxmllm.objectives.base import ModelView, Objective

MAX_P = 1 - 1e-6  # keeps the logarithm of what is left finite
TINY = 1e-4  # below it, float32 knows the sum of probabilities better than one minus a product


class VisualWords(Objective):
    """Averages over the labels of samples with pictures, without the token that ends an answer. Metric: hit, the share
    of them that are the nearest word of a visual token. The logits [B, tokens of pictures, V] exist at once.
    """

    def check(self, name: str, layout: VisualLayout) -> None:
        if not layout.encoders:
            raise ValueError(f"objective {name!r} looks for words in visual tokens, and the model has no encoder")

    def count(self, name: str, batch: Batch) -> jax.Array:
        """The number of such labels."""
        return (wanted(batch) & same_sample(batch).any(1)).sum()

    def __call__(self, view: ModelView) -> tuple[Term, dict[str, Term]]:
        batch = view.batch
        tokens, own = sharded.shard(view.visual, "batch", None, None), same_sample(batch)
        table = sharded.shard(view.output_table, None, None)[: view.vocab].astype(tokens.dtype)
        logits = sharded.einsum("bjh,vh->bjv", tokens, table, "batch", None, None)
        log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
        labels = jnp.maximum(sharded.shard(batch.labels, "batch", None), 0)[:, None]
        log_p_label = jnp.take_along_axis(log_p, labels, -1)  # [B, J, S]
        mask = wanted(batch) & own.any(1)
        nll = -log_any(log_p_label, own | ~mask[:, None])
        hit = (own & (log_p.argmax(-1)[..., None] == labels)).any(1)
        return Term(nll, mask), {"hit": Term(hit.astype(jnp.float32), mask)}


def log_any(log_p: jax.Array, among: jax.Array) -> jax.Array:
    """log(1 - prod_j (1 - p_j)) over the second dimension, where `among`; for tiny p that is the log of their sum."""
    none = jnp.where(among, jnp.log1p(-jnp.minimum(jnp.exp(log_p), MAX_P)), 0).sum(1)
    tiny = none > -TINY
    several = jnp.log(-jnp.expm1(jnp.where(tiny, -1.0, none)))
    return jnp.where(tiny, jax.nn.logsumexp(jnp.where(among, log_p, -jnp.inf), 1), several)


def same_sample(batch: Batch) -> jax.Array:
    """bool[B, J, S]: whether a place belongs to the sample of a visual token."""
    b, slots, block = batch.visual_positions.shape
    places = sharded.reshape(batch.visual_positions, b, slots * block)
    segments = sharded.shard(batch.segment_ids, "batch", None)
    own = sharded.take_rows(segments[..., None], jnp.maximum(places, 0))  # [B, J, 1]
    return (segments[:, None] == own) & (places >= 0)[..., None]


def wanted(batch: Batch) -> jax.Array:
    """bool[B, S]: labels that are not the last of their answer."""
    labeled = sharded.shard(batch.labels, "batch", None) != IGNORE_LABEL
    return labeled & jnp.pad(labeled[:, 1:], ((0, 0), (0, 1)))
