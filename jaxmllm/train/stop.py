"""Stopping on a signal without losing work."""

from __future__ import annotations

import os
import signal

import jax
from jax.experimental import multihost_utils


class Stopped(Exception):
    """The run was told to stop by SIGTERM or SIGINT, and has saved its state."""


class StopSignal:
    """While entered, SIGTERM and SIGINT ask for a stop instead of killing the process.

    It is entered for the whole run, so a signal during a compilation is answered after the next step. If one of several
    processes is told to stop, all of them stop at the same step.
    """

    def __init__(self):
        self.told = False

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; each process must ask at each step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.told

    def __enter__(self) -> StopSignal:
        signals = (signal.SIGINT,) if jax.process_count() > 1 else (signal.SIGTERM, signal.SIGINT)
        self.old = {number: signal.signal(number, self._tell) for number in signals}
        return self

    def _tell(self, *_) -> None:
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)  # JAX passes it on to the other processes
        else:
            self.told = True

    def __exit__(self, *_) -> None:
        for number, handler in self.old.items():
            signal.signal(number, handler)
