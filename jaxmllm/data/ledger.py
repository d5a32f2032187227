"""The list of samples that could not be used, a file in the run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import threading
from typing import Any

from jaxmllm.data.sources.record import BadSample


class TooManyBadSamples(RuntimeError):
    """More samples are bad than the run tolerates."""


class Ledger:
    """Appends {"source", "index", "id", "path", "reason"} of each bad sample to a JSONL file; each (source, index) is
    written once, even over restarts. Lines without these two fields, from older versions, count once each.

    path: a local file, which is made, with its folder, at the first bad sample. max_bad: how many distinct samples are
    tolerated. Several threads may use a ledger; an append is a single write, so several processes may share a file.
    """

    def __init__(self, path: str, max_bad: int = 1000):
        self.path, self.max_bad = str(path), max_bad
        self.lock = threading.Lock()
        self.found: dict[tuple[str | None, int], str] = {}  # (source, index) -> id and reason
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                for number, line in enumerate(file):
                    with contextlib.suppress(ValueError):  # cut off when the process died; its sample will be met again
                        entry = json.loads(line)
                        key = (entry["source"], entry["index"]) if "index" in entry else (None, number)
                        self.found[key] = f"{entry['id']}: {entry['reason']}"

    @property
    def count(self) -> int:
        """Distinct bad samples so far."""
        return len(self.found)

    def add(self, source: str, index: int, bad: BadSample) -> None:
        """Notes record `index` of a source. Raises TooManyBadSamples if there are then more than max_bad."""
        with self.lock:
            if (source, index) not in self.found:
                self.found[source, index] = f"{bad.id}: {bad.reason}"
                entry = {"source": source, "index": index, "id": bad.id, "path": bad.path, "reason": bad.reason}
                self._append(entry)
            if self.count > self.max_bad:
                first = "; ".join(list(self.found.values())[:3])
                excess = f"{self.count} samples are bad, the limit is {self.max_bad}"
                raise TooManyBadSamples(f"{excess}; the first: {first}; see {self.path}")

    def _append(self, entry: dict[str, Any]) -> None:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            line_ended = not size or os.pread(file, 1, size - 1) == b"\n"
            os.write(file, (b"" if line_ended else b"\n") + json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        finally:
            os.close(file)
