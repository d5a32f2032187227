"""Float32 masters survive stages that freeze them: the compute dtype of a frozen parameter is only a copy."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm.config import Init, Rule, Run
from jaxmllm.recipes import to_document
from jaxmllm.train.checkpoint import open_checkpoints
from jaxmllm.train.setup import start_stage
from tests.step_case import ROWS, tiny_run

ALL, LLM, REST = Rule(".*"), Rule("^llm/", lr=None), Rule(".*")


def three_stages(*rules: tuple[Rule, ...]) -> Run:
    """The tiny recipe in bfloat16 with a stage for each set of rules."""
    run = tiny_run()
    stages = tuple(
        dataclasses.replace(run.stages[0], name=f"stage_{i}", rules=each, rows=ROWS) for i, each in enumerate(rules)
    )
    return dataclasses.replace(run, stages=stages, compute_dtype="bfloat16", init=Init(llm="random"))


def no_sources(config: Run, abstract: dict, rates: dict) -> tuple[dict, list]:
    """As a run whose parts all start at random."""
    return {}, []


def start(run: Run, workdir, number: int):
    """(state at the start of a stage, its checkpoints)."""
    mesh, names = run.mesh.build(), [stage.name for stage in run.stages]
    checkpoints = open_checkpoints(str(workdir), names, record=to_document(run))[number]
    with jax.set_mesh(mesh):
        state, _, _ = start_stage(run, run.stages[number], mesh, checkpoints, no_sources)
    return state, checkpoints


def trained(state, checkpoints, seed: int):
    """As after steps that change every trained parameter by a number with all bits of float32; saved."""
    rng = np.random.default_rng(seed)
    new = {k: x + 1e-3 * rng.standard_normal(x.shape, np.float32) for k, x in state.trainable.items()}
    state = state.replace(step=jnp.asarray(7, jnp.int32), trainable=new)
    checkpoints.save(state, {})
    checkpoints.wait()
    return jax.device_get(state)


def assert_equal_bits(found: dict, expected: dict) -> None:
    assert len(expected) > 10
    for path, x in expected.items():
        assert found[path].dtype == x.dtype, path
        np.testing.assert_array_equal(np.asarray(found[path]), np.asarray(x), err_msg=path)


def llm(params: dict) -> dict:
    return {path: x for path, x in params.items() if path.startswith("llm/")}


def others(params: dict) -> dict:
    return {path: x for path, x in params.items() if not path.startswith("llm/")}


def test_masters_survive_a_stage_that_freezes_them(tmp_path):
    run = three_stages((ALL,), (LLM, REST), (ALL,))
    first = trained(*start(run, tmp_path, 0), seed=0)
    state, checkpoints = start(run, tmp_path, 1)
    assert_equal_bits(state.trainable, others(first.trainable))
    assert_equal_bits(state.frozen, {k: x.astype(jnp.bfloat16) for k, x in llm(first.trainable).items()})
    second = trained(state, checkpoints, seed=1)
    resumed, _ = start(run, tmp_path, 1)  # the same stage again, from its checkpoint
    assert int(resumed.step) == 7
    assert_equal_bits(resumed.trainable, second.trainable)
    assert_equal_bits(resumed.frozen, second.frozen)
    third, _ = start(run, tmp_path, 2)
    assert not third.frozen
    assert_equal_bits(third.trainable, llm(first.trainable) | second.trainable)
    rounded = {k: x.astype(jnp.bfloat16).astype(np.float32) for k, x in llm(first.trainable).items()}
    assert any((rounded[k] != x).any() for k, x in llm(first.trainable).items()), "the test needs more bits"


def test_parameters_that_start_frozen_are_trained_from_what_they_were(tmp_path):
    run = three_stages((LLM, REST), (LLM, REST), (ALL,))
    state, checkpoints = start(run, tmp_path, 0)
    everything, _ = start(three_stages((ALL,)), tmp_path / "other", 0)
    assert_equal_bits(state.trainable, others(everything.trainable))
    trained(state, checkpoints, seed=0)
    second = trained(*start(run, tmp_path, 1), seed=1)
    resumed, _ = start(run, tmp_path, 1)  # no stage has trained what this one freezes
    assert_equal_bits(resumed.frozen, second.frozen)
    third, _ = start(run, tmp_path, 2)
    assert_equal_bits(third.trainable, llm(everything.trainable) | second.trainable)


@pytest.mark.parametrize("number", [1, 2])
def test_a_stage_does_not_write_what_it_freezes(tmp_path, number):
    """Checkpoints hold the trained parameters only."""
    import orbax.checkpoint as ocp

    run = three_stages((ALL,), (LLM, REST), (LLM, REST))
    for i in range(number + 1):
        trained(*start(run, tmp_path, i), seed=i)
    with ocp.PyTreeCheckpointer() as checkpointer:
        tree = checkpointer.metadata(tmp_path / f"stage_{number}" / "checkpoints" / "7" / "state").item_metadata.tree
    assert tree["trainable"].keys() == others(tree["trainable"]).keys() and len(tree["trainable"]) > 10
