"""What happens before the first step: the workdir is claimed, parameters are made, loaded or restored."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmllm import mesh as meshes
from jaxmllm.batch import Batch, empty_batch
from jaxmllm.config import ConfigError, Run, Stage, check_resumable, to_json
from jaxmllm.train.checkpoint import StageCheckpoints, abstract_on
from jaxmllm.train.compiler import options
from jaxmllm.train.optim import optimizer
from jaxmllm.train.state import Params, TrainState, flatten, match_rules, split
from jaxmllm.train.step import make_step


def claim_workdir(config: Run, workdir: str) -> None:
    """Writes WORKDIR/config.json, or compares with the one there. Raises ConfigError if they do not fit together."""
    path = Path(workdir) / "config.json"
    if path.exists():
        check_resumable(json.loads(path.read_text()), config, workdir)
    elif jax.process_index() == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(to_json(config), indent=1))
        os.replace(part, path)


def initial_params(config: Run) -> Params:
    """Fresh parameters, made on the devices in their shards; call under jit or eval_shape, with a mesh set."""
    data, model = config.data, config.model
    rows = meshes.data_shards(jax.sharding.get_abstract_mesh())
    batch = empty_batch(model.layout, rows, data.seq_len, data.image_slots, model.target_shapes)
    batch = jax.tree.map(lambda x: meshes.shard(jnp.asarray(x), "batch"), batch)
    return flatten(model.init(jax.random.key(config.seed), batch, ("next_token", *model.distill))["params"])


def abstract_batch(config: Run, stage: Stage, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes and shardings of a global batch of the stage."""
    data, model = config.data, config.model
    row = empty_batch(model.layout, 1, data.seq_len, data.image_slots, model.target_shapes)
    sharding = meshes.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((stage.rows, *x.shape[1:]), x.dtype, sharding=sharding), row)


def stage_program(config: Run, stage: Stage, mesh: jax.sharding.Mesh) -> tuple[Params, Callable, Callable]:
    """-> (abstract parameters with shardings, fresh: parameters -> TrainState, jitted step). Nothing is allocated.

    Raises ConfigError if the stage's rules do not cover the parameters, ValueError if rows do not divide over the mesh.
    """
    dtype = jnp.dtype(config.compute_dtype)
    if stage.rows % stage.accumulate:
        raise ConfigError(f"stages.{stage.name}: rows {stage.rows} do not divide by accumulate {stage.accumulate}")
    micro = stage.rows // stage.accumulate, config.data.seq_len
    meshes.check_split(f"stages.{stage.name}: tokens of a micro-batch", micro, ("batch", "length"))
    abstract = abstract_on(mesh, jax.eval_shape(lambda: initial_params(config)))
    table = match_rules(stage.rules, list(abstract))
    tx = optimizer(stage.optim, stage.steps, table)

    def fresh(params: Params) -> TrainState:
        trainable, frozen = split(params, table, dtype)
        return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))

    step = make_step(config.model, stage.losses, tx, dtype, stage.accumulate)
    return abstract, fresh, jax.jit(step, donate_argnums=0, compiler_options=options(mesh))


def start_stage(
    config: Run,
    stage: Stage,
    mesh: jax.sharding.Mesh,
    checkpoints: StageCheckpoints,
    previous: StageCheckpoints | None,
) -> tuple[TrainState, Any, Callable]:
    """-> (state, data position or None, jitted step): from the stage's newest checkpoint, else from the parameters of
    the stage before, else fresh. Raises ConfigError if the stage's rules do not cover the parameters."""
    abstract, fresh, step = stage_program(config, stage, mesh)
    if checkpoints.latest() is not None:
        state, position = checkpoints.restore(abstract_on(mesh, jax.eval_shape(fresh, abstract)))
    else:
        position = None
        if previous:
            state = jax.jit(fresh, donate_argnums=0)(previous.restore_params(abstract))
        else:
            state = jax.jit(lambda: fresh(initial_params(config)))()
        checkpoints.save_frozen(state.frozen)
    return state, position, step
