"""config.json of others: it builds a run of known classes whose values fit, or is refused in one line."""

from __future__ import annotations

import json
import sys

import pytest

from jaxmllm.config import Data, Source, Stage
from jaxmllm.documents import find_class, from_document, is_storable, read_document, stages_of, to_document
from jaxmllm.errors import ConfigError
from jaxmllm.fields import Natural, NonNegative, Positive, fits, problem
from jaxmllm.recipes import load, namespace, override, read_run
from tests.conftest import ROOT

TINY = f"{ROOT}/configs/toy.py:tiny"


@pytest.fixture
def document():
    return json.loads(json.dumps(to_document(load(TINY))))


def refused(document) -> str:
    with pytest.raises(ConfigError) as error:
        from_document(document, "there/config.json")
    line = str(error.value)
    assert line.isprintable() and len(line) < 1000
    return line


def place(document, path):
    """(holder, key) of a dotted path in a document."""
    *parents, last = (int(key) if key.isdigit() else key for key in path.split("."))
    for key in parents:
        document = document[key]
    return document, last


@pytest.mark.parametrize(
    "path, value, says",
    [
        ("stages.0.steps", "abc", "Stage: steps is 'abc', but must be int | None"),
        ("stages.0.steps", True, "Stage: steps is True"),
        ("stages.0.steps", 1.5, "Stage: steps is 1.5"),
        ("stages.0.steps", -3, "steps is -3, but must be positive"),
        ("stages.0.rows", 0, "rows is 0, but must be positive"),
        ("stages.0.accumulate", 0, "accumulate is 0, but must be positive"),
        ("stages.0.ema", "x", "Stage: ema is 'x'"),
        ("stages.0.sources", [3], "Stage: sources is (3,)"),
        ("stages.0.sources", {"dict": {}}, "Stage: sources is {}"),
        ("stages.0.losses", {"dict": {"depth": "much"}}, "Stage: losses is {'depth': 'much'}"),
        ("stages.0.optim", 3, "Stage: optim is 3, which has no direction()"),
        ("stages.0.data", {"dict": {"template": 3}}, "data: template is 3, which has no of()"),
        ("stages.0.data", {"dict": {"targets": [1]}}, "targets is (1,), but|targets is 1, which has no spec()"),
        ("data.template", None, "Data: template is None, which has no of()"),
        ("loggers", [None], "Run: loggers is None, which has no open()"),
        ("loggers", [3], "Run: loggers is 3, which has no open()"),
        ("stages", 3, "Run: stages is 3"),
        ("model", None, "Run: model is None"),
        ("model.llm.layers", "two", "Decoder: layers is 'two', but must be a positive int"),
        ("model.llm.heads", 3, "Decoder: "),
        ("model.encoders.dict.clip", 3, "MLLM: encoders is"),
        ("data.tokenizer", [1], "Data: tokenizer is (1,)"),
        ("mesh", [], "Run: mesh is ()"),
        ("seed", {"a": 1}, "an object without a class"),
        ("seed", {"dict": []}, "an object without a class"),
        ("seed", {"class": ["jaxmllm.config:Source"]}, "an object without a class"),
        ("mesh", {"class": "jaxmllm.config:Source", "path": "x"}, "Run: mesh is Source"),
        ("data.more", 3, "Data has no 'more'"),
        ("model.llm.parent", None, "Decoder has no 'parent'"),
        ("data.tokenizr", "x", "Data has no 'tokenizr'; did you mean 'tokenizer'"),
    ],
)
def test_values_that_do_not_fit(document, path, value, says):
    holder, key = place(document, path)
    holder[key] = value
    line = refused(document)
    assert any(text in line for text in says.split("|"))


def test_a_field_that_is_missing(document):
    del document["stages"][0]["rules"]
    assert "Stage: " in refused(document) and "rules" in refused(document)


def test_a_name_that_would_steer_a_terminal(document):
    document["init"]["objectives"]["dict"]["\n\x1b[2J\ud800"] = "run:x"
    assert refused(document).startswith(r"init.objectives.\n\x1b[2J\ud800: the model has no such part")


@pytest.mark.parametrize("content", [None, 3, [], "x", {"format": []}, {"format": True}, {"format": {"a": 1}}, {}])
def test_documents_of_no_format(content):
    refused(content)


@pytest.mark.parametrize("content", [{}, {"class": "jaxmllm.config:Source", "path": "x"}, {"dict": {}}])
def test_documents_of_no_run(content):
    refused({"format": 2, **content})


@pytest.mark.parametrize(
    "kind",
    [
        "jaxmllm.__main__:main", "jaxmllm.cli.main:main", "jaxmllm.errors:ConfigError", "jaxmllm.config:Any",
        "jaxmllm.config:dataclasses", "jaxmllm:config", ":", "", "os:system", "jaxmllm.config", "jaxmllm..config:Run",
        "jaxmllm.config:Mesh", "jaxmllm/config:Run", ".config:Run", "jaxmllm.errors:difflib", "builtins:type",
        "dataclasses:Field", "jaxmllm.config.Run:Run", "\0:Run", "jaxmllm.\ud800:Run", "grain:MapDataset",
    ],
)  # fmt: skip
@pytest.mark.parametrize("trusted", [False, True])
def test_only_classes_of_configs_are_found(kind, trusted):
    before = {name for name in sys.modules if not name.startswith("jaxmllm")}
    with pytest.raises(ConfigError, match="which is not a class of jaxmllm") as error:
        find_class(kind, namespace(f"{ROOT}/configs/toy.py") if trusted else None)
    assert str(error.value).isprintable()
    assert before == {name for name in sys.modules if not name.startswith("jaxmllm")}


