"""The list of samples that could not be used, a file in the run's folder."""

from __future__ import annotations

import contextlib
import json
import os
import threading

from jaxmllm.data.sources.record import BadSample


class TooManyBadSamples(RuntimeError):
    """More samples are bad than the run tolerates."""


class Ledger:
    """Appends {"id", "path", "reason"} of each bad sample to a JSONL file; each id is written once, even over restarts.

    path: a local file, which is made, with its folder, at the first bad sample. max_bad: how many distinct ids are
    tolerated. Several threads may use a ledger; an append is a single write, so several processes may share a file.
    """

    def __init__(self, path: str, max_bad: int = 1000):
        self.path, self.max_bad = str(path), max_bad
        self.lock = threading.Lock()
        self.reasons: dict[str, str] = {}  # id -> reason
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                for line in file:
                    with contextlib.suppress(ValueError):  # cut off when the process died; its sample will be met again
                        entry = json.loads(line)
                        self.reasons[entry["id"]] = entry["reason"]

    @property
    def count(self) -> int:
        """Distinct bad samples so far."""
        return len(self.reasons)

    def add(self, bad: BadSample) -> None:
        """Notes a sample. Raises TooManyBadSamples if there are then more than max_bad."""
        with self.lock:
            if bad.id not in self.reasons:
                self.reasons[bad.id] = bad.reason
                self._append({"id": bad.id, "path": bad.path, "reason": bad.reason})
            if self.count > self.max_bad:
                first = "; ".join(f"{id}: {reason}" for id, reason in list(self.reasons.items())[:3])
                excess = f"{self.count} samples are bad, the limit is {self.max_bad}"
                raise TooManyBadSamples(f"{excess}; the first: {first}; see {self.path}")

    def _append(self, entry: dict[str, str]) -> None:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            line_ended = not size or os.pread(file, 1, size - 1) == b"\n"
            os.write(file, (b"" if line_ended else b"\n") + json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        finally:
            os.close(file)
