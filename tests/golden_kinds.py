"""How golden files of single modules of MMFuser and Cambrian-1 run here. All sizes come from the file."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np

from jaxmllm.aggregators.sva import SVALayer, to_memory, window_mask
from jaxmllm.data.images import key_mask, padding, token_mask
from jaxmllm.fusers.mmfuser import DeformableAttention, MMFuser
from jaxmllm.nn.maps import FlatMaps
from jaxmllm.train.state import unflatten
from jaxmllm.weights import key_maps
from jaxmllm.weights.convert import join
from tests.golden_case import Case, Check, numbered, shapes


def deformable_attention(case: Case) -> Check:
    module = DeformableAttention(case.config["num_heads"], case.config["num_points"])

    def inputs(x):
        return x["query"], x["reference_points"], [FlatMaps.of(level[None]) for level in numbered(x, "value")]

    def forward(params, x):
        y, where, weights = module.apply({"params": unflatten(params)}, *inputs(x), method=module.attend)
        scalar = jnp.sum(y * x["cotangent"])
        return {"output": y, "sampling_locations": where, "attention_weights": weights, "scalar": scalar}

    return Check(forward, key_maps.deformable_attention(), shapes(module, *inputs(case.inputs)))


def mmfuser(case: Case) -> Check:
    c = case.config
    module = MMFuser(c["num_heads"], c["num_points"], c["layer_norm_eps"], levels=c["num_key_value_levels"])

    def taps(x):
        return [m.reshape(m.shape[0], side, side, -1) for m, side in zip(numbered(x, "features"), c["grid_sides"])]

    def forward(params, x):
        y, a, a2 = module.apply({"params": unflatten(params)}, taps(x), method=module.attend)
        y = y.reshape(a.shape)
        scalar = jnp.sum(y * x["cotangent"])
        return {"output": y, "cross_attention_output": a, "self_attention_output": a2, "scalar": scalar}

    return Check(forward, key_maps.mmfuser(), shapes(module, taps(case.inputs), method=module.attend))


def sva(case: Case) -> Check:
    c = case.config
    layer, layers = SVALayer(c["hidden_width"], c["num_heads"]), range(c["num_layers"])
    side = c["query_grid_side"]

    def start(x):
        memory = to_memory(numbered(x, "features"), numbered(x, "key_mask"), x["context"], side)
        shape = (x["context"].shape[0], side, side, c["query_width"])
        query = jnp.broadcast_to(x["query"], shape)  # the connector has one query for all cells
        return query.reshape(len(query), side**2, -1), memory

    def forward(params, x):
        (query, memory), tree, outputs = start(x), unflatten(params), {}
        for i in layers:
            query = layer.apply({"params": tree[f"layer_{i}"]}, query, memory)
            output = outputs[f"layer_{i}_output"] = query.reshape(len(query), side, side, -1)
        return outputs | {"output": output, "scalar": jnp.sum(output * x["cotangent"])}

    one = shapes(layer, *start(case.inputs))
    ours = {f"layer_{i}/{path}": shape for i in layers for path, shape in one.items()}
    key_map = key_maps.sva_layer(c["window_sides"])
    return Check(forward, join(key_map.under(f"layers.{i}.", f"layer_{i}/") for i in layers), ours)


def cambrian_masks(case: Case) -> Check:
    grid, fine = case.config["query_grid_side"], case.config["encoder_grid_side"]

    def forward(_, x):
        sizes = x["image_sizes"].tolist()
        # [images, sides, (x, y)]
        pads = np.array([[padding(*size, side, min_used=0) for side in (grid, fine)] for size in sizes])
        tokens = np.stack([token_mask(*size, grid, newline=True, min_used=0) for size in sizes])
        keys = np.stack([key_mask(padding(*size, fine, min_used=0), fine) for size in sizes])
        return {
            "token_mask": tokens,
            "image_position_ids": tokens.reshape(len(sizes), -1).cumsum(1) - 1,
            "key_mask": keys,
            "usable_keys_per_window": window_mask(jnp.asarray(keys), grid).sum(0).reshape(len(keys), grid, grid),
            "padding": pads.repeat(2, -1).reshape(len(sizes), -1),
        }

    return Check(forward, scalars={})
