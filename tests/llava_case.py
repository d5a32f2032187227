"""A model whose parts come from a LLaVA folder, on a mesh:

    python -m tests.llava_case FOLDER INPUTS OUTPUTS AXIS=SIZE ..

INPUTS is an npz file with tokens and labels int32[B, S] and images uint8[B, px, px, 3]; one image per row stands where
the token is IMAGE. OUTPUTS gets the logits [B, S, V], the loss, and the lines of the reports.
"""

from __future__ import annotations

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import sharded
from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.batch import Batch, empty_batch
from jaxmllm.encoders import presets as encoders
from jaxmllm.fusers.single import Single
from jaxmllm.host_batches import global_from_copies
from jaxmllm.llms import presets as llms
from jaxmllm.mesh import Mesh
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.processes import join_processes
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.state import flatten, unflatten
from jaxmllm.weights.parts import load_parts

IMAGE = 59
PICTURES = dict(mean=(0.4, 0.5, 0.6), std=(0.3, 0.2, 0.25), fit="squash")  # what a preprocessor_config.json would say


def model_of(folder: str) -> MLLM:
    """LLaVA's model, with nothing but the folder's own sizes."""
    encoder = encoders.from_folder(folder, remat="none", **PICTURES)
    llm = llms.from_folder(folder, remat="none")
    return MLLM({"clip": encoder}, {"clip": Single()}, MLPProjector(encoder.side), llm, {"next_token": NextToken()})


def text_batch_of(model: MLLM, tokens: np.ndarray) -> Batch:
    """A batch of rows without images or labels."""
    rows, length = tokens.shape
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    empty = empty_batch(model.layout, rows, length, 1, {})
    return dataclasses.replace(empty, tokens=tokens, segment_ids=np.ones_like(tokens), positions=positions)


def batch_of(model: MLLM, tokens: np.ndarray, labels: np.ndarray, images: np.ndarray, image: int = IMAGE) -> Batch:
    """A batch of one image per row, which stands where the token is `image`."""
    rows, length = tokens.shape
    empty = empty_batch(model.layout, rows, length, 1, {})
    places = np.stack([np.flatnonzero(row == image) for row in tokens])
    index = np.full(tokens.shape, -1, np.int32)
    np.put_along_axis(index, places, np.arange(places.shape[1], dtype=np.int32)[None], 1)
    return Batch(
        tokens=tokens, labels=np.pad(labels[:, 1:], ((0, 0), (0, 1)), constant_values=-100),
        segment_ids=np.ones_like(tokens), positions=np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape),
        visual_index=index, visual_positions=places[:, None].astype(np.int32),
        images={name: images[:, None] for name in model.encoders},
        padding=empty.padding, targets={}, target_mask={},
    )  # fmt: skip


def abstract_params(model: MLLM, mesh: jax.sharding.Mesh, rows: int) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and sharding of the model's parameters on the mesh, which must be set."""

    def init():
        batch = jax.tree.map(jnp.asarray, empty_batch(model.layout, rows, 32, 1, {}))
        batch = jax.tree.map(lambda x: sharded.shard(x, "batch"), batch)
        return flatten(model.init(jax.random.key(0), batch, ("next_token",))["params"])

    return abstract_on(mesh, jax.eval_shape(init))


def outputs(model: MLLM, params: dict, batch: Batch):
    """-> (logits [B, S, V], mean loss)."""

    def run(model, batch):
        states = model.hidden(batch)[0]
        table = sharded.gather_param(model.llm.output_table(), ("vocab", "embed"))
        logits = sharded.einsum("bsh,vh->bsv", states, table, "batch", "length", "vocab")
        term = model(batch, ("next_token",))[0]["next_token"]
        return sharded.shard(logits, None, None, None), jnp.where(term.mask, term.values, 0).sum() / term.mask.sum()

    with jax.default_matmul_precision("highest"):
        return jax.jit(lambda p, b: model.apply({"params": unflatten(p)}, b, method=run))(params, batch)


def main(folder: str, inputs: str, result: str, *axes: str) -> None:
    join_processes(False)
    sharded.MIN_FSDP_SIZE = 64  # so that small weights are split too
    arrays, model = np.load(inputs), model_of(folder)
    mesh = Mesh(**{name: int(size) for name, size in (axis.split("=") for axis in axes)}).build()
    with jax.set_mesh(mesh):
        abstract = abstract_params(model, mesh, len(arrays["tokens"]))
        params, reports = load_parts(model, {"rest": folder}, abstract)
        assert params.keys() == abstract.keys()
        for path, x in params.items():
            assert x.sharding == abstract[path].sharding and x.dtype == abstract[path].dtype, path
        split = [path for path, x in params.items() if not x.sharding.is_fully_replicated]
        assert len(split) > 10 or mesh.size == 1, split
        batch = global_from_copies(batch_of(model, **arrays), mesh)
        logits, loss = outputs(model, params, batch)
        if jax.process_index() == 0:
            np.savez(result, logits=np.asarray(logits), loss=np.asarray(loss), reports=[str(r) for r in reports])


if __name__ == "__main__":
    main(*sys.argv[1:])
