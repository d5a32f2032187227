"""The training loop: stages in order, each from where it stopped. The same command again resumes.

Order inside the loop: dispatch step k, fetch the metrics of step k-1 (so the host never makes the device wait), save the
state after step k beside the position of the data that led to it, and only then draw the next batch.
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxmllm import mesh as meshes
from jaxmllm.batch import empty_batch
from jaxmllm.config import Run, Stage, check_resumable, to_json
from jaxmllm.train.checkpoint import StageCheckpoints, abstract_on
from jaxmllm.train.metrics import Reporter
from jaxmllm.train.optim import optimizer, schedule
from jaxmllm.train.state import Params, TrainState, flatten, match_rules, split
from jaxmllm.train.step import make_step


class Stopped(Exception):
    """The run was told to stop (SIGTERM, SIGINT) and has saved its state."""


def run(config: Run, workdir: str, make_loader: Callable[[Stage], Any]) -> None:
    """Trains all stages of `config` in `workdir` on the batches of `make_loader(stage)`. Raises ConfigError for a workdir of another config, Stopped after a
    signal, FloatingPointError for a loss that is not finite."""
    path, main = Path(workdir) / "config.json", jax.process_index() == 0
    if path.exists():
        check_resumable(json.loads(path.read_text()), config, workdir)
    elif main:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(to_json(config), indent=1))
    mesh = config.mesh.build()
    with jax.set_mesh(mesh):
        previous = None
        for stage in config.stages:
            previous = run_stage(config, stage, mesh, workdir, previous, make_loader)


def initial_params(config: Run) -> Params:
    """Fresh parameters, made on the devices in their shards; call under jit or eval_shape, with a mesh set."""
    data, model = config.data, config.model
    rows = meshes.data_shards(jax.sharding.get_abstract_mesh())
    batch = empty_batch(model.layout, rows, data.seq_len, data.image_slots, model.target_shapes)
    batch = jax.tree.map(lambda x: meshes.shard(jnp.asarray(x), "batch"), batch)
    return flatten(model.init(jax.random.key(config.seed), batch, ("next_token", *model.distill))["params"])


def run_stage(config: Run, stage: Stage, mesh, workdir: str, previous, make_loader) -> StageCheckpoints:
    """Trains one stage from its newest checkpoint, else from the stage before, else from scratch."""
    checkpoints = StageCheckpoints(workdir, stage.name, config.keep, to_json(config))
    if checkpoints.latest() == stage.steps:
        return checkpoints
    dtype = jnp.dtype(config.compute_dtype)
    abstract = abstract_on(mesh, jax.eval_shape(lambda: initial_params(config)))
    table = match_rules(stage.rules, list(abstract))
    tx = optimizer(stage.optim, stage.steps, table)

    def fresh(params: Params) -> TrainState:
        trainable, frozen = split(params, table, dtype)
        return TrainState(jnp.zeros((), jnp.int32), trainable, frozen, tx.init(trainable))

    loader = make_loader(stage)
    if checkpoints.latest() is None:
        params = previous.restore_params(abstract) if previous else jax.jit(lambda: initial_params(config))()
        state = jax.jit(fresh)(params)
        checkpoints.save_frozen(state.frozen)
    else:
        state, position = checkpoints.restore(abstract_on(mesh, jax.eval_shape(fresh, abstract)))
        loader.set_state(position)
    step = jax.jit(make_step(config.model, stage.losses, tx, dtype, stage.accumulate), donate_argnums=0)
    reporter = Reporter(workdir, stage.name, stage.steps, jax.process_index() == 0)
    try:
        train(config, stage, mesh, state, step, loader, checkpoints, reporter)
    finally:
        loader.close()
        checkpoints.close()
        reporter.close()
    return checkpoints


def train(config: Run, stage: Stage, mesh, state: TrainState, step, loader, checkpoints, reporter) -> None:
    """Runs `step` until the stage's last one, under a transfer guard: every host-device copy is deliberate."""
    done, pending, stop = int(state.step), None, StopSignal()
    rate = schedule(stage.optim, stage.steps)
    reporter.say(f"stage {stage.name}: steps {done} to {stage.steps}, compiling ...")
    with jax.transfer_guard("disallow"), stop:
        while done < stage.steps:
            start = time.perf_counter()
            rows, info = next(loader)
            batch = meshes.to_global(rows, mesh)
            reporter.count(info["tokens"], info["images"], time.perf_counter() - start)
            state, metrics = step(state, batch)
            if pending is None:
                reporter.say(f"first step after {reporter.age():.1f} s")
            if pending and (done % config.log_every == 0 or done == 1):
                report(reporter, done, pending, rate)
            done, pending = done + 1, metrics
            if done % config.save_every == 0 or done == stage.steps or stop.asked:
                report(reporter, done, pending, rate)
                checkpoints.save(state, loader.get_state())
            if stop.asked and done < stage.steps:
                checkpoints.close()
                raise Stopped(f"stopped at step {done} of stage {stage.name}, saved; the same command resumes it")


def report(reporter: Reporter, step: int, metrics: dict[str, jax.Array], rate) -> None:
    """Fetches and writes metrics; raises FloatingPointError if the loss is not finite."""
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"loss is {values['loss']} at step {step} of stage {reporter.stage}")
    with jax.transfer_guard("allow"):
        reporter.write(step, {**values, "learning_rate": float(rate(step))})


class StopSignal:
    """While entered, SIGTERM and SIGINT set `asked` instead of killing the process."""

    def __init__(self):
        self.asked = False

    def __enter__(self):
        self.old = {s: signal.signal(s, self._ask) for s in (signal.SIGTERM, signal.SIGINT)}
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        for number, handler in self.old.items():
            signal.signal(number, handler)
