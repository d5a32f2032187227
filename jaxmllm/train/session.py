"""The structs of the training loop: what comes from outside, what a run's stages share, and the tools of one stage."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax

from jaxmllm.config import Run, Stage
from jaxmllm.train.checkpoint import StageCheckpoints
from jaxmllm.train.finite import check_state
from jaxmllm.train.metrics import Reporter, report
from jaxmllm.train.profile import Profiler
from jaxmllm.train.setup import LoadParts
from jaxmllm.train.state import TrainState
from jaxmllm.train.stop import StopSignal


@dataclasses.dataclass(frozen=True)
class Hooks:
    """What a run gets from outside: train/ knows neither data sets, nor weights of others, nor evaluation.

    evals: stage name -> its evaluations: due(step) is true if any is to be made, and a call with (step, state,
    reporter) makes them and returns the seconds that it took. profile: first and last step to trace, of the first stage
    that is trained. stop: entered by whoever wants signals to stop the run.
    """

    make_loader: Callable[[Stage], Any]
    load_parts: LoadParts
    evals: Mapping[str, Any]
    profile: tuple[int, int] | None = None
    stop: StopSignal = dataclasses.field(default_factory=StopSignal)


@dataclasses.dataclass(frozen=True)
class Session:
    """What all stages of a run share."""

    config: Run
    workdir: str
    mesh: jax.sharding.Mesh
    hooks: Hooks
    profiler: Profiler


@dataclasses.dataclass(frozen=True)
class StageTools:
    """What one stage reads from and writes to."""

    loader: Any
    checkpoints: StageCheckpoints
    reporter: Reporter

    def save(self, step: int, state: TrainState, metrics: dict[str, jax.Array], position: dict[str, Any]) -> None:
        """Reports a step, then starts writing its state and the position in the data after it.

        Raises FloatingPointError, without writing, if the metrics or the state are not finite.
        """
        report(self.reporter, step, metrics, self.checkpoints)
        check_state(state, step, self.checkpoints)
        self.checkpoints.save(state, position)
