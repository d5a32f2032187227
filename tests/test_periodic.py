"""Evaluation in the training loop, with a fuser and a task that only the config file defines."""

import dataclasses
import json
import shutil
from types import SimpleNamespace

import jax.numpy as jnp
import pytest

from jaxmllm.config import Eval
from jaxmllm.eval.periodic import StageEvals
from jaxmllm.eval.tasks.base import Result
from jaxmllm.recipes import load
from jaxmllm.train.state import TrainState
from tests.conftest import jaxmllm, settings
from tests.test_resume import assert_equal, newest_state

CONFIG = "tests/own_config.py"


def evaluation(scenes) -> dict:
    """Overrides of the variant `evaluated`."""
    return {
        "stages.align.evals.held_out_loss.task.source.path": scenes / "align.jsonl",
        "stages.align.evals.reply_length.task.path": scenes / "heldout.jsonl",
        "stages.instruct.evals.reply_length.task.path": scenes / "heldout.jsonl",
    }


@pytest.fixture(scope="module")
def trained(scenes, tmp_path_factory):
    """(workdir without evaluation, workdir with it, stderr of the latter)."""
    plain, with_evals = tmp_path_factory.mktemp("plain"), tmp_path_factory.mktemp("evaluated")
    jaxmllm("train", *settings(scenes, f"{CONFIG}:config"), "--workdir", plain)
    done = jaxmllm("train", *settings(scenes, f"{CONFIG}:evaluated", **evaluation(scenes)), "--workdir", with_evals)
    return plain, with_evals, done.stderr


def rows(workdir) -> list[dict]:
    return [json.loads(line) for line in open(workdir / "metrics.jsonl")]


def evals(workdir) -> list[tuple]:
    return [(row["stage"], row["step"], row["eval"]) for row in rows(workdir) if "eval" in row]


EXPECTED = [
    ("align", 2, "reply_length"),
    ("align", 3, "held_out_loss"),
    ("align", 4, "held_out_loss"),
    ("align", 4, "reply_length"),
    ("instruct", 4, "reply_length"),
]


def test_results_are_rows_of_the_metrics_and_lines(trained):
    _, workdir, stderr = trained
    assert evals(workdir) == EXPECTED
    loss = next(row for row in rows(workdir) if row.get("eval") == "held_out_loss")
    assert {"next_token", "depth", "seg", "accuracy", "samples", "bad"} <= set(loss)
    assert (loss["samples"], loss["bad"]) == (160, 0) and loss["next_token"] > 1
    assert "align step 3: held_out_loss  next_token " in stderr and "instruct step 4: reply_length  words" in stderr
    replies = [json.loads(line) for line in open(workdir / "align" / "eval_replies.jsonl")]
    assert len(replies) == 12 and {row["step"] for row in replies} == {2, 4}
    assert set(replies[0]) == {"stage", "step", "eval", "row", "prompt", "reply"}
    assert replies[0]["row"].endswith("heldout.jsonl:1")


