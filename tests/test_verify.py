"""`jaxmllm verify`: what counts as the same model, and what it says of those that are not."""

from __future__ import annotations

import json
import re
import sys

import numpy as np
import pytest

from jaxmllm import recipes
from jaxmllm.cli.main import main
from jaxmllm.eval.verify import Outputs, compare, hashes, verify
from jaxmllm.weights.export import export
from jaxmllm.weights.opened import folder_model
from tests.run_case import random_of, run_of, save
from tests.test_export import bytes_, llava, text_only, words  # noqa: F401


@pytest.fixture(scope="module")
def case(tmp_path_factory, words):  # noqa: F811
    """A LLaVA run and its export, and a run in which one number of the projector is another."""
    root = tmp_path_factory.mktemp("verify")
    run = run_of(llava(16), words)
    params = random_of(run)
    save(run, params, root / "run")
    export(str(root / "run"), str(root / "out"))
    params["aggregator/projector/linear_0/bias"][0] += 0.5
    save(run, params, root / "other")
    return root


def test_a_run_and_its_export(case, capsys):
    assert main(["verify", str(case / "run"), str(case / "out"), "--json", str(case / "found.json")]) == 0
    text = capsys.readouterr().out
    for part in ("encoders.clip", "aggregator", "llm"):
        assert re.search(rf"^{part}: outputs differ by at most \S+, parameters equal \((\w{{16}}), \1\)$", text, re.M)
    assert text.endswith("\nequal\n")
    found = json.loads((case / "found.json").read_text())
    assert found["equal"] and found["kl"] <= 1e-12 and found["top1"] == 1 and found["differences"]["llm"] <= 1e-6


def test_one_other_number_is_found_in_its_part(case, capsys):
    assert main(["verify", f"run:{case}/run/only/2", str(case / "other")]) == 1
    text = capsys.readouterr().out
    assert re.search(r"^encoders.clip: outputs differ by at most 0.00e\+00, parameters equal", text, re.M)
    (difference,) = re.findall(r"^aggregator: outputs differ by at most (\S+), parameters differ", text, re.M)
    assert float(difference) > 1e-3 and text.endswith("not equal: bounds are KL 3e-07 and 100.00% of top tokens\n")


def test_figures():
    rng = np.random.default_rng(0)
    p = rng.dirichlet(np.ones(5), (1, 2))
    q = p.copy()
    q[0, 1] = p[0, 1][::-1]
    a, b = (Outputs("", {"llm": x.astype(np.float32)}, np.log(x), {"llm": "1"}) for x in (p, q))
    found = compare(a, b)
    expected = (p[0, 1] * np.log(p[0, 1] / q[0, 1])).sum()
    assert found.kl == pytest.approx(expected) and found.mean_kl == pytest.approx(expected / 2) and found.top1 == 0.5
    assert found.differences["llm"] == pytest.approx(np.abs(p - q).max(), rel=1e-6)
    assert not found.equal() and found.equal(expected + 1e-6, 0.5) and not compare(a, a).equal(max_kl=-1)
    unknown = compare(a, Outputs("", {}, np.full((1, 2, 5), np.nan), {}))
    assert not unknown.equal() and unknown.differences == {}


def test_hashes_do_not_depend_on_the_dtype_or_the_name_of_an_encoder():
    x = np.arange(4, dtype=np.float32)
    one = hashes({"encoders_a/w": x, "llm/w": x})
    two = hashes({"encoders_b/w": x.astype(np.float16), "llm/w": x.reshape(2, 2)})
    assert one["encoders.a"] == two["encoders.b"] and one["llm"] != two["llm"]


def test_folders_are_models(case):
    model, ours = folder_model(case / "out"), llava(16)
    assert model.aggregator == ours.aggregator and model.fusers == ours.fusers and model.llm.width == ours.llm.width


@pytest.mark.long
def test_the_toy_and_its_export(tmp_path, words):  # noqa: F811
    run = run_of(recipes.load("configs/toy.py:tiny").model, words)
    save(run, random_of(run), tmp_path / "run")
    export(str(tmp_path / "run"), str(tmp_path / "out"))
    found = verify(str(tmp_path / "run"), str(tmp_path / "out"))
    assert found.equal() and {"encoders.clip", "fusers.clip", "aggregator", "llm"} <= found.differences.keys()
    assert all(a == b for a, b in found.hashes.values()) and "inserts" in found.hashes


def test_refusals(case, tmp_path, words, capsys, monkeypatch):  # noqa: F811
    run = run_of(text_only(40), words)
    save(run, random_of(run), tmp_path / "text")
    monkeypatch.setitem(sys.modules, "torch", None)
    for args, says in {
        (
            str(case / "run"),
            str(tmp_path / "text"),
        ): "the models do not take the same pictures: encoders of [42] and []",
        (str(case / "out"), f"transformers:{case / 'out'}"): f"transformers:{case / 'out'} needs torch",
        (str(case / "out"), str(case / "nothing")): f"{case / 'nothing'} is no folder",
        (str(case / "out"), str(case / "out"), "--mesh", "fdsp=2"): "--set fdsp=2: Mesh has no 'fdsp'; did you mean",
    }.items():
        assert main(["verify", *args]) == 2
        assert capsys.readouterr().err.startswith(f"jaxmllm: {says}")
