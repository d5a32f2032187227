"""Where the records of a JSON array or a JSONL file start and end, and its fingerprint, without parsing the file.

The memory that this takes is 16 bytes a record and a few chunks, whatever the file holds.
"""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

from jaxmllm import json_text
from jaxmllm.data.sources.record import BadSample

CHUNK = 1 << 20  # bytes that are scanned at a time; they stay in the processor's cache between the two readings
MAX_RECORD = 4 << 20  # bytes of a record: a million tokens
MAX_RECORDS = 1 << 26  # of a file
BOM = b"\xef\xbb\xbf"  # some editors write it before UTF-8
BLANK = b" \t\r\n"
QUOTE, OPEN, CLOSE, COMMA = 1, 2, 3, 4
MARKS = np.zeros(256, np.uint8)  # byte -> what it means for the structure of JSON
for _mark, _bytes in ((QUOTE, b'"'), (OPEN, b"[{"), (CLOSE, b"]}"), (COMMA, b",")):
    MARKS[[*_bytes]] = _mark


def scan(content: mmap.mmap | bytes, path: str) -> tuple[np.ndarray, str]:
    """-> (record bounds, fingerprint), from one pass over a JSON array or JSONL, whichever the file holds.

    Bounds: int64[records, 2], start and end of each record; every element of an array counts, and every line that is
    not blank. The fingerprint is SHA-256, which most processors have in hardware: here it takes less than half the time
    of BLAKE2. Raises ValueError for a file that is not UTF-8, for an array that does not end where the file ends, and
    for more than MAX_RECORDS records.
    """
    if content[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise ValueError(f"{path} is UTF-16; write it as UTF-8")
    digest = hashlib.sha256()
    is_array = content[:4096].removeprefix(BOM).lstrip(BLANK)[:1] == b"["
    bounds = (array_bounds if is_array else line_bounds)(hashed(content, digest), content, path)
    return bounds, digest.hexdigest()


def hashed(content: mmap.mmap | bytes, digest: Any) -> Iterator[tuple[int, np.ndarray]]:
    """Yields (start, uint8[bytes]) for each chunk, which is added to the digest."""
    for at in range(0, len(content), CHUNK):
        chunk = np.frombuffer(content, np.uint8, min(CHUNK, len(content) - at), at)
        digest.update(chunk)
        yield at, chunk


class Bounds:
    """Collects the bounds of records."""

    def __init__(self, path: str):
        self.path, self.count = path, 0
        self.parts: list[np.ndarray] = [np.zeros((0, 2), np.int64)]

    def add(self, starts: np.ndarray, ends: np.ndarray) -> None:
        """Raises ValueError if there are more than MAX_RECORDS."""
        self.parts.append(np.stack([starts, ends], 1).astype(np.int64))
        self.count += len(starts)
        if self.count > MAX_RECORDS:
            raise ValueError(f"{self.path} has more than {MAX_RECORDS} records; split it")


def line_bounds(chunks: Iterable[tuple[int, np.ndarray]], content: mmap.mmap | bytes, path: str) -> np.ndarray:
    """int64[records, 2]: start and end of each line that is not blank."""
    found, start = Bounds(path), len(BOM) if content[:3] == BOM else 0
    whole = np.frombuffer(content or b"\n", np.uint8)
    for at, chunk in chunks:
        ends = np.flatnonzero(chunk == ord("\n")) + at
        if at + len(chunk) == len(content):
            ends = np.append(ends, len(content))
        starts = np.append(start, ends[:-1] + 1)[: len(ends)]
        start = int(ends[-1]) + 1 if len(ends) else start
        used = ends > starts
        starts, ends = starts[used], ends[used]
        solid = whole[starts] > ord(" ")
        for line in np.flatnonzero(~solid):  # few: lines that begin with a blank
            solid[line] = not is_blank(content, int(starts[line]), int(ends[line]))
        found.add(starts[solid], ends[solid])
    return np.concatenate(found.parts)


def array_bounds(chunks: Iterable[tuple[int, np.ndarray]], content: mmap.mmap | bytes, path: str) -> np.ndarray:
    """int64[records, 2]: start and end of each element of a JSON array, with the blanks around it.

    Brackets, braces and commas count only outside strings; a quote opens or closes a string unless it is escaped.
    Raises ValueError if the file ends inside the array, or goes on after it.
    """
    # Carried from chunk to chunk; `escaped` is about the next byte.
    depth, in_string, escaped = 0, False, False
    found, start, end = Bounds(path), 0, None  # of the next element, of the array
    for at, chunk in chunks:
        if end is None:
            plain, escaped = unescaped(chunk, escaped)
            kinds = MARKS[chunk] * plain
            marks = np.flatnonzero(kinds)
            quotes = kinds[marks] == QUOTE
            outside = ~((np.cumsum(quotes) + in_string) % 2).astype(bool) & ~quotes
            in_string = bool((quotes.sum() + in_string) % 2)
            marks = marks[outside]
            kinds = kinds[marks]
            depths = depth + np.cumsum((kinds == OPEN).astype(np.int64) - (kinds == CLOSE))
            if depth == 0 and marks.size:
                start = int(marks[0]) + at + 1
            depth = int(depths[-1]) if depths.size else depth
            borders = marks[(kinds == COMMA) & (depths == 1)] + at
            closed = np.flatnonzero((kinds == CLOSE) & (depths == 0))
            if closed.size:
                end = int(marks[closed[0]]) + at
                borders = np.append(borders[borders < end], end)
            if borders.size:
                found.add(np.append(start, borders[:-1] + 1), borders)
                start = int(borders[-1]) + 1
        if end is not None and chunk[max(end + 1 - at, 0) :].tobytes().strip(BLANK):
            raise ValueError(f"{path} is not one JSON array: it goes on after byte {end}, where the array ends")
    if end is None or content[end : end + 1] != b"]":
        raise ValueError(f"{path} is not a whole JSON array: it ends inside a record")
    bounds = np.concatenate(found.parts)
    # Nothing stands before the end of an empty array, and none of the last record after a comma that should not be.
    return bounds[:-1] if is_blank(content, *bounds[-1].tolist()) else bounds


def unescaped(chunk: np.ndarray, escaped: bool) -> tuple[np.ndarray, bool]:
    """bool[bytes]: False after a backslash that is not escaped itself; and whether the next chunk's first byte is
    escaped. escaped: whether this chunk's is."""
    slashes = np.flatnonzero(chunk == ord("\\"))
    if escaped and slashes.size and slashes[0] == 0:
        slashes = slashes[1:]
    # In a run of backslashes the first, third, fifth, ... escapes the byte after it.
    starts_run = np.diff(slashes, prepend=-2) != 1
    run_start = np.maximum.accumulate(np.where(starts_run, np.arange(slashes.size), 0))
    plain = np.ones(chunk.size + 1, bool)
    plain[slashes[(np.arange(slashes.size) - run_start) % 2 == 0] + 1] = False
    plain[0] &= not escaped
    return plain[:-1], not plain[-1]


def is_blank(content: mmap.mmap | bytes, start: int, end: int) -> bool:
    """Whether there are only blanks between two bytes; no record is so long that it must be looked at."""
    return end - start <= MAX_RECORD and not content[start:end].strip(BLANK)


def parse(content: mmap.mmap | bytes, start: int, end: int, index: int, path: str) -> dict[str, Any]:
    """The JSON object of record `index`, between two bytes of a file. Raises BadSample if it is not one."""
    if end - start > MAX_RECORD:
        raise BadSample(str(index), path, "too large", f"{end - start} bytes, and the limit is {MAX_RECORD}")
    try:
        data = json_text.loads(content[start:end])
    except ValueError as error:
        raise BadSample(str(index), path, "not JSON", str(error)) from None
    if not isinstance(data, dict):
        raise BadSample(str(index), path, "not JSON", f"record {index} is not an object")
    return data
