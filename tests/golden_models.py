"""What golden files of whole models share: MLLM with given features in place of encoders."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmllm.batch import Batch, EncoderInput, MapShape, VisualLayout, empty_batch
from jaxmllm.llms.decoder import Decoder
from jaxmllm.llms.inserts import place_visual
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.next_token import IGNORE, next_token
from tests.golden_case import Case


class Features(nn.Module):
    """An encoder whose map is given: [N, h, w, C] in place of the pictures -> taps [1, N, h, w, C]."""

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


def decoder(c: dict, **more) -> Decoder:
    """The language model that a file's config describes."""
    return Decoder(
        c["vocab_size"], c["hidden_size"], c["num_layers"], c["num_heads"], c["num_key_value_heads"],
        c["intermediate_size"], rope_theta=c["rope_theta"], eps=c["rms_norm_eps"], tied=c["tied_embeddings"],
        remat="none", **more,
    )  # fmt: skip


def through(model: MLLM, batch: Batch, keys: jax.Array, taps: tuple[int, ...]) -> dict:
    """Visual path and language model; tokens with keys 0 are zero vectors which the language model hides.

    (MLLM.hidden gives padding no such vectors, and VisPer-LM's predictors look at what becomes of them.)
    """
    block, visual = model.visual(batch)
    places = batch.visual_positions.reshape(len(block), -1), batch.visual_index
    x = place_visual(model.llm.embed(batch.tokens), block, *places) * (keys > 0)[..., None]
    segments = (jnp.ones_like(keys), keys)
    memory = visual if visual.memory is not None else None
    states, tapped, _ = model.llm(x, batch.positions, segments, memory, taps)
    table = model.llm.output_table()
    nll, _ = next_token(states, table, batch.labels, model.vocab_chunk)
    loss = jnp.sum(nll.values * nll.mask) / jnp.sum(nll.mask)
    logits = jnp.einsum("bsh,vh->bsv", states, table)
    return {"x": x, "block": block, "visual": visual, "tapped": tapped, "logits": logits, "loss": loss}


def text_rows(case: Case, layout: VisualLayout, places: list[list[int]], length: int) -> tuple[Batch, np.ndarray]:
    """Rows as the data pipeline makes them: ids, the picture's tokens (`places` in its block), ids, padding.

    Returns the numpy batch, pictures left out, and int32[B, length]: which of the file's ids stands at each
    place of a row, -1 for visual tokens and beyond the ids.
    """
    ids, labels = case.inputs["input_ids"], case.inputs["labels"]
    batch = empty_batch(layout, len(ids), length, 1, {})
    batch.positions[:] = np.arange(length)
    source = np.full((len(ids), length), -1)
    for b, visible in enumerate(places):
        found = np.flatnonzero(ids[b] == case.config["image_token_id"])
        at = int(found[0]) if len(found) else ids.shape[1]  # a row of text alone
        end = at + len(visible)
        rest = max(min(ids.shape[1] - at - 1, length - end), 0)
        source[b, :at], source[b, end : end + rest] = np.arange(at), np.arange(at + 1, at + 1 + rest)
        batch.visual_index[b, at:end] = visible
        batch.visual_positions[b, 0, visible] = np.arange(at, end)
    rows = np.arange(len(ids))[:, None]
    batch.tokens[:] = np.where(source >= 0, ids[rows, source], 0)
    batch.labels[:, :-1] = np.where(source >= 0, labels[rows, source], IGNORE)[:, 1:]
    return batch, source
