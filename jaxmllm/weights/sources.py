"""Where the weights of a part come from: a Hugging Face folder, the hub (hub.py), or a workdir of ours (workdir.py)."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmllm.errors import suggest_path
from jaxmllm.nn.lora import is_adapter
from jaxmllm.weights import families
from jaxmllm.weights.convert import KeyMap, misfits
from jaxmllm.weights.exported import KEY_MAP, ExportedPart, ExportedSource
from jaxmllm.weights.hf_config import differences, read_config
from jaxmllm.weights.hf_pictures import normalisation_differences
from jaxmllm.weights.hub import download
from jaxmllm.weights.load import Abstract, load_arrays, unequal
from jaxmllm.weights.released import ReleasedPart, ReleasedSource, is_released
from jaxmllm.weights.safetensors import Folder, open_folder
from jaxmllm.weights.workdir import WorkdirPart, WorkdirSource, open_workdir


@dataclasses.dataclass(frozen=True)
class FolderSource:
    """A Hugging Face folder. name: what a report calls it."""

    name: str
    path: Path

    @functools.cached_property
    def config(self) -> Any:
        """config.json. Raises ValueError."""
        return read_config(self.path)

    @functools.cached_property
    def folder(self) -> Folder:
        """The tensors. Raises ValueError."""
        return open_folder(self.path)

    @property
    def fingerprint(self) -> str:
        """A hash of the names, sizes and headers of the files with the tensors."""
        return self.folder.fingerprint

    def part(self, name: str, module: Any, abstract: Abstract, length: int | None) -> FolderPart:
        """A part in the folder."""
        return FolderPart(self, name, module, {k: x for k, x in abstract.items() if not is_adapter(k)}, length)


@dataclasses.dataclass(frozen=True)
class FolderPart:
    """A part that is to be loaded from a folder. abstract: its parameters. length: see families.check_sizes."""

    source: FolderSource
    name: str
    module: Any
    abstract: Abstract
    length: int | None

    @functools.cached_property
    def key_map(self) -> KeyMap:
        """The part's key map, with whole paths of parameters. Raises ValueError."""
        source = self.source
        found = families.key_map(source.config, self.name, self.module, source.folder.keys())
        return found.under("", self.name.replace(".", "_") + "/")

    def problems(self) -> list[str]:
        """All differences from the folder's sizes and normalisation in one line, else all tensors that do not fit.

        Reads only the JSON files and the headers of the tensors.
        """
        config = self.source.config
        sizes = differences(families.describe(config, self.name, self.module, self.length), self.module)
        if families.part_kind(self.name) == "encoder":
            sizes += normalisation_differences(self.source.path, self.module)
        if sizes:
            return [f"{'; '.join(sizes)} ({self.source.name})"]
        return misfits(self.key_map, self.source.folder, {path: x.shape for path, x in self.abstract.items()})

    def different_numbers(self) -> list[str]:
        """What is wrong with the numbers of tensors, once there are no `problems`."""
        return unequal(self.key_map, self.source.folder)

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype in which the file has a parameter."""
        key = next(entry.key for entry in self.key_map.entries if entry.path == path)
        return self.source.folder[key].dtype

    def load(self) -> dict[str, jax.Array]:
        """The part's parameters."""
        return load_arrays(self.key_map, self.source.folder, self.abstract)

    @property
    def tensors(self) -> int:
        """How many tensors are read."""
        return len({entry.key for entry in self.key_map.entries})

    @property
    def left_out(self) -> str:
        """The modules in the folder that no tap needs, in one line."""
        heads = {key[:end] for key in self.source.folder for end in (i for i, c in enumerate(key + ".") if c == ".")}
        unused = [module for module in self.key_map.left_out if module in heads]
        return f"{', '.join(ranges(unused))}: after the last tap" if unused else ""


def open_source(text: str, model: Any = None) -> FolderSource | ExportedSource | ReleasedSource | WorkdirSource:
    """FOLDER (of Hugging Face, `jaxmllm export` or released.py), hf:org/name@revision or run:WORKDIR[/stage[/step]].

    model: the MLLM that is to get the weights; a released checkpoint is only read for one. Raises ValueError, in one
    line.
    """
    if text.startswith("run:"):
        return open_workdir(text)
    if text.startswith("hf:"):
        return _folder(*download(text), model)
    if not Path(text).is_dir():
        kinds = "a source is FOLDER, hf:org/name@revision, run:WORKDIR or random"
        raise ValueError(f"{text} is no folder; {kinds}{suggest_path(text)}")
    return _folder(text, Path(text), model)


def _folder(name: str, path: Path, model: Any) -> FolderSource | ExportedSource | ReleasedSource:
    if (path / KEY_MAP).is_file():
        return ExportedSource(name, path)
    if not is_released(path):
        return FolderSource(name, path)
    if model is None:
        mend = "train or export a recipe that starts from it, or verify it against such a run"
        raise ValueError(f"{name} is a checkpoint in its authors' layout, which names no encoders of ours; {mend}")
    return ReleasedSource(name, path, model)


def ranges(names: list[str]) -> list[str]:
    """["layers.3", "layers.4", "norm"] -> ["layers.3 to 4", "norm"]: consecutive numbers become one entry."""
    found: list[tuple[str, str]] = []  # (first name, last number or "")
    for name in names:
        stem, _, number = name.rpartition(".")
        if found and number.isdigit() and _follows(found[-1], stem, int(number)):
            found[-1] = (found[-1][0], number)
        else:
            found.append((name, ""))
    return [f"{first} to {last}" if last else first for first, last in found]


def _follows(entry: tuple[str, str], stem: str, number: int) -> bool:
    first, last = entry
    return first.rpartition(".")[0] == stem and (last or first.rpartition(".")[2]) == str(number - 1)


Part = FolderPart | ExportedPart | ReleasedPart | WorkdirPart
