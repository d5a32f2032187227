"""A run that is killed and resumed ends bit-equal to an uninterrupted one: parameters, optimizer, place in the data."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxmllm.train.events import records
from tests.conftest import ROOT, jaxmllm, settings


def newest_state(workdir, stage):
    """(step, state, position in the data) of a stage's newest checkpoint."""
    folder = workdir / stage / "checkpoints"
    step = max(int(p.name) for p in folder.iterdir() if p.name.isdigit())
    with ocp.PyTreeCheckpointer() as checkpointer:
        return (
            step,
            checkpointer.restore(folder / str(step) / "state"),
            json.loads((folder / str(step) / "data" / "metadata").read_text()),
        )


def leaves(tree, path=""):
    """Flattens nested dicts and lists to {path: array}."""
    if isinstance(tree, dict):
        return {k: v for name, part in tree.items() for k, v in leaves(part, f"{path}/{name}").items()}
    if isinstance(tree, (list, tuple)):
        return {k: v for i, part in enumerate(tree) for k, v in leaves(part, f"{path}/{i}").items()}
    return {} if tree is None else {path: np.asarray(tree)}


def assert_equal(a, b):
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys() and len(a) > 100
    for path in a:
        np.testing.assert_array_equal(a[path], b[path], err_msg=path)


def test_kill_and_resume_is_bit_equal(scenes, tmp_path):
    args = settings(scenes, **{"stages.align.steps": 6, "stages.instruct.steps": 6})
    jaxmllm("train", *args, "--workdir", tmp_path / "uninterrupted")
    killed = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxmllm", "train", *args, "--workdir", str(killed)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 240
    while not (killed / "align" / "checkpoints" / "2").is_dir() and time.time() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (killed / "align" / "checkpoints" / "2").is_dir()
    assert not list(killed.glob("instruct/checkpoints/*"))
    again = jaxmllm("train", *args, "--workdir", killed).stderr
    assert re.search(r"first step after [\d.]+ s \(\d+ programs from the cache, \d+ s saved\)", again), again
    for stage in ("align", "instruct"):
        step, state, data = newest_state(tmp_path / "uninterrupted", stage)
        step2, state2, data2 = newest_state(killed, stage)
        assert step == step2 == 6
        assert_equal(state, state2)
        assert data == data2
    rows = [[json.loads(line) for line in open(d / "metrics.jsonl")] for d in (tmp_path / "uninterrupted", killed)]
    losses = [{(r["stage"], r["step"]): r["loss"] for r in part} for part in rows]
    assert losses[0] == losses[1] and len(losses[0]) == 12


KILLS = 20


@pytest.mark.long
def test_many_kills_at_random_moments_are_bit_equal(scenes, tmp_path):
    """Every other kill comes while a checkpoint is being written."""
    steps = {"stages.align.steps": 120, "stages.instruct.steps": 120, "save_every": 3}
    args = settings(scenes, **steps)
    jaxmllm("train", *args, "--workdir", tmp_path / "unbroken")
    killed, chance, in_saves = tmp_path / "killed", random.Random(0), 0
    for number in range(KILLS):
        process = subprocess.Popen(
            [sys.executable, "-m", "jaxmllm", "train", *args, "--workdir", str(killed)],
            cwd=ROOT,
            stderr=subprocess.PIPE,
            text=True,
        )
        if number % 5 == 4:  # in start-up
            time.sleep(chance.uniform(0, 5))
        else:
            assert any(line.startswith("first step") for line in process.stderr), process.wait()
            for _ in range(chance.randrange(10)):  # steps, so that the run gets on however slow the machine is
                process.stderr.readline()
            time.sleep(chance.uniform(0, 0.1))
        deadline = time.monotonic() + 60
        while number % 2 and not saving(killed) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.001)
        process.kill()
        process.wait()
        assert process.returncode == -signal.SIGKILL, f"kill {number} came after the end"
        process.stderr.close()
        in_saves += bool(saving(killed))
    assert in_saves >= KILLS // 4 and newest_state(killed, "align")[0] > 3
    jaxmllm("train", *args, "--workdir", killed)
    for stage in ("align", "instruct"):
        one, other = newest_state(tmp_path / "unbroken", stage), newest_state(killed, stage)
        assert one[0] == other[0] == 120 and one[2] == other[2]
        assert_equal(one[1], other[1])
    assert rows(killed) == rows(tmp_path / "unbroken") and len(rows(killed)) == 240
    for stage in ("align", "instruct"):
        assert losses_on_the_board(killed / "tensorboard" / stage) == [
            (row["step"], pytest.approx(row["loss"])) for row in rows(killed) if row["stage"] == stage
        ]


