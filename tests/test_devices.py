"""Several processes: the losses of one, resumed in another number of them; who reads what; what they say."""

import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmllm import config as configs
from jaxmllm import host_batches, mesh, processes
from jaxmllm.data.build import sample_spec
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.loader import Loader
from jaxmllm.data.sources.open import open_source
from tests.conftest import finish, jaxmllm, settings, start_processes

STEPS = {"stages.align.steps": 2, "stages.instruct.steps": 2, "mesh.fsdp": 4, "mesh.tensor": 2}


def losses(workdir):
    rows = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def one_device(scenes, tmp_path_factory):
    """Losses on a single device."""
    workdir = tmp_path_factory.mktemp("one")
    jaxmllm("train", *settings(scenes, **{**STEPS, "mesh.fsdp": 1, "mesh.tensor": 1}), "--workdir", workdir)
    return losses(workdir)


def same(found, expected):
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected):
        assert a[:2] == b[:2]
        assert a[2:] == pytest.approx(b[2:], rel=1e-5)


@pytest.mark.long  # the quick one is tests/test_meshes.py
def test_eight_devices(scenes, tmp_path, one_device):
    jaxmllm("train", *settings(scenes, **STEPS), "--workdir", tmp_path, devices=8)
    same(losses(tmp_path), one_device)


def test_two_processes(scenes, tmp_path, one_device):
    """They say first whom they wait for; losses are those of one device, and so are the answers to questions."""
    said = finish(start_processes(2, 4, "train", *settings(scenes, **STEPS), "--workdir", tmp_path))
    for i, (_, errors) in enumerate(said):
        first = errors.splitlines()[0]
        assert re.match(rf"\d\d:\d\d:\d\d process {i} of 2 on .*, coordinator 127.0.0.1:\d+: waiting", first)
    same(losses(tmp_path), one_device)


# Tensor goes across the processes, so both hold the same rows.
@pytest.mark.long
def test_processes_that_hold_the_same_rows(scenes, tmp_path, one_device):
    words = settings(scenes, **{**STEPS, "mesh.fsdp": 1, "mesh.context": 4})
    finish(start_processes(2, 4, "train", *words, "--workdir", tmp_path))
    same(losses(tmp_path), one_device)


@pytest.mark.long
def test_eval_in_two_processes(scenes, tmp_path):
    """The same answers as in one process, written once."""
    jaxmllm("train", *settings(scenes, **{"stages.align.steps": 2, "stages.instruct.steps": 40}), "--workdir", tmp_path)
    words = ("eval", tmp_path, "--rows", scenes / "heldout.jsonl", "--train-rows", scenes / "train_rows.jsonl")
    one = jaxmllm(*words, "--out", tmp_path / "one.json")
    said = finish(start_processes(2, 2, *words, "--out", tmp_path / "two.json", "--set", "mesh.tensor=2"))
    table = [out.splitlines()[:-1] for out, _ in said]
    assert table == [one.stdout.splitlines()[:-1], []]
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())


@pytest.mark.long
def test_resume_on_fewer_processes(scenes, tmp_path):
    """Four processes, stopped by a signal to one of them, then two, then one: losses of a run never interrupted."""
    steps = {"stages.align.steps": 12, "stages.instruct.steps": 2}
    straight, moved = tmp_path / "straight", tmp_path / "moved"
    jaxmllm("train", *settings(scenes, **steps), "--workdir", straight)
    for count, until, number in ((4, " 4/12", signal.SIGTERM), (2, " 8/12", signal.SIGINT)):
        processes = start_processes(count, 1, "train", *settings(scenes, **steps), "--workdir", moved)
        for line in processes[0].stderr:
            if until in line:
                break
        processes[-1].send_signal(number)
        assert all("the same command resumes it" in errors for _, errors in finish(processes))
        assert losses(moved)[-1][1] < 12
    jaxmllm("train", *settings(scenes, **steps), "--workdir", moved)
    found, expected = losses(moved), losses(straight)
    assert [row[:2] for row in found] == [row[:2] for row in expected] and len(found) == 14
    for a, b in zip(found, expected):
        assert a[2:] == pytest.approx(b[2:], rel=1e-4)  # rounding, which every update passes on


def test_each_process_reads_its_own_rows(scenes):
    """Four processes: no sample is read twice, all together read what one reads."""

    def ids(run, index, count):
        shares = Loader(
            [(open_source(s.path, s.image_root), s.weight) for s in run.stages[0].sources], sample_spec(run),
            Ledger(os.devnull, 0), rows=8, num_shards=4, process_index=index, process_count=count, threads=0,
        )  # fmt: skip
        with shares as loader:
            return [next(loader)[1]["sample_ids"] for _ in range(3)]

    words = settings(scenes)
    run = configs.override(configs.load(words[0]), words[2:])
    parts, whole = [ids(run, i, 4) for i in range(4)], ids(run, 0, 1)
    for step in range(3):
        read = np.concatenate([part[step] for part in parts])
        np.testing.assert_array_equal(read, whole[step])
    every = [i for rows in whole for i in rows[rows >= 0]]
    assert len(every) == len(set(every)) > 24


@pytest.mark.parametrize(
    "sizes, parts",
    [
        ({"fsdp": 8}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "tensor": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"context": 8}, [(0, 1)] * 4),
    ],
)
def test_parts_of_the_rows(sizes, parts):
    """Four hosts of two devices: those that tensor or context joins read the same rows."""
    devices = np.array([SimpleNamespace(process_index=i // 2) for i in range(8)], object)
    sizes = [{"slice": 1, "data": 1, "fsdp": 1, "tensor": 1, "context": 1, **sizes}[axis] for axis in mesh.AXES]
    found = SimpleNamespace(devices=devices.reshape(sizes), shape=dict(zip(mesh.AXES, sizes)))
    assert [host_batches.process_rows(found, process) for process in range(4)] == parts


@pytest.mark.parametrize("index, says", [(0, "another process has not been started"), (1, "does not answer")])
def test_a_process_that_never_comes(index, says):
    """Two lines, no stack trace: whom it waits for, and after the time-out what to look at."""
    process = start_processes(2, 1, prefix=("-c", "from jaxmllm import mesh; processes.start_processes(2)"))
    process.pop(1 - index).kill()
    errors = process[0].communicate(timeout=60)[1].splitlines()
    assert process[0].returncode == 1 and len(errors) == 2, errors
    assert "waiting for the others (up to 2 s)" in errors[0]
    assert "not all came within 2 s" in errors[1] and says in errors[1]
