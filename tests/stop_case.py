"""What the tests of stopping send signals to: `python -m tests.stop_case WORKDIR PHASE..`.

Trains test_loop's small model once per phase, in WORKDIR/PHASE, and says "in PHASE" when it is in that phase, which
only a signal ends, or C++ that holds the main thread for some seconds. JAX_COORDINATOR_ADDRESS makes it one of several.
"""

import dataclasses
import hashlib
import sys
import time

import jax

from jaxmllm import processes
from jaxmllm.recipes import load
from jaxmllm.train import checkpoint, loop
from jaxmllm.train.loggers import JsonLines
from jaxmllm.train.session import Hooks
from jaxmllm.train.stop import Stopped, StopSignal
from tests import test_loop

SAVE = checkpoint.StageCheckpoints.save
HELD = 1_500_000  # rounds of a hash, which take some seconds without Python's lock, and no signal interrupts them


def hold() -> None:
    hashlib.pbkdf2_hmac("sha256", b"", b"", HELD)


def phase_begins(name: str) -> None:
    print(f"in {name}", flush=True)


def wait_for_ever(name: str) -> None:
    phase_begins(name)
    time.sleep(600)
    raise AssertionError("nothing has ended this")


class Batches(test_loop.Batches):
    """A loader whose data never comes: at all, or after the third batch."""

    def __init__(self, rows: int, phase: str):
        super().__init__(rows // jax.process_count())
        self.phase = phase

    def __next__(self):
        if (self.phase, self.place) in (("first data", 0), ("data", 3)):
            wait_for_ever(self.phase)
        return super().__next__()


class Evals:
    def __init__(self, phase: str):
        self.phase = phase

    def due(self, step):
        return False

    def __call__(self, step, state, reporter):
        if self.phase == "evaluation" and step == 3:
            wait_for_ever("evaluation")
        return 0.0


def start_stage(phase: str):
    def start(*arguments):
        if phase == "startup":
            wait_for_ever("startup")
        state, position, step = test_loop.start_stage(*arguments)

        def slow_step(state, batch):
            number = int(jax.device_get(state.step)) + 1
            if (phase, number) in (("compile", 1), ("step", 3)):
                phase_begins(phase)
                hold()
            return step(state, batch)

        return state, position, slow_step

    return start


def main(workdir: str, *phases: str) -> None:
    loop.check_stages = lambda config, mesh: None
    for phase in phases:
        train(f"{workdir}/{phase}", phase)


def train(workdir: str, phase: str) -> None:
    base = load("configs/toy.py:tiny")
    stage = dataclasses.replace(base.stages[0], steps=1000)
    every = 2 if phase == "save" else 1000
    run = dataclasses.replace(base, stages=(stage,), loggers=(JsonLines(),), log_every=1, save_every=every)

    def slow_save(self, state, data):
        if phase == "save" and (int(jax.device_get(state.step)), self.latest()) == (4, 2):
            phase_begins("save")
            hold()
        SAVE(self, state, data)

    checkpoint.StageCheckpoints.save, loop.start_stage = slow_save, start_stage(phase)
    stop = StopSignal()
    try:
        with stop:
            processes.join_processes(False)
            stop.joined()
            hooks = Hooks(lambda stage: Batches(stage.rows, phase), None, {"align": Evals(phase)}, stop=stop)
            loop.run(run, workdir, hooks)
    except Stopped:
        if not stop.ended:
            stop.end("stopped before it trained")
        stop.deadline = None  # this process goes on with the next phase
        print(f"{phase} ended", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
