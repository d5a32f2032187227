"""How golden files of Dense Connector and Mixture of Features run here."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.aggregators.mlp import Projector
from jaxmllm.aggregators.mof import InterleavedMoF
from jaxmllm.batch import FeatureMap, TokenLayout, VisualLayout
from jaxmllm.fusers.dense_connector import STI, dci, sci
from jaxmllm.nn import inverse_gather
from jaxmllm.nn.primitives import Embed
from jaxmllm.train.state import unflatten
from jaxmllm.weights import key_maps
from jaxmllm.weights.convert import copy
from tests.golden_case import Case, Check, shapes
from tests.golden_models import text_rows

EARLY = (7, 15)  # the hidden states that STI and SCI add for any encoder


def depth(names) -> int:
    """The number of linear layers of a projector whose weights have these names."""
    return sum(name.endswith(".weight") for name in names)


def sides(tokens: int) -> tuple[int, int]:
    """A grid for this number of tokens: square if possible, else one row (columns do not matter here)."""
    root = math.isqrt(tokens)
    return (root, root) if root * root == tokens else (1, tokens)


def dense_connector(case: Case) -> Check:
    c = case.config
    final, size = c["final_map_index"], 12 if c["has_class_token"] else 13
    if c["variant"] == "dci":
        fuser, wanted = dci(size, final=final), list(range(max(final + 1, 2 * size)))
    else:
        fuser, wanted = STI() if c["variant"] == "sti" else sci(), [*EARLY, final]
    project = Projector(c["output_width"], depth(case.weights))

    def fuse(states):
        states = states[np.array(wanted)][:, :, int(c["has_class_token"]) :]
        fused = fuser.apply({}, states.reshape(*states.shape[:2], *sides(c["tokens"]), -1))
        cells = fused.cells.reshape(c["batch"], c["tokens"], -1)
        return cells if fused.extra is None else jnp.concatenate([cells, fused.extra], 1)

    def forward(params, x):
        fused = fuse(x["hidden_states"])
        y = project.apply({"params": unflatten(params)}, fused)
        return {"fused": fused, "output": y, "scalar": jnp.sum(y * x["cotangent"])}

    example = jax.eval_shape(fuse, case.inputs["hidden_states"])
    return Check(forward, key_maps.projector(project.depth), shapes(project, example))


class Spliced(nn.Module):
    """Puts the visual tokens of two encoders among the embedded text tokens."""

    aggregator: nn.Module
    embedding: nn.Module

    def __call__(self, maps: dict, tokens: jax.Array, *places: jax.Array) -> tuple[jax.Array, jax.Array]:
        visual = {name: FeatureMap(x) for name, x in maps.items()}
        image = self.aggregator(visual, {}, self.embedding.width).tokens
        return image, inverse_gather.replace(self.embedding(tokens), image, *places)


def mof_interleaved(case: Case) -> Check:
    c, x = case.config, case.inputs
    ids, width = x["input_ids"], c["hidden_size"]
    names = {"clip": "clip_features", "dino": "dino_features"}
    grid = sides(c["tokens_per_tower"])
    aggregator = InterleavedMoF(depth(name for name in case.weights if name.startswith("mm_projector.")))
    module = Spliced(aggregator, Embed(c["vocab_size"], width))
    layout = VisualLayout({}, TokenLayout(extra=2 * c["tokens_per_tower"]), 0)
    places = [list(range(layout.block)) if c["image_token_id"] in row else [] for row in ids]
    batch, source = text_rows(case, layout, places, c["output_length"])

    def spread(values, visual, beyond):
        """Along our rows: `values` at ids, `visual` at visual tokens, `beyond` after the last id."""
        found = np.take_along_axis(values, np.maximum(source, 0), 1)
        return np.where(source >= 0, found, np.where(batch.visual_index >= 0, visual, beyond))

    fixed = {
        "labels": spread(x["labels"], c["ignore_label"], c["ignore_label"]).astype(np.int32),
        "attention_mask": spread(x["attention_mask"], True, False),
    }
    inside = (source >= 0) | (batch.visual_index >= 0)

    def args(x):
        maps = {name: x[key].reshape(len(ids), *grid, -1) for name, key in names.items()}
        return maps, *map(jnp.asarray, (batch.tokens, batch.visual_positions[:, 0], batch.visual_index))

    def forward(params, x):
        image, embeds = module.apply({"params": unflatten(params)}, *args(x))
        embeds = embeds * inside[..., None]  # after the last id the reference has zero vectors
        outputs = {"image_tokens": image, "inputs_embeds": embeds, "scalar": jnp.sum(embeds * x["cotangent"])}
        return outputs | fixed

    key_map = key_maps.interleaved_mof(aggregator, names).under("", "aggregator/")
    key_map += copy("embed_tokens.weight", "embedding/embedding")
    return Check(forward, key_map, shapes(module, *args(x)))
