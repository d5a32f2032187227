"""Compares loss and every gradient on a mesh with those on one device: `python -m tests.equal_meshes CASE ..`

A case is "axis=size,..", optionally followed by some of these:

    /remat   blocks are computed again in the backward pass
    /scan    layers are scanned
    /rows    every sample has a row of its own
    /parts   rows come in two micro-batches

The reference does none of these. With micro-batches the contrastive part of the teachers' losses is off in both, since
an image is compared with the other images of its micro-batch. The model is the tiny recipe with eight heads, so that
every axis can have size 8. All weights of 512 elements or more are split over fsdp. The gradients are those of the
train step itself, with an optimizer that only keeps them.

Prints one JSON line per case, which also says what the compiled program sends between devices. The case "wrong" is a
program that sends what must not be sent.
"""

import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmllm import host_batches, sharded
from jaxmllm import mesh as meshes
from jaxmllm.batch import IGNORE_LABEL, Batch
from jaxmllm.config import Run
from jaxmllm.data.loader import make_batch
from jaxmllm.data.samples import Sample, visual_indices
from jaxmllm.encoders.vit import ViT
from jaxmllm.objectives.next_token import Chunks
from jaxmllm.recipes import load, override
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.setup import abstract_batch, initial_params
from jaxmllm.train.state import TrainState
from jaxmllm.train.step import make_step
from tests import collectives

MIN_FSDP_SIZE = 512  # elements; smaller weights are not split over fsdp
ROWS, S, SLOTS = 8, 128, 2
LOSSES = {"next_token": 1.0, "depth": 0.5, "seg": 0.5}
# Fields of the model that have `heads`.
HEADED = ("encoders.clip", "encoders.dino", "fusers.clip", "aggregator", "llm", "llm.inserts.layer", "objectives.depth")
HEADED += ("objectives.seg",)


def recipe(remat: str, unroll: bool | int, contrast: bool) -> Run:
    """The tiny recipe with this remat and unroll for all stacks. contrast: the teachers' losses have their contrastive
    part."""
    overrides = [f"model.{part}.heads=8" for part in HEADED]
    overrides += ["model.llm.kv_heads=8", "model.objectives.seg.blocks=1"]
    overrides += [f"data.seq_len={S}", f"data.image_slots={SLOTS}"]
    overrides += ["model.llm.tied=False", "model.objectives.next_token.chunk=72"]  # chunks that overlap
    if not contrast:
        overrides += [f"model.objectives.{name}.contrastive=0" for name in ("depth", "seg")]
    run = override(load("configs/toy.py:tiny"), overrides)
    encoders = {k: e.clone(remat=remat, unroll=unroll) for k, e in run.model.encoders.items()}
    llm = run.model.llm.clone(remat=remat, unroll=unroll)
    return dataclasses.replace(run, model=run.model.clone(encoders=encoders, llm=llm))


