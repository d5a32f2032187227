"""One record of a data set, its files, and what a source of records must offer."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

MAPS = ("depth", "instances")  # fields that hold the paths of target maps; see data/targets.py
NO_IMAGE = ("", "None", "none", "nan")  # values of the field `image`, as text, that mean "no picture"


class BadSample(ValueError):
    """A record that cannot be trained on: `kind` is one of a few fixed phrases, `reason` adds the details."""

    def __init__(self, id: str, path: str, kind: str, detail: str = ""):
        self.id, self.path, self.kind = id, path, kind
        self.reason = f"{kind}: {detail}" if detail else kind
        super().__init__(f"sample {id} ({path}): {self.reason}")


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
    """The bytes of a file."""
    with open(path, "rb") as file:
        return file.read()


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
