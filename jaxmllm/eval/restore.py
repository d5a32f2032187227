"""The newest checkpoint of a workdir: its config, its stage and its parameters."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jaxmllm.config import Run, Stage
from jaxmllm.errors import ConfigError
from jaxmllm.eval.answer import Answerer
from jaxmllm.recipes import override, read_run
from jaxmllm.train.checkpoint import StageCheckpoints, open_checkpoints
from jaxmllm.train.setup import abstract_params
from jaxmllm.train.state import Params


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """The newest checkpoint of a run, of the last stage that has any."""

    config: Run
    stage: Stage
    checkpoints: StageCheckpoints

    def params(self) -> Params:
        """All parameters by path, on the config's mesh and in its compute dtype."""
        mesh, dtype = self.config.mesh.build(), jnp.dtype(self.config.compute_dtype)
        with jax.set_mesh(mesh):
            abstract, _ = abstract_params(self.config, mesh)
            abstract = {path: x.update(dtype=dtype) for path, x in abstract.items()}
            return self.checkpoints.restore_params(abstract, average=True)


def newest_checkpoint(workdir: str, overrides: Sequence[str] = (), config: str | None = None) -> Checkpoint:
    """Finds the newest checkpoint; reads no parameters yet.

    overrides: assignments to the config, such as "mesh.fsdp=1" for other devices than those of training. config:
    FILE.py[:variant] of a recipe with parts of its own (recipes.read_run). Raises ConfigError if `workdir` holds no run
    or no checkpoint.
    """
    run = override(read_run(workdir, config), list(overrides))
    stages = open_checkpoints(workdir, [stage.name for stage in run.stages])
    for stage, checkpoints in reversed(list(zip(run.stages, stages))):
        if checkpoints.latest() is not None:
            return Checkpoint(run, stage, checkpoints)
    raise ConfigError(f"{workdir} has no checkpoint yet; run `jaxmllm train` on it first")


def restore_answerer(
    workdir: str, max_new_tokens: int = 32, overrides: Sequence[str] = (), config: str | None = None
) -> Answerer:
    """An Answerer with the parameters of the newest checkpoint. Arguments as in `newest_checkpoint`."""
    found = newest_checkpoint(workdir, overrides, config)
    return Answerer(found.config, found.params(), max_new_tokens)
