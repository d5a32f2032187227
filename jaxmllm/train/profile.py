"""Traces of a few training steps with jax.profiler."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxmllm.config import ConfigError


def parse_steps(text: str) -> tuple[int, int]:
    """ "FROM:TO" -> (first, last) step to trace, counted from 1. Raises ConfigError."""
    first, _, last = text.partition(":")
    if not (first.isdecimal() and last.isdecimal() and 1 <= int(first) <= int(last)):
        raise ConfigError(f"--profile {text}: write the first and the last step, counted from 1, e.g. --profile 20:24")
    return int(first), int(last)


class Profiler:
    """Traces `steps` (first, last) of the first stage that a command trains, or nothing if they are None.

    Every process traces its own devices into WORKDIR/profile.
    """

    def __init__(self, steps: tuple[int, int] | None, workdir: str):
        self.steps, self.folder, self.running = steps, str(Path(workdir).absolute() / "profile"), False

    def check(self, stage: str, done: int, steps: int) -> None:
        """Raises ConfigError if the stage's steps after `done` do not include those to trace."""
        if self.steps and not done < self.steps[0] <= self.steps[1] <= steps:
            asked = "--profile {}:{}".format(*self.steps)
            raise ConfigError(f"{asked}: stage {stage} is to train steps {done + 1} to {steps}; name some of these")

    def before(self, step: int, state: Any) -> None:
        """Starts the trace if `step` is the first; waits for the state, so that no earlier step is in it."""
        if self.steps and step == self.steps[0]:
            jax.block_until_ready(state)
            jax.profiler.start_trace(self.folder)
            self.running = True

    def after(self, step: int, metrics: Any, say: Callable[[str], None]) -> None:
        """Ends the trace if `step` is the last, once it has its metrics; `say` prints a line about it."""
        if self.running and step == self.steps[1]:
            jax.block_until_ready(metrics)
            self.close()
            first, last = self.steps
            say(
                f"trace of steps {first} to {last}: {self.folder}; to open it: pip install xprof, then "
                f"xprof --logdir={self.folder}"
            )
            self.steps = None

    def close(self) -> None:
        """Ends a trace that runs."""
        if self.running:
            jax.profiler.stop_trace()
            self.running = False
