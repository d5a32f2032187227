"""`jaxmllm data show`: what it says of a record is what the loader makes of it, or why the loader leaves it out."""

from __future__ import annotations

import dataclasses
import html
import json
import re

import numpy as np
import pytest
from PIL import Image

from jaxmllm.cli.main import main
from jaxmllm.config import Source
from jaxmllm.data.samples import Sample
from jaxmllm.data.show import show_record, target_map, to_document
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.tiling import Tiling
from jaxmllm.report.record import page
from tests.conftest import settings
from tests.loader_case import RECORDS, open_loader, sample_spec, take, write_source
from tests.records import write_bad_records, write_good_records, write_jsonl


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(folder, source, spec) of the loader's tests."""
    root = tmp_path_factory.mktemp("source")
    return root, write_source(root), sample_spec(root)


@pytest.mark.parametrize("tiling", [None, Tiling(((1, 2), (2, 1)), tile=8)])
def test_every_record_is_shown_as_the_loader_makes_it(case, tmp_path, tiling):
    root, source, spec = case
    if tiling:
        layout = dataclasses.replace(spec.layout, task_tokens=0)
        spec = dataclasses.replace(spec, tiling=tiling, image_slots=6, seq_len=96, layout=layout)
    loader = open_loader(source, spec, tmp_path, packing=False)
    seen = set()
    for batch, info in take(loader, 8):
        for row, (index, *_) in enumerate(info["sample_ids"].tolist()):
            document = to_document(show_record([source], index, spec), str(tmp_path / "out"))
            count = len(document["tokens"])
            assert document["error"] is None and document["index"] == document["record"] == index
            assert document["tokens"] == batch.tokens[row][:count].tolist()
            assert document["labels"] == batch.labels[row][:count].tolist()
            assert (batch.segment_ids[row] > 0).sum() == count == sum(len(p["ids"]) for p in document["pieces"])
            assert [i for piece in document["pieces"] for i in piece["ids"]] == document["tokens"]
            is_picture = [piece["image"] is not None for piece in document["pieces"] for _ in piece["ids"]]
            assert is_picture == (batch.visual_index[row][:count] >= 0).tolist()
            trained = [piece["trained"] for piece in document["pieces"] for _ in piece["ids"]]
            assert [label >= 0 for label in document["labels"]] == [*trained[1:], False]
            for name, image in document["images"].items():
                for slot, shown in enumerate(image["slots"]):
                    np.testing.assert_array_equal(np.asarray(Image.open(shown["file"])), batch.images[name][row, slot])
                    assert shown["padding"] == batch.padding[name][row, slot].tolist()
                assert image["file"] == image["slots"][0]["file"] and image["size"] == [batch.images[name].shape[2]] * 2
            for name, maps in document["targets"].items():
                assert [found["slot"] for found in maps] == np.flatnonzero(batch.target_mask[name][row]).tolist()
                for found in maps:
                    values = batch.targets[name][row, found["slot"]]
                    assert found["mean"] == pytest.approx(values.mean()) and found["shape"] == [*values.shape]
            seen.add(index)
    assert len(seen) == RECORDS
    loader.close()


def test_the_index_counts_over_the_sources(case, tmp_path):
    _, source, spec = case
    write_good_records(tmp_path)
    other = LlavaSource(tmp_path / "data.jsonl")
    found = show_record([source, other], RECORDS + 1, spec)
    assert (found.id, found.source, found.index, found.record) == ("wide", other.path, RECORDS + 1, 1)
    for index in (-1, RECORDS + 4):
        with pytest.raises(ValueError, match=f"no record {index}: the sources have {RECORDS + 4}"):
            show_record([source, other], index, spec)


