"""How golden files of VisPer-LM run here: its predictors, its loss and the whole model."""

from __future__ import annotations

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.batch import IGNORE_LABEL, Batch
from jaxmllm.fusers.single import Single
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.embed_distill import (
    MAX_SCALE,
    EmbedDistill,
    Predictor,
    fit_queries,
    info_nce,
    smooth_l1,
)
from jaxmllm.objectives.task_tokens import task_places
from jaxmllm.train.state import unflatten
from jaxmllm.weights import key_maps
from tests.golden_case import Arrays, Case, Check, shapes
from tests.golden_models import Features, decoder, text_rows, through


def visper_head(case: Case) -> Check:
    c = case.config
    extra_heads = sum(name.startswith("linear_") and name.endswith(".0.weight") for name in case.weights)
    sizes = (
        c["working_width"],
        c["output_width"],
        c["num_heads"],
        c["dim_head"],
        c["num_blocks"],
        c["ff_mult"],
    )
    module = Predictor(*sizes, extra_heads=extra_heads)

    def args(x):
        return x["hidden_states"], fit_queries(jnp.asarray(x["queries"])[:, None], c["num_queries"])

    def forward(params, x):
        found = [y[:, 0] for y in module.apply({"params": unflatten(params)}, *args(x))]
        y = channels_first(found[0], x["cotangent"].shape)
        outputs = {f"linear_{i + 1}_output": found[i] for i in range(1, extra_heads)}
        return outputs | {"output": y, "plain_output": found[-1], "scalar": jnp.sum(y * x["cotangent"])}

    return Check(forward, key_maps.visper_head(module), shapes(module, *args(case.inputs)))


