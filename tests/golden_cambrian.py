"""How golden files of the whole Cambrian-1 model run here."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.batch import IGNORE_LABEL, Batch
from jaxmllm.data.images import padding
from jaxmllm.data.samples import visual_indices
from jaxmllm.fusers.single import Single
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.mllm import MLLM
from jaxmllm.train.state import unflatten
from jaxmllm.weights import key_maps
from tests.golden_case import Case, Check, shapes
from tests.golden_models import Features, decoder, text_rows, through


def build(c: dict) -> MLLM:
    """Builds the model that a file's config describes. Raises ValueError if its SVA layers are not evenly spaced."""
    after, names = c["in_llm_after_layers"], [f"encoder{k}" for k in range(c["num_encoders"])]
    steps = set(np.diff(after).tolist()) or {1}
    if len(steps) > 1:
        raise ValueError(f"in_llm_after_layers {after} are not evenly spaced")
    width, heads, grid = c["sva_width"], c["num_heads_sva"], c["query_grid_side"]
    inserts = VisualInserts(SVALayer(width, heads), after[0], steps.pop(), len(after)) if after else None
    return MLLM(
        {name: Features(*size) for name, *size in zip(names, c["encoder_grid_sides"], c["encoder_widths"])},
        {name: Single() for name in names},
        SVA(width, grid, c["connector_depth"], heads, tuple(c["query_group_sides"])),
        decoder(c["llm"], inserts=inserts),
        {},
    )


def pick(tree: dict, j: int) -> dict:
    """Layer j of stacked parameters."""
    return jax.tree.map(lambda w: w[j], tree)


def cambrian_full(case: Case) -> Check:
    """Tokens that show only padding are masked in the file's train path; our rows leave them out.

    `slot` gives, for each place of the file's row, the place in our row. A masked token gets the place, and so the
    position, of the token before it.
    """
    c, x, model = case.config, case.inputs, build(case.config)
    sizes, ids, after = x["image_sizes"].tolist(), x["input_ids"], c["in_llm_after_layers"]
    layout, tokens = model.layout, model.layout.tokens
    places = [visual_indices(0, size, layout) for size in sizes]
    shown = np.zeros((len(ids), tokens.count), bool)
    for row, place in zip(shown, places):
        row[place] = True
    patches = shown.reshape(-1, tokens.grid, tokens.columns)[:, :, :-1]

    if c["path"] == "train":
        counted = np.ones((len(ids), ids.shape[1] - 1 + tokens.count), bool)
        counted[:, c["image_position"] : c["image_position"] + tokens.count] = shown
    else:
        counted = np.ones(case.outputs["logits"].shape[:2], bool)
    slot = counted.cumsum(1) - 1
    batch, source = text_rows(case, layout, places, slot.max() + 1)
    text = np.array(c["text_lengths"])[:, None]  # number of ids that are not padding, including the image's
    length = text - 1 + shown.sum(1, keepdims=True)
    keys = (batch.positions < length).astype(np.int32)
    valid = counted & (slot < length)
    source = np.where(counted, np.take_along_axis(source, slot, 1), -1)
    fixed = {
        "attention_mask": valid,
        "position_ids": slot,
        "labels": np.where(source >= 0, np.take_along_axis(x["labels"], source, 1), IGNORE_LABEL),
        "unpadded_grid": np.stack([patches.any(2).sum(1), patches.any(1).sum(1)], 1),
    }
    for name, encoder in layout.encoders.items():
        batch.padding[name][:, 0] = [padding(*size, encoder.grid) for size in sizes]
    taps = tuple(i + 1 for i in after if i + 1 < model.llm.layers)

    def with_maps(x) -> Batch:
        sides = {name: encoder.grid for name, encoder in layout.encoders.items()}
        maps = {}
        for k, (name, side) in enumerate(sides.items()):
            maps[name] = x[f"features_{k}"].reshape(len(ids), 1, side, side, -1)
        return dataclasses.replace(batch, images=maps)

    def forward(params, x):
        tree, last_query = unflatten(params), []

        def spy(call, args, kwargs, context):
            here = context.module.path, context.method_name
            if here == (("llm", "norm"), "__call__"):
                last_query.append(args[0])
            return call(*args, **kwargs)

        def connector(module, _):
            return module.path[:1] == ("aggregator",) and (len(module.path) == 2 or module.path[2:] == ("layer",))

        found, seen = model.apply(
            {"params": tree}, with_maps(x), keys, taps, method=through,
            capture_intermediates=connector, mutable=["intermediates"],
        )  # fmt: skip
        if len(taps) < len(after):  # the input of an SVA layer after the last decoder layer: the states without it
            fewer = dataclasses.replace(model.llm.inserts, count=len(taps))
            with nn.intercept_methods(spy):
                without = model.clone(llm=model.llm.clone(inserts=fewer))
                without.apply({"params": tree}, with_maps(x), keys, (), method=through)
        seen = seen["intermediates"]["aggregator"]
        square = lambda y, side: y.reshape(-1, side, side, y.shape[-1])
        outputs = {
            "loss": found["loss"],
            "image_tokens": square(seen["projector"]["__call__"][0], c["query_grid_side"]),
        }
        for g, side in enumerate(c["query_group_sides"]):
            outputs[f"connector_output_{g}"] = square(seen[f"group_{g}"]["layer"]["__call__"][0][-1], side)

        where = batch.visual_positions[:, 0].reshape(*patches.shape[:2], -1)[:, :, :-1]
        rows = np.arange(len(ids))[:, None, None]
        states = [found["tapped"][i] for i in taps] + last_query
        for j, state in enumerate(states):
            query, memory = state[rows, np.maximum(where, 0)], found["visual"].memory
            weights = pick(tree["llm"]["visual"]["layers"]["layer"], j)
            flat = query.reshape(len(query), -1, query.shape[-1])
            update = model.llm.inserts.layer.apply({"params": weights}, flat, memory).reshape(query.shape)
            for name, grid in (("query", query), ("output", update)):
                if c["path"] != "train":  # the rows and columns that are kept
                    grid = grid[patches].reshape(len(ids), *fixed["unpadded_grid"][0], -1)
                outputs[f"in_llm_{j}_{name}"] = grid

        for name, values in (("inputs_embeds", found["x"]), ("logits", found["logits"])):
            outputs[name] = jnp.take_along_axis(values, slot[..., None], 1)
        scalar = found["loss"]
        if "cotangent" in x:
            scalar = jnp.sum(outputs["logits"] * x["cotangent"] * valid[..., None])
        return outputs | fixed | {"scalar": scalar}

    compare = {"inputs_embeds": valid[..., None], "logits": valid[..., None]}
    if c["path"] == "train":
        for j in range(len(after)):
            compare |= {f"in_llm_{j}_query": patches[..., None], f"in_llm_{j}_output": patches[..., None]}
    ours = shapes(model, jax.tree.map(jnp.asarray, with_maps(x)), losses=("next_token",))
    return Check(forward, key_maps.cambrian(model), ours, compare)
