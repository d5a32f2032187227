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
        return np.random.default_rng(self.place).normal(size=(self.rows, WIDTH)), {
            "sample_ids": np.arange(2),
            "tokens": 8,
            "images": 2,
        }

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

    def apply(self, variables, batch, names, rngs=None):
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


def test_each_start_has_a_row_that_says_where_it_began(unbroken, broken):
    starts = [[json.loads(line) for line in open(workdir / "starts.jsonl")] for workdir in (unbroken, broken)]
    assert [[(row["stage"], row["step"]) for row in each] for each in starts] == [
        [("align", 0)],
        [("align", 0), ("align", 3)],
    ]
    assert starts[1][1]["devices"] == jax.device_count() and starts[1][1]["versions"]["jax"] == jax.__version__


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


def test_a_refused_run_has_not_claimed_its_workdir(run, tmp_path, monkeypatch):
    def refuse(*arguments):
        raise ValueError("the weights do not fit")

    with monkeypatch.context() as patch:
        patch.setattr(loop, "start_stage", refuse)
        with pytest.raises(ValueError, match="the weights do not fit"):
            train(run, tmp_path)
    with pytest.raises(ConfigError, match="--profile 2:9: stage align is to train steps 1 to 6"):
        train(run, tmp_path, profile=(2, 9))
    assert not (tmp_path / "config.json").exists()
    train(dataclasses.replace(run, seed=1), tmp_path)  # so another config may use it
    with pytest.raises(ConfigError, match="seed"):
        train(run, tmp_path)


def test_a_trace_of_some_steps(run, tmp_path, capsys):
    train(run, tmp_path, profile=(3, 4))
    with pytest.raises(ConfigError, match="trained to the end"):
        train(run, tmp_path, profile=(3, 4))
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    line = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("trace"))
    assert re.match(r"trace of steps 3 to 4: .*/profile; to open it: pip install xprof, then xprof --logdir=", line)


def spoiled(change):
    """start_stage whose step number n gives change(n, state, metrics)."""

    def start(*arguments):
        state, position, step = start_stage(*arguments)
        numbers = iter(range(int(state.step) + 1, STEPS + 1))
        return state, position, lambda state, batch: change(next(numbers), *step(state, batch))

    return start


def checkpoints_in(workdir) -> list[str]:
    return sorted(path.name for path in (workdir / "align" / "checkpoints").iterdir() if path.name.isdigit())


@pytest.mark.parametrize("first, back, note", [(4, "2", ""), (5, "2", "4")])
def test_a_step_that_is_not_finite_ends_the_run(run, tmp_path, monkeypatch, first, back, note):
    """Also one without a row of metrics; a checkpoint that leads there at once is not the one to go back to."""
    nan = jax.device_put(np.float32("nan"))
    poison = lambda n, state, metrics: (state, metrics | ({"grad_norm": nan} if n >= first else {}))
    monkeypatch.setattr(loop, "start_stage", spoiled(poison))
    with pytest.raises(FloatingPointError) as error:
        train(run, tmp_path)
    folder = tmp_path / "align" / "checkpoints"
    said = f"grad_norm is nan at step {first} of stage align; checkpoint to go back to: {folder / back}"
    assert str(error.value) == said + f" ({folder / note} leads here at once)" * bool(note)
    assert checkpoints_in(tmp_path) == ["2", "4"][: 1 + bool(note)]
    assert [row["step"] for row in rows(tmp_path)] == [1, 2, 4][: 2 + bool(note)]


@pytest.mark.parametrize("value", ["nan", "1e30"])
@pytest.mark.parametrize("group", ["trainable", "opt_state", "ema"])
def test_a_state_that_is_ruined_is_not_saved(run, tmp_path, monkeypatch, group, value):
    """The update just before a save ruins the state: the last good checkpoint stays, and a new start trains on."""

    def ruin(n, state, metrics):
        spoil = lambda x: x.at[0].set(float(value)) if x.shape == (WIDTH,) and n == 4 else x
        with jax.transfer_guard("allow"):
            return state.replace(**{group: jax.tree.map(spoil, getattr(state, group))}), metrics

    monkeypatch.setattr(loop, "start_stage", spoiled(ruin))
    if group == "opt_state" and value == "1e30":  # a second moment may be that large
        return train(run, tmp_path)
    with pytest.raises(FloatingPointError) as error:
        train(run, tmp_path)
    folder = tmp_path / "align" / "checkpoints"
    assert str(error.value).startswith(group)
    assert str(error.value).endswith(f"after step 4 of stage align; checkpoint to go back to: {folder / '2'}")
    assert checkpoints_in(tmp_path) == ["2"]
    monkeypatch.setattr(loop, "start_stage", start_stage)
    train(run, tmp_path)
    assert checkpoints_in(tmp_path) == ["2", "4", "6"]


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
