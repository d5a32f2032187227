"""TensorBoard's event files: a row is in the file when `write` returns, and what comes again is cut out.

A file is a sequence of records: length uint64, its checksum uint32, an event (protocol buffer), its checksum uint32.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator
from pathlib import Path

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.summary import scalar

HEAD, TAIL = 12, 4  # bytes around an event


def records(data: bytes) -> Iterator[tuple[bytes, Event]]:
    """The complete records of a file, each with its event; a process that was killed may leave an incomplete one."""
    place = 0
    while len(data) >= place + HEAD:
        end = place + HEAD + struct.unpack_from("<Q", data, place)[0] + TAIL
        if end > len(data):
            return
        yield data[place:end], Event.FromString(data[place + HEAD : end - TAIL])
        place = end


def drop_events_after(folder: Path, step: int) -> None:
    """Removes the scalars of later steps, and incomplete records, from the event files of a folder."""
    for path in sorted(folder.glob("events.out.tfevents.*")):
        data = path.read_bytes()
        kept = b"".join(record for record, event in records(data) if event.step <= step or not event.summary.value)
        if len(kept) < len(data):
            part = folder / f"part.{path.name}"  # a name that TensorBoard does not read
            part.write_bytes(kept)
            os.replace(part, path)


class EventFile:
    """A new event file in a folder, for the steps after `step`; earlier files forget what they hold of these."""

    def __init__(self, folder: Path, step: int):
        drop_events_after(folder, step)
        folder.mkdir(parents=True, exist_ok=True)
        self.writer = EventsWriter(str(folder / "events"), f".from{step}.{os.getpid()}")
        if step:  # a TensorBoard that has read the later steps forgets them too
            self.add(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def write(self, numbers: dict[str, float], step: int) -> None:
        """Appends one scalar per name."""
        for name, value in numbers.items():
            self.add(Event(step=step, summary=scalar(name, value)))
        self.writer.flush()

    def add(self, event: Event) -> None:
        event.wall_time = time.time()
        self.writer.write_event(event)

    def close(self) -> None:
        self.writer.close()
