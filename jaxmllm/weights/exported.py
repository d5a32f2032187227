"""A folder of ours: safetensors, config.json with the recipe, and key_map.json, which says what each tensor is."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxmllm.config import Run, part_of
from jaxmllm.documents import from_document
from jaxmllm.nn.lora import is_adapter
from jaxmllm.weights.convert import (
    CONV,
    FLAT,
    FLAT_GRID,
    LEADING_ONE,
    SAME,
    Entry,
    KeyMap,
    Transform,
    linear,
    misfits,
    patches,
)
from jaxmllm.weights.hf_config import read_json
from jaxmllm.weights.load import Abstract, load_arrays
from jaxmllm.weights.safetensors import Folder, open_folder

KEY_MAP = "key_map.json"


def key_map_document(key_map: KeyMap) -> dict[str, Any]:
    """A key map as JSON data."""
    entries = [
        {"key": e.key, "path": e.path, "transform": e.transform.name, "index": list(e.index), "axis": e.axis}
        for e in key_map.entries
    ]
    return {"entries": entries}


def read_key_map(path: Path) -> KeyMap:
    """The key map in a file. Raises ValueError, in one line."""
    try:
        entries = [
            Entry(e["key"], e["path"], named_transform(e["transform"]), tuple(e["index"]), e["axis"])
            for e in read_json(path)["entries"]
        ]
    except (KeyError, TypeError) as error:
        raise ValueError(f"cannot read {path}: it is no key map ({error})") from None
    return KeyMap(tuple(entries))


def named_transform(name: str) -> Transform:
    """The transform of this name. Raises ValueError if there is none."""
    kind, _, number = name.partition(":")
    made, fixed = (
        {"linear": linear, "patches": patches},
        {x.name: x for x in (SAME, FLAT, LEADING_ONE, FLAT_GRID, CONV)},
    )
    if kind in made and number.isdigit():
        return made[kind](int(number))
    if name not in fixed:
        raise ValueError(f"there is no transform {name!r}; known: {', '.join((*fixed, *(f'{k}:N' for k in made)))}")
    return fixed[name]


@dataclasses.dataclass(frozen=True)
class ExportedSource:
    """A folder of ours as a source of weights."""

    name: str
    path: Path

    @functools.cached_property
    def folder(self) -> Folder:
        """The tensors. Raises ValueError."""
        return open_folder(self.path)

    @functools.cached_property
    def key_map(self) -> KeyMap:
        """Of the whole model. Raises ValueError."""
        return read_key_map(self.path / KEY_MAP)

    def run(self, trusted: Mapping[str, Any] | None = None) -> Run:
        """The recipe. trusted: see documents.from_json. Raises ValueError."""
        path = self.path / "config.json"
        return from_document(read_json(path).get("run"), str(path), trusted)

    @property
    def fingerprint(self) -> str:
        """A hash of the names, sizes and headers of the files with the tensors."""
        return self.folder.fingerprint

    def part(self, name: str, module: Any, abstract: Abstract, length: int | None) -> ExportedPart:
        """A part in the folder."""
        return ExportedPart(self, name, {path: x for path, x in abstract.items() if not is_adapter(path)})


@dataclasses.dataclass(frozen=True)
class ExportedPart:
    """A part that is to be loaded from a folder of ours. abstract: its parameters."""

    source: ExportedSource
    name: str
    abstract: Abstract

    @functools.cached_property
    def key_map(self) -> KeyMap:
        """The part's entries."""
        return KeyMap(tuple(e for e in self.source.key_map.entries if part_of(e.path) == self.name))

    @property
    def tensor_views(self) -> dict[str, np.ndarray]:
        """Key -> tensor of the part."""
        folder = self.source.folder
        return {entry.key: folder[entry.key] for entry in self.key_map.entries if entry.key in folder}

    def problems(self) -> list[str]:
        """Parameters that are missing, left over or of other shapes."""
        if not self.key_map.entries:
            parts = sorted({part_of(entry.path) for entry in self.source.key_map.entries})
            return [f"{self.source.name} has no such part; parts: {', '.join(parts)}"]
        return misfits(self.key_map, self.tensor_views, {path: x.shape for path, x in self.abstract.items()})

    def different_numbers(self) -> list[str]:
        """Nothing: a folder of ours holds every table once."""
        return []

    def stored_dtype(self, path: str) -> np.dtype:
        """The dtype in which the file has a parameter."""
        return self.source.folder[next(e.key for e in self.key_map.entries if e.path == path)].dtype

    def load(self) -> dict[str, jax.Array]:
        """The part's parameters."""
        return load_arrays(self.key_map, self.tensor_views, self.abstract)

    @property
    def tensors(self) -> int:
        """How many tensors are read."""
        return len(self.tensor_views)

    @property
    def left_out(self) -> str:
        """Nothing is left out."""
        return ""
