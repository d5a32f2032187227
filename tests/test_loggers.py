"""Loggers, and what the loop says of a step: rows, rates, a loss that is not finite, parameters without gradient."""

import dataclasses
import importlib.util
import json
import math
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.config import ConfigError, Run, Stage
from jaxmllm.plan import chips
from jaxmllm.plan.flops import model_flops
from jaxmllm.recipes import check_resumable, from_document, load, override, to_document
from jaxmllm.train.events import records
from jaxmllm.train.loggers import JsonLines, TensorBoard, WeightsAndBiases
from jaxmllm.train.metrics import ENOUGH, Reporter, report
from jaxmllm.train.optim import note_gradients, rate
from jaxmllm.train.profile import Profiler, parse_steps
from jaxmllm.train.state import TrainState


@pytest.fixture(scope="module")
def tiny() -> Run:
    return load("configs/toy.py:tiny")


def stage_of(run: Run, **changes) -> Stage:
    return dataclasses.replace(run.stages[0], **changes)


def rows(path) -> list[tuple[str, int]]:
    return [(row["stage"], row["step"]) for row in map(json.loads, path.read_text().splitlines())]


def test_json_lines_forgets_what_comes_again(tiny, tmp_path):
    align, instruct = tiny.stages
    path = tmp_path / "metrics.jsonl"
    for stage, start, steps in ((align, 0, (1, 2, 4)), (instruct, 0, (1, 2, 3))):
        log = JsonLines().open(str(tmp_path), tiny, stage, start)
        for step in steps:
            log.write({"loss": 0.5}, step)
        log.close()
    path.write_text(path.read_text() + '{"stage": "instruct", "st')  # killed in the middle of a row
    JsonLines().open(str(tmp_path), tiny, instruct, 2).close()
    assert rows(path) == [("align", 1), ("align", 2), ("align", 4), ("instruct", 1), ("instruct", 2)]
    before = path.stat().st_ino
    JsonLines().open(str(tmp_path), tiny, instruct, 2).close()
    assert path.stat().st_ino == before  # nothing to drop: the file is left alone
    JsonLines().open(str(tmp_path), tiny, align, 2).close()
    assert rows(path) == [("align", 1), ("align", 2), ("instruct", 1), ("instruct", 2)]
    log = JsonLines().open(str(tmp_path), tiny, instruct, 2)
    log.write({"accuracy": None}, 2, "task")
    log.close()
    JsonLines().open(str(tmp_path), tiny, instruct, 2).close()  # the result of a task on the step that was saved stays
    last = {"stage": "instruct", "step": 2, "eval": "task", "accuracy": None}
    assert json.loads(path.read_text().splitlines()[-1]) == last
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(ValueError, match="metrics.jsonl:1 is no row"):
        JsonLines().open(str(tmp_path), tiny, align, 2)


def events(folder) -> list:
    """The events in a folder's files, in order."""
    return [event for path in sorted(folder.iterdir()) for _, event in records(path.read_bytes())]


def test_tensorboard_holds_each_step_once(tiny, tmp_path):
    folder = tmp_path / "tensorboard" / "align"
    for start, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = TensorBoard().open(str(tmp_path), tiny, tiny.stages[0], start)
        for step in steps:
            log.write({"loss": 0.5, "grad_norm": 2.0}, step)
        log.write({"loss": 0.25, "accuracy": None}, steps[-1], "held_out")
        if not start:  # killed: it has not closed its file, and the last record is cut off
            path = next(folder.iterdir())
            path.write_bytes(path.read_bytes() + b"\x18\0\0\0\0\0\0\0\0\0\0\0\t")
        else:
            log.close()
    found = events(folder)
    scalars = [(e.step, v.tag) for e in found for v in e.summary.value]
    trained = [(step, tag) for step in (1, 2, 3, 4) for tag in ("loss", "grad_norm")]
    assert [each for each in scalars if "/" not in each[1]] == trained
    assert [each for each in scalars if "/" in each[1]] == [(4, "held_out/loss")]
    assert [e.step for e in found if e.HasField("session_log")] == [3]  # a TensorBoard that runs forgets step 3
    assert all(path.name.startswith("events.out.tfevents.") for path in folder.iterdir())


def test_loggers_may_change_on_resume(tiny):
    other = dataclasses.replace(tiny, loggers=(WeightsAndBiases(project="p"),))
    assert from_document(to_document(other), "config.json") == other
    check_resumable(to_document(tiny), other, "workdir")
    with pytest.raises(ConfigError, match="ema"):
        changed = dataclasses.replace(tiny, stages=(stage_of(tiny, ema=0.9), tiny.stages[1]))
        check_resumable(to_document(tiny), changed, "workdir")


def test_ema_is_a_decay(tiny):
    with pytest.raises(ConfigError, match="no decay between 0 and 1"):
        override(tiny, ["stages.align.ema=1.0"])


@pytest.mark.skipif(importlib.util.find_spec("wandb") is not None, reason="wandb is installed")
def test_missing_wandb_is_named(tiny, tmp_path):
    with pytest.raises(ValueError, match=r'pip install "jaxmllm\[wandb\]"'):
        WeightsAndBiases(project="p").open(str(tmp_path), tiny, tiny.stages[0], 0)


