"""The import rules, the length of files, and that every config builds."""

import ast
from pathlib import Path

import jax
import pytest

from jaxmllm import config as configs
from jaxmllm.train.setup import initial_params
from jaxmllm.train.state import match_rules
from tests.conftest import ROOT

STAGES = {"data", "encoders", "fusers", "aggregators", "llms", "objectives"}
FILES = sorted((ROOT / "jaxmllm").rglob("*.py"))


def imports(path: Path) -> set[str]:
    """First folder or module under jaxmllm of every import in a file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += (
            [f"{node.module}.{a.name}" for a in node.names] if isinstance(node, ast.ImportFrom) and node.module else []
        )
        found |= {name.split(".")[1] for name in names if name.startswith("jaxmllm.")}
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_import_rules(path):
    place = path.relative_to(ROOT / "jaxmllm").parts[0]
    used = imports(path)
    if place in STAGES:
        assert not used & (STAGES - {place}), "stages never import one another; only mllm.py joins them"
        assert not used & {"train", "eval", "mllm"}
    if place in ("train", "nn"):
        assert not used & (STAGES | {"mllm"}), f"{place}/ imports no stage"
    assert len(path.read_text().splitlines()) <= 400


def test_linen_stays_behind_its_seam():
    for path in FILES:
        place = path.relative_to(ROOT / "jaxmllm").parts[0]
        if place in ("train", "eval", "weights", "data", "main.py", "batch.py", "mesh.py"):
            assert "flax.linen" not in path.read_text(), path


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_config_builds_lowers_and_survives_json(path):
    run = configs.load(str(path))
    assert configs.from_json(configs.to_json(run)) == run
    with jax.set_mesh(run.mesh.build()):
        shapes = jax.eval_shape(lambda: initial_params(run))
    for stage in run.stages:
        match_rules(stage.rules, list(shapes))
