"""Evaluation while a stage trains: at fixed steps and at its end. It reads the parameters and changes nothing."""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils

from jaxmllm.config import Run, Stage
from jaxmllm.json_lines import append_line, drop_lines, read_lines
from jaxmllm.train.metrics import Reporter
from jaxmllm.train.state import Params, TrainState


class StageEvals:
    """The evaluations of one stage.

    Each result is a row for the run's loggers, and a line on stderr. What was evaluated is read from the rows in
    WORKDIR/metrics.jsonl: a resumed run repeats nothing and leaves nothing out. Replies go to
    WORKDIR/<stage>/eval_replies.jsonl as they come, each once.
    """

    def __init__(self, run: Run, stage: Stage, workdir: str):
        """Loads and checks the data of all tasks. Raises ValueError for data that cannot be used."""
        self.run, self.stage, self.workdir = run, stage, workdir
        self.metrics, self.replies = f"{workdir}/metrics.jsonl", f"{workdir}/{stage.name}/eval_replies.jsonl"
        self.measures = {each.name: each.task.prepare(run, stage, workdir) for each in stage.evals}

    def due(self, step: int) -> list[str]:
        """The tasks whose turn it is after `step`, and of which the metrics hold no result yet.

        All processes must ask at the same steps; the first one decides.
        """
        last = step == self.stage.steps
        names = [each.name for each in self.stage.evals if last or (each.every and step and step % each.every == 0)]
        if not names:
            return []
        rows = [row for row in read_lines(self.metrics) if "eval" in row]
        done = {row["eval"] for row in rows if (row["stage"], row["step"]) == (self.stage.name, step)}
        missing = np.array([name not in done for name in names])
        if jax.process_count() > 1:
            with jax.transfer_guard("allow"):
                missing = multihost_utils.broadcast_one_to_all(missing)
        return [name for name, is_missing in zip(names, missing) if is_missing]

    def __call__(self, step: int, state: TrainState, reporter: Reporter) -> float:
        """Evaluates the state after `step` by the tasks that are due -> seconds that it took, without the step's own.

        It reads the trained parameters, or their moving average if the stage keeps one, in the compute dtype, which for
        bfloat16 is a copy for as long as it takes.
        """
        names = self.due(step)
        if not names:
            return 0.0
        jax.block_until_ready(state)
        start, active = time.perf_counter(), jax.process_index() == 0
        params = cast(state.ema or state.trainable, jnp.dtype(self.run.compute_dtype)) | state.frozen
        for name in names:
            began, at = time.perf_counter(), {"stage": self.stage.name, "step": step}
            note = functools.partial(append, self.replies, at) if active else lambda row: None
            if active:  # what an evaluation that was interrupted has noted
                again = {**at, "eval": name}
                drop_lines(self.replies, lambda row, again=again: again.items() <= row.items())
            found = self.measures[name](params, note)
            reporter.log(found.numbers, step, name)
            seconds = time.perf_counter() - began
            reporter.say(f"{self.stage.name} step {step}: {name}  {found.line()}  ({seconds:.1f} s)")
        return time.perf_counter() - start


def append(path: str, at: dict, row: dict) -> None:
    append_line(path, {**at, **row})


def cast(params: Params, dtype: jnp.dtype) -> Params:
    """Parameters in a dtype; those that have it are not copied."""
    return params | _convert({path: x for path, x in params.items() if x.dtype != dtype}, dtype)


@functools.partial(jax.jit, static_argnums=1)
def _convert(params: Params, dtype: jnp.dtype) -> Params:
    return {path: x.astype(dtype) for path, x in params.items()}
