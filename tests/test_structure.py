"""The structure of the package: import rules, the length of files, where platforms and JAX's internals may appear."""

import ast
import graphlib
import re

import jax
import pytest

from jaxmllm import recipes
from jaxmllm.train.setup import initial_params
from jaxmllm.train.state import match_rules
from tests.conftest import ROOT

PARTS = {"data", "encoders", "fusers", "aggregators", "llms", "objectives"}
FILES = sorted((ROOT / "jaxmllm").rglob("*.py"))
every_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))


def place(path) -> str:
    """Path relative to the package, e.g. "nn/rope.py"."""
    return str(path.relative_to(ROOT / "jaxmllm"))


def imports(path) -> set[str]:
    """Modules of the package that a file imports anywhere, as paths relative to the package."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    found = {name.partition(".")[2].replace(".", "/") for name in names if name.startswith("jaxmllm.")}
    return {f"{name}.py" for name in found if (ROOT / "jaxmllm" / f"{name}.py").is_file()}


@every_file
def test_imports_follow_the_rules(path):
    folder, used = place(path).split("/")[0], {name.split("/")[0] for name in imports(path)}
    if folder in PARTS:
        assert not used & (PARTS - {folder}), "parts never import one another; only mllm.py joins them"
        assert not used & {"train", "eval", "mllm.py", "cli", "scenes", "plan"}
    if folder in ("train", "nn"):
        assert not used & (PARTS | {"mllm.py", "eval", "cli"}), f"{folder}/ imports no part of the model"
    if folder != "cli" and place(path) != "__main__.py":
        assert "cli" not in used, "the library does not know the command line"


def test_there_are_no_import_cycles():
    graph = {place(path): imports(path) for path in FILES}
    list(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError, which names the cycle


@every_file
def test_files_have_at_most_300_lines(path):
    assert len(path.read_text().splitlines()) <= 300


@every_file
def test_linen_platforms_and_internals_appear_only_where_they_may(path):
    text, name = path.read_text(), place(path)
    folder = name.split("/")[0]
    if folder in ("train", "eval", "weights", "data", "cli", "batch.py", "mesh.py", "sharded.py"):
        assert "flax.linen" not in text
    if folder in PARTS | {"nn", "mllm.py"} and name not in ("nn/compiler.py", "nn/attention/choose.py"):
        asks = re.search(r"optimization_barrier|with_layout_constraint|\bplatform\(\) [!=]=", text)
        assert name == "nn/sampling/choose.py" or not asks, "forks by platform belong in nn/compiler.py or a choose.py"
    if name != "jax_internals.py":
        assert not re.search(r"jax\._src|jax\.extend|eqn\.params|num_carry", text), "that belongs in jax_internals.py"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_config_builds_lowers_and_survives_json(path):
    run = recipes.load(str(path))
    assert recipes.from_document(recipes.to_document(run), "config.json") == run
    with jax.set_mesh(run.mesh.build()):
        shapes = jax.eval_shape(lambda: initial_params(run))
    for stage in run.stages:
        match_rules(stage.rules, list(shapes))
