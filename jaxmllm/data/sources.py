"""Where records come from: random access to LLaVA JSON(L), ArrayRecord shards and TFDS folders.

A source has `len()` and gives `Record` i in O(1), from any thread. It can be pickled; files are opened again
where it is unpickled. Pictures are read when asked for, not with the record.
"""

from __future__ import annotations

import dataclasses
import functools
import glob
import json
import mmap
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np

MAPS = ("depth", "instances")  # fields that hold the paths of target maps; see data/targets.py
NO_IMAGE = ("", "None", "none", "nan")  # as text
CHUNK = 1 << 23  # bytes that an index looks at together


class BadSample(ValueError):
    """A record that cannot be trained on: `kind` is one of a few fixed phrases, `reason` adds the details."""

    def __init__(self, id: str, path: str, kind: str, detail: str = ""):
        self.id, self.path, self.kind = id, path, kind
        self.reason = f"{kind}: {detail}" if detail else kind
        super().__init__(f"sample {id} ({path}): {self.reason}")


@dataclasses.dataclass(frozen=True)
class Blob:
    """A file that belongs to a record. `read()` returns its bytes or raises OSError."""

    path: str  # as an error should name it
    read: Callable[[], bytes]


@dataclasses.dataclass(frozen=True)
class Record:
    """One sample as it lies on disk."""

    id: str
    path: str  # the file that holds the record
    data: dict[str, Any]  # the JSON object
    images: list[Blob]
    maps: dict[str, Blob]  # field of MAPS -> target map

    def bad(self, kind: str, detail: str = "", path: str | None = None) -> BadSample:
        """The error that says what is wrong with this record; path: the file at fault if not the record's."""
        return BadSample(self.id, path or self.path, kind, detail)

    def read(self, blob: Blob) -> bytes:
        """Bytes of a picture or map. Raises BadSample, which tells names that differ only in case apart."""
        try:
            return blob.read()
        except FileNotFoundError:
            other = case_variant(blob.path)
            kind = "only the case differs" if other else "missing file"
            raise self.bad(kind, other or "", blob.path) from None
        except OSError as error:
            raise self.bad("unreadable file", error.strerror or type(error).__name__, blob.path) from None


