"""Reads PyTorch checkpoints (.pth, .bin), the old stream and the zip, without torch.

They are pickles: programs for a machine that may call any function by name. Here the machine has only the instructions
that build numbers, texts and containers, and only the names in `_Reader` can be called, each of which builds a
dictionary or a view of bytes in the file. Nothing that is built takes more memory than a small multiple of the file.
"""

from __future__ import annotations

import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from jaxmllm.errors import shown

MAGIC = 0x1950A86A20F9469CFC6C  # starts the stream that torch wrote before version 1.6
MAX_PICKLE = 4 << 20  # bytes that describe the tensors, some 250 each; the machine makes objects of 100 bytes of one
MAX_NAME = 1000  # bytes of the name of a module or function
MAX_SHARING = 4  # bytes of all tensors over those of the file; tied weights share a storage
STORAGES = {
    "DoubleStorage": np.float64, "FloatStorage": np.float32, "HalfStorage": np.float16,
    "BFloat16Storage": ml_dtypes.bfloat16, "LongStorage": np.int64, "IntStorage": np.int32,
    "ShortStorage": np.int16, "CharStorage": np.int8, "ByteStorage": np.uint8, "BoolStorage": np.bool_,
}  # fmt: skip


# The instructions: those that build numbers, texts, tuples, lists and dictionaries, use the memo, or call a known name.
INSTRUCTIONS = (
    pickle.PROTO, pickle.FRAME, pickle.STOP, pickle.MARK, pickle.POP, pickle.POP_MARK,
    pickle.NONE, pickle.NEWTRUE, pickle.NEWFALSE, pickle.BININT, pickle.BININT1, pickle.BININT2, pickle.LONG1,
    pickle.BINFLOAT, pickle.BINUNICODE, pickle.SHORT_BINUNICODE, pickle.BINSTRING, pickle.SHORT_BINSTRING,
    pickle.EMPTY_TUPLE, pickle.TUPLE, pickle.TUPLE1, pickle.TUPLE2, pickle.TUPLE3,
    pickle.EMPTY_LIST, pickle.APPEND, pickle.APPENDS, pickle.EMPTY_DICT, pickle.SETITEM, pickle.SETITEMS,
    pickle.BINPUT, pickle.LONG_BINPUT, pickle.MEMOIZE, pickle.BINGET, pickle.LONG_BINGET,
    pickle.GLOBAL, pickle.STACK_GLOBAL, pickle.REDUCE, pickle.BUILD, pickle.BINPERSID,
)  # fmt: skip


class Storage:
    """A sequence of numbers whose bytes may come later in the file."""

    def __init__(self, dtype: np.dtype, count: int):
        if type(count) is not int or count < 0:
            raise ValueError(f"a storage has {shown(repr(count))} numbers")
        self.dtype, self.count, self.data = dtype, count, None

    @property
    def size(self) -> int:
        """Bytes."""
        return self.count * self.dtype.itemsize

    def fill(self, content: memoryview) -> None:
        """Raises ValueError if there are too few bytes."""
        if len(content) < self.size:
            raise ValueError(f"a storage of {self.size} bytes has {len(content)} in the file")
        self.data = np.frombuffer(content, self.dtype, self.count)


