"""The training loop: stages in order, each from where it stopped. The same command again resumes.

Order inside the loop: dispatch step k, fetch the metrics of step k-1 (so the host never makes the device wait), save
the state after step k beside the position of the data that led to it, and only then draw the next batch.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxmllm import mesh as meshes
from jaxmllm.config import Run, Stage, to_json
from jaxmllm.train.checkpoint import StageCheckpoints
from jaxmllm.train.metrics import Reporter
from jaxmllm.train.optim import schedule
from jaxmllm.train.setup import claim_workdir, start_stage
from jaxmllm.train.stop import Stopped, StopSignal


def run(config: Run, workdir: str, make_loader: Callable[[Stage], Any]) -> None:
    """Trains all stages of `config` in `workdir` on the batches of `make_loader(stage)`.

    Raises ConfigError for a workdir of another config, Stopped after a signal, FloatingPointError for a loss that is
    not finite.
    """
    claim_workdir(config, workdir)
    mesh = config.mesh.build()
    with StopSignal() as stop, jax.set_mesh(mesh):
        previous = None
        for stage in config.stages:
            checkpoints = StageCheckpoints(workdir, stage.name, config.keep, to_json(config))
            if checkpoints.latest() != stage.steps:
                run_stage(config, stage, mesh, workdir, checkpoints, previous, make_loader, stop)
            previous = checkpoints


def run_stage(config: Run, stage: Stage, mesh, workdir, checkpoints, previous, make_loader, stop) -> None:
    """Sets a stage up, trains it, and leaves everything written and closed."""
    reporter = Reporter(workdir, stage.name, stage.steps, jax.process_index() == 0, meshes.own_part(mesh)[1])
    loader = make_loader(stage)
    try:
        state, position, step = start_stage(config, stage, mesh, checkpoints, previous)
        if position is not None:
            loader.set_state(position)
        train(config, stage, mesh, state, step, loader, checkpoints, reporter, stop)
    finally:
        loader.close()
        checkpoints.wait()
        reporter.close()


def train(config: Run, stage: Stage, mesh, state, step, loader, checkpoints, reporter, stop) -> None:
    """Runs `step` until the stage's last one, under a transfer guard: every host-device copy is deliberate."""
    done, pending = int(state.step), None
    rate = schedule(stage.optim, stage.steps)
    reporter.say(f"stage {stage.name}: steps {done} to {stage.steps}, compiling ...")
    with jax.transfer_guard("disallow"):
        while done < stage.steps:
            start = time.perf_counter()
            rows, info = next(loader)
            batch = meshes.to_global(rows, mesh)
            reporter.count(info, time.perf_counter() - start)
            state, metrics = step(state, batch)
            jax.block_until_ready(pending)  # at most one step ahead: what is then waited for is data
            if pending is None:
                reporter.first_step()
            elif done % config.log_every == 0 or done == 1:
                report(reporter, done, pending, rate)
            done, pending = done + 1, metrics
            stopping = stop.asked(done) and done < stage.steps
            if done % config.save_every == 0 or done == stage.steps or stopping:
                report(reporter, done, pending, rate)
                checkpoints.save(state, loader.get_state())
            if stopping:
                raise Stopped(f"stopped at step {done} of stage {stage.name}, saved; the same command resumes it")


def report(reporter: Reporter, step: int, metrics: dict[str, jax.Array], rate: Callable) -> None:
    """Fetches and writes metrics, once a step; raises FloatingPointError if the loss is not finite."""
    if step == reporter.last:
        return
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"the loss is {values['loss']} at step {step} of stage {reporter.stage}")
    with jax.transfer_guard("allow"):
        reporter.write(step, {**values, "learning_rate": float(rate(step))})