class Source(Protocol):
    """Random access to records. `source[i]` raises BadSample if record i cannot be read."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Record: ...


class LlavaSource:
    """LLaVA's format: a JSON array, or JSONL with one object per line; pictures in files.

    The file is mapped, not loaded, and scanned once for where records start. `image` is a path relative to
    `image_root` (default: the folder of the file), a list of paths, or absent or one of NO_IMAGE for text
    only. Raises ValueError for a file that is missing or is not JSON.
    """

    def __init__(self, path: str, image_root: str | None = None):
        self.path = str(path)
        if not os.path.isfile(self.path):
            raise ValueError(f"no data file {self.path}")
        self.root = str(image_root) if image_root else os.path.dirname(self.path)
        bounds = array_bounds if self.whole[:CHUNK].lstrip()[:1] == b"[" else line_bounds
        self.bounds = bounds(self.whole, self.path)

    @functools.cached_property
    def whole(self) -> mmap.mmap | bytes:
        """The whole file; an empty one cannot be mapped."""
        with open(self.path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            return mmap.mmap(file.fileno(), size, access=mmap.ACCESS_READ) if size else b""

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "whole"}

    def __len__(self) -> int:
        return len(self.bounds)

    def __getitem__(self, index: int) -> Record:
        start, end = self.bounds[index].tolist()
        data = parse(self.whole[start:end], index, self.path)
        names = data.get("image")
        names = [n for n in (names if isinstance(names, list) else [names]) if str(n) not in NO_IMAGE]
        return Record(
            id=str(data.get("id", index)),
            path=self.path,
            data=data,
            images=[self.file(name) for name in names],
            maps={key: self.file(data[key]) for key in MAPS if isinstance(data.get(key), str)},
        )

    def file(self, name: str) -> Blob:
        path = os.path.join(self.root, str(name))
        return Blob(path, functools.partial(read_file, path))


class ArrayRecordSource:
    """Shards that `convert` wrote, in the order of their names: a folder, or a glob pattern of files.

    A record is its header's length (4 bytes, little-endian), the header in JSON {"id", "data", "blobs":
    [[field, path, size], ...]}, then the blobs: pictures (field "image") and target maps. Raises ValueError
    for missing shards.
    """

    def __init__(self, path: str):
        self.path = str(path)
        folder = os.path.isdir(self.path)
        self.files = sorted(glob.glob(glob.escape(self.path) + "/*.array_record*" if folder else self.path))
        if not self.files:
            raise ValueError(f"no ArrayRecord shards at {self.path}")
        named = re.search(r"-of-(\d+)", self.files[0])
        if named and int(named[1]) != len(self.files):
            raise ValueError(f"{self.path} has {len(self.files)} shards, but their names say {int(named[1])}")
        self.count = len(self.records)  # opens every shard: a broken one is named before training starts

    @functools.cached_property
    def records(self) -> Any:
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        return ArrayRecordDataSource(self.files)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "records"}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        whole = memoryview(self.records[index])
        start = 4 + struct.unpack("<I", whole[:4])[0]
        header = json.loads(bytes(whole[4:start]))
        images, maps = [], {}
        for field, path, size in header["blobs"]:
            blob = Blob(path, whole[start : start + size].tobytes)
            start += size
            if field == "image":
                images.append(blob)
            else:
                maps[field] = blob
        return Record(header["id"], self.path, header["data"], images, maps)


class TfdsSource:
    """A TFDS folder in ArrayRecord format, read without TensorFlow.

    Features: `image` if there are pictures, and either `conversations` (a Sequence of {"from", "value"}) or
    `question` and `answer`; `id` if there are ids. Raises ValueError for another folder or an unknown split.
    """

    def __init__(self, folder: str, split: str = "train"):
        self.path, self.split = str(folder), split
        if not os.path.isfile(os.path.join(folder, "dataset_info.json")):
            raise ValueError(f"{folder} is not a TFDS folder: it has no dataset_info.json")
        splits, features = self.builder.info.splits, set(self.builder.info.features)
        if split not in splits:
            raise ValueError(f"{folder} has no split {split!r}; it has {', '.join(splits)}")
        if not features & {"conversations", "question"}:
            raise ValueError(f"{folder} has neither `conversations` nor `question`, but {', '.join(features)}")

    @functools.cached_property
    def builder(self) -> Any:
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.path)

    @functools.cached_property
    def records(self) -> Any:
        import tensorflow_datasets as tfds

        # The picture stays encoded: decoding belongs to data/images.py, for all sources alike.
        encoded = {"image": tfds.decode.SkipDecoding()} if "image" in self.builder.info.features else None
        return self.builder.as_data_source(self.split, decoders=encoded)

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("builder", "records")}

    def __len__(self) -> int:
        return self.builder.info.splits[self.split].num_examples

    def __getitem__(self, index: int) -> Record:
        item = self.records[index]
        mark = "<image>\n" if "image" in item else ""
        if "conversations" in item:
            turns = list(zip(*(map(text, item["conversations"][key]) for key in ("from", "value"))))
        else:
            turns = [("human", mark + text(item["question"])), ("gpt", text(item["answer"]))]
        name = text(item.get("id", index))
        data = {"id": name, "conversations": [{"from": who, "value": what} for who, what in turns]}
        images = [Blob(f"{self.path}[{index}]", lambda: item["image"])] if mark else []
        return Record(name, self.path, data, images, {})


def text(value: Any) -> str:
    """A string of a TFDS example, where it is bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)


def open_source(path: str, image_root: str | None = None) -> Source:
    """The source at `path`: a JSON or JSONL file, a folder or glob of ArrayRecord shards,
    `TFDS_FOLDER:SPLIT`.
    """
    folder, _, split = str(path).rpartition(":")
    if folder and os.path.isfile(os.path.join(folder, "dataset_info.json")):
        return TfdsSource(folder, split)
    if str(path).endswith((".json", ".jsonl")):
        return LlavaSource(path, image_root)
    return ArrayRecordSource(path)


