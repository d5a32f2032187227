"""The training loop: each stage in order, from where it stopped. The same command again resumes.

Order inside the loop: dispatch step k, fetch the metrics of step k-1 (so that the device never waits for the host),
save the state after step k together with the position of the data that led to it, and only then draw the next batch.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any

import jax

from jaxmllm.config import Run, Stage
from jaxmllm.host_batches import global_from_rows, process_rows
from jaxmllm.recipes import to_document
from jaxmllm.train.checkpoint import StageCheckpoints, open_checkpoints
from jaxmllm.train.metrics import Reporter
from jaxmllm.train.optim import rate
from jaxmllm.train.setup import check_stages, claim_workdir, start_stage
from jaxmllm.train.stop import Stopped, StopSignal


@dataclasses.dataclass(frozen=True)
class Session:
    """What all stages of a run share."""

    config: Run
    workdir: str
    mesh: jax.sharding.Mesh
    make_loader: Callable[[Stage], Any]
    stop: StopSignal


@dataclasses.dataclass(frozen=True)
class StageTools:
    """What one stage reads from and writes to."""

    loader: Any
    checkpoints: StageCheckpoints
    reporter: Reporter


def run(config: Run, workdir: str, make_loader: Callable[[Stage], Any]) -> None:
    """Trains all stages of `config` in `workdir` on the batches of `make_loader(stage)`.

    Raises ConfigError for a workdir of another config, Stopped after a signal, FloatingPointError for a loss that is
    not finite.
    """
    mesh = config.mesh.build()
    with StopSignal() as stop, jax.set_mesh(mesh):
        check_stages(config, mesh)
        claim_workdir(config, workdir)
        session = Session(config, workdir, mesh, make_loader, stop)
        names = [stage.name for stage in config.stages]
        all_checkpoints = open_checkpoints(workdir, names, config.keep, to_document(config))
        for stage, checkpoints in zip(config.stages, all_checkpoints):
            if checkpoints.latest() != stage.steps:
                run_stage(session, stage, checkpoints)


def run_stage(session: Session, stage: Stage, checkpoints: StageCheckpoints) -> None:
    """Sets a stage up and trains it; at the end everything is written and closed."""
    _, parts = process_rows(session.mesh)
    reporter = Reporter(session.workdir, stage.name, stage.steps, jax.process_index() == 0, parts)
    tools = StageTools(session.make_loader(stage), checkpoints, reporter)
    try:
        state, position, step = start_stage(session.config, stage, session.mesh, checkpoints)
        if position is not None:
            tools.loader.set_state(position)
        train(session, stage, tools, state, step)
    finally:
        tools.loader.close()
        checkpoints.wait()
        reporter.close()


def train(session: Session, stage: Stage, tools: StageTools, state, step: Callable) -> None:
    """Runs `step` until the stage's last one. A transfer guard makes every copy between host and device deliberate."""
    config, reporter = session.config, tools.reporter
    done, pending = int(state.step), None
    learning_rate = rate(stage.optim, stage.steps)
    reporter.say(f"stage {stage.name}: steps {done} to {stage.steps}, compiling ...")
    with jax.transfer_guard("disallow"):
        while done < stage.steps:
            start = time.perf_counter()
            rows, info = next(tools.loader)
            batch = global_from_rows(rows, session.mesh)
            reporter.count(info, time.perf_counter() - start)
            state, metrics = step(state, batch)
            jax.block_until_ready(pending)  # the host stays one step ahead, so that what it waits for then is data
            if pending is None:
                reporter.first_step()
            elif done % config.log_every == 0 or done == 1:
                report(reporter, done, pending, learning_rate)
            done, pending = done + 1, metrics
            stopping = session.stop.asked(done) and done < stage.steps
            if done % config.save_every == 0 or done == stage.steps or stopping:
                report(reporter, done, pending, learning_rate)
                tools.checkpoints.save(state, tools.loader.get_state())
            if stopping:
                raise Stopped(f"stopped at step {done} of stage {stage.name}, saved; the same command resumes it")


def report(reporter: Reporter, step: int, metrics: dict[str, jax.Array], learning_rate: Callable) -> None:
    """Fetches and writes the metrics of a step (counted from 1) once, with the rate that it used; raises
    FloatingPointError if the loss is not finite."""
    if step == reporter.last:
        return
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"the loss is {values['loss']} at step {step} of stage {reporter.stage}")
    with jax.transfer_guard("allow"):
        reporter.write(step, {**values, "learning_rate": float(learning_rate(step - 1))})
