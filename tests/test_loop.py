"""The loop on made-up batches: a run that is stopped and one that is killed write what an unbroken one writes."""

import dataclasses
import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxmllm.batch import Term
from jaxmllm.config import ConfigError, Rule
from jaxmllm.nn.param_info import ParamInfo
from jaxmllm.recipes import load
from jaxmllm.train import loop
from jaxmllm.train.checkpoint import abstract_on, open_checkpoints
from jaxmllm.train.loggers import JsonLines
from jaxmllm.train.optim import transformation
from jaxmllm.train.session import Hooks
from jaxmllm.train.state import TrainState
from jaxmllm.train.step import make_step
from jaxmllm.train.stop import Stopped, StopSignal
from tests.conftest import jaxmllm, settings

TIMES = ("step_ms", "tokens_per_s", "images_per_s", "data_wait")
STEPS, WIDTH = 6, 16


class Batches:
    """A loader of random batches, a different one for each step."""

    def __init__(self, rows: int):
        self.rows, self.place = rows, 0

    def __next__(self):
        self.place += 1
        return np.random.default_rng(self.place).normal(size=(self.rows, WIDTH)), {"tokens": 8, "images": 2}

    def get_state(self):
        return {"0": {"place": self.place}}

    def set_state(self, state):
        self.place = state["0"]["place"]

    def close(self):
        pass


class Model:
    """One weight: its product with a batch is to be 1."""

    def counts(self, batch, names):
        return {"next_token": jnp.int32(batch.shape[0])}

    def apply(self, variables, batch, names):
        values = jnp.square(batch.astype(jnp.float32) @ variables["params"]["w"] - 1)
        return {"next_token": Term(values, jnp.ones(values.shape, bool))}, {}


def start_stage(config, stage, mesh, checkpoints, load_parts):
    """As setup.start_stage, for that model."""
    infos = {"w": ParamInfo("matrix", ("embed",), 1)}
    tx = transformation(stage.optim, stage.steps, {"w": Rule(".*")}, infos)
    step = jax.jit(make_step(Model(), {"next_token": 1.0}, tx, jnp.float32, 1, stage.ema), donate_argnums=0)

    def new():
        w = jnp.zeros(WIDTH)
        return TrainState(jnp.zeros((), jnp.int32), {"w": w}, {}, tx.init({"w": w}), {"w": jnp.copy(w)})

    if checkpoints.latest() is None:
        return jax.jit(new)(), None, step
    return *checkpoints.restore(abstract_on(mesh, jax.eval_shape(new))), step


@pytest.fixture(scope="module")
def run():
    base = load("configs/toy.py:tiny")
    stage = dataclasses.replace(base.stages[0], steps=STEPS, ema=0.75)
    return dataclasses.replace(base, stages=(stage,), loggers=(JsonLines(),), log_every=4, save_every=2, keep=10)


@pytest.fixture(scope="module", autouse=True)
def small():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "start_stage", start_stage)
        patch.setattr(loop, "check_stages", lambda config, mesh: None)
        yield


class NoEvals:
    def due(self, step):
        return False

    def __call__(self, step, state, reporter):
        return 0.0


def train(run, workdir, profile=None):
    hooks = Hooks(lambda stage: Batches(stage.rows), None, {stage.name: NoEvals() for stage in run.stages}, profile)
    loop.run(run, str(workdir), hooks)


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
        assert np.abs(after["ema"][path] - after["trainable"][path]).max() > 1e-5
    checkpoints, last = open_checkpoints(str(broken), ["align"], keep=10)[0], stored(broken, STEPS)
    abstract = abstract_on(run.mesh.build(), {"w": jax.ShapeDtypeStruct((WIDTH,), jnp.float32)})
    for average, group in ((True, "ema"), (False, "trainable")):  # the next stage starts from the latter
        found = checkpoints.restore_params(abstract, average=average)
        np.testing.assert_array_equal(found["w"], last[group]["w"])


def test_a_trace_of_some_steps(run, tmp_path, capsys):
    with pytest.raises(ConfigError, match="--profile 2:9: stage align is to train steps 1 to 6"):
        train(run, tmp_path, profile=(2, 9))
    train(run, tmp_path, profile=(3, 4))
    with pytest.raises(ConfigError, match="trained to the end"):
        train(run, tmp_path, profile=(3, 4))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("trace"))
    assert re.match(r"trace of steps 3 to 4: .*/profile; to open it: pip install xprof, then xprof --logdir=", line)


def test_what_is_not_finite_is_not_saved(run, tmp_path, monkeypatch):
    nan = jax.device_put(np.float32("nan"))

    def poisoned(*arguments):
        state, position, step = start_stage(*arguments)
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


RECIPE = """
import dataclasses, runpy
from jaxmllm.train.optimizers import Adafactor, Muon

def config():
    run = runpy.run_path("configs/toy.py")["tiny"]()
    optimizers = (Muon(lr=2e-3, weight_decay=0.05), Adafactor(lr=1e-3))
    stages = [dataclasses.replace(s, optim=o, ema=0.5) for s, o in zip(run.stages, optimizers)]
    return dataclasses.replace(run, stages=tuple(stages), save_every=2)
"""


@pytest.mark.long
def test_two_stages_with_other_optimizers_on_eight_devices_and_one(scenes, tmp_path):
    """Muon, then Adafactor; the second stage goes on on one device from what eight have saved, and a chat follows."""
    path = tmp_path / "recipe.py"
    path.write_text(RECIPE)
    args = settings(scenes, str(path))
    one, other = tmp_path / "one", tmp_path / "other"
    jaxmllm("train", *args, "--workdir", one)
    jaxmllm("train", *args, "--workdir", other, devices=8)
    losses = [[(row["stage"], row["step"], row["loss"]) for row in rows(workdir)] for workdir in (one, other)]
    for (stage, step, loss), (stage2, step2, loss2) in zip(*losses, strict=True):
        assert (stage, step) == (stage2, step2) and loss == pytest.approx(loss2, rel=2e-3)
    shutil.rmtree(other / "instruct" / "checkpoints" / "4")
    jaxmllm("train", *args, "--workdir", other)
    assert [(row["stage"], row["step"]) for row in rows(other)] == [place[:2] for place in losses[0]]
    picture = next((scenes / "images" / "heldout").iterdir())
    assert jaxmllm("chat", other, "--image", picture, "--prompt", "Describe the image.").stdout.startswith("model:")
