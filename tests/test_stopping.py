"""docs/stopping.md: what SIGTERM and SIGINT do in each phase of a run. Signals go to other processes only."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest

from tests.conftest import ROOT, settings, start_processes

SIGNALS = [signal.SIGTERM, signal.SIGINT]
LIGHT = """
import hashlib, sys, time
from jaxmllm.train import stop
stop.GRACE = 1.0
signals = stop.StopSignal()
try:
    with signals:
        print("ready", flush=True)
        {body}
except stop.Stopped:
    signals.end("stopped")
    {after}
"""
HELD = 'hashlib.pbkdf2_hmac("sha256", b"", b"", 30_000_000)'  # minutes in C, which no signal interrupts


def start(*command, seconds: float = 120) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    limit(process, seconds)
    return process


def limit(process: subprocess.Popen, seconds: float = 120) -> None:
    """Kills a process that a signal has not ended, so that the test fails and does not wait."""
    timer = threading.Timer(seconds, process.kill)
    timer.daemon = True
    timer.start()


def light(body: str, after: str = "pass") -> subprocess.Popen:
    """A process without JAX that is ready for signals and then does `body`, and `after` once it is stopped."""
    process = start("-c", LIGHT.format(body=body, after=after))
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)  # it is in `body` by now
    return process


@pytest.mark.parametrize("number", SIGNALS)
def test_a_start_is_ended_at_once(number):
    process = light("time.sleep(60)")
    process.send_signal(number)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == 0 and errors.endswith("jaxmllm: stopped\n")


@pytest.mark.parametrize("number", SIGNALS)
def test_a_start_that_cannot_be_interrupted_gets_a_line_at_once_and_ends_soon(number):
    process = light(HELD)
    sent = time.monotonic()
    process.send_signal(number)
    assert "nothing is trained yet" in process.stderr.readline()
    assert time.monotonic() - sent < 1
    process.communicate(timeout=10)
    assert process.returncode == 0


@pytest.mark.parametrize("number", SIGNALS)
def test_a_second_signal_ends_at_once(number):
    """Also while C++ holds the main thread in a step."""
    process = light(f"with signals.shielded(): {HELD}")
    process.send_signal(number)
    assert "saves and ends when this step is done" in process.stderr.readline()
    sent = time.monotonic()
    process.send_signal(number)
    assert f"{number.name} again: ended at once" in process.communicate(timeout=10)[1]
    assert process.returncode == 128 + number and time.monotonic() - sent < 5


def test_signals_that_come_together_count_as_one():
    process = light("with signals.shielded(): time.sleep(1)")
    for number in (*SIGNALS, *SIGNALS):
        process.send_signal(number)
    errors = process.communicate(timeout=10)[1]
    assert process.returncode == 0 and errors.endswith("; again: at once\njaxmllm: stopped\n")


def test_an_exception_that_python_drops_is_raised_again():
    """As in a callback of the garbage collector, of which JAX has one."""
    body = """import gc
        signals.starting = False
        gc.callbacks.append(lambda *_: time.sleep(1.5))
        print("ready", flush=True); gc.collect(); gc.callbacks.clear(); time.sleep(60)"""
    process = light(body)
    process.send_signal(signal.SIGTERM)
    errors = process.communicate(timeout=20)[1]
    assert process.returncode == 0 and "ignored" in errors and errors.endswith("jaxmllm: stopped\n")


def test_threads_that_wait_for_data_do_not_keep_the_process():
    process = light("time.sleep(60)", "import threading; threading.Thread(target=time.sleep, args=(60,)).start()")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=10)
    assert process.returncode == 0


def test_other_commands_end_at_ctrl_c():
    code = """if True:
        import signal

        from jaxmllm.cli import data_stats, main

        signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job starts with it ignored
        data_stats.run.__code__ = (lambda args: [print("ready", flush=True), __import__("time").sleep(60)]).__code__
        """
    process = start("-c", f"{code}raise SystemExit(main.main(['data', 'stats', 'configs/toy.py']))")
    assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=10)[1] == "jaxmllm: interrupted\n" and process.returncode == 130


def checkpoints(workdir) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "align" / "checkpoints").iterdir() if path.name.isdigit())


def test_each_phase_of_a_run(tmp_path):
    """phase -> the step that is saved last; the step in which the signal comes is finished, and then saved."""
    saved = {"startup": None, "first data": 0, "compile": 1, "step": 3, "data": 3, "evaluation": 3, "save": 4}
    process = start("-m", "tests.stop_case", tmp_path, *saved)
    for (phase, step), number in zip(saved.items(), SIGNALS * 4):
        while (line := process.stdout.readline()) != f"in {phase}\n":
            assert line, process.communicate()[1]
        sent = time.monotonic()
        process.send_signal(number)
        while "jaxmllm: " not in (line := process.stderr.readline()):
            assert line and "Traceback" not in line
        assert time.monotonic() - sent < 2, f"{phase}: no line at once"
        assert "told to stop" in line or phase not in ("compile", "step", "save")
        assert process.stdout.readline() == f"{phase} ended\n"
        assert time.monotonic() - sent < 30
        if step is None:
            assert not (tmp_path / phase / "config.json").exists()
            continue
        while "jaxmllm: stopped" not in line:
            line = process.stderr.readline()
            assert line and "Traceback" not in line
        if step == 0:
            assert line == "jaxmllm: stopped before stage align began; the same command resumes it\n"
            continue
        assert line == f"jaxmllm: stopped at step {step} of stage align, saved; the same command resumes it\n"
        folder = tmp_path / phase / "align" / "checkpoints"
        assert checkpoints(tmp_path / phase)[-1] == step
        assert json.loads((folder / str(step) / "data" / "metadata").read_text()) == {"0": {"place": step}}
    process.communicate(timeout=60)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.long)])
def test_two_processes_stop_at_the_same_step(tmp_path, number):
    """Only one gets the signal, while C++ holds its main thread: it answers at once, and both stop together."""
    started = start_processes(2, 1, tmp_path, "compile", prefix=("-m", "tests.stop_case"))
    for process in started:
        limit(process)
        while (line := process.stdout.readline()) != "in compile\n":
            assert line, process.communicate()[1]
    sent = time.monotonic()
    started[1].send_signal(number)
    while "told to stop" not in (line := started[1].stderr.readline()):
        assert line and "Traceback" not in line
    assert time.monotonic() - sent < 2
    outputs = [process.communicate(timeout=60) for process in started]
    assert [process.returncode for process in started] == [0, 0], outputs
    assert all(out == "compile ended\n" for out, _ in outputs)
    (step,) = checkpoints(tmp_path / "compile")
    assert f"stopped at step {step} of stage align, saved" in outputs[0][1]


RECIPE = """
import dataclasses, runpy
from jaxmllm.config import Eval
from jaxmllm.eval.tasks.held_out_loss import HeldOutLoss

