"""A whole model, its modules and its parameters, from what holds one: a run, an exported or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxmllm import mesh as meshes
from jaxmllm import sharded
from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.batch import empty_batch
from jaxmllm.config import part_of
from jaxmllm.encoders import presets as encoders
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.single import Single
from jaxmllm.llms import presets as llms
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.recipes import read_run
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.state import Params, flatten
from jaxmllm.weights.exported import KEY_MAP, ExportedSource
from jaxmllm.weights.hf_config import read_config, read_json
from jaxmllm.weights.load import Abstract
from jaxmllm.weights.parts import load_parts
from jaxmllm.weights.released import TOWERS, is_released
from jaxmllm.weights.sources import open_source
from jaxmllm.weights.workdir import WorkdirSource, open_workdir


@dataclasses.dataclass(frozen=True)
class Opened:
    """name: what holds the model. load: reads its parameters, in the dtypes and shardings of the abstract ones.
    borrowed: parts that it does not hold, which are those of another model."""

    name: str
    model: MLLM
    load: Callable[[Abstract], Params]
    borrowed: tuple[str, ...] = ()


def open_model(text: str, config: str | None = None) -> Opened:
    """Opens WORKDIR[/stage[/step]], with or without "run:" before it, FOLDER or hf:org/name@revision.

    Reads no parameters yet. Of a run, adapters are merged, and a moving average is taken where the stage has one, as in
    evaluation. config: FILE.py[:variant] of a run with parts of its own. Raises ValueError, in one line.
    """
    source = open_workdir(f"run:{text}") if is_workdir(text) else open_source(text)
    if isinstance(source, WorkdirSource):
        run = read_run(str(source.workdir), config)
        return Opened(source.name, run.model, source.merged)
    model = source.run().model if isinstance(source, ExportedSource) else folder_model(source.path)
    return Opened(text, model, lambda abstract: load_parts(model, {"rest": text}, abstract)[0])


def is_released_folder(text: str) -> bool:
    """Whether a path is a checkpoint in its authors' layout (released.py)."""
    path = Path(text)
    return path.is_dir() and not (path / KEY_MAP).is_file() and is_released(path)


def open_released(text: str, other: Opened) -> Opened:
    """A checkpoint in its authors' layout as the model of `other`, whose encoders it gets if it holds none.

    Raises ValueError, in one line.
    """
    model, source = other.model, open_source(text, other.model)
    inside = any(key.startswith(TOWERS) for key in source.folder)
    borrowed = () if inside else tuple(f"encoders.{name}" for name in model.encoders)

    def load(abstract: Abstract) -> Params:
        theirs = {path: x for path, x in abstract.items() if part_of(path) in borrowed}
        own = {path: x for path, x in abstract.items() if path not in theirs}
        return load_parts(model, {"rest": text}, own)[0] | other.load(theirs)

    return Opened(text, model, load, borrowed)


def is_workdir(text: str) -> bool:
    """Whether a path is a workdir, or a stage or step in one."""
    configs = (place / "config.json" for place in (Path(text), *Path(text).parents[:2]))
    return any("stages" in read_json(path) for path in configs if path.is_file())


def folder_model(path: str | Path) -> MLLM:
    """The model in a Hugging Face folder: a language model, or a LLaVA. Raises ValueError, in one line."""
    config, objectives = read_config(path), {"next_token": NextToken()}
    if config.model_type != "llava":
        return MLLM({}, {}, None, llms.from_folder(path), objectives)
    encoder = encoders.from_folder(path)
    fuser = Concat() if isinstance(config.vision_feature_layer, list) else Single()
    return MLLM({"clip": encoder}, {"clip": fuser}, MLPProjector(encoder.side), llms.from_folder(path), objectives)


def abstract_model(model: MLLM, mesh: jax.sharding.Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, float32 and sharding of a model's parameters on the mesh, which must be set."""
    rows = meshes.data_shards(mesh)

    def init() -> Params:
        batch = empty_batch(model.layout, rows, model.layout.block + 1, 1, model.target_shapes)
        batch = jax.tree.map(lambda x: sharded.shard(jnp.asarray(x), "batch"), batch)
        return flatten(model.init(jax.random.key(0), batch, tuple(model.objectives))["params"])

    return abstract_on(mesh, jax.eval_shape(init))
