"""Several devices and processes: the losses of one device, resuming in fewer processes, rows, and missing processes."""

import json
import os
import re
import signal
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmllm import host_batches, mesh, recipes
from jaxmllm.data.build import sample_spec
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.loader import Loader
from jaxmllm.data.sources.open import open_source
from tests.conftest import finish, jaxmllm, settings, start_processes

STEPS = {"stages.align.steps": 2, "stages.instruct.steps": 2, "mesh.fsdp": 4, "mesh.tensor": 2}


def losses(workdir):
    """(stage, step, loss, gradient norm) of every step of a run."""
    rows = [json.loads(line) for line in open(workdir / "metrics.jsonl")]
    return [(row["stage"], row["step"], row["loss"], row["grad_norm"]) for row in rows]


@pytest.fixture(scope="module")
def one_device(scenes, tmp_path_factory):
    """The losses of a run on one device."""
    workdir = tmp_path_factory.mktemp("one")
    jaxmllm("train", *settings(scenes, **{**STEPS, "mesh.fsdp": 1, "mesh.tensor": 1}), "--workdir", workdir)
    return losses(workdir)


def assert_same_losses(found, expected):
    assert len(found) == len(expected) == 4
    for a, b in zip(found, expected):
        assert a[:2] == b[:2]
        assert a[2:] == pytest.approx(b[2:], rel=1e-5)


@pytest.mark.long  # tests/test_meshes.py has a fast form of it
def test_eight_devices_give_the_losses_of_one(scenes, tmp_path, one_device):
    jaxmllm("train", *settings(scenes, **STEPS), "--workdir", tmp_path, devices=8)
    assert_same_losses(losses(tmp_path), one_device)


def test_two_processes_give_the_losses_of_one_device(scenes, tmp_path, one_device):
    """Their first line says which process it is and that it waits for the others."""
    outputs = finish(start_processes(2, 4, "train", *settings(scenes, **STEPS), "--workdir", tmp_path))
    for i, (_, errors) in enumerate(outputs):
        first = errors.splitlines()[0]
        assert re.match(rf"\d\d:\d\d:\d\d process {i} of 2 on .*, coordinator 127.0.0.1:\d+: waiting", first)
    assert_same_losses(losses(tmp_path), one_device)


@pytest.mark.long
def test_processes_that_hold_the_same_rows_give_the_losses_of_one_device(scenes, tmp_path, one_device):
    """The tensor axis goes across the two processes, so both hold the same rows."""
    args = settings(scenes, **{**STEPS, "mesh.fsdp": 1, "mesh.context": 4})
    finish(start_processes(2, 4, "train", *args, "--workdir", tmp_path))
    assert_same_losses(losses(tmp_path), one_device)


@pytest.mark.long
def test_eval_in_two_processes_gives_the_answers_of_one(scenes, tmp_path):
    """Only the first process prints the table and writes the file."""
    jaxmllm("train", *settings(scenes, **{"stages.align.steps": 2, "stages.instruct.steps": 40}), "--workdir", tmp_path)
    args = ("eval", tmp_path, "--rows", scenes / "heldout.jsonl", "--train-rows", scenes / "train_rows.jsonl")
    one = jaxmllm(*args, "--out", tmp_path / "one.json")
    outputs = finish(start_processes(2, 2, *args, "--out", tmp_path / "two.json", "--set", "mesh.tensor=2"))
    # JAX's transport between processes on CPUs prints lines of its own.
    tables = [[line for line in out.splitlines() if not line.startswith("[Gloo]")][:-1] for out, _ in outputs]
    assert tables == [one.stdout.splitlines()[:-1], []]
    assert json.loads((tmp_path / "one.json").read_text()) == json.loads((tmp_path / "two.json").read_text())