def test_a_config_file_does_not_open_python(tmp_path):
    """A config that imports a module of Python's own does not let a document name the classes of it."""
    (tmp_path / "own.py").write_text("import unittest.mock\nimport pstats\nfrom http import client\n")
    names = namespace(str(tmp_path / "own.py"))
    for kind in ("pstats:StatsProfile", "pstats:FunctionProfile"):
        with pytest.raises(ConfigError, match="not a class of jaxmllm"):
            find_class(kind, names)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff", b"[" * 100_000, b'{"a": 1, "a": 2}', b'{"a": "\\ud800"}', b" " * (17 << 20), b"1" * 5000],
)
def test_files_that_cannot_be_read(tmp_path, content):
    (tmp_path / "config.json").write_bytes(content)
    for read in (lambda: read_document(tmp_path / "config.json"), lambda: read_run(str(tmp_path))):
        with pytest.raises(ConfigError, match="cannot read .*config.json: ") as error:
            read()
        assert str(error.value).isprintable()


def test_stages_of_a_document():
    good = {"stages": [{"name": "a", "steps": 3, "more": None}]}
    assert stages_of(good, "f") == good["stages"]
    for bad in (
        None,
        {},
        {"stages": 3},
        {"stages": [3]},
        {"stages": [{"name": "a"}]},
        {"stages": [{"name": 1, "steps": 1}]},
    ):
        with pytest.raises(ConfigError, match="f does not say the names and steps"):
            stages_of(bad, "f")


# Overrides


@pytest.mark.parametrize(
    "text",
    [
        "1j",
        "b'x'",
        "{1, 2}",
        "{1: 2}",
        "...",
        "1e999",
        "-1e999",
        "(1, {'a': b''})",
        str(2**63),
        "9" * 4000,
        "'\\ud800'",
    ],
)
def test_overrides_take_only_what_a_config_holds(text):
    with pytest.raises(ConfigError, match="a config holds None, True, False, texts, finite numbers") as error:
        override(load(TINY), [f"stages.align.data.shards={text}"])
    assert str(error.value).isprintable() and len(str(error.value)) < 1000


@pytest.mark.parametrize(
    "assignment",
    [
        "stages.align.accumulate=0", "stages.align.ema='a'", "stages.align.data.template=3", "data.targets=3",
        "stages.align.data.targets=[3]", "model=None", "stages=None", "stages.align.rules=[3]", "loggers=[3]",
        "stages.align.losses={'depth': 'x'}", "stages.align.optim=None", "data.shards=x", "init.llm=3",
        "mesh.data=None",
        "=", ".=1", "a..b=1", "stages.align.data.=1", "model.encoders={}", "model.encoders.clip=None", "seed=None",
        "stages.align.sources=[]", "stages.align.epochs=-1", "name=" + "(" * 500, "seed=" + "-" * 20_000 + "1",
    ],
)  # fmt: skip
def test_overrides_are_refused_in_one_line(assignment):
    if assignment.startswith("name="):  # text that Python cannot read is a text
        assert override(load(TINY), [assignment]).name == "(" * 500
    elif assignment == "stages.align.sources=[]":  # no data: refused when the data is opened
        assert override(load(TINY), [assignment]).stages[0].sources == ()
    else:
        with pytest.raises(ConfigError) as error:
            override(load(TINY), [assignment])
        assert "\n" not in str(error.value)


def test_values_survive_json_as_they_are():
    run = override(
        load(TINY), ["model.encoders.clip.taps=[1, 2]", "stages.align.data={'seq_len': 300, 'targets': None}"]
    )
    assert from_document(json.loads(json.dumps(to_document(run))), "f") == run
    assert is_storable((1, ("a", {"b": (None, 1.5)}))) and not is_storable([1]) and not is_storable(float("nan"))


# Fields


@pytest.mark.parametrize(
    "hint, good, bad",
    [
        (int, (0, -3), (True, 1.0, "1", None)),
        (float, (1, 1.5), (False, "1", None)),
        (int | None, (None, 3), ("x", 3.5)),
        (tuple[int, ...], ((), (1, 2)), ([1], (1, "x"), 1)),
        (tuple[int, str], ((1, "a"),), ((1,), (1, 2), (1, "a", 3))),
        (tuple[tuple[int, int], ...], ((), ((1, 2),)), ((1,), ((1, 2, 3),))),
        (dict[str, float], ({}, {"a": 1}), ({1: 1.0}, {"a": None}, ())),
        (Source, (Source("x"),), ("x", None)),
        (Positive, (1, 7), (0, -1, 1.5, True, "1", None)),
        (Natural | None, (0, 7, None), (-1, 0.0)),
        (tuple[NonNegative, ...], ((0, 0.5),), ((-0.5,), ("x",))),
    ],
)
def test_whether_values_fit(hint, good, bad):
    assert all(fits(value, hint) for value in good) and not any(fits(value, hint) for value in bad)


def test_the_problem_names_the_field():
    assert problem(Stage, {"rows": 3, "steps": None}) is None
    assert problem(Stage, {"rows": 3, "ema": "x"}) == "ema is 'x', but must be float | None"
    assert problem(Data, {"seq_len": 0}) == "seq_len is 0, but must be a positive int"
    assert problem(Data, {"shards": -1}) == "shards is -1, but must be a positive int | None"
