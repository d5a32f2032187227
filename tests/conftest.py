"""Shared helpers: a small data set made once, and the command line in processes of its own."""

import os
import socket
import subprocess
import sys
import tempfile
import time
import tracemalloc
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Many processes compile the same few programs; with one folder, removed at the end, the later ones read them from the
# cache.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    COMPILED = tempfile.TemporaryDirectory(prefix="jaxmllm-xla-", ignore_cleanup_errors=True)
    os.environ["JAX_COMPILATION_CACHE_DIR"] = COMPILED.name
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
# The tests spend most of their time compiling; programs this small run as fast without XLA's costly passes.
FLAGS = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
os.environ.setdefault("XLA_FLAGS", FLAGS)


def simulated(devices: int) -> dict[str, str]:
    """The environment of a process that sees this many CPU devices."""
    flags = f"{FLAGS} --xla_force_host_platform_device_count={devices}"
    return {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}


@pytest.fixture(scope="session")
def scenes(tmp_path_factory) -> Path:
    """Composed scenes: 160 for training, 24 held out."""
    from jaxmllm.scenes.files import make_scenes

    return make_scenes(tmp_path_factory.mktemp("data") / "scenes", train=160, heldout=24, processes=1)


def settings(scenes: Path, config: str = "configs/toy.py:tiny", **values) -> list[str]:
    """Command-line arguments: a config that reads `scenes`, with the fields `values` overridden."""
    values = {
        "data.tokenizer": scenes / "tokenizer",
        "stages.align.sources.0.path": scenes / "align.jsonl",
        "stages.instruct.sources.0.path": scenes / "instruct.jsonl",
        "stages.instruct.sources.1.path": scenes / "align.jsonl",
        **values,
    }
    return [config, "--set", *(f"{key}={value}" for key, value in values.items())]


def start_processes(count: int, devices: int, *args, prefix: tuple[str, ...] = ("-m", "jaxmllm")) -> list:
    """Starts `python -m jaxmllm ARGS` in `count` processes that find each other, each with `devices` CPU devices."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {"JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}", "JAX_NUM_PROCESSES": str(count)}
    return [
        subprocess.Popen(
            [sys.executable, *prefix, *map(str, args)],
            cwd=ROOT,
            env={**simulated(devices), **common, "JAX_PROCESS_ID": str(i)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(count)
    ]


def finish(processes: list) -> list[tuple[str, str]]:
    """Waits for processes, which must all succeed, and returns (stdout, stderr) of each."""
    outputs = [process.communicate(timeout=900) for process in processes]
    assert not any(process.returncode for process in processes), outputs
    return outputs


def jaxmllm(*args, devices: int = 1, check: bool = True, env: dict | None = None) -> subprocess.CompletedProcess:
    """Runs `python -m jaxmllm ARGS` from the repository's root, on simulated CPU devices."""
    done = subprocess.run(
        [sys.executable, "-m", "jaxmllm", *map(str, args)],
        cwd=ROOT,
        env={**simulated(devices), **(env or {})},
        capture_output=True,
        text=True,
    )
    assert not check or done.returncode == 0, done.stderr
    return done


def refusal(read, path) -> str:
    """The one line with which `read` refuses a file or folder."""
    with pytest.raises(ValueError) as error:
        read(path)
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000 and line.startswith(f"cannot read {path}")
    return line


@pytest.fixture
def bounded():
    """For tests that must take little memory and time."""
    tracemalloc.start()
    begun = time.process_time()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 100 << 20 and time.process_time() - begun < 20