@pytest.mark.long
def test_resumed_in_fewer_processes_losses_are_those_of_an_uninterrupted_run(scenes, tmp_path):
    """Four processes, then two, each time until one of them gets a signal; then one process."""
    steps = {"stages.align.steps": 12, "stages.instruct.steps": 2}
    uninterrupted, moved = tmp_path / "uninterrupted", tmp_path / "moved"
    jaxmllm("train", *settings(scenes, **steps), "--workdir", uninterrupted)
    for count, until, stop in ((4, " 4/12", signal.SIGTERM), (2, " 8/12", signal.SIGINT)):
        started = start_processes(count, 1, "train", *settings(scenes, **steps), "--workdir", moved)
        for line in started[0].stderr:
            if until in line:
                break
        started[-1].send_signal(stop)
        assert all("the same command resumes it" in errors for _, errors in finish(started))
        assert losses(moved)[-1][1] < 12
    jaxmllm("train", *settings(scenes, **steps), "--workdir", moved)
    found, expected = losses(moved), losses(uninterrupted)
    assert [row[:2] for row in found] == [row[:2] for row in expected] and len(found) == 14
    for a, b in zip(found, expected):
        assert a[2:] == pytest.approx(b[2:], rel=1e-4)  # every update adds to the rounding


def test_four_processes_together_read_what_one_reads(scenes):
    """No sample is read twice."""

    def ids(run, index, count):
        loader = Loader(
            [(open_source(s.path, s.image_root), s.weight) for s in run.stages[0].sources], sample_spec(run),
            Ledger(os.devnull, 0), rows=8, num_shards=4, process_index=index, process_count=count, threads=0,
        )  # fmt: skip
        with loader:
            return [next(loader)[1]["sample_ids"] for _ in range(3)]

    config, _, *overrides = settings(scenes)
    run = recipes.override(recipes.load(config), overrides)
    of_four, of_one = [ids(run, i, 4) for i in range(4)], ids(run, 0, 1)
    for step in range(3):
        read = np.concatenate([batches[step] for batches in of_four])
        np.testing.assert_array_equal(read, of_one[step])
    every = [i for rows in of_one for i in rows[rows >= 0]]
    assert len(every) == len(set(every)) > 24


@pytest.mark.parametrize(
    "sizes, parts",
    [
        ({"fsdp": 8}, [(0, 4), (1, 4), (2, 4), (3, 4)]),
        ({"data": 2, "tensor": 4}, [(0, 2), (0, 2), (1, 2), (1, 2)]),
        ({"context": 8}, [(0, 1)] * 4),
    ],
)
def test_processes_joined_by_tensor_or_context_read_the_same_rows(sizes, parts):
    """Four processes with two devices each."""
    devices = np.array([SimpleNamespace(process_index=i // 2) for i in range(8)], object)
    sizes = [{"slice": 1, "data": 1, "fsdp": 1, "tensor": 1, "context": 1, **sizes}[axis] for axis in mesh.AXES]
    found = SimpleNamespace(devices=devices.reshape(sizes), shape=dict(zip(mesh.AXES, sizes)))
    assert [host_batches.process_rows(found, process) for process in range(4)] == parts


@pytest.mark.parametrize("index, says", [(0, "another process has not been started"), (1, "does not answer")])
def test_a_missing_process_is_reported_after_the_time_out(index, says):
    """Two lines without a stack trace: what the process waits for, and then what to look at."""
    started = start_processes(2, 1, prefix=("-c", "from jaxmllm import processes; processes.start_processes(2)"))
    started.pop(1 - index).kill()
    errors = started[0].communicate(timeout=60)[1].splitlines()
    assert started[0].returncode == 1 and len(errors) == 2, errors
    assert "waiting for the others (up to 2 s)" in errors[0]
    assert "some are still missing after 2 s" in errors[1] and says in errors[1]


def test_processes_with_different_data_are_refused():
    """Each of two processes has another version of the second source; both name it."""
    code = """
import os
from jaxmllm import processes
from jaxmllm.data.build import check_same_everywhere
processes.start_processes(60)
own = "0" + os.environ["JAX_PROCESS_ID"]
check_same_everywhere([{"path": "a", "fingerprint": "00"}, {"path": "b", "fingerprint": "01"}])
try:
    check_same_everywhere([{"path": "a", "fingerprint": "00"}, {"path": "b", "fingerprint": own}])
except ValueError as error:
    print(error)
"""
    for said, _ in finish(start_processes(2, 1, prefix=("-c", code))):
        assert "the processes read different versions of b" in said
