"""`python -m tests.equal_meshes CASE ..`: loss and every gradient on a mesh against one device, one JSON line a case.

A case is "axis=size,..", with "/remat", "/scan", "/rows" or "/parts" behind it: blocks are computed again in the
backward pass, layers are scanned, every sample has a row of its own, rows come in two micro-batches. The reference
does none of these. The model is the tiny recipe with eight heads, so that every axis can have size 8, and all weights
of 512 elements are split over fsdp. Gradients are those of the train step itself: an optimizer that only keeps them.
"""

import dataclasses
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxmllm import mesh as meshes
from jaxmllm.batch import Batch
from jaxmllm.config import Run, load, override
from jaxmllm.data.loader import join
from jaxmllm.data.samples import Sample, image_places
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.setup import initial_params
from jaxmllm.train.state import TrainState
from jaxmllm.train.step import make_step

ROWS, S, SLOTS = 8, 128, 2
LOSSES = {"next_token": 1.0, "depth": 0.5, "seg": 0.5}
HEADED = ("encoders.clip", "encoders.dino", "fusers.clip", "aggregator", "llm", "llm.insert", "distill.depth", "distill.seg")


def recipe(remat: str, unroll: bool | int) -> Run:
    """The tiny recipe; remat and unroll are those of all its stacks."""
    words = [f"model.{part}.heads=8" for part in HEADED]
    words += ["model.llm.kv_heads=8", f"data.seq_len={S}", f"data.image_slots={SLOTS}"]
    run = override(load("configs/toy.py:tiny"), words)
    encoders = {k: e.clone(remat=remat, unroll=unroll) for k, e in run.model.encoders.items()}
    llm = run.model.llm.clone(remat=remat, unroll=unroll)
    return dataclasses.replace(run, model=run.model.clone(encoders=encoders, llm=llm))


def samples(run: Run) -> list[Sample]:
    """Two for every row, together at most as long as one: a picture and words, or words alone."""
    random, model = np.random.default_rng(0), run.model
    layout, shapes = model.layout, model.target_shapes
    made = []
    for i in range(2 * ROWS):
        m, n = int(i % 3 > 0), S // 2 - i % 5
        tokens = random.integers(6, 60, n).astype(np.int32)
        visual = np.full(n, -1, np.int32)
        places = image_places(0, (4, 3), layout) if m else []
        visual[2 : 2 + len(places)] = places
        labels = np.where((visual < 0) & (random.random(n) < 0.5), tokens, -100).astype(np.int32)
        pixels = {k: random.integers(0, 256, (m, e.size, e.size, 3), np.uint8) for k, e in layout.encoders.items()}
        padding = {k: np.tile(np.int32([0, e.grid // 6]), (m, 1)) for k, e in layout.encoders.items()}
        targets = {k: random.standard_normal((m, *s)).astype(np.float32) for k, s in shapes.items()}
        masks = {k: np.ones(m, bool) for k in shapes}
        made.append(Sample(i, tokens, labels, visual, pixels, padding, targets, masks, m))
    return made


def batch(run: Run, packed: bool) -> Batch:
    """The same samples, two in a row or one."""
    own = SimpleNamespace(
        layout=run.model.layout, seq_len=S, image_slots=SLOTS, target_shapes=run.model.target_shapes
    )
    every = samples(run)
    rows = [every[i : i + 2] for i in range(0, len(every), 2)] if packed else [[one] for one in every]
    return join(rows, own)[0]


def loss_and_gradients(case: str) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Losses and the gradient of every parameter, by path."""
    sizes, *ways = case.split("/")
    sizes = {"fsdp": 1} | {axis: int(n) for axis, n in (part.split("=") for part in sizes.split(",") if part)}
    run = recipe("full" if "remat" in ways else "none", 1 if "scan" in ways else True)
    with jax.set_mesh(jax.make_mesh((1,) * 5, meshes.AXES, devices=jax.devices()[:1])):
        params = jax.jit(lambda: initial_params(run))()
    mesh = meshes.Mesh(**sizes).build(jax.devices()[: int(np.prod(list(sizes.values())))])
    with jax.set_mesh(mesh):
        places = abstract_on(mesh, jax.eval_shape(lambda: initial_params(run)))
        params = {k: jax.device_put(np.asarray(v), places[k].sharding) for k, v in params.items()}
        keep = optax.trace(0.0)  # its state is the last gradient
        step = make_step(run.model, LOSSES, keep, jnp.float32, 2 if "parts" in ways else 1)
        state = TrainState(jnp.zeros((), jnp.int32), params, {}, jax.jit(keep.init)(params))
        rows = batch(run, "rows" not in ways)
        state, metrics = jax.jit(step)(state, meshes.to_global(rows, mesh))
        return jax.device_get(metrics), jax.device_get(state.opt_state.trace)


def main(cases: list[str]) -> None:
    meshes.MIN_FSDP_SIZE = 512
    losses, grads = loss_and_gradients("")
    largest = max(np.abs(g).max() for g in grads.values())
    for case in cases:
        found, other = loss_and_gradients(case)
        apart = {k: float(np.abs(other[k] - g).max() / max(np.abs(g).max(), 1e-3 * largest)) for k, g in grads.items()}
        worst = max(apart, key=apart.get)
        metrics = {k: abs(float(found[k]) / float(v) - 1) for k, v in losses.items()}
        print(json.dumps({"case": case, "metrics": metrics, "leaves": len(grads), "gradient": [apart[worst], worst]}))


if __name__ == "__main__":
    main(sys.argv[1:])
