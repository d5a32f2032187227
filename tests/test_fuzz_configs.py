"""Overrides and config.json broken at random: refused in one line, or a run that config.json holds as it is."""

from __future__ import annotations

import json

import pytest
from hypothesis import strategies as st

from jaxmllm.documents import from_document, to_document
from jaxmllm.errors import ConfigError
from jaxmllm.recipes import load, override
from tests.conftest import ROOT
from tests.fuzz import JSON, altered, at, broken, one_line, places, run, sizes

TINY = load(f"{ROOT}/configs/toy.py:tiny")
DOCUMENT = json.loads(json.dumps(to_document(TINY)))
VALUES = [
    "None",
    "True",
    "3",
    "-1",
    "0",
    "1.5",
    "1e999",
    "[1, 2]",
    "[3]",
    "()",
    "{}",
    "{'a': 1}",
    "x",
    "'x'",
    "[",
    "nan",
]


def stored(run_):
    return from_document(json.loads(json.dumps(to_document(run_))), "config.json")


def read(document):
    """The run of a document; None if it is refused."""
    try:
        found = from_document(document, "config.json")
    except ConfigError as error:
        assert one_line(error)
        return None
    assert stored(found) == found or "nan" in repr(found)  # a number that is not equal to itself
    return found


@sizes(150)
def test_documents(examples):
    outcomes = []
    run(lambda document: outcomes.append(read(document)), examples, altered(DOCUMENT))
    assert any(found is None for found in outcomes) and any(found is not None for found in outcomes)


@sizes(150)
def test_one_value_of_a_document(examples):
    """Any JSON in the place of any one value."""
    paths = [path for path in places(DOCUMENT) if path]

    def check(path, value):
        holder = json.loads(json.dumps(DOCUMENT))
        at(holder, path[:-1])[path[-1]] = value
        read(holder)

    run(check, examples, st.sampled_from(paths), JSON)


def dotted() -> list[str]:
    """The path of every field of the config, as --set takes it."""
    found = []
    for path in places(DOCUMENT):
        if path and path[-1] not in ("class", "dict"):
            found.append(".".join(str(key) for key in path if key != "dict"))
    return found


@sizes(150)
def test_overrides(examples):
    outcomes = []

    def check(assignments):
        try:
            found = override(TINY, assignments)
        except ConfigError as error:
            assert one_line(error)
            outcomes.append(False)
            return
        assert stored(found) == found
        outcomes.append(True)

    value = st.sampled_from(VALUES) | JSON.map(repr) | st.text(max_size=20) | st.floats().map(repr)
    name = st.sampled_from(dotted()) | st.text(".ab0", max_size=6)
    one = st.tuples(name, value).map("=".join) | st.text(max_size=20)
    run(check, examples, st.lists(one, min_size=1, max_size=3))
    assert any(outcomes) and not all(outcomes)


@sizes(150)
def test_bytes_of_a_file(tmp_path, examples):
    from jaxmllm.recipes import read_run

    path, content = tmp_path / "config.json", json.dumps(DOCUMENT).encode()

    def check(found):
        path.write_bytes(found)
        try:
            read_run(str(tmp_path))
        except ConfigError as error:
            assert one_line(error)

    run(check, examples, broken(content))


@pytest.mark.parametrize("path", ["model.llm.layers", "stages.0.steps", "data.seq_len"])
def test_the_paths_are_those_of_overrides(path):
    assert path in dotted() and override(TINY, [f"{path}=5"]) != TINY