def test_training_is_bit_equal_with_and_without(trained):
    plain, with_evals, _ = trained
    for stage in ("align", "instruct"):
        (step, state, data), (step2, state2, data2) = newest_state(plain, stage), newest_state(with_evals, stage)
        assert step == step2 == 4 and data == data2
        assert_equal(state, state2)
    losses = [[(r["stage"], r["step"], r["loss"]) for r in rows(d) if "loss" in r] for d in (plain, with_evals)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_resuming_neither_repeats_nor_skips(scenes, trained, tmp_path):
    """As after two crashes: during an evaluation at the end of a stage, and after one, before the next checkpoint."""
    shutil.copytree(trained[1], tmp_path, dirs_exist_ok=True)
    args = ("train", *settings(scenes, f"{CONFIG}:evaluated", **evaluation(scenes)), "--workdir", tmp_path)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines(True)
    lost = [line for line in lines if '"align", "step": 4, "eval": "held_out_loss"' in line]
    assert len(lost) == 1
    (tmp_path / "metrics.jsonl").write_text("".join(line for line in lines if line not in lost) + '{"stage": "al')
    shutil.rmtree(tmp_path / "instruct" / "checkpoints" / "4")
    jaxmllm(*args)
    found = [json.loads(line) for line in open(tmp_path / "metrics.jsonl") if line.endswith("}\n")]
    again = [json.loads(line) for line in lost]
    assert [row for row in found if row.get("eval") == "held_out_loss" and row["step"] == 4] == again
    assert sorted((row["stage"], row["step"], row["eval"]) for row in found if "eval" in row) == sorted(EXPECTED)
    assert [row["step"] for row in found if row["stage"] == "instruct" and "loss" in row] == [1, 2, 3, 4]
    replies = [(folder / "instruct" / "eval_replies.jsonl").read_text() for folder in (trained[1], tmp_path)]
    assert replies[0] == replies[1] and len(replies[0].splitlines()) == 6


def test_evaluation_may_change_on_resume(scenes, trained, tmp_path):
    """A new task of a finished stage is measured on its last step, and nothing is trained."""
    shutil.copytree(trained[0], tmp_path, dirs_exist_ok=True)
    jaxmllm("train", *settings(scenes, f"{CONFIG}:evaluated", **evaluation(scenes)), "--workdir", tmp_path)
    assert evals(tmp_path) == EXPECTED[2:]
    same = [row for row in rows(tmp_path) if row.get("eval") == "held_out_loss"]
    assert same == [row for row in rows(trained[1]) if row.get("eval") == "held_out_loss" and row["step"] == 4]


def test_own_parts_are_evaluated_and_talk_with_their_config_only(scenes, trained, tmp_path):
    workdir, picture = trained[1], next((scenes / "images" / "heldout").iterdir())
    for command in (("chat", workdir, "--prompt", "x"), ("eval", workdir, "--task", "reply_length")):
        done = jaxmllm(*command, check=False)
        assert done.returncode == 2 and "OwnFuser" in done.stderr and "add --config" in done.stderr, done.stderr
        assert "Traceback" not in done.stderr
    own = ("--config", f"{CONFIG}:evaluated")
    said = jaxmllm("chat", workdir, *own, "--image", picture, "--prompt", "Describe the image.")
    assert said.stdout.startswith("model:")
    out = tmp_path / "length.json"
    done = jaxmllm("eval", workdir, *own, "--task", "reply_length", "--out", out)
    assert "words in 6 replies" in done.stdout and f"details: {out}, {tmp_path}/length_replies.jsonl" in done.stdout
    last = next(row for row in rows(workdir) if row["stage"] == "instruct" and "eval" in row)
    found = json.loads(out.read_text())
    assert found["words"] == last["words"] and found["steps"] == 8
    assert len((tmp_path / "length_replies.jsonl").read_text().splitlines()) == 6


def test_a_task_of_a_file(scenes, trained, tmp_path):
    workdir, path = trained[1], tmp_path / "task.py"
    path.write_text(open(CONFIG).read().replace("data/scenes", str(scenes)))
    own = ("--config", CONFIG, "--out", tmp_path / "out.json")
    assert "words in 10 replies" in jaxmllm("eval", workdir, *own, "--task", f"{path}:length_of_ten").stdout
    refused = jaxmllm("eval", workdir, *own, "--task", f"{path}:length_of_tem", check=False)
    assert refused.returncode == 2 and "did you mean 'length_of_ten'" in refused.stderr
    nothing = jaxmllm("eval", workdir, *own, check=False)
    assert nothing.returncode == 2 and "either --rows" in nothing.stderr


@dataclasses.dataclass(frozen=True)
class Seen:
    """A task whose result is a parameter."""

    name: str = "seen"

    def prepare(self, run, stage, workdir):
        return lambda params, note: Result({path: float(x) for path, x in params.items()}, "")


def test_the_moving_average_is_measured_where_there_is_one(tmp_path):
    run = load("configs/toy.py:tiny")
    evals = StageEvals(run, dataclasses.replace(run.stages[0], evals=(Eval(task=Seen()),)), str(tmp_path))
    trained, average, frozen = {"a": jnp.array(1.0)}, {"a": jnp.array(2.0)}, {"b": jnp.array(3.0)}
    kept = []
    reporter = SimpleNamespace(log=lambda row, step, task: kept.append((row, step, task)), say=lambda line: None)
    for ema in ({}, average):
        evals(4, TrainState(jnp.array(4), trained, frozen, {}, ema), reporter)
    assert kept == [({"a": 1.0, "b": 3.0}, 4, "seen"), ({"a": 2.0, "b": 3.0}, 4, "seen")]
