"""The same global batch gives the same loss on 1 device, on 8 (fsdp 4 x tensor 2) and in 2 processes x 4 devices."""

import json
import os
import socket
import subprocess
import sys

import pytest

from tests.conftest import ROOT, jaxmllm, settings

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


def test_eight_devices(scenes, tmp_path, one_device):
    jaxmllm("train", *settings(scenes, **STEPS), "--workdir", tmp_path, devices=8)
    same(losses(tmp_path), one_device)


def test_two_processes(scenes, tmp_path, one_device):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [
        sys.executable,
        "-m",
        "jaxmllm.main",
        "train",
        *settings(scenes, **STEPS),
        "--workdir",
        str(tmp_path),
    ]
    processes = [
        subprocess.Popen(
            words,
            cwd=ROOT,
            env={
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": str(i),
            },
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [p.communicate(timeout=400)[1] for p in processes]
    assert [p.returncode for p in processes] == [0, 0], errors
    same(losses(tmp_path), one_device)
