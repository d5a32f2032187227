"""The list of samples that could not be used, kept beside the run."""

from __future__ import annotations

import contextlib
import json
import os
import threading

from jaxmllm.data.sources import BadSample


class TooManyBadSamples(RuntimeError):
    """More samples are bad than the run tolerates."""


class Ledger:
    """Appends {"id", "path", "reason"} per bad sample to a JSONL file, each id once, also over restarts.

    path: a local file, made with its folder at the first bad sample. max_bad: distinct ids tolerated. Safe
    to use from several threads; an append is one write, so several processes may share a file.
    """

    def __init__(self, path: str, max_bad: int = 1000):
        self.path, self.max_bad = str(path), max_bad
        self.lock = threading.Lock()
        self.reasons: dict[str, str] = {}  # id -> reason
        if os.path.exists(self.path):
            with open(self.path, encoding="utf-8") as file:
                for line in file:
                    with contextlib.suppress(ValueError):  # a line the process died in; its sample comes again
                        entry = json.loads(line)
                        self.reasons[entry["id"]] = entry["reason"]

    @property
    def count(self) -> int:
        """Distinct bad samples so far."""
        return len(self.reasons)

    def add(self, bad: BadSample) -> None:
        """Notes a sample. Raises TooManyBadSamples once there are more than max_bad."""
        with self.lock:
            if bad.id not in self.reasons:
                self.reasons[bad.id] = bad.reason
                self._append({"id": bad.id, "path": bad.path, "reason": bad.reason})
            if self.count > self.max_bad:
                first = "; ".join(f"{id}: {reason}" for id, reason in list(self.reasons.items())[:3])
                what = f"{self.count} samples are bad, the limit is {self.max_bad}"
                raise TooManyBadSamples(f"{what}; the first: {first}; see {self.path}")

    def _append(self, entry: dict[str, str]) -> None:
        os.makedirs(os.path.dirname(self.path) or ".", exist_ok=True)
        file = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            whole = not size or os.pread(file, 1, size - 1) == b"\n"
            os.write(file, (b"" if whole else b"\n") + json.dumps(entry, ensure_ascii=False).encode() + b"\n")
        finally:
            os.close(file)