def convert(
    source: Source, out_dir: str, shards: int, progress: Callable[[int, int], None] | None = None
) -> list[BadSample]:
    """Writes a source as ArrayRecord files part-00000-of-00004.array_record, in the order of its records.

    The folder is written under another name and renamed at the end, so it is whole or absent. progress(done,
    total) is called after each record. Returns the records left out because a file of theirs could not be
    read. Raises ValueError if `out_dir` is a folder with something in it, or there are fewer records than
    shards.
    """
    from array_record.python.array_record_module import ArrayRecordWriter

    target = Path(out_dir)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{out_dir} is not an empty folder; remove it or choose another")
    if not 1 <= shards <= len(source):
        raise ValueError(f"shards must be 1 to {len(source)}, the number of records, not {shards}")
    partial = target.with_name(target.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    bad, ends = [], [len(source) * (shard + 1) // shards for shard in range(shards)]
    for shard, end in enumerate(ends):
        file = partial / f"part-{shard:05d}-of-{shards:05d}.array_record"
        writer = ArrayRecordWriter(str(file), "group_size:1")
        for index in range(ends[shard - 1] if shard else 0, end):
            try:
                writer.write(packed(source[index]))
            except BadSample as error:
                bad.append(error)
            if progress:
                progress(index + 1, len(source))
        writer.close()
    partial.replace(target)
    return bad


def packed(record: Record) -> bytes:
    """A record with its files, in the format of ArrayRecordSource."""
    blobs = [("image", blob) for blob in record.images] + list(record.maps.items())
    contents = [record.read(blob) for _, blob in blobs]
    table = [(field, blob.path, len(content)) for (field, blob), content in zip(blobs, contents)]
    header = json.dumps({"id": record.id, "data": record.data, "blobs": table}, ensure_ascii=False).encode()
    return b"".join([struct.pack("<I", len(header)), header, *contents])


def parse(text: bytes, index: int, path: str) -> dict[str, Any]:
    try:
        data = json.loads(text)
    except ValueError as error:
        raise BadSample(str(index), path, "not JSON", str(error)) from None
    if not isinstance(data, dict):
        raise BadSample(str(index), path, "not JSON", f"record {index} is not an object")
    return data


def read_file(path: str) -> bytes:
    with open(path, "rb") as file:
        return file.read()


def line_bounds(whole: mmap.mmap | bytes, path: str) -> np.ndarray:
    """int64[N, 2]: start and end of each line that is not blank."""
    chunks = ((at, np.frombuffer(whole[at : at + CHUNK], np.uint8)) for at in range(0, len(whole), CHUNK))
    found = [np.flatnonzero(chunk == ord("\n")) + at for at, chunk in chunks]
    ends = np.concatenate([*found, [len(whole)]]).astype(np.int64)
    starts = np.concatenate([[0], ends[:-1] + 1])
    return np.stack([starts, ends], 1)[ends - starts > 1]  # a blank line may hold a carriage return


def array_bounds(whole: mmap.mmap | bytes, path: str) -> np.ndarray:
    """int64[N, 2]: start and end of each object of a JSON array. Raises ValueError if the file ends in one.

    Braces count where they are not in a string; a quote opens or closes a string if it is not escaped.
    """
    depth, in_string, escaped = 0, False, False  # carried from chunk to chunk; escaped: the next byte is
    starts, ends = [], []
    for at in range(0, len(whole), CHUNK):
        chunk = np.frombuffer(whole[at : at + CHUNK], np.uint8)
        slashes = np.flatnonzero(chunk == ord("\\"))
        if escaped and slashes.size and slashes[0] == 0:
            slashes = slashes[1:]
        # In a run of backslashes every other one escapes the byte behind it, from the first on.
        first = np.diff(slashes, prepend=-2) != 1
        begin = np.maximum.accumulate(np.where(first, np.arange(slashes.size), 0))
        escapes = slashes[(np.arange(slashes.size) - begin) % 2 == 0] + 1
        plain = np.ones(chunk.size + 1, bool)
        plain[escapes] = False
        plain[0] &= not escaped
        escaped = not plain[-1]

        quotes = (chunk == ord('"')) & plain[:-1]
        marks = np.flatnonzero(quotes | (chunk == ord("{")) | (chunk == ord("}")))
        outside = ~((np.cumsum(quotes[marks]) + in_string) % 2).astype(bool) & ~quotes[marks]
        in_string = bool((quotes.sum() + in_string) % 2)
        braces = marks[outside]
        opening = chunk[braces] == ord("{")
        depths = depth + np.cumsum(np.where(opening, 1, -1))
        depth = int(depths[-1]) if depths.size else depth
        starts.append(braces[opening & (depths == 1)] + at)
        ends.append(braces[~opening & (depths == 0)] + at + 1)
    if depth or in_string:
        raise ValueError(f"{path} is not a whole JSON array: it ends inside a record")
    return np.stack([np.concatenate(starts), np.concatenate(ends)], 1).astype(np.int64)


def case_variant(path: str) -> str | None:
    """The file whose path differs from the missing `path` only in upper and lower case, if any."""
    found = Path(path).anchor or "."
    for part in Path(path).parts[bool(Path(path).anchor) :]:
        exact = os.path.join(found, part)
        name = part if os.path.exists(exact) else folder_names(found).get(part.lower())
        if name is None:
            return None
        found = os.path.join(found, name)
    return found


@functools.lru_cache(maxsize=64)
def folder_names(folder: str) -> dict[str, str]:
    """Lower-case name -> name, for everything in a folder."""
    return {name.lower(): name for name in os.listdir(folder)} if os.path.isdir(folder) else {}