class Tensor:
    """A view of a storage; stands for torch._utils._rebuild_tensor_v2, whose further arguments are about gradients."""

    def __init__(self, storage: Storage, offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_: Any):
        if not isinstance(storage, Storage) or type(size) is not tuple or type(stride) is not tuple:
            raise ValueError("a tensor is not made of a storage, a shape and strides")
        if len(size) != len(stride) or len(size) > 32:
            raise ValueError(f"a tensor has {len(size)} dimensions and {len(stride)} strides")
        if not all(type(n) is int and n >= 0 for n in (offset, *size, *stride)):
            raise ValueError("the offset, shape or strides of a tensor are not whole numbers")
        self.storage, self.offset, self.shape, self.stride = storage, offset, size, stride

    def array(self) -> np.ndarray:
        """The view, read-only, or a copy if it is not contiguous. Raises ValueError if it leaves its storage."""
        last = self.offset + sum((n - 1) * step for n, step in zip(self.shape, self.stride))
        count, held = math.prod(self.shape), self.storage.count
        if count > held or (count and last >= held):
            raise ValueError(f"a tensor of shape {self.shape} reaches beyond its storage of {held} numbers")
        if self.storage.data is None:
            raise ValueError("the numbers of a tensor are not in the file")
        if not count:
            return np.zeros(self.shape, self.storage.dtype)
        data = self.storage.data[self.offset :]
        steps = [step * data.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(data, self.shape, steps, writeable=False)
        return np.array(view, order="C", copy=None)


class _Bytes:
    """Bytes as a file from which a pickle is read; nothing is copied but what is asked for.

    Raises ValueError if more than MAX_PICKLE bytes are read.
    """

    def __init__(self, content: memoryview):
        self.content, self.at = content, 0

    def read(self, count: int) -> bytes:
        found = bytes(self.content[self.at : self.at + count])
        self.at += len(found)
        if self.at > MAX_PICKLE:
            raise ValueError(f"it needs more than {MAX_PICKLE} bytes to describe its tensors")
        return found

    def readline(self) -> bytes:
        """A line of at most MAX_NAME bytes: the names of modules and functions are written so."""
        end = bytes(self.content[self.at : self.at + MAX_NAME]).find(b"\n")
        return self.read(end + 1)


class _Reader(pickle._Unpickler):
    """A pickle machine that can only make dictionaries, tensors and storages.

    It is the one in Python, whose instructions can be chosen; the one in C reserves as much memory as a pickle asks
    for. storage(dtype, key, count) returns a storage.
    """

    dispatch = {code[0]: pickle._Unpickler.dispatch[code[0]] for code in INSTRUCTIONS}

    def __init__(self, content: memoryview, storage: Callable[[np.dtype, str, int], Storage]):
        self.file = _Bytes(content)
        super().__init__(self.file, encoding="utf-8")
        self.storage, self.room = storage, len(content)  # each item of a dictionary takes a byte of the file or more

    def find_class(self, module: str, name: str) -> Any:
        if module == "torch" and name in STORAGES:
            return np.dtype(STORAGES[name])  # an object that cannot be called, as NumPy's types can
        known = {
            "collections.OrderedDict": self.ordered,
            "torch._utils._rebuild_tensor_v2": Tensor,
            "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        }
        if f"{module}.{name}" not in known:
            raise ValueError(f"it calls {module}.{name}, which is not allowed in a file of weights")
        return known[f"{module}.{name}"]

    def persistent_load(self, pid: tuple) -> Storage:
        kind, dtype, key, _, count = pid[:5]
        if type(kind) is not str or kind != "storage" or not isinstance(dtype, np.dtype) or type(key) is not str:
            raise ValueError("it refers to something that is no storage")
        found = self.storage(dtype, key, count)
        if (found.dtype, found.count) != (dtype, count):
            raise ValueError(f"it refers to storage {shown(key)} as two different ones")
        return found

    def ordered(self, items: list[list[Any]] | tuple = ()) -> dict[str, Any]:
        """Stands for collections.OrderedDict; Python 2 wrote its items as a list of pairs."""
        found: dict[str, Any] = {}
        self.fill(found, [(key, value) for key, value in items])
        return found

    def fill(self, target: Any, items: list[tuple[Any, Any]]) -> None:
        """Adds items to a dictionary. Raises ValueError for another target, for more items than the file can hold, and
        for keys such as nested tuples, whose hash may be as deep as the file is long."""
        self.room -= len(items)
        if self.room < 0 or type(target) is not dict or not all(type(key) in (int, str) for key, _ in items):
            raise ValueError("it fills something that is not a dictionary of texts and numbers")
        target.update(items)

    def load_build(self) -> None:
        """Leaves out the state of an object: torch notes versions of modules there."""
        self.stack.pop()

    def load_setitem(self) -> None:
        value, key = self.stack.pop(), self.stack.pop()
        self.fill(self.stack[-1], [(key, value)])

    def load_setitems(self) -> None:
        items = self.pop_mark()
        self.fill(self.stack[-1], list(zip(items[::2], items[1::2], strict=True)))

    dispatch[pickle.BUILD[0]], dispatch[pickle.SETITEM[0]] = load_build, load_setitem
    dispatch[pickle.SETITEMS[0]] = load_setitems


def open_pickled(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the state dict in a file that torch.save wrote, also from under a key "state_dict" or "model".

    The file is mapped: contiguous tensors are read-only views of it. Raises ValueError, in one line, for a damaged
    file and for one that calls any other function.
    """
    try:
        with open(path, "rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
            found = _zip(content, file) if zipfile.is_zipfile(file) else _stream(content)
        for wrapped in ("state_dict", "model"):
            found = found.get(wrapped, found) if isinstance(found, dict) else found
        if not isinstance(found, dict):
            raise ValueError("it holds no dictionary of tensors")
        tensors = {str(name): x for name, x in found.items() if isinstance(x, Tensor)}
        held = sum(math.prod(x.shape) * x.storage.dtype.itemsize for x in tensors.values())
        if held > MAX_SHARING * len(content):
            raise ValueError(f"its tensors have {held} bytes, and the file only {len(content)}")
        return {name: x.array() for name, x in tensors.items()}
    except Exception as error:  # a damaged pickle raises almost anything
        raise ValueError(f"cannot read {path} as weights: {reason(error)}") from None


def reason(error: Exception) -> str:
    """An error of the pickle machine in one line."""
    if isinstance(error, EOFError):
        return "it ends before its tensors do"
    if isinstance(error, KeyError) and isinstance(error.args[0], int):
        return f"it has the instruction {error.args[0]}, which is not allowed in a file of weights"
    return shown((str(error).splitlines() or [""])[0], 300) or type(error).__name__


def _stream(content: memoryview) -> dict[str, Any]:
    """Reads magic number, protocol, machine, state dict, keys of the storages; then each storage's count and bytes."""
    storages: dict[str, Storage] = {}

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        return storages.setdefault(key, Storage(dtype, count))

    loaded, at = [], 0
    for _ in range(5):
        reader = _Reader(content[at:], storage)
        loaded.append(reader.load())
        at += reader.file.at
    magic, _, _, found, keys = loaded
    if type(magic) is not int or magic != MAGIC or type(keys) is not list:
        raise ValueError("it is not a PyTorch checkpoint")
    for key in keys:
        if type(key) is not str or key not in storages:
            raise ValueError("it has a storage that no tensor refers to")
        one = storages[key]
        if int.from_bytes(content[at : at + 8], "little") != one.count:
            raise ValueError(f"storage {shown(key)} does not have the {one.count} numbers that it should have")
        at += 8
        one.fill(content[at : at + one.size])
        at += one.size
    return found


def _zip(content: memoryview, file: BinaryIO) -> dict[str, Any]:
    """Reads NAME/data.pkl and, for each storage, NAME/data/KEY. torch compresses nothing, so each is a part of the
    file."""
    archive, storages, read = zipfile.ZipFile(file), {}, 0

    def part(name: str) -> memoryview:
        nonlocal read
        entry = archive.getinfo(name)
        if entry.compress_type != zipfile.ZIP_STORED:
            raise ValueError(f"{shown(name)} is compressed, which torch does not do")
        name_and_extra = struct.unpack_from("<HH", content, max(entry.header_offset, 0) + 26)  # of the local header
        start = entry.header_offset + 30 + sum(name_and_extra)
        found, read = content[start : start + entry.file_size], read + entry.file_size
        if read > len(content) or zlib.crc32(found) != entry.CRC:
            raise ValueError(f"{shown(name)} is damaged")
        return found

    def storage(dtype: np.dtype, key: str, count: int) -> Storage:
        if key not in storages:
            storages[key] = Storage(dtype, count)
            storages[key].fill(part(f"{main[: -len('.pkl')]}/{key}"))
        return storages[key]

    (main,) = (name for name in archive.namelist() if name.endswith("/data.pkl"))
    return _Reader(part(main), storage).load()
