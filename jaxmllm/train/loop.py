"""The training loop: each stage in order, from where it stopped. The same command again resumes.

Order inside the loop: dispatch step k, fetch the metrics of step k-1 (so that the device never waits for the host),
save the state after step k together with the position of the data that led to it, and only then draw the next batch.
Which steps have a row of metrics depends on the config only, so an interrupted run writes the same rows.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

import jax

from jaxmllm.config import Run, Stage
from jaxmllm.documents import to_document
from jaxmllm.errors import ConfigError
from jaxmllm.host_batches import global_from_rows, process_rows
from jaxmllm.train.checkpoint import StageCheckpoints, open_checkpoints
from jaxmllm.train.compiler import use_random_kernel
from jaxmllm.train.metrics import Reporter, report
from jaxmllm.train.profile import Profiler
from jaxmllm.train.session import Hooks, Session, StageTools
from jaxmllm.train.setup import check_stages, check_workdir, claim_workdir, start_stage
from jaxmllm.train.starts import note_start
from jaxmllm.train.stop import Stopped


def run(config: Run, workdir: str, hooks: Hooks) -> None:
    """Trains all stages of `config` in `workdir`.

    Raises ConfigError for a workdir of another config, Stopped after a signal, FloatingPointError for a loss,
    gradient or state that is not finite.
    """
    mesh = config.mesh.build()
    use_random_kernel(mesh)
    with jax.set_mesh(mesh), contextlib.closing(Profiler(hooks.profile, workdir)) as profiler:
        check_stages(config, mesh)
        check_workdir(config, workdir)
        session = Session(config, workdir, mesh, hooks, profiler)
        names = [stage.name for stage in config.stages]
        all_checkpoints = open_checkpoints(workdir, names, config.keep, to_document(config))
        left = [
            (stage, own)
            for stage, own in zip(config.stages, all_checkpoints)
            if own.latest() != stage.steps or hooks.evals[stage.name].due(stage.steps)
        ]
        if hooks.profile and not left:
            raise ConfigError(f"--profile: {workdir} is trained to the end; use another --workdir")
        for number, (stage, checkpoints) in enumerate(left):
            run_stage(session, stage, checkpoints, is_first=number == 0)


def run_stage(session: Session, stage: Stage, checkpoints: StageCheckpoints, is_first: bool) -> None:
    """Sets a stage up and trains it; at the end everything is written and closed. is_first: of this process."""
    done = checkpoints.latest() or 0
    session.profiler.check(stage.name, done, stage.steps)
    with contextlib.ExitStack() as at_end:
        at_end.callback(checkpoints.wait)
        loader = at_end.enter_context(contextlib.closing(session.hooks.make_loader(stage)))
        state, position, step = start_stage(session.config, stage, session.mesh, checkpoints, session.hooks.load_parts)
        if position is not None:
            loader.set_state(position)
        claim_workdir(session.config, session.workdir)  # nothing refuses the run any more
        if is_first:
            note_start(session.workdir, stage.name, done)
        parts = process_rows(session.mesh)[1]
        reporter = Reporter(session.config, stage, session.workdir, done, parts)
        at_end.callback(reporter.close)
        train(session, stage, StageTools(loader, checkpoints, reporter), state, step)


def train(session: Session, stage: Stage, tools: StageTools, state, step: Callable) -> None:
    """Runs `step` until the stage's last one. A transfer guard makes every copy between host and device deliberate.

    A signal ends the wait for data and an evaluation; a step is finished and saved first.
    """
    reporter, stop, evals = tools.reporter, session.hooks.stop, session.hooks.evals[stage.name]
    done, pending, position = int(state.step), None, tools.loader.get_state()
    reporter.say(f"stage {stage.name}: steps {done} to {stage.steps}, compiling ...")
    with jax.transfer_guard("disallow"):
        try:
            evals(done, state, reporter)  # what a run that was interrupted here has not evaluated
            while done < stage.steps:
                start = time.perf_counter()
                rows, info = next(tools.loader)
                with stop.shielded():
                    batch = global_from_rows(rows, session.mesh)
                    reporter.count(info, time.perf_counter() - start)
                    session.profiler.before(done + 1, state)
                    with jax.profiler.StepTraceAnnotation("train", step_num=done + 1):
                        state, metrics = step(state, batch)
                    position = tools.loader.get_state()
                    jax.block_until_ready(pending)  # one step ahead, so that what the host waits for then is data
                    if pending is None:
                        reporter.first_step()
                    else:
                        report(reporter, done, pending, tools.checkpoints)
                    done, pending = done + 1, metrics
                    session.profiler.after(done, metrics, reporter.say)
                    stopping = stop.asked(done) and done < stage.steps
                    if done % session.config.save_every == 0 or done == stage.steps:
                        tools.save(done, state, pending, position)
                    reporter.look_for_unreached(done, state)
                    if stopping:
                        raise Stopped
                reporter.window_start += evals(done, state, reporter)
            with stop.shielded():
                tools.checkpoints.wait()
        except Stopped:
            with stop.shielded():
                if pending is not None:
                    tools.save(done, state, pending, position)
                tools.checkpoints.wait()
                what = f"at step {done} of stage {stage.name}, saved" if done else f"before stage {stage.name} began"
                stop.end(f"stopped {what}; the same command resumes it")
            raise
