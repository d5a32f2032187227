"""One record of a data set, its files, and what a source of records must offer."""

from __future__ import annotations

import dataclasses
import errno
import functools
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from jaxmllm.errors import shown

MAPS = ("depth", "instances")  # fields that hold the paths of target maps; see data/targets.py
MAX_FILE = 256 << 20  # bytes of a picture or map
NO_IMAGE = ("", "None", "none", "nan")  # values of the field `image`, as text, that mean "no picture"


class BadSample(ValueError):
    """A record that cannot be trained on: `kind` is one of a few fixed phrases, `reason` adds the details."""

    def __init__(self, id: str, path: str, kind: str, detail: str = ""):
        # All but the kind may come from a file of others; what they hold must not end a log or steer a terminal.
        self.id, self.path, self.kind = shown(id), shown(path, 500), kind
        self.reason = f"{kind}: {shown(detail, 500)}" if detail else kind
        super().__init__(f"sample {self.id} ({self.path}): {self.reason}")


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file that belongs to a record. `read()` returns its bytes or raises OSError."""

    path: str  # the name that error messages give
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample as stored on disk."""

    id: str
    path: str  # the file that holds the record
    data: dict[str, Any]  # the JSON object
    images: list[Blob]
    maps: dict[str, Blob]  # field of MAPS -> target map
    markers_are_text: bool = False  # whether what looks like a marker of media, but is not <image>, is text

    def bad(self, kind: str, detail: str = "", path: str | None = None) -> BadSample:
        """The error that says what is wrong with this record; path: the file at fault if it is not the record's."""
        return BadSample(self.id, path or self.path, kind, detail)

    def read(self, blob: Blob) -> bytes:
        """The bytes of a picture or map. Raises BadSample, which tells a missing file from a name in the wrong case."""
        try:
            return blob.read()
        except FileNotFoundError:
            other = case_variant(blob.path)
            kind = "only the case differs" if other else "missing file"
            raise self.bad(kind, other or "", blob.path) from None
        except OSError as error:
            raise self.bad("unreadable file", error.strerror or type(error).__name__, blob.path) from None


class RecordSource(Protocol):
    """Random access to records. `source[i]` raises BadSample if record i cannot be read."""

    path: str  # as the config gives it

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...

    @property
    def fingerprint(self) -> str:
        """A hash that differs if the records have changed, as far as the format lets that be seen quickly."""


def read_file(path: str) -> bytes:
    """The bytes of a file. Raises OSError, also for a device or pipe, and for a file of more than MAX_FILE bytes."""
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(errno.EINVAL, "it is a folder, a device or a pipe")
    if found.st_size > MAX_FILE:
        raise OSError(errno.EFBIG, f"it has {found.st_size} bytes, and the limit is {MAX_FILE}")
    with open(path, "rb") as file:
        return file.read(MAX_FILE)


def path_in(root: str, name: str, outside: bool = False) -> str:
    """The path of a file that a record names, relative to `root`.

    Raises ValueError if it could not be a path, or leads out of `root`, by "..", as an absolute path or through a link,
    unless `outside` allows that.
    """
    if "\0" in name:
        raise ValueError("the name holds a NUL character")
    path = os.path.join(root, name)
    if not outside:
        top, real = os.path.realpath(root), os.path.realpath(path)
        if os.path.commonpath([top, real]) != top:
            raise ValueError(f"it leads to {real}, outside the image root {top}; outside_root=True allows that")
    return path


def case_variant(path: str) -> str | None:
    """An existing file whose path differs from the missing `path` only in upper and lower case, if there is one."""
    existing = Path(path).anchor or "."
    for part in Path(path).parts[bool(Path(path).anchor) :]:
        exact = os.path.join(existing, part)
        name = part if os.path.exists(exact) else folder_names(existing).get(part.lower())
        if name is None:
            return None
        existing = os.path.join(existing, name)
    return existing


@functools.lru_cache(maxsize=64)
def folder_names(folder: str) -> dict[str, str]:
    """Lower-case name -> name, for everything in a folder."""
    return {name.lower(): name for name in os.listdir(folder)} if os.path.isdir(folder) else {}
