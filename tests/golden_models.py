"""What golden files of whole models share: an MLLM that gets features in place of pictures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmllm.batch import IGNORE_LABEL, Batch, EncoderInput, MapShape, VisualLayout, empty_batch
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mllm import MLLM
from jaxmllm.nn import inverse_gather
from jaxmllm.objectives.next_token import NextToken, next_token
from tests.golden_case import Case


class Features(nn.Module):
    """An encoder whose input is its map: [N, h, w, C] in place of pictures -> taps [1, N, h, w, C]."""

    grid: int
    width: int

    @property
    def input(self) -> EncoderInput:
        return EncoderInput(self.grid, self.grid, (0, 0, 0))

    @property
    def maps(self) -> tuple[MapShape, ...]:
        return (MapShape(self.grid, self.grid, self.width),)

    def __call__(self, maps: jax.Array) -> jax.Array:
        return maps[None]


def decoder(c: dict, **fields) -> Decoder:
    """The language model that a file's config describes."""
    return Decoder(
        c["vocab_size"], c["hidden_size"], c["num_layers"], c["num_heads"], c["num_key_value_heads"],
        c["intermediate_size"], rope_theta=c["rope_theta"], eps=c["rms_norm_eps"], tied=c["tied_embeddings"],
        remat="none", **fields,
    )  # fmt: skip


def through(model: MLLM, batch: Batch, keys: jax.Array, taps: tuple[int, ...]) -> dict:
    """Runs the visual path and the language model; tokens whose key is 0 are masked zero vectors.

    This is not MLLM.hidden, which does not set padding to zero: VisPer-LM's predictors read its hidden states.
    """
    block, visual = model.visual(batch)
    places = batch.visual_positions.reshape(len(block), -1), batch.visual_index
    x = inverse_gather.replace(model.llm.embed(batch.tokens), block, *places) * (keys > 0)[..., None]
    segments = (jnp.ones_like(keys), keys)
    memory = visual if visual.memory is not None else None
    states, tapped, *_ = model.llm(x, batch.positions, segments, memory, taps)
    table = model.llm.output_table()
    nll, _ = next_token(states, table, batch.labels, NextToken.chunk)
    loss = jnp.sum(nll.values * nll.mask) / jnp.sum(nll.mask)
    logits = jnp.einsum("bsh,vh->bsv", states, table)
    return {"x": x, "block": block, "visual": visual, "tapped": tapped, "logits": logits, "loss": loss}


def text_rows(case: Case, layout: VisualLayout, places: list[list[int]], length: int) -> tuple[Batch, np.ndarray]:
    """Builds rows as the data pipeline does: ids, the picture's tokens (those at `places` in its block), ids, padding.

    Returns the numpy batch without pictures, and int32[B, length]: for each place of a row, which of the file's ids
    stands there; -1 for visual tokens and after the last id.
    """
    ids, labels = case.inputs["input_ids"], case.inputs["labels"]
    batch = empty_batch(layout, len(ids), length, 1, {})
    batch.positions[:] = np.arange(length)
    source = np.full((len(ids), length), -1)
    for b, visible in enumerate(places):
        found = np.flatnonzero(ids[b] == case.config["image_token_id"])
        at = int(found[0]) if len(found) else ids.shape[1]  # a row without an image
        end = at + len(visible)
        rest = max(min(ids.shape[1] - at - 1, length - end), 0)
        source[b, :at], source[b, end : end + rest] = np.arange(at), np.arange(at + 1, at + 1 + rest)
        batch.visual_index[b, at:end] = visible
        batch.visual_positions[b, 0, visible] = np.arange(at, end)
    rows = np.arange(len(ids))[:, None]
    batch.tokens[:] = np.where(source >= 0, ids[rows, source], 0)
    batch.labels[:, :-1] = np.where(source >= 0, labels[rows, source], IGNORE_LABEL)[:, 1:]
    return batch, source
