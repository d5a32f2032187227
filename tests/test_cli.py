"""A mistaken command: one clear line, exit code 2, and no harm done. Bad samples, and `chat`."""

import json
import shutil

import pytest
from PIL import Image

from jaxmllm.recipes import load, to_document
from tests.conftest import jaxmllm, settings


def refused(*args, code=2):
    """The one line on stderr of a command that is refused."""
    done = jaxmllm(*args, check=False)
    assert done.returncode == code, done.stderr
    lines = [line for line in done.stderr.splitlines() if line]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("model.llm.layer=2", "did you mean 'layers'"),
        ("stages.instuct.steps=2", "did you mean 'instruct'"),
        ("model.llm.layers=two", "expected int"),
        ("model.llm.layers", "name=value"),
        ("model.llm.kv_heads=3", "multiple of kv_heads"),
        ("mesh.tensor=3", "does not fit 1 devices"),
        ("mesh.data=0", "mesh.data is 0; it must be a number of devices"),
        ("stages.align.data.shards=3", "the virtual shards must divide the rows"),
    ],
)
def test_typo_in_set(scenes, tmp_path, assignment, says):
    assert says in refused("train", *settings(scenes), assignment, "--workdir", tmp_path)
    assert not list(tmp_path.iterdir())


def test_unknown_variant_or_file(tmp_path):
    assert "did you mean 'tiny'" in refused("train", "configs/toy.py:tinny", "--workdir", tmp_path)
    assert "did you mean 'configs/toy.py'" in refused("train", "configs/toys.py", "--workdir", tmp_path)


def test_missing_data(tmp_path):
    line = refused("train", "configs/toy.py:tiny", "--workdir", tmp_path, "--set", "data.tokenizer=nowhere")
    assert "nowhere" in line


def test_rules_must_cover_every_parameter(scenes, tmp_path):
    args = settings(scenes, **{"stages.align.rules.0.pattern": "llm/.*"})
    assert "no rule covers parameter" in refused("train", *args, "--workdir", tmp_path)


def test_workdir_of_another_config(scenes, tmp_path):
    steps = {"stages.align.steps": 1, "stages.instruct.steps": 1}
    jaxmllm("train", *settings(scenes, **steps), "--workdir", tmp_path)
    line = refused("train", *settings(scenes, **steps, **{"model.llm.rope_theta": 5.0}), "--workdir", tmp_path)
    assert "belongs to another config" in line and "rope_theta" in line


@pytest.mark.parametrize(
    ("number", "says"),
    [(None, "format 1, and this version reads format 2; jaxmllm 0.1 reads it"), (9, "a newer jaxmllm")],
)
def test_workdir_of_another_format(scenes, tmp_path, number, says):
    document = to_document(load("configs/toy.py:tiny")) | {"format": number}
    if number is None:  # the first format had no number
        del document["format"]
    (tmp_path / "config.json").write_text(json.dumps(document))
    assert says in refused("train", *settings(scenes), "--workdir", tmp_path)
    assert says in refused("chat", tmp_path, "--prompt", "x")
    assert [path.name for path in tmp_path.iterdir()] == ["config.json"]


def test_bad_samples_are_named_and_the_run_goes_on(scenes, tmp_path):
    """Unusable records of every kind get a line in the ledger; the run finishes."""
    folder = tmp_path / "broken"
    shutil.copytree(scenes, folder)
    records = [json.loads(line) for line in open(folder / "align.jsonl")]
    picture = folder / records[0]["image"]
    picture.write_bytes(picture.read_bytes()[:300])
    (folder / records[1]["image"]).unlink()
    records[2]["conversations"][0]["value"] = "<image><image>\nDescribe the image."
    records[3]["conversations"][1]["value"] = ""
    (folder / "align.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    args = settings(folder, **{"stages.align.steps": 10, "stages.instruct.steps": 1})
    jaxmllm("train", *args, "--workdir", tmp_path / "run")
    entries = {e["id"]: e for e in map(json.loads, open(tmp_path / "run" / "bad_samples.jsonl"))}
    bad = [records[i]["id"] for i in range(4)]
    assert set(bad) <= set(entries)
    assert set(entries[bad[0]]) == {"source", "index", "id", "path", "reason"}
    assert entries[bad[0]]["path"].endswith(".jpg") and entries[bad[0]]["index"] == 0
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 11


def test_chat_answers_and_refuses(scenes, tmp_path):
    args = settings(scenes, **{"stages.align.steps": 1, "stages.instruct.steps": 1})
    jaxmllm("train", *args, "--workdir", tmp_path / "run")
    photo = tmp_path / "photo.png"
    Image.new("RGB", (300, 200), "red").save(photo)
    done = jaxmllm("chat", tmp_path / "run", "--image", photo, "--prompt", "Describe the image.")
    assert done.stdout.startswith("model:")
    assert "no picture" in refused("chat", tmp_path / "run", "--image", "gone.png", "--prompt", "x")
    assert "holds no run" in refused("chat", tmp_path / "empty", "--prompt", "x")
    photo.write_bytes(photo.read_bytes()[:100])
    assert "photo.png" in refused("chat", tmp_path / "run", "--image", photo, "--prompt", "x")
