"""JSON Lines files that survive a crash: metrics, starts, replies, bad samples."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def append_line(path: str | os.PathLike[str], row: dict[str, Any]) -> None:
    """Appends a row in a single write, after ending a line that a crash has cut off. Makes the folder if needed."""
    os.makedirs(os.path.dirname(path) or ".", exist_ok=True)
    file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        size = os.fstat(file).st_size
        line_ended = not size or os.pread(file, 1, size - 1) == b"\n"
        os.write(file, (b"" if line_ended else b"\n") + json.dumps(row, ensure_ascii=False).encode() + b"\n")
    finally:
        os.close(file)


def read_lines(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The rows of a file that this program wrote, without lines that a crash has cut off; none if there is no file."""
    rows = []
    for line in Path(path).read_text(encoding="utf-8").split("\n") if os.path.exists(path) else []:
        with contextlib.suppress(ValueError):
            rows.append(json.loads(line))
    return rows


def drop_lines(path: str | os.PathLike[str], dropped: Callable[[dict[str, Any]], bool]) -> None:
    """Removes rows, and lines that a crash has cut off, from a file if there is one: all of them or none."""
    rows = read_lines(path)
    kept = [row for row in rows if not dropped(row)]
    if len(kept) < len(rows):
        part = f"{path}.part"
        Path(part).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in kept), encoding="utf-8")
        os.replace(part, path)