def config():
    run = runpy.run_path("configs/toy.py")["tiny"]()
    first, second = run.stages
    evals = (Eval(task=HeldOutLoss(first.sources[0]), every=2),)
    stages = dataclasses.replace(first, steps=4000, evals=evals), second
    return dataclasses.replace(run, stages=stages, save_every=1000)
"""
# Phase -> the line after which it begins, and the seconds from then until it is under way
MARKS = {"compile": ("compiling", 5.0), "step": (" 1/4000", 0.3), "evaluation": (" 1/4000", 1.0)}


@pytest.mark.long
@pytest.mark.parametrize("phase", ["imports", *MARKS])
def test_a_real_run(scenes, tmp_path, phase):
    """The tiny recipe, really compiled: it stops, and goes on with the evaluation that it has given up."""
    recipe, workdir = tmp_path / "recipe.py", tmp_path / "run"
    recipe.write_text(RECIPE)
    values = {"stages.align.evals.0.task.source.path": scenes / "align.jsonl"}
    values |= {"stages.align.evals.0.every": 2 if phase == "evaluation" else 2000}
    command = ["-m", "jaxmllm", "train", *settings(scenes, str(recipe), **values), "--workdir", workdir]
    process = start(*command, seconds=900)
    if phase == "imports":
        time.sleep(1.5)
    else:
        mark, seconds = MARKS[phase]
        while mark not in (line := process.stderr.readline()):
            assert line, process.wait()
        time.sleep(seconds)
    sent, lines = time.monotonic(), []
    process.send_signal(signal.SIGTERM)
    heard = next(time.monotonic() - sent for line in process.stderr if lines.append(line) or "jaxmllm: " in line)
    lines += process.stderr.readlines()
    took = time.monotonic() - sent
    assert process.wait() == 0 and "Traceback" not in "".join(lines)
    # A line at once, and the end within a minute: of a compilation, as soon as the compiler is done.
    assert heard < 5 or phase == "imports"
    assert took < 60 or phase == "compile"
    if phase == "imports":
        assert lines[-1] == "jaxmllm: stopped before it trained; the same command starts it again\n"
        assert not (workdir / "config.json").exists()
        return
    assert "told to stop: saves and ends when this step is done" in "".join(lines) or phase == "evaluation"
    step = int(re.fullmatch(r"jaxmllm: stopped at step (\d+) of stage align, saved; .* resumes it\n", lines[-1])[1])
    assert checkpoints(workdir) == [step] and step == {"compile": 1, "evaluation": 2}.get(phase, step)
    if phase == "evaluation":
        evaluated = lambda: [r["step"] for r in map(json.loads, open(workdir / "metrics.jsonl")) if "eval" in r]
        assert not evaluated()
        process = start(*command, seconds=900)
        while " 3/4000" not in (line := process.stderr.readline()):
            assert line
        process.send_signal(signal.SIGTERM)
        process.communicate()
        assert evaluated()[0] == 2
