"""Reads and writes Hugging Face folders of safetensors files, without torch.

The format holds arrays and nothing that could be executed. Files are mapped into memory: a tensor is a read-only view
of its file, so looking one up costs nothing, and only the pages whose elements are used are ever read.
"""

from __future__ import annotations

import hashlib
import json
import math
import mmap
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from jaxmllm import json_text
from jaxmllm.errors import shown

SHARD_BYTES = 5 * 10**9
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
MAX_HEADER = 16 << 20  # bytes; that of a file with 100,000 tensors has 10 MB
# The format's names of data types that weights come in. Others are refused when the file is opened.
DTYPES = {
    "F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "BOOL": np.bool_,
    "I64": np.int64, "I32": np.int32, "I16": np.int16, "I8": np.int8,
    "U64": np.uint64, "U32": np.uint32, "U16": np.uint16, "U8": np.uint8,
}  # fmt: skip
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


class File(Mapping[str, np.ndarray]):
    """The tensors of one file: name -> read-only view.

    Raises ValueError, in one line, for a file that is damaged, cut off, or has data types that are not known here.
    """

    def __init__(self, path: Path):
        self.path = path
        try:
            with open(path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._start = 8 + int.from_bytes(self._map[:8], "little")
            if self._start > min(len(self._map), MAX_HEADER):
                raise ValueError(f"its header has {self._start - 8} bytes, the file {len(self._map)}")
            self.header = self._map[: self._start]
            self._tensors = read_header(self.header[8:], len(self._map) - self._start)
            with safe_open(path, "numpy"):  # the format's own library must agree
                pass
        except (OSError, ValueError, SafetensorError) as error:
            raise ValueError(f"cannot read {shown(path, 400)}: {shown(error, 500)}") from None

    @property
    def size(self) -> int:
        """Bytes of the file."""
        return len(self._map)

    def __getitem__(self, name: str) -> np.ndarray:
        x = self._tensors[name]
        shape, dtype, offset = x["shape"], DTYPES[x["dtype"]], self._start + x["data_offsets"][0]
        return np.frombuffer(self._map, dtype, math.prod(shape), offset).reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def read_header(text: bytes, size: int) -> dict[str, dict[str, Any]]:
    """Tensor name -> {"dtype", "shape", "data_offsets"}, as the JSON of a header says it.

    size: bytes after the header. Raises ValueError for another form, a name that occurs twice, a data type that is not
    in DTYPES, and unless the tensors have the bytes of their shapes and cover all of the file once.
    """
    document = json_text.loads(text, unique=True)
    if not isinstance(document, dict):
        raise ValueError("its header is no JSON object")
    tensors, places = {k: v for k, v in document.items() if k != "__metadata__"}, []
    for name, x in tensors.items():
        if not isinstance(x, dict) or x.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"tensor {shown(name)!r} has not the fields dtype, shape and data_offsets")
        dtype, shape, offsets = x["dtype"], x["shape"], x["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise ValueError(f"tensor {shown(name)!r} has data type {shown(dtype)}")
        if not are_counts(shape) or not are_counts(offsets) or len(offsets) != 2:
            raise ValueError(f"the shape or place of tensor {shown(name)!r} are not whole numbers")
        expected = math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        if offsets[1] - offsets[0] != expected:
            raise ValueError(f"tensor {shown(name)!r} does not have the {expected} bytes of its shape")
        places.append((*offsets, name))
    end = 0
    for begin, stop, name in sorted(places):
        if begin != end:
            raise ValueError(f"tensor {shown(name)!r} starts at byte {begin}, and the one before ends at {end}")
        end = stop
    if end != size:
        raise ValueError(f"its tensors end at byte {end}, and the file at {size}")
    return tensors


def are_counts(values: Any) -> bool:
    """Whether this is a list of at most 32 whole numbers from 0 to 2^63 - 1."""
    return isinstance(values, list) and len(values) <= 32 and all(type(n) is int and 0 <= n < 2**63 for n in values)


class Folder(Mapping[str, np.ndarray]):
    """The tensors of several files: name -> read-only view."""

    def __init__(self, files: Mapping[str, File], weight_map: Mapping[str, str]):
        """weight_map: tensor name -> file name, as the index says. Tensors that the index leaves out are found too."""
        self.files = files
        self._place = {name: file for file in files.values() for name in file}
        for name, file in weight_map.items():
            if name not in files[file]:
                raise ValueError(f"{files[file].path} has no tensor {shown(name)!r}, although {INDEX} lists it")
            self._place[name] = files[file]

    @property
    def fingerprint(self) -> str:
        """A hash of the names, sizes and headers of the files; their contents are not read."""
        digest = hashlib.sha256()
        for name, file in sorted(self.files.items()):
            digest.update(f"{name}\n{file.size}\n".encode() + file.header)
        return digest.hexdigest()[:16]

    def __getitem__(self, name: str) -> np.ndarray:
        return self._place[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._place)

    def __len__(self) -> int:
        return len(self._place)


def open_folder(path: str | Path) -> Folder:
    """Opens the tensors of one file or of a folder (one file, or shards with an index).

    Raises ValueError, in one line, if there is nothing to read, or if a file is damaged or missing.
    """
    path = Path(path)
    if (path / INDEX).is_file():
        weight_map = read_index(path / INDEX)
        names = sorted(set(weight_map.values()))
        return Folder({name: File(path / name) for name in names}, weight_map)
    file = path / SINGLE if path.is_dir() else path
    if not file.is_file():
        raise ValueError(f"no safetensors in {path}: neither {INDEX} nor {SINGLE} is there")
    return Folder({file.name: File(file)}, {})


def read_index(path: Path) -> dict[str, str]:
    """Tensor name -> name of a file in the folder. Raises ValueError if that is not what an index holds."""
    try:
        weight_map = json_text.loads(path.read_bytes())["weight_map"]
        for file in weight_map.values():
            if Path(file).name != file or file in ("", "..") or "\0" in file:
                raise ValueError(f"{shown(file)} is not the name of a file in the folder")
        return weight_map
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        text = f"cannot read {path}: it is not the index of safetensors files: {shown(error)}"
        raise ValueError(text) from None


def write_folder(path: str | Path, tensors: Mapping[str, np.ndarray], shard_bytes: int = SHARD_BYTES) -> None:
    """Writes a folder that `open_folder` and transformers can read, in files of up to `shard_bytes` (or one tensor)."""
    places = create_folder(path, {name: (x.shape, x.dtype) for name, x in tensors.items()}, shard_bytes)
    for name, x in tensors.items():
        places[name][...] = x


def create_folder(
    path: str | Path, tensors: Mapping[str, tuple[tuple[int, ...], Any]], shard_bytes: int = SHARD_BYTES
) -> dict[str, np.ndarray]:
    """Makes the files of a folder, full of zeros -> the place of each tensor in them: name -> writable array.

    tensors: name -> (shape, dtype). What is put into a place goes to the file, in any order and piece by piece, and
    takes no memory that the system could not take back.
    """
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    sizes = {name: math.prod(shape) * np.dtype(dtype).itemsize for name, (shape, dtype) in tensors.items()}
    shards, total = [[]], 0
    for name, size in sizes.items():
        if shards[-1] and total + size > shard_bytes:
            shards.append([])
            total = 0
        shards[-1].append(name)
        total += size
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = [SINGLE]
    else:
        weight_map = {name: file for file, shard in zip(names, shards) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (path / INDEX).write_text(json.dumps(index, indent=1))
    places = {}
    for file, shard in zip(names, shards):
        places |= create_file(path / file, {name: tensors[name] for name in shard})
    return places


def create_file(path: Path, tensors: Mapping[str, tuple[tuple[int, ...], Any]]) -> dict[str, np.ndarray]:
    """One file, as in `create_folder`.

    The format: the length of the header, 8 bytes; the header, JSON; the tensors one after the other.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers requires this mark
    end = 0
    for name, (shape, dtype) in tensors.items():
        start, end = end, end + math.prod(shape) * np.dtype(dtype).itemsize
        header[name] = {"dtype": NAMES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned
    with open(path, "w+b") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)
        file.flush()
        data = mmap.mmap(file.fileno(), 0)
    offsets = {name: 8 + len(text) + header[name]["data_offsets"][0] for name in tensors}
    return {
        name: np.ndarray(tuple(shape), np.dtype(dtype), data, offsets[name]) for name, (shape, dtype) in tensors.items()
    }
