"""The loop on made-up batches: a run that is stopped and one that is killed write what an unbroken one writes."""

import dataclasses
import json
import re

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxmllm import bench
from jaxmllm.config import ConfigError
from jaxmllm.recipes import load
from jaxmllm.train import loop
from jaxmllm.train.checkpoint import open_checkpoints
from jaxmllm.train.loggers import JsonLines
from jaxmllm.train.setup import abstract_params
from jaxmllm.train.stop import Stopped, StopSignal

TIMES = ("step_ms", "tokens_per_s", "images_per_s", "data_wait")
STEPS = 6


class Batches:
    """A loader of random batches, a different one for each step."""

    def __init__(self, run, stage):
        self.run, self.stage, self.place = run, stage, 0

    def __next__(self):
        self.place += 1
        run = dataclasses.replace(self.run, seed=self.place)
        return bench.synthetic(run, self.stage, self.stage.rows), {"tokens": 8, "images": 2}

    def get_state(self):
        return {"0": {"place": self.place}}

    def set_state(self, state):
        self.place = state["0"]["place"]

    def close(self):
        pass


@pytest.fixture(scope="module")
def run():
    base = load("configs/toy.py:tiny")
    stage = dataclasses.replace(base.stages[0], steps=STEPS, ema=0.75)
    data = dataclasses.replace(base.data, seq_len=128, image_slots=2)
    return dataclasses.replace(
        base, data=data, stages=(stage,), loggers=(JsonLines(),), log_every=4, save_every=2, keep=10
    )


def train(run, workdir, **arguments):
    loop.run(run, str(workdir), lambda stage: Batches(run, stage), **arguments)


def rows(workdir) -> list[dict]:
    """The rows of metrics without their times."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in TIMES} for row in lines]


def stored(workdir, step: int) -> dict:
    """What a checkpoint holds of the state."""
    with open_checkpoints(str(workdir), ["align"], keep=10)[0].manager as manager:
        return manager.restore(step, args=ocp.args.Composite(state=ocp.args.StandardRestore())).state


@pytest.fixture(scope="module")
def unbroken(run, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("unbroken")
    train(run, workdir)
    return workdir


@pytest.fixture(scope="module")
def broken(run, tmp_path_factory):
    """Stopped at step 3, which has no row; then killed after it has written rows of steps that were not saved."""
    workdir = tmp_path_factory.mktemp("broken")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StopSignal, "asked", lambda self, step: step == 3)
        with pytest.raises(Stopped):
            train(run, workdir)
    assert [row["step"] for row in rows(workdir)] == [1, 2]
    with open(workdir / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"stage": "align", "step": 4, "loss": 0.1}) + '\n{"stage": "align", "st')
    train(run, workdir)
    return workdir


def test_an_interrupted_run_writes_the_rows_of_an_unbroken_one(unbroken, broken):
    assert [row["step"] for row in rows(unbroken)] == [1, 2, 4, 6]
    assert rows(broken) == rows(unbroken)
    assert all(row.keys() >= {"stage", "loss", "grad_norm", "learning_rate"} for row in rows(unbroken))


def test_an_interrupted_run_ends_in_the_state_of_an_unbroken_one(run, unbroken, broken):
    one, other = stored(unbroken, STEPS), stored(broken, STEPS)
    assert set(one) == {"step", "trainable", "opt_state", "ema"} and one["ema"].keys() == one["trainable"].keys()
    for x, y in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(x, y)


def test_the_moving_average_is_kept_and_evaluation_reads_it(run, broken):
    before, after = stored(broken, 3), stored(broken, 4)
    for path, old in before["ema"].items():
        assert old.dtype == np.float32
        np.testing.assert_allclose(after["ema"][path], 0.75 * old + 0.25 * after["trainable"][path], atol=1e-6)
    moved = [path for path, x in after["ema"].items() if np.abs(x - after["trainable"][path]).max() > 1e-5]
    assert len(moved) > 100
    mesh = run.mesh.build()
    checkpoints = open_checkpoints(str(broken), ["align"], keep=10)[0]
    last = stored(broken, STEPS)
    with jax.set_mesh(mesh):
        abstract, _ = abstract_params(run, mesh)
        for average, group in ((True, "ema"), (False, "trainable")):  # the next stage starts from the latter
            for path, x in checkpoints.restore_params(abstract, average=average).items():
                np.testing.assert_array_equal(x, last[group][path])


def test_a_trace_of_some_steps(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--profile 2:9: stage align is to train steps 1 to 6"):
        train(run, tmp_path, profile=(2, 9))
    train(run, tmp_path, profile=(3, 4))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("trace"))
    assert re.match(r"trace of steps 3 to 4: .*/profile; to open it: pip install xprof, then xprof --logdir=", line)


def test_what_is_not_finite_is_not_saved(run, tmp_path, monkeypatch):
    start, nan = loop.start_stage, jax.device_put(np.float32("nan"))

    def poisoned(*arguments):
        state, position, step = start(*arguments)
        done = iter(range(1, STEPS + 1))

        def poisoned_step(state, batch):
            state, metrics = step(state, batch)
            return state, metrics | ({"grad_norm": nan} if next(done) >= 3 else {})

        return state, position, poisoned_step

    monkeypatch.setattr(loop, "start_stage", poisoned)
    with pytest.raises(FloatingPointError) as error:
        train(run, tmp_path)
    folder = tmp_path / "align" / "checkpoints"
    assert str(error.value) == f"grad_norm is nan at step 4 of stage align; checkpoint to go back to: {folder / '2'}"
    assert [path.name for path in folder.iterdir() if path.name.isdigit()] == ["2"]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2]