def channels_first(y: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """[B, queries, dim] unchanged, or in the reference's shape [B, dim, h, w] if `shape` is one of pictures."""
    return y.swapaxes(1, 2).reshape(shape) if len(shape) == 4 else y


def rows_last(y: jax.Array) -> jax.Array:
    """The inverse of `channels_first`."""
    return y.reshape(*y.shape[:2], -1).swapaxes(1, 2) if y.ndim == 4 else y


def reference_loss(prediction, target, logit_scale, mask, weight, clip=MAX_SCALE) -> dict[str, jax.Array]:
    """Our losses per sample [ranks * B, ..], reduced to [ranks] as the reference does; mask [ranks, B].

    Smooth-L1 is divided by the batch size, not by the number of valid samples. The contrastive part is the mean loss
    times the mean of the mask, and masked samples still count as rows and as negatives.
    """
    scale = jnp.minimum(jnp.exp(logit_scale), clip)
    entropy = info_nce(prediction, target, scale).reshape(mask.shape)
    smooth = (smooth_l1(prediction, target).reshape(mask.shape) * mask).mean(1)
    contrastive = weight * entropy.mean(1) * mask.mean(1)
    total = smooth + contrastive
    return {
        "total": total,
        "smooth_l1": smooth,
        "contrastive": contrastive,
        "per_sample_cross_entropy": entropy,
    }


def visper_loss(case: Case) -> Check:
    c = case.config
    several = c["ranks"] > 1

    def losses(x, mask):
        def merge(y):
            return y.reshape(-1, *y.shape[2:]) if several else y

        mask = x[mask].reshape(c["ranks"], -1)
        scale = jnp.asarray(x["logit_scale"]).reshape(-1, 1)  # one for all ranks, or one per rank
        scale = jnp.broadcast_to(scale, mask.shape).reshape(-1, 1)
        local = reference_loss(
            merge(x["predictions"]),
            merge(x["targets"]),
            scale,
            mask,
            c["contrastive_weight"],
            c["scale_clip"],
        )
        means = {name: y.mean() for name, y in local.items() if y.ndim == 1}
        entropy = local["per_sample_cross_entropy"]
        means["per_sample_cross_entropy"] = entropy if several else entropy[0]
        return means | {f"rank_{name}": y for name, y in local.items()}

    def forward(_, x):
        outputs = losses(x, "mask")
        outputs["scalar"] = outputs["total"]
        if "mask_partial" in x:
            outputs |= {f"partial_{name}": y for name, y in losses(x, "mask_partial").items()}
        return outputs

    scalars = {"": "scalar"} | ({"partial/": "partial_total"} if "mask_partial" in case.inputs else {})
    return Check(forward, scalars=scalars)


SHORT = 600  # if predictors see text at all, the reference shows them all of a sequence that is shorter than this


def build(case: Case) -> MLLM:
    """Builds the model that a file's config describes."""
    c, common = case.config, case.config["predictors"]
    grid = math.isqrt(c["image_tokens"])

    def teacher(task):
        own = common[task]
        tokens = c["task_tokens_per_task"] if task != "gen" else len(case.weights["model.special_gen_tokens"])
        extra_heads = sum(
            bool(re.fullmatch(rf"image_{task}_heads\.0\.linear_\d+\.0\.weight", name)) for name in case.weights
        )
        return EmbedDistill(
            own["queries"], own["output_width"], tuple(own["layers"]), tokens,
            pooled=task != "gen", predictor_width=own["working_width"], heads=common["num_heads"],
            head_dim=common["dim_head"], blocks=common["blocks"], ff_mult=common["ff_mult"], extra_heads=extra_heads,
            contrastive=c["contrastive_weight"],
        )  # fmt: skip

    return MLLM(
        {"encoder": Features(grid, case.inputs["features"].shape[-1])},
        {"encoder": Single()},
        MLPProjector(grid),
        decoder(c["llm"]),
        {task: teacher(task) for task in c["task_order"]},
    )


def visper_full(case: Case) -> Check:
    """Padding is masked in the language model, but the predictors see it."""
    c, x, model = case.config, case.inputs, build(case)
    layout, start = model.layout, c["prefix_length"]
    length, text = x["input_ids"].shape[1] - 1 + layout.block, start + layout.block
    batch, source = text_rows(case, layout, [list(range(layout.block))] * len(x["input_ids"]), length)
    batch.segment_ids[:] = 1
    keys = np.where(source >= 0, np.take_along_axis(x["attention_mask"], source, 1), True).astype(np.int32)
    labels = np.where(source >= 0, np.take_along_axis(x["labels"], source, 1), IGNORE_LABEL)
    taps = tuple(sorted({layer for teacher in model.objectives.values() for layer in teacher.layers}))

    def with_map(x) -> Batch:
        maps = x["features"].reshape(len(keys), 1, *[layout.tokens.grid] * 2, -1)
        return dataclasses.replace(batch, images={"encoder": maps})

    def run(model, batch):
        found, first = through(model, batch, keys, taps), layout.tokens.count
        for task, teacher in model.objectives.items():
            places = task_places(batch, layout, first, teacher.tokens)
            first += teacher.tokens
            if not c["pass_text_to_predictors"]:
                places = places._replace(visible=places.visible & (batch.positions < text)[:, None])
            elif length < SHORT:
                places = places._replace(visible=jnp.ones_like(places.visible))
            states = enumerate(found["tapped"][layer] for layer in teacher.layers)
            found[task] = [teacher.predict(i, y, places) for i, y in states], teacher.logit_scale(())
        tokens = [teacher.task_tokens(model.llm.width) for teacher in model.objectives.values()]
        found["task_tokens"] = jnp.concatenate(tokens)
        return found

    def forward(params, x):
        found = model.apply({"params": unflatten(params)}, jax.tree.map(jnp.asarray, with_map(x)), method=run)
        outputs = {"inputs_embeds": found["x"], "task_tokens": found["task_tokens"], "labels": labels}
        outputs |= {"text_logits": found["logits"][:, text:], "text_loss": found["loss"]}
        total = found["loss"]
        for task in c["task_order"]:
            target, mask = x[f"{task}_target"], jnp.asarray(x[f"{task}_mask"])[None]
            predictions, scale = found[task]
            layers = []
            for i, y in enumerate(predictions):
                outputs[f"{task}_prediction_{i}"] = channels_first(y, target.shape)
                loss = reference_loss(y, rows_last(target), scale, mask, c["contrastive_weight"], c["scale_clip"])
                layers.append({name: loss[name][0] for name in ("total", "smooth_l1", "contrastive")})
            for name in layers[0]:
                outputs[f"{task}_layer_{name}"] = jnp.stack([layer[name] for layer in layers])
            outputs[f"{task}_loss"] = c["predictors"][task]["loss_weight"] * outputs[f"{task}_layer_total"].sum()
            total = total + outputs[f"{task}_loss"]
        return outputs | {"total_loss": total, "scalar": total}

    ours = shapes(model, jax.tree.map(jnp.asarray, with_map(x)), method=run)
    return Check(forward, key_maps.visper(model), ours, from_grads=gradient_norms)


GROUPS = {  # of gradients, by patterns of the reference's names; the first match counts
    "features": r"inputs/features",
    "mm_projector": r"weights/model\.mm_projector",
    "task_tokens": r"weights/model\.special_",
    "depth_heads": r"weights/image_depth_heads",
    "seg_heads": r"weights/image_seg_heads",
    "gen_heads": r"weights/image_gen_heads",
    "logit_scales": r"weights/\w+_logit_scale",
    "llm": r"weights/",
}


def gradient_norms(grads: Arrays) -> Arrays:
    """L2 norms of the groups of gradients, {"gradient_norm_<group>": norm}."""
    squares = dict.fromkeys(GROUPS, 0.0)
    for name, g in grads.items():
        group = next(group for group, pattern in GROUPS.items() if re.match(pattern, name))
        squares[group] += np.sum(np.square(g, dtype=np.float64))
    return {f"gradient_norm_{group}": np.sqrt(np.float64(square)) for group, square in squares.items()}
