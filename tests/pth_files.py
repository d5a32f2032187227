"""Writes PyTorch checkpoints without torch, instruction by instruction, so that tests can also write harmful ones."""

from __future__ import annotations

import pickle
import struct
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from jaxmllm.weights.pickled import MAGIC

KINDS = {"float32": "FloatStorage", "float64": "DoubleStorage", "int64": "LongStorage", "uint8": "ByteStorage"}


def text(value: str) -> bytes:
    """A text, as BINUNICODE."""
    content = value.encode()
    return b"X" + struct.pack("<I", len(content)) + content


def number(value: int) -> bytes:
    """An integer, as BININT."""
    return b"J" + struct.pack("<i", value)


def numbers(values: tuple[int, ...]) -> bytes:
    """A tuple of integers."""
    return b"(" + b"".join(map(number, values)) + b"t"


def called(module: str, name: str) -> bytes:
    """A function or class by its name."""
    return f"c{module}\n{name}\n".encode()


def storage(kind: str, key: str, count: int, zipped: bool = True) -> bytes:
    """A reference to a storage."""
    view = b"" if zipped else b"N"
    return b"(" + text("storage") + called("torch", kind) + text(key) + text("cpu") + number(count) + view + b"tQ"


def tensor(reference: bytes, offset: int, shape: tuple[int, ...], strides: tuple[int, ...]) -> bytes:
    """A tensor that views a storage."""
    rebuild = called("torch._utils", "_rebuild_tensor_v2")
    return rebuild + b"(" + reference + number(offset) + numbers(shape) + numbers(strides) + b"\x89)tR"


def dictionary(items: Mapping[str, bytes]) -> bytes:
    """A dictionary of texts."""
    return b"}(" + b"".join(text(key) + value for key, value in items.items()) + b"u"


def program(content: bytes) -> bytes:
    """A whole pickle."""
    return b"\x80\x02" + content + b"."


def state_dict(arrays: Mapping[str, np.ndarray], zipped: bool = True) -> bytes:
    """The pickle of arrays, each in a storage whose key is its number."""
    items = {}
    for key, (name, x) in enumerate(arrays.items()):
        strides = tuple(step // x.itemsize for step in x.strides)
        reference = storage(KINDS[str(x.dtype)], str(key), x.size, zipped)
        items[name] = tensor(reference, 0, x.shape, strides)
    return program(dictionary(items))


def write_zip(path: Path, content: bytes, storages: Mapping[str, bytes], **options) -> Path:
    """A file as torch writes it since version 1.6; options: of zipfile.ZipFile."""
    with zipfile.ZipFile(path, "w", **options) as archive:
        archive.writestr("archive/data.pkl", content)
        for key, data in storages.items():
            archive.writestr(f"archive/data/{key}", data)
    return path


def write_stream(path: Path, content: bytes, storages: Mapping[str, tuple[int, bytes]]) -> Path:
    """A file as torch wrote it before; storages: key -> (count, bytes)."""
    head = b"".join(pickle.dumps(x, 2) for x in (MAGIC, 1001, {"little_endian": True}))
    data = b"".join(struct.pack("<q", count) + found for count, found in storages.values())
    path.write_bytes(head + content + pickle.dumps([*storages], 2) + data)
    return path


def write_arrays(path: Path, arrays: Mapping[str, np.ndarray], zipped: bool = True) -> Path:
    """A file of these arrays."""
    content = state_dict(arrays, zipped)
    if zipped:
        return write_zip(path, content, {str(k): x.tobytes() for k, x in enumerate(arrays.values())})
    return write_stream(path, content, {str(k): (x.size, x.tobytes()) for k, x in enumerate(arrays.values())})
