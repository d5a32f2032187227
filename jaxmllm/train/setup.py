"""Before the first step: all is checked, parameters are made or restored, and then the workdir is claimed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmllm import host_batches, sharded
from jaxmllm import mesh as meshes
from jaxmllm.batch import Batch, empty_batch
from jaxmllm.config import Run, Stage, part_of
from jaxmllm.documents import read_document, to_document
from jaxmllm.errors import ConfigError
from jaxmllm.nn.lora import adapters, is_adapter
from jaxmllm.nn.param_info import ParamInfo, describing
from jaxmllm.recipes import check_resumable
from jaxmllm.train.checkpoint import StageCheckpoints, abstract_on
from jaxmllm.train.compiler import options
from jaxmllm.train.optim import is_trained, transformation
from jaxmllm.train.state import Params, TrainState, flatten, match_rules, split
from jaxmllm.train.step import make_step

# (config, abstract parameters, path -> factor of the rate or None if frozen) -> the parameters that have a source, and
# what each part starts from, as JSON data.
LoadParts = Callable[[Run, Params, dict[str, float | None]], tuple[Params, list[dict[str, Any]]]]


def check_workdir(config: Run, workdir: str) -> None:
    """Raises ConfigError if the workdir belongs to another config."""
    path = Path(workdir) / "config.json"
    if path.exists():
        check_resumable(read_document(path), config, workdir)


def claim_workdir(config: Run, workdir: str) -> None:
    """Writes WORKDIR/config.json unless it is there: from then on the workdir belongs to this config."""
    path = Path(workdir) / "config.json"
    if jax.process_index() == 0 and not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(".part")
        part.write_text(json.dumps(to_document(config), indent=1))
        os.replace(part, path)


def initial_params(config: Run) -> Params:
    """New parameters, made on the devices in their shards; call under jit or eval_shape, with a mesh set."""
    data, model = config.data, config.model
    rows = meshes.data_shards(jax.sharding.get_abstract_mesh())
    batch = empty_batch(model.layout, rows, data.seq_len, data.image_slots, model.target_shapes)
    batch = jax.tree.map(lambda x: sharded.shard(jnp.asarray(x), "batch"), batch)
    key = jax.random.key(config.seed)
    with describing() as infos:
        params = flatten(model.init(key, batch, tuple(model.objectives))["params"])
    return params | adapters(config.lora or (), params, infos, key)


def abstract_params(config: Run, mesh: jax.sharding.Mesh) -> tuple[Params, dict[str, ParamInfo]]:
    """-> (shapes and shardings of the parameters, what each of them is); call with the mesh set.

    Raises ConfigError for a parameter that a layer of nn/primitives.py did not make.
    """
    with describing() as described:
        abstract = abstract_on(mesh, jax.eval_shape(lambda: initial_params(config)))
    if unknown := sorted(abstract.keys() - described.keys()):
        raise ConfigError(f"parameter {unknown[0]} has no kind; make it with a layer of jaxmllm.nn.primitives")
    return abstract, {path: described[path].stacked(x.ndim) for path, x in abstract.items()}


def abstract_batch(config: Run, stage: Stage, mesh: jax.sharding.Mesh) -> Batch:
    """Shapes and shardings of the stage's global batch."""
    data, model = config.data_of(stage), config.model
    row = empty_batch(model.layout, 1, data.seq_len, data.image_slots, model.target_shapes)
    sharding = host_batches.batch_sharding(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((stage.rows, *x.shape[1:]), x.dtype, sharding=sharding), row)


