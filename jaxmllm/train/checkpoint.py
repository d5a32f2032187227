"""Checkpoints with Orbax: training state, data position and config in one folder per step, written asynchronously.

    WORKDIR/config.json
    WORKDIR/frozen/           parameters that the first stage freezes, in the dtype they came in; written once a run
    WORKDIR/<stage>/checkpoints/<step>/{state,data,config}

A parameter that a later stage freezes is in the last checkpoint of the stage that trained it, in float32. A step folder
gets its name only when it is complete. It can be restored onto any mesh and number of processes.
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
    """The checkpoints of one stage; `previous` are those of the stage before it.

    record: JSON data to keep in each checkpoint; without it nothing can be saved.
    """

    def __init__(
        self,
        workdir: str,
        stage: str,
        *,
        previous: StageCheckpoints | None = None,
        keep: int = 2,
        record: dict[str, Any] | None = None,
    ):
        self.workdir = epath.Path(workdir).absolute()
        self.stage, self.previous, self.record = stage, previous, record
        options = ocp.CheckpointManagerOptions(
            max_to_keep=keep, create=record is not None, enable_async_checkpointing=True
        )
        self.manager = ocp.CheckpointManager(self.workdir / stage / "checkpoints", options=options)

    def latest(self) -> int | None:
        """The newest complete step, None if there is none."""
        return self.manager.latest_step()

    def newest_folder(self, before: int | None = None) -> str | None:
        """The folder of the newest complete step (below `before`), or of the stages before; None if there is none."""
        steps = [step for step in self.manager.all_steps() if before is None or step < before]
        if steps:
            return str(self.manager.directory / str(max(steps)))
        return self.previous.newest_folder() if self.previous else None

    def saved_record(self) -> dict[str, Any]:
        """The record in the newest checkpoint."""
        return self.manager.restore(self.latest(), args=ocp.args.Composite(config=ocp.args.JsonRestore())).config

    def save(self, state: TrainState, data: dict[str, Any]) -> None:
        """Starts writing; returns when the arrays have been copied off the device."""
        step = int(jax.device_get(state.step))
        if step == self.latest():
            return
        args = ocp.args.Composite(
            state=ocp.args.StandardSave(own_part(state)),
            data=ocp.args.JsonSave(gather_json(data)),
            config=ocp.args.JsonSave(self.record),
        )
        self.manager.save(step, args=args)

    def save_frozen(self, frozen: Params) -> None:
        """Writes the parameters that the first stage freezes, in place of any that an interrupted start has left."""
        if frozen:
            with ocp.StandardCheckpointer() as checkpointer:
                checkpointer.save(self.workdir / "frozen", frozen, force=True)

    def restore(self, abstract: TrainState) -> tuple[TrainState, dict[str, Any]]:
        """The newest state, sharded like `abstract`, and the data position of all shards."""
        args = ocp.args.Composite(state=ocp.args.StandardRestore(own_part(abstract)), data=ocp.args.JsonRestore())
        found = self.manager.restore(self.latest(), args=args)
        return TrainState(frozen=self.restore_untrained(abstract.frozen), **found.state), found.data

    def stored_params(self, step: int | None = None) -> dict[str, Any]:
        """Path -> metadata (shape, dtype) of all parameters after a step (default: the newest)."""
        if self.previous:
            untrained = self.previous.stored_params()
        else:
            frozen = self.workdir / "frozen"
            untrained = ocp.PyTreeCheckpointHandler().metadata(frozen).tree if frozen.exists() else {}
        return {**untrained, **self._state_tree(step)["trainable"]}

    def trained(self, step: int | None = None) -> list[str]:
        """The parameters that this stage trains."""
        return list(self._state_tree(step)["trainable"])

    def restore_params(self, abstract: Params, step: int | None = None, average: bool = False) -> Params:
        """Parameters after a step (default: the newest), in the dtypes of `abstract`, which need not have all.

        average: those that this stage trains as their moving average, if it keeps one. Raises ValueError if `abstract`
        has a parameter that the run does not have.
        """
        tree = self._state_tree(step)
        trained, group = set(tree["trainable"]), "ema" if average and "ema" in tree else "trainable"
        own = {group: {path: x for path, x in abstract.items() if path in trained}}
        found = {group: {}}
        if own[group]:
            restore_args = ocp.checkpoint_utils.construct_restore_args(own)
            with ocp.PyTreeCheckpointer() as checkpointer:
                found = checkpointer.restore(
                    self._state_folder(step),
                    args=ocp.args.PyTreeRestore(own, restore_args=restore_args, partial_restore=True),
                )
        rest = {path: x for path, x in abstract.items() if path not in trained}
        return found[group] | self.restore_untrained(rest)

    def restore_untrained(self, abstract: Params) -> Params:
        """Parameters that this stage does not train: as the previous stages left them, or as they came."""
        if not abstract:
            return {}
        if self.previous:
            return self.previous.restore_params(abstract)
        frozen, handler = self.workdir / "frozen", ocp.PyTreeCheckpointHandler()
        stored = handler.metadata(frozen).tree if frozen.exists() else {}
        if missing := [path for path in abstract if path not in stored]:
            raise ValueError(f"{self.workdir} has no parameter {missing[0]} (and {len(missing) - 1} more)")
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract)
        with ocp.PyTreeCheckpointer() as checkpointer:
            return checkpointer.restore(
                frozen, args=ocp.args.PyTreeRestore(abstract, restore_args=restore_args, partial_restore=True)
            )

    def _state_folder(self, step: int | None) -> epath.Path:
        return self.manager.directory / str(self.latest() if step is None else step) / "state"

    def _state_tree(self, step: int | None) -> dict[str, Any]:
        return ocp.PyTreeCheckpointHandler().metadata(self._state_folder(step)).tree

    def wait(self) -> None:
        """Returns when all writes are complete."""
        self.manager.wait_until_finished()


def own_part(state: TrainState) -> dict[str, Any]:
    """What a checkpoint keeps of a state: all but the frozen parameters."""
    part = {"step": state.step, "trainable": state.trainable, "opt_state": state.opt_state}
    return part | ({"ema": state.ema} if state.ema else {})


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


def open_checkpoints(
    workdir: str, stages: Sequence[str], keep: int = 2, record: dict[str, Any] | None = None
) -> list[StageCheckpoints]:
    """The checkpoints of all stages, each with those before it. Arguments as in StageCheckpoints."""
    found: list[StageCheckpoints] = []
    for stage in stages:
        previous = found[-1] if found else None
        found.append(StageCheckpoints(workdir, stage, previous=previous, keep=keep, record=record))
    return found