@pytest.mark.long
def test_weights_and_biases_offline(tiny, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "config.json").write_text(json.dumps(to_document(tiny)))
    ids = set()
    for start, steps in ((0, (1, 2)), (1, (2, 3))):
        log = WeightsAndBiases(project="p").open(str(tmp_path), tiny, tiny.stages[0], start)
        ids.add(log.run.id)
        assert log.run.group == tmp_path.name and log.run.config["name"] == "tiny"
        for step in steps:
            log.write({"loss": 0.5}, step)
        log.close()
    assert len(ids) == 1
    assert len(list((tmp_path / "wandb").glob("offline-run-*"))) >= 1


@dataclasses.dataclass(frozen=True)
class Kept:
    """A logger of a user: keeps rows in a list."""

    kept: list = dataclasses.field(default_factory=list)

    def open(self, workdir, run, stage, step):
        def write(row, step, task):
            self.kept.append((step, row))

        return SimpleNamespace(write=write, close=lambda: self.kept.append("closed"))


def reporter(tiny, tmp_path, start=0) -> tuple[Reporter, list]:
    logger = Kept()
    run = dataclasses.replace(tiny, loggers=(logger,), log_every=4, save_every=3)
    return Reporter(run, stage_of(tiny, steps=10), str(tmp_path), start, 1), logger.kept


def metrics(**values) -> dict[str, jax.Array]:
    return {k: jnp.float32(v) for k, v in ({"loss": 2.0, "grad_norm": 1.0} | values).items()}


def test_rows_hold_the_rate_of_their_step_and_come_once(tiny, tmp_path):
    one, kept = reporter(tiny, tmp_path)
    values = metrics()
    for step in [*range(1, 11), 10]:
        with jax.transfer_guard("disallow"):
            report(one, step, values, None)
    one.close()
    assert [row[0] for row in kept[:-1]] == [1, 3, 4, 6, 8, 9, 10] and kept[-1] == "closed"
    expected = rate(one.stage.optim, 10)
    assert all(row["learning_rate"] == float(expected(step - 1)) for step, row in kept[:-1])
    assert {"loss", "grad_norm", "step_ms", "tokens_per_s", "images_per_s", "data_wait"} <= set(kept[0][1])
    resumed, _ = reporter(tiny, tmp_path, start=4)
    assert [step for step in range(1, 11) if resumed.is_due(step)] == [6, 8, 9, 10]


def test_mfu_where_the_peak_of_a_device_is_known(tiny, tmp_path, monkeypatch):
    """In the surroundings of the training loop: on a mesh, where copies must be deliberate."""
    monkeypatch.setattr(chips, "PEAKS", {"cpu": 1e12})
    one, kept = reporter(tiny, tmp_path)
    values, info = metrics(), {"sample_ids": np.arange(3), "tokens": 100, "images": 2}
    with jax.set_mesh(one.run.mesh.build()), jax.transfer_guard("disallow"):
        one.first_step()
        for step in range(1, 5):
            one.count(info, 0.0)
            report(one, step, values, None)
    flops = sum(model_flops(one.run, one.stage).values())
    assert [step for step, _ in kept] == [1, 3, 4] and flops > 1e8
    for _, row in kept:
        assert row["mfu"] == pytest.approx(flops / 1e12 / (row["step_ms"] / 1e3) / jax.device_count())


@pytest.mark.parametrize("name", ["loss", "grad_norm"])
@pytest.mark.parametrize("folder", ["runs/a/align/checkpoints/3", None])
def test_what_is_not_finite_stops_with_the_checkpoint_to_go_back_to(tiny, tmp_path, name, folder):
    one, kept = reporter(tiny, tmp_path)
    checkpoints = SimpleNamespace(stage="align", wait=lambda: None, newest_folder=lambda: folder, latest=lambda: 3)
    with pytest.raises(FloatingPointError) as error:
        report(one, 5, metrics(**{name: math.nan}), checkpoints)  # a step without a row
    where = folder or "none yet"
    assert str(error.value) == f"{name} is nan at step 5 of stage align; checkpoint to go back to: {where}"
    assert not kept


def test_parameters_without_gradient_are_named_once(tiny, tmp_path, capsys):
    one, _ = reporter(tiny, tmp_path)
    params = {f"p{i}": jnp.ones(2) for i in range(9)}
    tx = note_gradients()
    _, reached = tx.update({k: v * (k == "p0") for k, v in params.items()}, tx.init(params))
    state = TrainState(jnp.zeros((), jnp.int32), params, {}, (reached,))
    info = {"sample_ids": np.zeros(1, np.int32), "tokens": 1, "images": 1}
    said = []
    for step in range(1, 17):
        one.count(info | {"images": int(step > 2)}, 0.0)
        with jax.transfer_guard("disallow"):
            one.look_for_unreached(step, state)
        said.append(capsys.readouterr().err)
    assert [step for step, line in enumerate(said, 1) if line] == [2 + ENOUGH]  # also the end of a log interval
    assert "no gradient has reached: p1, p2, p3, p4, p5 and 3 more (8 of 9 parameters)" in said[1 + ENOUGH]


@pytest.mark.parametrize("text", ["5", "5:", "a:b", "0:3", "4:3", "-1:3"])
def test_steps_to_trace_are_checked(text):
    with pytest.raises(ConfigError, match="write the first and the last step"):
        parse_steps(text)


def test_steps_to_trace_lie_in_what_is_trained(tmp_path):
    assert parse_steps("20:24") == (20, 24)
    Profiler(None, str(tmp_path)).check("align", 4, 8)
    Profiler((5, 8), str(tmp_path)).check("align", 4, 8)
    for steps in ((4, 6), (7, 9)):
        with pytest.raises(ConfigError, match="stage align is to train steps 5 to 8"):
            Profiler(steps, str(tmp_path)).check("align", 4, 8)
