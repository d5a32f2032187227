"""Reads PyTorch checkpoints (.pth, .bin), the old stream and the zip, without torch.

They are pickles, and a pickle may call any function by name. Here only the names in `_Reader` can be reached, and each
of them only builds a dictionary or a view of bytes in the file.
"""

from __future__ import annotations

import collections
import io
import math
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C  # starts the stream that torch wrote before version 1.6
STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


class Storage:
    """A sequence of numbers whose bytes may come later in the file."""

    def __init__(self, dtype: type, count: int):
        self.dtype, self.count, self.data = np.dtype(dtype), count, None

    def fill(self, content: bytes) -> None:
        """Raises ValueError if there are too few bytes."""
        self.data = np.frombuffer(content, self.dtype, self.count)


class Tensor:
    """A view of a storage; stands for torch._utils._rebuild_tensor_v2, whose further arguments are about gradients."""

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any):
        self.storage, self.offset, self.size, self.stride = storage, offset, tuple(size), tuple(stride)

    def array(self) -> np.ndarray:
        """Copies the view. Raises ValueError if it reaches beyond its storage."""
        last = self.offset + sum((n - 1) * step for n, step in zip(self.size, self.stride))
        count, held = math.prod(self.size), self.storage.count
        if min(self.offset, 0, *self.size, *self.stride) < 0 or count > held or (count and last >= held):
            raise ValueError(f"a tensor of shape {self.size} reaches beyond its storage of {held} numbers")
        data = self.storage.data[self.offset :]
        steps = [step * data.itemsize for step in self.stride]
        return np.lib.stride_tricks.as_strided(data, self.size, steps).copy()


class _Reader(pickle.Unpickler):
    """An unpickler that can only make dictionaries, tensors and storages."""

    def __init__(self, file: BinaryIO, storage: Callable[[type, str, int], Storage]):
        super().__init__(file, encoding="utf-8")
        self.storage = storage

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return STORAGES[name]
        known = {
            "collections.OrderedDict": collections.OrderedDict,
            "torch._utils._rebuild_tensor_v2": Tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        if f"{module}.{name}" not in known:
            raise ValueError(f"it calls {module}.{name}, which is not allowed in a file of weights")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: tuple) -> Storage:
        _, dtype, key, _, count = pid[:5]
        return self.storage(dtype, key, count)


def open_pickled(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the state dict in a file that torch.save wrote, also from under a key "state_dict" or "model".

    Raises ValueError, in one line, for a damaged file and for one that calls any other function.
    """
    try:
        with open(path, "rb") as file:
            found = _zip(file) if zipfile.is_zipfile(file) else _stream(file)
        for wrapped in ("state_dict", "model"):
            found = found.get(wrapped, found)
        return {str(name): x.array() for name, x in found.items() if isinstance(x, Tensor)}
    except Exception as error:  # a damaged pickle raises almost anything
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ValueError(f"cannot read {path} as weights: {reason}") from None


def _stream(file: BinaryIO) -> dict[str, Any]:
    """Reads magic number, protocol, machine, state dict, keys of the storages; then each storage's count and bytes."""
    file.seek(0)
    storages: dict[str, Storage] = {}

    def storage(dtype: type, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, count))

    magic, _, _, found, keys = (_Reader(file, storage).load() for _ in range(5))
    if magic != MAGIC:
        raise ValueError("it is not a PyTorch checkpoint")
    for key in keys:
        one = storages[key]
        if int.from_bytes(file.read(8), "little") != one.count:
            raise ValueError(f"storage {key} does not have the {one.count} numbers that it should have")
        one.fill(file.read(one.count * one.dtype.itemsize))
    return found


def _zip(file: BinaryIO) -> dict[str, Any]:
    """Reads NAME/data.pkl and, for each storage, NAME/data/KEY."""
    with zipfile.ZipFile(file) as archive:
        (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
        storages: dict[str, Storage] = {}

        def storage(dtype: type, key: str, count: int) -> Storage:
            if key not in storages:
                storages[key] = Storage(dtype, count)
                storages[key].fill(archive.read(f"{main[: -len('.pkl')]}/{key}"))
            return storages[key]

        return _Reader(io.BytesIO(archive.read(main)), storage).load()