def test_refusals_have_the_words_of_the_loader(case, tmp_path):
    from jaxmllm.data.mixture import SampleMaker

    _, _, spec = case
    write_good_records(tmp_path)
    source = LlavaSource(write_jsonl(tmp_path / "bad.jsonl", [*write_bad_records(tmp_path).values()]))
    maker = SampleMaker([source], dataclasses.replace(spec, seq_len=200, image_slots=4), 0)
    for place in range(len(source)):
        made, (_, index) = maker(0, place), maker.record(0, place)
        found = show_record([source], index, maker.spec)
        document = to_document(found, str(tmp_path / "out"))
        assert not isinstance(made, Sample) and document["error"] == str(made) and document["id"] == made.id
        assert document["tokens"] == [] and document["images"] == {} and json.dumps(document)
        if made.kind == "too long":
            assert sum(len(piece["ids"]) for piece in document["pieces"]) > 200
        assert made.reason in html.unescape(page("c.py", found))
    assert not (tmp_path / "out").exists()


def test_a_target_is_drawn_as_it_lies_in_the_picture():
    values = np.arange(18, dtype=np.float32).reshape(9, 2)
    drawn = target_map(values)
    assert drawn.shape == (24, 56) and drawn[0, 0] == 0 and drawn[-1, -1] == 255
    assert drawn[4, 20] == round(4 / 17 * 255) and drawn[12, 4] == round(6 / 17 * 255)
    assert target_map(np.ones((6, 1), np.float32)).shape == (8, 48)


# The command


@pytest.fixture(scope="module")
def scene_args(scenes):
    config, _, *values = settings(scenes)
    return config, values


def test_the_command_prints_json_and_writes_files(scenes, scene_args, tmp_path, capsys):
    config, values = scene_args
    paths = "--out", str(tmp_path / "out"), "--html", str(tmp_path / "page.html")
    assert main(["data", "show", config, "--index", "2", "--json", *paths, "--set", *values]) == 0
    document = json.loads(capsys.readouterr().out)
    needed = {"id", "source", "index", "error", "pieces", "tokens", "labels", "images", "targets"}
    assert needed <= document.keys() and document["source"] == str(scenes / "align.jsonl")
    assert {"text", "ids", "trained", "image"} == document["pieces"][0].keys()
    assert Image.open(document["images"]["clip"]["file"]).size == (48, 48) == tuple(document["images"]["clip"]["size"])
    assert document["targets"].keys() == {"depth", "seg"} and len([*(tmp_path / "out").iterdir()]) == 4
    text = (tmp_path / "page.html").read_text()
    assert text.count("data:image/png;base64,") == 4 and 'class="trained"' in text and 'class="picture"' in text


def test_the_command_in_words_and_in_colour(scene_args, capsys, monkeypatch):
    config, values = scene_args
    command = ["data", "show", config, "--stage", "instruct", "--index", "0", "--set", *values]
    assert main(command) == 0
    plain = capsys.readouterr().out
    assert "\x1b" not in plain and re.search(r'^trained +".*"  [\d ]+$', plain, re.M)
    assert re.search(r'^picture +"<image>"  \d+ tokens of picture 0$', plain, re.M)
    assert "encoder dino, slot 0: 48 x 48 pixels, padding" in plain and "target depth, slot 0: 36 queries of 4" in plain
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    assert main(command) == 0
    coloured = capsys.readouterr().out
    assert coloured.count("\x1b[1;32m") >= 1 and "\x1b[1;34m" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured) == plain


def test_the_command_refuses(scene_args, tmp_path, capsys):
    config, values = scene_args
    assert main(["data", "show", config, "--index", "999999", "--set", *values]) == 2
    assert "there is no record 999999" in capsys.readouterr().err
    assert main(["data", "show", config, "--index", "0", "--stage", "instuct", "--set", *values]) == 2
    assert "did you mean 'instruct'" in capsys.readouterr().err
    path = write_jsonl(tmp_path / "d.jsonl", [{"id": "\x1b[2J", "conversations": [], "image": "../x.jpg"}])
    assert Source(path).outside_root is False
    source = [f"stages.align.sources.0.path={path}"]
    values = [value for value in values if not value.startswith("stages.align.sources.0.path")]
    assert main(["data", "show", config, "--index", "0", "--set", *values, *source]) == 1
    out = capsys.readouterr().out
    assert "refused: sample \\x1b[2J" in out and "\x1b" not in out
