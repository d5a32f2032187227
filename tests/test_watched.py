"""A training process that dies without a word: its parent names the records that were being read."""

import json
import re
import signal
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT, settings

LIGHT = """
import os, signal, sys, threading, time
from jaxmllm import watched
code = watched.watch()
if code is not None:
    sys.exit(code)
{body}
"""
DIES = """
watched.note("record 7 of good.jsonl")
watched.note("")
def read():
    watched.note("record 8 of data.jsonl, 8.png")
    {death}
threading.Thread(target=read).start()
time.sleep(60)
"""


def start(body: str) -> subprocess.Popen:
    command = [sys.executable, "-c", LIGHT.format(body=body)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


@pytest.mark.parametrize(
    ("death", "how"),
    [
        ("os._exit(0)", "with exit code 0"),
        ("os._exit(17)", "with exit code 17"),
        ("os.kill(os.getpid(), signal.SIGKILL)", "by SIGKILL"),
        ("__import__('ctypes').string_at(0)", "by SIGSEGV"),
    ],
)
def test_a_crash_names_the_record(death, how):
    process = start(DIES.format(death=death))
    said = f"jaxmllm: the training process died {how} while it read record 8 of data.jsonl, 8.png; "
    assert process.communicate(timeout=20) == ("", said + "what it has saved is intact\n")
    assert process.returncode == 1


@pytest.mark.parametrize("code", [0, 1, 2, 130])
@pytest.mark.parametrize("way", ["sys.exit", "watched.leave"])
def test_an_end_that_was_meant_keeps_its_exit_code(way, code):
    process = start(f"watched.note('x'); {way}({code})")
    assert process.communicate(timeout=20) == ("", "") and process.returncode == code


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_are_passed_on(number):
    body = f"signal.signal({int(number)}, lambda *_: sys.exit(5)); print('ready', flush=True); time.sleep(60)"
    process = start(body)
    assert process.stdout.readline() == "ready\n"
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 5


def test_a_signal_that_ends_the_child_is_no_crash():
    process = start("print('ready', flush=True); time.sleep(60)")
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate(timeout=20) == ("", "") and process.returncode == 128 + signal.SIGTERM


def test_the_child_dies_with_its_parent():
    process = start("print('ready', flush=True); time.sleep(60); print('alive')")
    assert process.stdout.readline() == "ready\n"
    process.kill()
    sent = time.monotonic()
    assert process.communicate(timeout=20) == ("", "") and time.monotonic() - sent < 10  # nobody holds the pipes


RECIPE = """
import dataclasses, os, runpy
from jaxmllm.data.templates import ChatTemplate

@dataclasses.dataclass(frozen=True)
class Fragile(ChatTemplate):
    def pieces(self, *record, **options):
        if "fragile" in str(record) and os.path.exists({armed!r}):
            {death}
        return super().pieces(*record, **options)

def config():
    run = runpy.run_path("configs/toy.py")["tiny"]()
    template = Fragile(**{{f.name: getattr(run.data.template, f.name) for f in dataclasses.fields(ChatTemplate)}})
    return dataclasses.replace(run, data=dataclasses.replace(run.data, template=template), save_every=1)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    ("death", "says"),
    [
        ("os._exit(17)", "the training process died with exit code 17 while it read record 77 of "),
        ("raise KeyError('x')", "making a sample of record 77 of "),
        ("raise SystemExit", "making a sample of record 77 of "),
    ],
)
def test_a_run_whose_loader_fails(scenes, tmp_path, death, says):
    """In the middle of training: one line, exit code 1; what was saved is complete, and the run can go on from it."""
    recipe, workdir, data, armed = (tmp_path / name for name in ("recipe.py", "run", "align.jsonl", "armed"))
    recipe.write_text(RECIPE.format(death=death, armed=str(armed)))
    records = [json.loads(line) for line in open(scenes / "align.jsonl")]
    records[77]["conversations"][0]["value"] += " fragile"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    values = {"stages.align.sources.0.path": data, "stages.align.sources.0.image_root": scenes}
    args = [*settings(scenes, str(recipe), **values, **{"stages.align.steps": 4000}), "--workdir", workdir]
    command = [sys.executable, "-m", "jaxmllm", "train", *map(str, args)]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    assert any(" 2/4000" in line for line in process.stderr)
    armed.touch()
    errors = process.stderr.read()
    (line,) = [line for line in errors.splitlines() if line.startswith("jaxmllm: ")]
    assert process.wait() == 1 and says + str(data) in line and records[77]["image"] in line, errors
    assert "Traceback" not in errors
    armed.unlink()
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stderr)
    begun = next(int(match[1]) for line in lines if (match := re.match(r"stage align: steps (\d+) to", line)))
    assert begun >= 1 and any(line.startswith("first step") for line in lines)
    process.terminate()
    process.communicate()
    assert process.returncode == 0