def saving(workdir) -> list:
    """The unfinished checkpoints in a workdir."""
    return list(workdir.glob("*/checkpoints/*tmp*"))


def rows(workdir) -> list[dict]:
    """The rows of metrics without their times."""
    times = ("step_ms", "tokens_per_s", "images_per_s", "data_wait")
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k not in times} for row in lines]


def losses_on_the_board(folder) -> list[tuple[int, float]]:
    """(step, loss) of the events in a folder of TensorBoard, in order."""
    found = [event for path in folder.iterdir() for _, event in records(path.read_bytes())]
    return sorted((e.step, v.simple_value) for e in found for v in e.summary.value if v.tag == "loss")


def test_training_again_after_the_last_step_does_nothing(scenes, tmp_path):
    args = settings(scenes, **{"stages.align.steps": 2, "stages.instruct.steps": 2})
    jaxmllm("train", *args, "--workdir", tmp_path)
    before = (tmp_path / "metrics.jsonl").read_text()
    jaxmllm("train", *args, "--workdir", tmp_path)
    assert (tmp_path / "metrics.jsonl").read_text() == before


def test_sigterm_saves_a_checkpoint(scenes, tmp_path):
    args = settings(scenes, **{"stages.align.steps": 4000, "save_every": 100000})
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxmllm", "train", *args, "--workdir", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if " 5/" in line:
            break
    process.send_signal(signal.SIGTERM)
    rest = process.communicate(timeout=120)[1]
    assert process.returncode == 0 and "the same command resumes it" in rest
    step, _, _ = newest_state(tmp_path, "align")
    assert step >= 5


def test_changed_data_needs_the_option(scenes, tmp_path):
    """One line says what changed and which option accepts it; nothing is lost by asking."""
    folder, workdir = tmp_path / "scenes", tmp_path / "run"
    shutil.copytree(scenes, folder)
    args = ["train", *settings(folder, **{"stages.align.steps": 40, "stages.instruct.steps": 1}), "--workdir", workdir]
    process = subprocess.Popen(
        [sys.executable, "-m", "jaxmllm", *map(str, args)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stderr=subprocess.PIPE,
        text=True,
    )
    for line in process.stderr:
        if " 3/40" in line:
            break
    process.send_signal(signal.SIGTERM)
    assert "the same command resumes it" in process.communicate(timeout=120)[1]
    step = newest_state(workdir, "align")[0]
    records = (folder / "align.jsonl").read_text().splitlines(keepends=True)
    (folder / "align.jsonl").write_text("".join([*records, records[0]]))

    refused = jaxmllm(*args, check=False)
    assert refused.returncode == 2 and newest_state(workdir, "align")[0] == step
    assert f"had {len(records)} records and has {len(records) + 1} now" in refused.stderr.splitlines()[-1]
    assert "--accept-changed-data" in refused.stderr.splitlines()[-1]
    accepted = jaxmllm(*args, "--accept-changed-data").stderr
    assert accepted.count("records may be seen twice or never") == 1
    assert newest_state(workdir, "align")[0] == 40
    saved = newest_state(workdir, "align")[2]["sources"]
    assert [source["records"] for source in saved] == [len(records) + 1]
