"""Checkpoints with Orbax: training state, data position and config in one folder per step, written asynchronously.

    WORKDIR/config.json
    WORKDIR/<stage>/frozen/           the frozen parameters, once per stage
    WORKDIR/<stage>/checkpoints/<step>/{state,data,config}

A step folder gets its name only when it is complete. It can be restored onto any mesh and number of processes.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

from jaxmllm.train.state import Params, TrainState


class StageCheckpoints:
    """The checkpoints of one stage."""

    def __init__(self, workdir: str, stage: str, keep: int = 2, config: Any = None):
        self.folder = epath.Path(workdir).absolute() / stage
        self.config = config
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=config is not None, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.folder / "checkpoints", options=options)

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self.manager.latest_step()

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Starts writing; returns when the arrays have been copied off the device."""
        step = int(jax.device_get(state.step))
        if step == self.latest():
            return
        part = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(part),
            data=ocp.args.JsonSave(gather_json(data)),
            config=ocp.args.JsonSave(self.config),
        )
        self.manager.save(step, args=args)

    def save_frozen(self, frozen: Params) -> None:
        """Writes the stage's frozen parameters unless they are already there."""
        if frozen and not (self.folder / "frozen").exists():
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self.folder / "frozen", frozen)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, sharded like `abstract`, and the data position of all shards."""
        part = {"step": abstract.step, "trainable": abstract.trainable, "opt_state": abstract.opt_state}
        args = ocp.args.Composite(state=ocp.args.StandardRestore(part), data=ocp.args.JsonRestore())
        found = self.manager.restore(self.latest(), args=args)
        return TrainState(frozen=self.restore_frozen(abstract.frozen), **found.state), found.data

    def restore_frozen(self, abstract: Params) -> Params:
        """The stage's frozen parameters."""
        if not abstract:
            return {}
        with ocp.StandardCheckpointer() as checkpointer:
            return checkpointer.restore(self.folder / "frozen", abstract)

    def restore_params(self, abstract: Params) -> Params:
        """All parameters after the newest step, trainable and frozen, in the dtypes of `abstract`."""
        frozen_folder = self.folder / "frozen"
        names = set()
        if frozen_folder.exists():
            with ocp.StandardCheckpointer() as checkpointer:
                names = set(checkpointer.metadata(frozen_folder).item_metadata.tree)
        frozen = self.restore_frozen({k: v for k, v in abstract.items() if k in names})
        trainable = {k: v for k, v in abstract.items() if k not in names}
        args = ocp.args.PyTreeRestore(
            {"trainable": trainable},
            restore_args=ocp.checkpoint_utils.construct_restore_args({"trainable": trainable}),
            partial_restore=True,
        )
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            found = checkpointer.restore(self.manager.directory / str(self.latest()) / "state", args=args)
        return frozen | found["trainable"]

    def wait(self) -> None:
        """Returns when all writes are complete."""
        self.manager.wait_until_finished()


def gather_json(data: dict[str, Any]) -> dict[str, Any]:
    """Joins the data positions of all processes; each process gets the whole. Raises ValueError if two contradict."""
    if jax.process_count() == 1:
        return data
    text = np.frombuffer(json.dumps(data).encode(), np.uint8)
    size = int(multihost_utils.process_allgather(np.array(text.size)).max())
    rows = multihost_utils.process_allgather(np.pad(text, (0, size - text.size), constant_values=32))
    return join([json.loads(bytes(row)) for row in rows], "data position")


def join(parts: Sequence[Any], name: str) -> Any:
    """Joins nested dicts, key by key; what several of them hold must be equal. Raises ValueError, naming the place."""
    if all(isinstance(part, dict) for part in parts):
        keys = dict.fromkeys(key for part in parts for key in part)
        return {key: join([part[key] for part in parts if key in part], f"{name}/{key}") for key in keys}
    if any(part != parts[0] for part in parts):
        raise ValueError(f"the processes disagree about {name}: do all of them read the same data?")
    return parts[0]


def abstract_on(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Shapes traced under a mesh (`jax.eval_shape`) -> shapes with shardings on the mesh's devices."""

    def place(x):  # counters made inside the program have no sharding: they are replicated
        spec = x.sharding.spec if x.sharding else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return jax.tree.map(place, tree)
