"""A wrong name of anything that a command line can name gets one line with the name that was probably meant."""

import json
import re

import pytest

from jaxmllm.cli.main import main
from jaxmllm.errors import suggest_path
from jaxmllm.eval.tasks.cv_bench import load
from jaxmllm.recipes import to_document
from jaxmllm.weights.sources import open_source
from tests.conftest import ROOT, settings
from tests.tiny_run import tiny_run

TINY = "configs/toy.py:tiny"


@pytest.fixture(scope="module")
def workdir(scenes, tmp_path_factory):
    """A run that has not trained."""
    folder = tmp_path_factory.mktemp("runs") / "mine"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_document(tiny_run(scenes))))
    return folder


@pytest.fixture(autouse=True)
def root(monkeypatch):
    monkeypatch.chdir(ROOT)


def refused(capsys, *args) -> str:
    """The one line for a command that is refused."""
    assert main([str(arg) for arg in args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


@pytest.mark.parametrize(
    "args, meant",
    [
        (["bench", "configs/toy.py:tinny"], "tiny"),
        (["bench", "configs/toyy.py"], "configs/toy.py"),
        (["bench", "config/toy.py"], "configs/toy.py"),
        (["bench", "toy.py"], "configs/toy.py"),
        (["bench", TINY, "--stage", "algn"], "align"),
        (["data", "stats", TINY, "--stage", "instuct"], "instruct"),
        (["bench", TINY, "--set", "stage.align.steps=3"], "stages"),
        (["bench", TINY, "--set", "mesh.fdsp=2"], "fsdp"),
        (["bench", TINY, "--set", "init.lmm=random"], "llm"),
        (["bench", TINY, "--set", "init.encoders.clop=random"], "encoders.clip"),
        (["bench", TINY, "--set", "stages.align.losses.next_tokn=1"], "next_token"),
    ],
)
def test_names_of_configs(capsys, args, meant):
    assert f"did you mean {meant!r}?" in refused(capsys, *args)


def test_folders_of_runs(capsys, workdir):
    wrong, meant = f"{workdir.parent}/nine", f"did you mean '{workdir}'?"
    for command in (["report", wrong], ["chat", wrong, "--prompt", "x"], ["eval", wrong, "--rows", "x"]):
        assert meant in refused(capsys, *command)
    with pytest.raises(ValueError, match=re.escape(meant)):
        open_source(f"run:{wrong}")


def test_files_of_data(capsys, scenes):
    for wrong in (scenes / "aling.jsonl", scenes.parent / "scens" / "align.jsonl"):
        assert f"did you mean '{scenes}/align.jsonl'?" in refused(capsys, "data", "check", wrong)
    wrong = settings(scenes, **{"data.tokenizer": scenes / "tokeniser"})
    assert f"did you mean '{scenes}/tokenizer'?" in refused(capsys, "data", "stats", *wrong)


def test_pictures_and_rows(capsys, scenes, workdir):
    picture = next((scenes / "images" / "heldout").iterdir())
    wrong = picture.with_suffix(".jpeg")
    assert f"did you mean '{picture}'?" in refused(capsys, "chat", workdir, "--image", wrong, "--prompt", "x")
    with pytest.raises(ValueError, match="did you mean '.*heldout.jsonl'"):
        load(str(scenes / "held-out.jsonl"))


def test_paths(tmp_path):
    (tmp_path / "data" / "scenes").mkdir(parents=True)
    (tmp_path / "data" / "scenes" / "train.json").touch()
    near = f"{tmp_path}/data/scenes"
    assert suggest_path(f"{tmp_path}/data/scene") == f"; did you mean '{near}'?"
    assert suggest_path(f"{tmp_path}/dat/scenes/train.json") == f"; did you mean '{near}/train.json'?"
    assert suggest_path(f"{near}/trane.json/x") == f"; did you mean '{near}/train.json'?"
    for nothing in (near, f"{near}/quite/another", f"{near}/train.json", f"{near}/train.json/x", "", "/"):
        assert suggest_path(nothing) == ""
