"""`python -m tests.equal_meshes CASE ..`: loss and every gradient on a mesh against one device.

A case is "axis=size,..", with "/remat", "/scan", "/rows" or "/parts" behind it: blocks are computed again in the
backward pass, layers are scanned, every sample has a row of its own, rows come in two micro-batches. The reference
does none of these. With micro-batches the contrastive part of the teachers' losses is off, since an image is compared
with those of its own micro-batch. The model is the tiny recipe with eight heads, so that every axis can have size 8,
and all weights of 512 elements are split over fsdp. Gradients are those of the train step itself: an optimizer that
only keeps them.

Prints one JSON line a case, what its compiled program sends between devices among it. The case "wrong" is a program
that sends what must not be sent.
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

from jaxmllm import mesh as meshes
from jaxmllm.batch import Batch
from jaxmllm.config import Run, load, override
from jaxmllm.data.loader import join
from jaxmllm.data.samples import Sample, image_places
from jaxmllm.encoders.vit import ViT
from jaxmllm.objectives.next_token import Chunks
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.setup import abstract_batch, initial_params
from jaxmllm.train.state import TrainState
from jaxmllm.train.step import make_step
from tests import collectives

SPLIT = 512  # elements from which on a weight is split over fsdp
ROWS, S, SLOTS = 8, 128, 2
LOSSES = {"next_token": 1.0, "depth": 0.5, "seg": 0.5}
HEADED = ("encoders.clip", "encoders.dino", "fusers.clip", "aggregator", "llm", "llm.insert", "distill.depth")
HEADED += ("distill.seg",)


def recipe(remat: str, unroll: bool | int, contrast: bool) -> Run:
    """The tiny recipe; remat and unroll are those of all its stacks. contrast: teachers' losses have that part."""
    words = [f"model.{part}.heads=8" for part in HEADED]
    words += ["model.llm.kv_heads=8", "model.distill.seg.blocks=1", f"data.seq_len={S}", f"data.image_slots={SLOTS}"]
    words += ["model.llm.tied=False", "model.vocab_chunk=72"]  # in chunks that overlap
    if not contrast:
        words += [f"model.distill.{name}.contrastive=0" for name in ("depth", "seg")]
    run = override(load("configs/toy.py:tiny"), words)
    encoders = {k: e.clone(remat=remat, unroll=unroll) for k, e in run.model.encoders.items()}
    llm = run.model.llm.clone(remat=remat, unroll=unroll)
    return dataclasses.replace(run, model=run.model.clone(encoders=encoders, llm=llm))


def samples(run: Run) -> list[Sample]:
    """Two for every row, each at most half as long: words alone, or a picture and words."""
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
    model, every = run.model, samples(run)
    spec = SimpleNamespace(layout=model.layout, seq_len=S, image_slots=SLOTS, target_shapes=model.target_shapes)
    rows = [every[i : i + 2] for i in range(0, len(every), 2)] if packed else [[one] for one in every]
    return join(rows, spec)[0]


@dataclasses.dataclass
class Program:
    """The step of a case: lowered arguments are abstract, so devices may be those of a topology."""

    run: Run
    mesh: jax.sharding.Mesh
    state: TrainState  # shapes and shardings
    lower: Callable


def contrastless(case: str) -> bool:
    """Whether a case has no contrastive losses: "/parts", and "/plain", the reference of those."""
    return "/parts" in case or "/plain" in case


def program(case: str, devices: list, options: Callable = lambda mesh: {}) -> Program:
    sizes, *ways = case.split("/")
    sizes = {"fsdp": 1} | {axis: int(n) for axis, n in (part.split("=") for part in sizes.split(",") if part)}
    run = recipe("full" if "remat" in ways else "none", 1 if "scan" in ways else True, not contrastless(case))
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
    """Random ones, about as large as initial values; none is zero, so every gradient is a sum of many terms."""
    random = np.random.default_rng(1)
    return {k: np.float32(0.15 * random.standard_normal(x.shape) + k.endswith("scale")) for k, x in shapes.items()}


def loss_and_gradients(case: str) -> tuple[dict[str, float], dict[str, np.ndarray], dict]:
    """Losses, the gradient of every parameter by path, and `sent`."""
    it = program(case, jax.devices())
    with jax.set_mesh(it.mesh):
        compiled = it.lower().compile()
        fresh = TrainState(np.int32(0), weights(it.state.trainable), {}, jax.tree.map(zeros, it.state.opt_state))
        state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), fresh, it.state)
        state, metrics = compiled(state, meshes.to_global(batch(it.run, "/rows" not in case), it.mesh))
    return jax.device_get(metrics), jax.device_get(state.opt_state.trace), sent(it, compiled.as_text())


