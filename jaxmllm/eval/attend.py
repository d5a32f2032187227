"""Where the language model looks while it answers: the attention of an answer's tokens to the cells of its picture."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import host_batches, sharded
from jaxmllm import mesh as meshes
from jaxmllm.batch import IGNORE_LABEL, Batch, TokenLayout
from jaxmllm.data.loader import make_batch
from jaxmllm.data.samples import Sample, make_sample
from jaxmllm.data.templates import IMAGE
from jaxmllm.eval.answer import LENGTH_STEP, Answerer, Question
from jaxmllm.eval.generate import shard_cache
from jaxmllm.nn.attention.plain import MASKED
from jaxmllm.nn.primitives import soft_cap
from jaxmllm.train.state import unflatten


@dataclasses.dataclass(frozen=True)
class Attention:
    """Means over the layers and heads of the language model, and over the places that predict the answer's tokens."""

    picture: np.ndarray  # uint8[px, px, 3], as the encoder with the most pixels sees it
    cells: np.ndarray  # float32[L, L], attention to each cell of the picture; NaN: the cell has no token in the row
    share: float  # attention to all tokens of the picture, of a sum of 1


def answer_attention(answerer: Answerer, asked: Sequence[tuple[Question, str]]) -> list[Attention]:
    """The attention of replies, each to a question about one picture. All are worked on at once.

    Raises BadSample for a question that cannot be asked, ValueError if visual tokens belong to no cell of a grid.
    """
    spec, layout = answerer.spec, answerer.spec.layout
    if not layout.tokens.grid:
        raise ValueError("the visual tokens of this model belong to no cell of the picture")
    samples = [answered(question, reply, answerer) for question, reply in asked]
    length = -(-max(len(sample.tokens) for sample in samples) // LENGTH_STEP) * LENGTH_STEP
    rows = [[sample] for sample in samples]
    rows += rows[:1] * (-len(rows) % meshes.data_shards(answerer.mesh))
    with jax.set_mesh(answerer.mesh):
        batch, _ = make_batch(rows, dataclasses.replace(spec, seq_len=length))
        on_devices = host_batches.global_from_copies(batch, answerer.mesh)
        weights = jax.device_get(make_watch(answerer.config.model)(unflatten(answerer.params), on_devices))
    largest = max(layout.encoders, key=lambda name: layout.encoders[name].size)
    found = []
    for sample, own, places in zip(samples, weights.mean(1), batch.visual_positions[:, 0]):
        share = float(own[: len(sample.tokens)][sample.visual_index >= 0].sum())
        found.append(Attention(sample.images[largest][0], cells_of(own, places, layout.tokens), share))
    return found


def answered(question: Question, reply: str, answerer: Answerer) -> Sample:
    """A question with its reply as one sample, whose labels say which places predict the reply.

    Of an empty reply only the place that predicts its end has a label.
    """
    record, reply = question.record(), reply.replace(IMAGE, "").strip()
    if not reply:
        sample = answerer.sample(question)
        labels = np.full_like(sample.labels, IGNORE_LABEL)
        labels[-1] = answerer.stop
        return dataclasses.replace(sample, labels=labels)
    turns = [*record.data["conversations"], {"from": "gpt", "value": reply}]
    record = dataclasses.replace(record, data={"conversations": turns})
    return make_sample(record, 0, answerer.spec)


def make_watch(model) -> Callable:
    """-> jitted watch(params, batch) -> float32[B, layers, S], on every device: the attention to each place.

    It is a mean over heads and over the places with a label. One layer's weights are held at a time.
    """

    @jax.jit
    def watch(params, batch: Batch):
        apply = partial(model.apply, {"params": params})
        b, s = batch.tokens.shape
        dtype = apply(method=lambda m: m.llm.output_table()).dtype
        cache = jax.tree.map(shard_cache, model.llm.empty_cache(b, s, dtype))
        layers, _, _, kv, dim = cache["k"].shape
        q = jnp.zeros((layers, b, s, kv, model.llm.heads // kv, dim), dtype)
        cache["q"] = sharded.shard(q, None, "batch", None, "heads", None, None)
        _, _, cache, _ = apply(batch, (), cache, method="hidden")
        asks = (batch.labels >= 0).astype(jnp.float32)
        asks = asks / asks.sum(1, keepdims=True)

        llm = model.llm
        seen = [llm.window if llm.window and windowed else s for windowed in llm.layer_kinds("windowed")]

        def layer(each):
            own, window = each
            weights = attention_weights(own["q"], own["k"], own["segments"], window, llm.attention_cap)
            return jnp.einsum("bkgst,bs->bt", weights, asks) / (weights.shape[1] * weights.shape[2])

        return sharded.shard(jax.lax.map(layer, (cache, jnp.array(seen))), None, None, None).swapaxes(0, 1)

    return watch


def attention_weights(
    q: jax.Array, k: jax.Array, segments: jax.Array, window: jax.Array | int, cap: float | None = None
) -> jax.Array:
    """The weights of causal attention: q [B, S, K, G, D], k [B, S, K, D], segments int32[B, S] -> [B, K, G, S, S].

    window, cap: as in nn/attention/choose.py; a window of S hides nothing. The weights are float32; those of a query
    sum to 1 over the keys that it sees, or are all 0 for padding.
    """
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k, preferred_element_type=jnp.float32) * q.shape[-1] ** -0.5
    before = jnp.arange(q.shape[1])[:, None] - jnp.arange(q.shape[1])  # how far a key stands before a query
    seen = (segments[:, :, None] == segments[:, None, :]) & (segments > 0)[:, None, :]
    seen = (seen & (before >= 0) & (before < window))[:, None, None]
    return jnp.where(seen, jax.nn.softmax(jnp.where(seen, soft_cap(scores, cap), MASKED), axis=-1), 0)


def cells_of(weights: np.ndarray, places: np.ndarray, tokens: TokenLayout) -> np.ndarray:
    """float32[L, L]: the weights float32[S] of the tokens of each cell; places int32[block]: where a picture's tokens
    stand in the row, -1 for those that do not. NaN for a cell none of whose tokens does."""
    grid = places[: tokens.grid * tokens.columns].reshape(tokens.grid, tokens.columns)
    grid = grid[:, : tokens.grid * tokens.per_cell].reshape(tokens.grid, tokens.grid, tokens.per_cell)
    sums = np.where(grid >= 0, weights[grid], 0).sum(-1)
    return np.where((grid >= 0).any(-1), sums, np.nan)
