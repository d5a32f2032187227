"""A workdir with a checkpoint of given parameters, as if a run had trained them, made without a step of training."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.config import Data, Rule, Run, Source, Stage
from jaxmllm.data.templates import CHATML
from jaxmllm.mesh import Mesh
from jaxmllm.recipes import to_document
from jaxmllm.train.checkpoint import open_checkpoints
from jaxmllm.train.optimizers import AdamW
from jaxmllm.train.setup import abstract_params, claim_workdir
from jaxmllm.train.state import TrainState


def run_of(model, tokenizer: Path, **fields) -> Run:
    """A run of one stage."""
    stage = Stage(
        name="only", sources=(Source("chat.json"),), rows=1, steps=4, rules=(Rule(".*"),), losses={"next_token": 1.0},
        optim=AdamW(lr=1e-3),
    )  # fmt: skip
    data = Data(tokenizer=str(tokenizer), template=CHATML, seq_len=64, image_slots=1)
    return Run(name="case", model=model, data=data, stages=(stage,), **{"compute_dtype": "float32"} | fields)


def abstract_of(run: Run) -> dict[str, jax.ShapeDtypeStruct]:
    mesh = Mesh(fsdp=1).build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        return abstract_params(run, mesh)[0]


def random_of(run: Run, scale: float = 0.1) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = {path: x.shape for path, x in abstract_of(run).items()}
    return {path: (scale * rng.standard_normal(shape)).astype(np.float32) for path, shape in shapes.items()}


def save(run: Run, params: dict, workdir: Path, step: int = 2, frozen: dict | None = None, average: dict | None = None):
    """Writes the workdir; `frozen` are parameters that the stage does not train."""
    claim_workdir(run, str(workdir))
    (checkpoints,) = open_checkpoints(str(workdir), ["only"], record=to_document(run) | {"init": []})
    arrays, average = jax.tree.map(jnp.asarray, (params, average or {}))
    checkpoints.save_frozen(jax.tree.map(jnp.asarray, frozen or {}))
    checkpoints.save(TrainState(jnp.int32(step), arrays, {}, {"count": jnp.zeros(())}, average), {})
    checkpoints.wait()