def samples(run: Run) -> list[Sample]:
    """Two samples for every row, each at most half as long as a row: text only, or an image and text."""
    random, model = np.random.default_rng(0), run.model
    layout, shapes = model.layout, model.target_shapes
    made = []
    for i in range(2 * ROWS):
        images, length = int(i % 3 > 0), S // 2 - i % 5
        tokens = random.integers(6, 60, length).astype(np.int32)
        visual_index = np.full(length, -1, np.int32)
        indices = visual_indices(0, (4, 3), layout) if images else []
        visual_index[2 : 2 + len(indices)] = indices
        is_label = (visual_index < 0) & (random.random(length) < 0.5)
        labels = np.where(is_label, tokens, IGNORE_LABEL).astype(np.int32)
        pixels = {k: random.integers(0, 256, (images, e.size, e.size, 3), np.uint8) for k, e in layout.encoders.items()}
        padding = {k: np.tile(np.int32([0, e.grid // 6]), (images, 1)) for k, e in layout.encoders.items()}
        targets = {k: random.standard_normal((images, *s)).astype(np.float32) for k, s in shapes.items()}
        target_mask = {k: np.ones(images, bool) for k in shapes}
        made.append(Sample(i, tokens, labels, visual_index, pixels, padding, targets, target_mask, images))
    return made


def batch(run: Run, packed: bool) -> Batch:
    """These samples, two in a row if packed, else one."""
    model, every = run.model, samples(run)
    spec = SimpleNamespace(layout=model.layout, seq_len=S, image_slots=SLOTS, target_shapes=model.target_shapes)
    rows = [every[i : i + 2] for i in range(0, len(every), 2)] if packed else [[one] for one in every]
    return make_batch(rows, spec)[0]


@dataclasses.dataclass
class Program:
    """The train step of a case. Its arguments are abstract, so the devices may be those of a topology."""

    run: Run
    mesh: jax.sharding.Mesh
    state: TrainState  # shapes and shardings
    lower: Callable


def without_contrast(case: str) -> bool:
    """Whether a case has no contrastive losses: "/parts", and "/plain", the reference for it."""
    return "/parts" in case or "/plain" in case


def make_program(case: str, devices: list, options: Callable = lambda mesh: {}) -> Program:
    """The Program of a case; options: mesh -> compiler options."""
    sizes, *ways = case.split("/")
    sizes = {"fsdp": 1} | {axis: int(n) for axis, n in (part.split("=") for part in sizes.split(",") if part)}
    run = recipe("full" if "remat" in ways else "none", 1 if "scan" in ways else True, not without_contrast(case))
    mesh = meshes.Mesh(**sizes).build(devices[: math.prod(sizes.values())])
    keep = optax.trace(0.0)  # its state is the last gradient
    step = jax.jit(
        make_step(run.model, LOSSES, keep, jnp.float32, 2 if "parts" in ways else 1), compiler_options=options(mesh)
    )
    with jax.set_mesh(mesh):
        params = abstract_on(mesh, jax.eval_shape(lambda: initial_params(run)))
        state = TrainState(jax.ShapeDtypeStruct((), jnp.int32), params, {}, jax.eval_shape(keep.init, params))
        state = abstract_on(mesh, state)
        stage = dataclasses.replace(run.stages[0], rows=ROWS if "rows" not in ways else 2 * ROWS)
        return Program(run, mesh, state, lambda: step.lower(state, abstract_batch(run, stage, mesh)))


def weights(shapes: dict[str, jax.ShapeDtypeStruct]) -> dict[str, np.ndarray]:
    """Random weights, about as large as initial ones. None is zero, so every gradient is a sum of many terms."""
    random = np.random.default_rng(1)
    return {k: np.float32(0.15 * random.standard_normal(x.shape) + k.endswith("scale")) for k, x in shapes.items()}


def loss_and_gradients(case: str) -> tuple[dict[str, float], dict[str, np.ndarray], dict]:
    """The metrics of a step, the gradient of every parameter by path, and what is `sent`."""
    program = make_program(case, jax.devices())
    with jax.set_mesh(program.mesh):
        compiled, abstract = program.lower().compile(), program.state
        new = TrainState(np.int32(0), weights(abstract.trainable), {}, jax.tree.map(zeros, abstract.opt_state))
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), new, abstract)
        rows = batch(program.run, packed="/rows" not in case)
        state, metrics = compiled(state, host_batches.global_from_rows(rows, program.mesh))
    return jax.device_get(metrics), jax.device_get(state.opt_state.trace), sent(program, compiled.as_text())


# What else may cross the data axes. TARGETS: numbers of elements; the contrastive loss compares an image with the
# targets of the whole global batch. DERIVED: shapes of gradients that are not summed in the shape of their weight:
# SVA's window positions (tiled), task tokens (means of the rows of their array), and MMFuser's offset bias (the share
# of its heads).
TARGETS = {images * 36 * dim for images in (ROWS, 2 * ROWS, 4 * ROWS) for dim in (4, 16)}
DERIVED = {(12, 12, 32), (4, 32)} | {collectives.key((heads, 2, 2)) for heads in (1, 2, 4, 8)}


def sent(program: Program, text: str) -> dict:
    """What a compiled step, of which `text` is the HLO, sends between devices (tests/collectives.py)."""
    found, params = collectives.crossings(text, program.mesh.devices.shape), program.state.trainable
    known = collectives.weight_shapes(params) | DERIVED | chunk_shapes(program)
    bad = collectives.of_activations(found, known, TARGETS)
    return {
        "activations": [str(each) for each in bad],
        "gathered": collectives.gathered_weights(found),
        "summed": collectives.summed_weights(found, params, chunk_shapes(program)),
        "looped": {name: collectives.summed_in_blocks(found, name) for name in ("llm", "encoder_clip", "encoder_dino")},
    }


def chunk_shapes(program: Program) -> set[tuple[int, ...]]:
    """Keys of the shapes of one chunk of the output table, gathered over fsdp."""
    (vocab, width), sizes = program.state.trainable["llm/lm_head/embedding"].shape, program.mesh.shape
    parts = sizes["tensor"] * sizes["fsdp"]
    rows = Chunks.of(vocab // parts, program.run.model.objectives["next_token"].chunk / parts, vocab).rows
    return {collectives.key(dims) for dims in ((sizes["fsdp"], rows, width), (sizes["fsdp"] * rows, width))}


def zeros(x: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.zeros(x.shape, x.dtype)


def wrong() -> list[str]:
    """Paths of what `collectives.of_activations` finds in a program on data 4 x tensor 2 that has two faults.

    Every device gets the features of all images, and a learned array is split over the rows only after it is broadcast
    to them, so that the gradients of all rows are gathered.
    """
    vit = ViT(48, 8, width=32, layers=1, heads=8, mlp=32, taps=(1,))

    def loss(params, images):
        with jax.named_scope("encoder_clip"):
            features = vit.apply({"params": params["vit"]}, images)[0]
        with jax.named_scope("fuser_clip"):
            features = sharded.shard(sharded.shard(features, None), "batch")
        with jax.named_scope("aggregator"):
            table = sharded.shard(jnp.broadcast_to(params["table"], (images.shape[0], 5, 32)), "batch")
            return jnp.sin(features.mean((1, 2))[:, None] * table).sum()

    mesh = meshes.Mesh(data=4, fsdp=1, tensor=2).build(jax.devices()[:8])
    with jax.set_mesh(mesh):
        images = jax.ShapeDtypeStruct((16, 48, 48, 3), np.uint8, sharding=host_batches.batch_sharding(mesh))
        init = lambda x: {"vit": vit.init(jax.random.key(0), x)["params"], "table": jnp.zeros((5, 32))}
        params = abstract_on(mesh, jax.eval_shape(init, images))
        text = jax.jit(jax.grad(loss)).lower(params, images).compile().as_text()
    found = collectives.crossings(text, mesh.devices.shape)
    known = collectives.weight_shapes({f"{i}": x for i, x in enumerate(jax.tree.leaves(params))})
    return [each.path for each in collectives.of_activations(found, known, set())]


def main(cases: list[str]) -> None:
    sharded.MIN_FSDP_SIZE = MIN_FSDP_SIZE
    reference = functools.cache(loss_and_gradients)
    for case in cases:
        if case == "wrong":
            print(json.dumps({"case": case, "activations": wrong()}))
            continue
        losses, grads, _ = reference("/plain" if without_contrast(case) else "")
        largest = max(np.abs(g).max() for g in grads.values())
        found, other, sends = loss_and_gradients(case)
        apart = {k: float(np.abs(other[k] - g).max() / max(np.abs(g).max(), 1e-3 * largest)) for k, g in grads.items()}
        metrics = {k: abs(float(found[k]) - float(v)) / (abs(float(v)) or 1.0) for k, v in losses.items()}
        worst = max(apart, key=apart.get)
        zero = [k for k, g in grads.items() if not g.any() and not (without_contrast(case) and "logit_scale" in k)]
        line = {"case": case, "metrics": metrics, "gradient": [apart[worst], worst], "zero": zero, **sends}
        print(json.dumps(line))


if __name__ == "__main__":
    main(sys.argv[1:])
