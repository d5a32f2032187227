"""Reads and writes Hugging Face folders of safetensors files, without torch.

The format holds arrays and nothing that could be executed. A tensor is read when it is looked up; bfloat16 is read as
ml_dtypes.bfloat16.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Folder(Mapping[str, np.ndarray]):
    """A mapping from tensor name to array that reads from disk at each access."""

    def __init__(self, files: Mapping[str, Path]):
        """files: tensor name -> the file that holds it."""
        self._files = dict(files)
        self._open = {path: _open(path) for path in set(self._files.values())}
        stored = {path: set(file.keys()) for path, file in self._open.items()}
        for name, path in self._files.items():
            if name not in stored[path]:
                raise ValueError(f"{path} has no tensor {name!r}, although {INDEX} lists it")

    def __getitem__(self, name: str) -> np.ndarray:
        return self._open[self._files[name]].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def open_folder(path: str | Path) -> Folder:
    """Opens the tensors of one file or of a folder (one file, or shards with an index).

    Raises ValueError, in one line, if there is nothing to read, or if a file is damaged or missing.
    """
    path = Path(path)
    if (path / INDEX).is_file():
        shards = json.loads((path / INDEX).read_text())["weight_map"]
        return Folder({name: path / file for name, file in shards.items()})
    file = path / SINGLE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no safetensors in {path}: neither {INDEX} nor {SINGLE} is there")
    names = _open(file).keys()
    return Folder(dict.fromkeys(names, file))


def _open(path: Path):
    try:
        return safe_open(path, "numpy")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def write_folder(path: str | Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = 5 * 10**9) -> None:
    """Writes a folder that `open_folder` and transformers can read, in files of up to `shard_bytes` (or one tensor)."""
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    shards, size = [{}], 0
    for name, array in tensors.items():
        if shards[-1] and size + array.nbytes > shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = array
        size += array.nbytes
    if len(shards) == 1:
        names = [SINGLE]
    else:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        total = sum(array.nbytes for array in tensors.values())
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=1))
    for file, shard in zip(names, shards):
        contiguous = {name: np.array(array, order="C", copy=None) for name, array in shard.items()}
        save_file(contiguous, path / file, metadata={"format": "pt"})  # transformers requires this mark