def stage_program(config: Run, stage: Stage, mesh: jax.sharding.Mesh) -> tuple[Params, Callable, Callable]:
    """-> (abstract parameters with shardings, new_train_state, jitted step). Nothing is allocated.

    new_train_state(parameters) is the TrainState before the first step. Raises ConfigError if the stage's rules do not
    cover the parameters, ValueError if rows do not divide over the mesh.
    """
    dtype = jnp.dtype(config.compute_dtype)
    check_micro_batch(config, stage)
    abstract, infos = abstract_params(config, mesh)
    tx = transformation(stage.optim, stage.steps, match_rules(stage.rules, list(abstract)), infos)
    trained = trained_paths(stage, infos)

    def new_train_state(params: Params) -> TrainState:
        trainable, frozen = split(params, trained, dtype)
        average = jax.tree.map(jnp.copy, trainable) if stage.ema else {}
        return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable), average)

    dropout = config.seed if any(each.dropout for each in config.lora or ()) else None
    step = make_step(config.model, stage.losses, tx, dtype, stage.accumulate, stage.ema, dropout)
    return abstract, new_train_state, jax.jit(step, donate_argnums=0, compiler_options=options(mesh))


def check_stages(config: Run, mesh: jax.sharding.Mesh) -> None:
    """Raises ConfigError or ValueError for what is wrong with any stage, before anything is written.

    Random weights may be frozen only if `init` says so: a part without a source must be trained before it is frozen.
    Training its adapters does not count.
    """
    abstract, infos = abstract_params(config, mesh)
    sources = config.init.sources()
    random = {part_of(path) for path in abstract} - set(sources)
    for stage in config.stages:
        check_micro_batch(config, stage)
        random -= {part_of(path) for path in trained_paths(stage, infos) if not is_adapter(path)}
        for part in sorted(random if "rest" not in sources else ()):
            raise ConfigError(
                f"stage {stage.name} freezes {part} with random weights; say where its weights come from, "
                f"--set init.{part}=FOLDER, or that they are meant, init.{part}=random"
            )


def check_micro_batch(config: Run, stage: Stage) -> None:
    """Raises ValueError if the tokens of a micro-batch do not divide over the mesh that is set."""
    micro = stage.rows // stage.accumulate, config.data_of(stage).seq_len
    meshes.check_split(f"stages.{stage.name}: tokens of a micro-batch", micro, ("batch", "length"))


def trained_paths(stage: Stage, infos: dict[str, ParamInfo]) -> set[str]:
    """The parameters that a stage trains. Raises ConfigError if its rules do not cover all parameters."""
    table = match_rules(stage.rules, list(infos))
    return {path for path, info in infos.items() if is_trained(table[path], info)}


def start_stage(
    config: Run, stage: Stage, mesh: jax.sharding.Mesh, checkpoints: StageCheckpoints, load_parts: LoadParts
) -> tuple[TrainState, Any, Callable]:
    """-> (state, data position or None, jitted step).

    The state comes from the stage's newest checkpoint, else it starts from the parameters of the previous stage, else
    from the sources of `init`. Raises ConfigError if the stage's rules do not cover the parameters, ValueError if
    weights do not fit.
    """
    abstract, new_train_state, step = stage_program(config, stage, mesh)
    state = abstract_on(mesh, jax.eval_shape(new_train_state, abstract))
    if checkpoints.latest() is not None:
        checkpoints.record["init"] = checkpoints.saved_record()["init"]
        return *checkpoints.restore(state), step
    if checkpoints.previous:
        checkpoints.record["init"] = checkpoints.previous.saved_record()["init"]
        params = checkpoints.previous.restore_params(abstract)
    else:
        table = match_rules(stage.rules, list(abstract))
        rates = {path: table[path].lr if path in state.trainable else None for path in abstract}
        params, reports = first_params(config, abstract, rates, load_parts)
        checkpoints.record["init"] = reports
        checkpoints.save_frozen({path: params[path] for path in state.frozen})
    return jax.jit(new_train_state, donate_argnums=0)(params), None, step


def first_params(
    config: Run, abstract: Params, rates: dict[str, float | None], load_parts: LoadParts
) -> tuple[Params, list[dict[str, Any]]]:
    """-> (the parameters before the first stage: from the sources of `init`, the others at random; reports)."""
    loaded, reports = load_parts(config, abstract, rates)
    random = [path for path in abstract if path not in loaded]

    def others() -> Params:
        params = initial_params(config)
        return {path: params[path] for path in random}

    return loaded | (jax.jit(others)() if random else {}), reports
