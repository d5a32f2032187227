"""`jaxmllm train --dry-run`: what it prints is right, and it writes nothing."""

import re

import pytest

from jaxmllm import bench
from jaxmllm.cli.main import main
from tests.conftest import settings

RECIPE = """
import dataclasses, runpy
from jaxmllm.train.optimizers import AdamW
from jaxmllm.train.schedules import Cosine

def config():
    run = runpy.run_path("configs/toy.py")["tiny"]()
    optim = AdamW(lr=2e-3, schedule=Cosine(warmup=0.05, final=0.5))
    return dataclasses.replace(run, stages=tuple(dataclasses.replace(s, optim=optim) for s in run.stages))
"""
MEASURED = {
    "step_seconds": 0.5,
    "data_wait_seconds": 0.1,
    "compile_seconds": 30.0,
    "peak_memory_bytes": 3 * 2**20,
    "peak_memory_from": "compiler",
}


def dry_run(capsys, *args) -> str:
    code = main(["train", *map(str, args), "--dry-run"])
    found = capsys.readouterr()
    assert code == 0, found.err
    return found.out


def test_what_it_prints(scenes, tmp_path, capsys, monkeypatch):
    """The figures of the state are exact: 4 bytes for each trained value and for each of Adam's two moments."""
    monkeypatch.setattr(bench, "measure", lambda *args, **options: MEASURED)
    values = {"stages.align.steps": 100, "data.packing": False, "mesh.fsdp": 1}
    recipe, workdir = tmp_path / "recipe.py", tmp_path / "run"
    recipe.write_text(RECIPE)
    (workdir / "align" / "checkpoints" / "40").mkdir(parents=True)
    said = dry_run(capsys, *settings(scenes, str(recipe), **values), "--workdir", workdir)
    total = int(re.search(r"all +([\d,]+) +100.0% +([\d,]+) trained", said)[1].replace(",", ""))
    llm = int(re.search(r"^llm +Decoder +([\d,]+) ", said, re.M)[1].replace(",", ""))
    assert 0 < llm < total
    align, instruct = said.split("\nstage ")[1:]
    assert align.startswith("align: steps 41 to 100\n") and instruct.startswith("instruct: steps 1 to 4\n")
    assert "8.0 samples a step, in 8 rows of 240 tokens and 3 pictures" in align
    assert "160 samples an epoch, of 160 records in 1 sources: 5.00 epochs" in align
    assert "of 320 records in 2 sources" in instruct
    assert f"trained  {total:,} of {total:,} parameters" in align
    state, trained, optimizer = map(float, re.search(r"([\d.]+) MiB .* ([\d.]+) KiB, .* ([\d.]+) KiB", align).groups())
    assert trained == pytest.approx(4 * total / 1024, rel=0.01)
    assert optimizer == pytest.approx(2 * trained, rel=0.01) and 1024 * state == pytest.approx(3 * trained, rel=0.01)
    assert re.search(r"0.0004 at step 1, 0.002 at step 5, 0.001 at step 100: AdamW, Cosine\(", align)
    assert "3 MiB a device, as the compiler counts it" in align
    assert "600 ms a step (3 measured, 100 of it waiting for data), 30 s to compile: 01:06 in all" in align
    assert "30 s to compile: 00:32 in all" in instruct and "in all 01:38," in said
    assert [path.name for path in workdir.rglob("*")] == ["align", "checkpoints", "40"]


def test_it_refuses_what_training_refuses(scenes, tmp_path, capsys):
    args = [*settings(scenes), "stages.align.data.shards=3", "--workdir", str(tmp_path / "run"), "--dry-run"]
    assert main(["train", *args]) == 2
    assert "the virtual shards must divide the rows" in capsys.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.long
def test_with_measured_steps(scenes, tmp_path, capsys):
    said = dry_run(capsys, *settings(scenes, **{"mesh.fsdp": 1}), "--workdir", tmp_path / "run")
    assert len(re.findall(r"time     [1-9]\d* ms a step", said)) == 2 and not list(tmp_path.iterdir())
