"""Every config lowers for pods of TPUs, without the TPU compiler."""

import dataclasses

import jax
import pytest
from jax.sharding import AbstractMesh, AxisType

from jaxmllm import mesh, recipes
from jaxmllm.plan.report import fixed_steps
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.setup import abstract_batch, stage_program
from tests.conftest import ROOT

# 64 x 4 and 256 x 8 chips. The toy, and the real model for a laptop, have too few heads to split; SigLIP's width, 1152,
# does not divide by 256.
SMALL = {"data": 64, "fsdp": 4}, {"data": 256, "fsdp": 8}
LARGE = {"fsdp": 64, "tensor": 4}, {"fsdp": 256, "tensor": 8}
PUBLISHED = LARGE[0], {"data": 4, "fsdp": 64, "tensor": 8}
MESHES = {"toy.py": SMALL, "real.py": SMALL, "cambrian_8b.py:published": PUBLISHED}
CONFIGS = sorted({path.name for path in (ROOT / "configs").glob("*.py")} | set(MESHES))
PODS = [
    pytest.param(name, sizes, id=f"{name}-{'x'.join(map(str, sizes.values()))}")
    for name in CONFIGS
    for sizes in MESHES.get(name, LARGE)
]


@pytest.mark.parametrize("name, sizes", PODS)
def test_every_config_lowers_on_a_pod(name, sizes):
    run = recipes.load(str(ROOT / "configs" / name))
    sizes = mesh.Mesh(**{"fsdp": 1, **sizes})
    pod = AbstractMesh(
        tuple(getattr(sizes, axis) for axis in mesh.AXES), mesh.AXES, axis_types=(AxisType.Explicit,) * len(mesh.AXES)
    )
    stage = fixed_steps(run.stages[-1])
    stage = dataclasses.replace(stage, rows=mesh.data_shards(pod) * stage.accumulate)
    with jax.sharding.use_abstract_mesh(pod):
        params, new_train_state, step = stage_program(run, stage, pod)
        state = abstract_on(pod, jax.eval_shape(new_train_state, params))
        text = step.trace(state, abstract_batch(run, stage, pod)).lower(lowering_platforms=("tpu",)).as_text()
    assert "sdy.mesh" in text or "mhlo.sharding" in text