# What crosses the data axes beside weights. The contrastive loss compares an image with the targets of the whole global
# batch (elements). Some gradients are summed in another shape than the weight's: SVA's window positions tiled, task
# tokens as means of the table's rows, MMFuser's offset bias in its heads' share.
TARGETS = {images * 36 * dim for images in (ROWS, 2 * ROWS, 4 * ROWS) for dim in (4, 16)}
DERIVED = {(12, 12, 32), (4, 32)} | {collectives.key((heads, 2, 2)) for heads in (1, 2, 4, 8)}


def sent(it: Program, text: str) -> dict:
    """What a compiled step sends between devices (tests/collectives.py)."""
    found, params = collectives.crossings(text, it.mesh.devices.shape), it.state.trainable
    known = collectives.weight_shapes(params) | DERIVED | chunk_shapes(it)
    bad = collectives.of_activations(found, known, TARGETS)
    return {
        "activations": [str(each) for each in bad],
        "gathered": collectives.gathered_weights(found),
        "summed": collectives.summed_weights(found, params, chunk_shapes(it)),
        "looped": {name: collectives.summed_in_blocks(found, name) for name in ("llm", "encoder_clip", "encoder_dino")},
    }


def chunk_shapes(it: Program) -> set[tuple[int, ...]]:
    """Shapes (keys) of one chunk of the output table, gathered over fsdp."""
    (vocab, width), sizes = it.state.trainable["llm/lm_head/embedding"].shape, it.mesh.shape
    parts = sizes["tensor"] * sizes["fsdp"]
    rows = Chunks.of(vocab // parts, it.run.model.vocab_chunk / parts).rows
    return {collectives.key(dims) for dims in ((sizes["fsdp"], rows, width), (sizes["fsdp"] * rows, width))}


def zeros(x: jax.ShapeDtypeStruct) -> np.ndarray:
    return np.zeros(x.shape, x.dtype)


def wrong() -> list[str]:
    """Paths of what `collectives.of_activations` finds in a program that does what must not be, on data 4 x tensor 2:
    every device gets the features of all images, and a learned table is put into the rows after its broadcast, so that
    the gradients of all rows are gathered."""
    vit = ViT(48, 8, width=32, layers=1, heads=8, mlp=32, taps=(1,))

    def loss(params, images):
        with jax.named_scope("encoder_clip"):
            features = vit.apply({"params": params["vit"]}, images)[0]
        with jax.named_scope("fuser_clip"):
            features = meshes.shard(meshes.shard(features, None), "batch")
        with jax.named_scope("aggregator"):
            table = meshes.shard(jnp.broadcast_to(params["table"], (images.shape[0], 5, 32)), "batch")
            return jnp.sin(features.mean((1, 2))[:, None] * table).sum()

    mesh = meshes.Mesh(data=4, fsdp=1, tensor=2).build(jax.devices()[:8])
    with jax.set_mesh(mesh):
        images = jax.ShapeDtypeStruct((16, 48, 48, 3), np.uint8, sharding=meshes.batch_sharding(mesh))
        fresh = lambda x: {"vit": vit.init(jax.random.key(0), x)["params"], "table": jnp.zeros((5, 32))}
        params = abstract_on(mesh, jax.eval_shape(fresh, images))
        text = jax.jit(jax.grad(loss)).lower(params, images).compile().as_text()
    found = collectives.crossings(text, mesh.devices.shape)
    known = collectives.weight_shapes({f"{i}": x for i, x in enumerate(jax.tree.leaves(params))})
    return [each.path for each in collectives.of_activations(found, known, set())]


def main(cases: list[str]) -> None:
    meshes.MIN_FSDP_SIZE = SPLIT
    reference = functools.cache(loss_and_gradients)
    for case in cases:
        if case == "wrong":
            print(json.dumps({"case": case, "activations": wrong()}))
            continue
        losses, grads, _ = reference("/plain" if contrastless(case) else "")
        largest = max(np.abs(g).max() for g in grads.values())
        found, other, program = loss_and_gradients(case)
        apart = {k: float(np.abs(other[k] - g).max() / max(np.abs(g).max(), 1e-3 * largest)) for k, g in grads.items()}
        metrics = {k: abs(float(found[k]) - float(v)) / (abs(float(v)) or 1.0) for k, v in losses.items()}
        worst = max(apart, key=apart.get)
        zero = [k for k, g in grads.items() if not g.any() and not (contrastless(case) and "logit_scale" in k)]
        print(
            json.dumps({"case": case, "metrics": metrics, "gradient": [apart[worst], worst], "zero": zero, **program})
        )


if __name__ == "__main__":
    main(sys.argv[1:])
