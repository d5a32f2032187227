"""Writes the parameters of a run as a Hugging Face folder, or as a folder of ours (layouts.py).

The files are made first, and each parameter of the checkpoint is then put into its places in them, so that a host
holds about GROUP bytes of the model at a time. The folder gets its name only when it is complete.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import jax
import ml_dtypes
import numpy as np

from jaxmllm.config import Run
from jaxmllm.data.templates import IMAGE
from jaxmllm.data.tokenizer import Tokenizer, add_tokens, load_tokenizer
from jaxmllm.documents import to_document
from jaxmllm.errors import ConfigError
from jaxmllm.mesh import Mesh
from jaxmllm.nn.lora import is_adapter
from jaxmllm.recipes import read_run
from jaxmllm.train.setup import abstract_params
from jaxmllm.weights import hf_write, layouts, released_model
from jaxmllm.weights.convert import Piece, Shape, pieces
from jaxmllm.weights.exported import KEY_MAP, key_map_document
from jaxmllm.weights.hf_pictures import FILE as PICTURES
from jaxmllm.weights.hf_pictures import PROCESSOR
from jaxmllm.weights.layouts import OWN, Layout
from jaxmllm.weights.load import Abstract
from jaxmllm.weights.safetensors import SHARD_BYTES, create_folder
from jaxmllm.weights.tables import unpadded, unpadded_shapes
from jaxmllm.weights.workdir import open_workdir

GROUP = 2**30  # bytes of parameters that are read from a checkpoint at a time
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "vocab.txt", "merges.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Exported:
    """What was written. layout: its name; why: see Layout. source: the stage and step it comes from."""

    folder: str
    source: str
    layout: str
    why: str
    tensors: int
    parameters: int
    dtype: str
    notes: tuple[str, ...]

    def __str__(self) -> str:
        """A line for the whole, and one for each note."""
        why = f" ({self.why})" if self.why else ""
        facts = f"{self.tensors:,} tensors, {self.parameters:,} parameters, {self.dtype}"
        return "\n".join([f"{self.folder}: {self.layout}{why} from {self.source}, {facts}", *self.notes])


def export(
    workdir: str,
    folder: str,
    *,
    part: str | None = None,
    authors: bool = False,
    dtype: str | None = None,
    shard_bytes: int = SHARD_BYTES,
    config: str | None = None,
) -> Exported:
    """Exports WORKDIR[/stage[/step]] (default: the newest checkpoint), with the moving average where the stage has one.

    part: "llm" for the language model alone. authors: in the layout of released checkpoints (released.py), without
    encoders. dtype: of all tensors; default: float32 if any parameter is stored so,
    else the stored one, so nothing is rounded. config: FILE.py[:variant] of a recipe with parts of its own. Raises
    ValueError or FileExistsError, in one line.
    """
    refuse_folder(folder, part)
    if dtype not in (None, *DTYPES):
        raise ConfigError(f"--dtype {dtype}: known are {', '.join(DTYPES)}")
    source = open_workdir(f"run:{workdir}")
    run = read_run(str(source.workdir), config)
    stored = {path: x.update(dtype=source.stored[path].dtype) for path, x in abstract_of(run, part).items()}
    abstract = {path: x for path, x in stored.items() if not is_adapter(path)}
    tokenizer = load_tokenizer(run.data.tokenizer, run.data.added_tokens)
    if authors:
        abstract = {path: x for path, x in abstract.items() if not path.startswith("encoders_")}
        layout = released_model.layout(run.model, max(run.data_of(stage).seq_len for stage in run.stages))
    else:
        layout = chosen_layout(run, part, {path: x.shape for path, x in abstract.items()}, image_token(tokenizer))
    kinds = {np.dtype(x.dtype) for x in stored.values()}
    kind = np.dtype(DTYPES[dtype] if dtype else np.float32 if len(kinds) > 1 else kinds.pop())

    with complete_folder(folder) as made:
        shapes = write_tensors(made, layout, abstract, run.model.llm.vocab, kind, shard_bytes, source.merged)
        write_configs(made, run, layout, kind)
        notes = write_tokenizer(made, tokenizer, layout, bool(run.data.added_tokens))
    count = sum(math.prod(shape) for shape in shapes.values())
    return Exported(folder, source.name, layout.name, layout.why, len(shapes), count, str(kind), notes)


def refuse_folder(folder: str, part: str | None) -> None:
    """Raises FileExistsError for a folder that exists, ConfigError for another part than the language model."""
    if Path(folder).exists():
        raise FileExistsError(f"{folder} exists; an export goes to a new folder")
    if part not in (None, "llm"):
        raise ConfigError(f"--part {part}: only llm, the language model, can be exported alone")


def abstract_of(run: Run, part: str | None) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of the parameters of a run, or of a part of it, on one device."""
    mesh = Mesh(fsdp=1).build(jax.devices()[:1])
    with jax.set_mesh(mesh):
        abstract, _ = abstract_params(run, mesh)
    return {path: x for path, x in abstract.items() if not part or path.startswith(f"{part}/")}


