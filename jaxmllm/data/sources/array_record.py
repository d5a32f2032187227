"""Records in ArrayRecord shards, with their pictures and maps inside: written once, then read in any order."""

from __future__ import annotations

import functools
import glob
import hashlib
import json
import os
import re
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

from jaxmllm import json_text
from jaxmllm.data.sources.record import MAPS, BadSample, Blob, Record, RecordSource
from jaxmllm.errors import shown, suggest_path

ENDS = 1 << 16  # bytes of the head and of the tail of a shard that its fingerprint covers


class ArrayRecordSource:
    """Shards that `convert` wrote, in the order of their names: a folder, or a glob pattern of files.

    A record is the length of its header (4 bytes, little-endian), the header as JSON {"id", "data", "blobs":
    [[field, path, size], ...]}, then the blobs: pictures (field "image") and target maps. Raises ValueError for missing
    shards and for a file that is none.
    """

    def __init__(self, path: str):
        self.path = str(path)
        is_folder = os.path.isdir(self.path)
        self.files = sorted(glob.glob(glob.escape(self.path) + "/*.array_record*" if is_folder else self.path))
        if not self.files:
            raise ValueError(f"no ArrayRecord shards at {self.path}{suggest_path(self.path)}")
        named = re.search(r"-of-(\d+)", self.files[0])
        if named and int(named[1]) != len(self.files):
            raise ValueError(f"{self.path} has {len(self.files)} shards, but their names say {int(named[1])}")
        self.count = len(self.records)  # opens every shard, so that a broken one is reported before training starts

    @functools.cached_property
    def records(self) -> Any:
        """The shards, opened."""
        from array_record.python.array_record_data_source import ArrayRecordDataSource

        try:
            return ArrayRecordDataSource(self.files)
        except Exception as error:  # the reader raises RuntimeError, which does not name the file
            raise ValueError(f"cannot read {self.path} as ArrayRecord shards: {shown(error, 400)}") from None

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of the names, sizes, heads and tails of the shards; the tail of a shard holds its index."""
        digest = hashlib.sha256()
        for path in self.files:
            with open(path, "rb") as file:
                size = os.fstat(file.fileno()).st_size
                digest.update(f"{os.path.basename(path)} {size}\n".encode())
                digest.update(file.read(ENDS))
                file.seek(max(size - ENDS, 0))
                digest.update(file.read(ENDS))
        return digest.hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k != "records"}

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Record:
        try:
            return unpacked(memoryview(self.records[index]), self.path)
        except Exception as error:  # a file of others may hold anything
            reason = shown(error, 400) or type(error).__name__
            raise BadSample(str(index), self.path, "damaged record", reason) from None


def unpacked(content: memoryview, path: str) -> Record:
    """The inverse of `packed`; path: of the source. Raises an error of any type for another format."""
    start = 4 + struct.unpack("<I", content[:4])[0]
    header = json_text.loads(bytes(content[4:start]))
    id, data = header["id"], header["data"]
    if not isinstance(id, str) or not isinstance(data, dict):
        raise ValueError("its header has no id and data")
    images, maps = [], {}
    for field, name, size in header["blobs"]:
        if field not in ("image", *MAPS) or not isinstance(name, str) or type(size) is not int or size < 0:
            raise ValueError(f"its header names a blob {field!r}, {name!r} of {size!r} bytes")
        blob = Blob(name, content[start : start + size].tobytes)
        start += size
        if field == "image":
            images.append(blob)
        else:
            maps[field] = blob
    if start != len(content):
        raise ValueError(f"it has {len(content)} bytes, and its header says {start}")
    return Record(id, path, data, images, maps)


def convert(
    source: RecordSource,
    out_dir: str,
    shards: int,
    progress: Callable[[int, int], None] | None = None,
    examine: Callable[[Record, int], Any] | None = None,
) -> list[BadSample]:
    """Writes a source as ArrayRecord files part-00000-of-00004.array_record, in the order of its records.

    The folder is written under another name and renamed at the end, so it is either complete or absent. progress(done,
    total) is called after each record. Returns the records that were left out: one of their files could not be read, or
    examine(record, index) raised BadSample. If these are all, nothing is written. Raises ValueError if `out_dir` is a
    folder that is not empty, or if there are fewer records than shards.
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
                record = source[index]
                if examine:
                    examine(record, index)
                writer.write(packed(record))
            except BadSample as error:
                bad.append(error)
            if progress:
                progress(index + 1, len(source))
        writer.close()
    if len(bad) < len(source):
        partial.replace(target)
    else:
        shutil.rmtree(partial)
    return bad


def packed(record: Record) -> bytes:
    """A record with its files, in the format of ArrayRecordSource."""
    blobs = [("image", blob) for blob in record.images] + list(record.maps.items())
    contents = [record.read(blob) for _, blob in blobs]
    table = [(field, blob.path, len(content)) for (field, blob), content in zip(blobs, contents)]
    header = json.dumps({"id": record.id, "data": record.data, "blobs": table}, ensure_ascii=False).encode()
    return b"".join([struct.pack("<I", len(header)), header, *contents])