def chosen_layout(run: Run, part: str | None, shapes: Mapping[str, Shape], token: int) -> Layout:
    """The layout of the whole model or, with part "llm", of its language model. Raises ConfigError if that has none."""
    model, length = run.model, max(run.data_of(stage).seq_len for stage in run.stages)
    if not part:
        return layouts.choose(model, shapes, length, token)
    layout = layouts.decoder(model, length)
    if layout is None:
        raise ConfigError("--part llm: transformers has no language model like this one; export the whole model")
    return layout


@contextlib.contextmanager
def complete_folder(folder: str) -> Iterator[Path]:
    """A temporary folder beside `folder`, which gets that name at the end, or is removed after an error."""
    made = Path(folder).absolute()
    part = made.with_name(f"{made.name}.part{os.getpid()}")
    part.mkdir(parents=True)
    try:
        yield part
        os.rename(part, made)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write_tensors(
    folder: Path, layout: Layout, abstract: Abstract, vocab: int, dtype: np.dtype, shard_bytes: int, read: Callable
) -> dict[str, Shape]:
    """Writes the tensors of a layout -> their shapes. read(abstract) gives some of the parameters, path -> array.
    vocab: rows of the tables of tokens; those after them are padding, which is left out."""
    ours = unpadded_shapes({path: x.shape for path, x in abstract.items()}, vocab)
    shapes = layout.shapes(ours)
    places = create_folder(folder, {key: (shape, dtype) for key, shape in shapes.items()}, shard_bytes)
    for key, (_, value) in layout.constants.items():
        places[key][...] = value
    by_path: dict[str, list[Piece]] = {}
    for piece in pieces(layout.key_map, ours):
        by_path.setdefault(piece.entry.path, []).append(piece)
    for few in groups(abstract):
        for path, array in read(few).items():
            array = unpadded(path, np.asarray(array), vocab)
            for piece in by_path[path]:
                put(places[piece.entry.key], piece, array)
    return shapes


def put(place: np.ndarray, piece: Piece, parameter: np.ndarray) -> None:
    """Puts what a piece takes of a parameter into its place. More rows than it has get the mean of its rows."""
    values = piece.entry.transform.save(parameter[piece.entry.index])
    if piece.share:
        place[(slice(None),) * piece.entry.axis + (piece.share,)] = values
    elif place.shape == values.shape:
        place[...] = values
    else:
        place[: len(values)] = values
        place[len(values) :] = values.astype(np.float32).mean(0)


def groups(abstract: Abstract) -> Iterator[dict[str, jax.ShapeDtypeStruct]]:
    """All parameters, GROUP bytes at a time, or one that is larger."""
    few: dict[str, jax.ShapeDtypeStruct] = {}
    for path, x in abstract.items():
        if few and sum(a.size * a.dtype.itemsize for a in (*few.values(), x)) > GROUP:
            yield few
            few = {}
        few[path] = x
    if few:
        yield few


def write_configs(folder: Path, run: Run, layout: Layout, dtype: np.dtype) -> None:
    """Writes config.json, and how pictures are prepared."""
    if layout.name == OWN:
        config = {"model_type": OWN, "run": to_document(run)}
        (folder / KEY_MAP).write_text(json.dumps(key_map_document(layout.key_map), indent=1))
    else:
        config = layout.config | {"dtype": str(dtype)}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    if layout.name == hf_write.LLAVA:
        (encoder,) = run.model.encoders.values()
        (folder / PICTURES).write_text(json.dumps(hf_write.picture_config(encoder), indent=1))
        processor = hf_write.processor_config(config["vision_config"], IMAGE)
        (folder / PROCESSOR).write_text(json.dumps(processor, indent=1))


def image_token(tokenizer: Tokenizer) -> int:
    """The id of <image>, or the one that it gets when it is added."""
    found = tokenizer.backend.token_to_id(IMAGE)
    return tokenizer.size if found is None else found


def write_tokenizer(folder: Path, tokenizer: Tokenizer, layout: Layout, more: bool) -> tuple[str, ...]:
    """Copies the tokenizer's files, and adds <image> to them for a LLaVA -> what is to be said of it. more: whether the
    tokenizer has tokens that its files lack."""
    for name in TOKENIZER_FILES:
        if (Path(tokenizer.path) / name).is_file() and not (folder / name).exists():
            shutil.copy(Path(tokenizer.path) / name, folder / name)
    if more:
        tokenizer.backend.save(str(folder / "tokenizer.json"))
    if layout.name != hf_write.LLAVA or tokenizer.backend.token_to_id(IMAGE) is not None:
        return ()
    token = image_token(tokenizer)
    add_tokens(tokenizer, (IMAGE,))
    tokenizer.backend.save(str(folder / "tokenizer.json"))
    note = f"added {IMAGE} as token {token}, which stands for the tokens of pictures"
    return (note + (f"; the tables have {layout.rows} rows, for it" if layout.rows else ""),)
