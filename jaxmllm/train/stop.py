"""Stopping on SIGTERM and SIGINT without losing work; docs/stopping.md says what happens when.

Light to import: the command line catches signals before it imports JAX.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator

from jaxmllm.watched import leave

SIGNALS = (signal.SIGTERM, signal.SIGINT)
ONE = 0.2  # seconds within which signals count as one: `timeout` and some schedulers send each twice
NUDGE = 1.0  # seconds after which Stopped is raised once more: Python drops what is raised in a callback of its own
GRACE = 10.0  # seconds that the main thread has to end the process where nothing can be lost


class Stopped(BaseException):
    """The run was told to stop, and what it had is saved. Like KeyboardInterrupt it is no Exception, so that no
    library takes it for an error."""


class StopSignal:
    """While entered, in the main thread, SIGTERM and SIGINT stop the run instead of killing the process.

    The first one raises Stopped in the main thread, inside `shielded` only at its end. Python delivers it when the main
    thread is back from C++, which can take minutes while XLA compiles. So the signals are also written to a descriptor
    that a thread reads: it answers with a line at once, and ends the process at the second signal.

    Among several processes `asked` is true after the same step in all of them. JAX's preemption service sees to it: it
    handles SIGTERM, and is told of both signals here.
    """

    def __init__(self):
        self.told = 0  # the signal
        self.starting, self.shield, self.ended = True, False, False
        self.nudged = False  # the thread has asked the main thread to raise Stopped once more
        self.jax_handler = None  # address of the preemption service's handler of SIGTERM, among several processes
        self.calls = 0  # of `asked`: a count of steps that goes on from stage to stage
        self.deadline: float | None = None  # when the thread ends the process; time.monotonic()

    def joined(self) -> None:
        """To be called when the processes have found each other: takes SIGTERM from JAX's service and tells it."""
        import jax

        if jax.process_count() > 1:
            libc = ctypes.CDLL(None)
            libc.signal.restype, libc.signal.argtypes = ctypes.c_void_p, (ctypes.c_int, ctypes.c_void_p)
            self.jax_handler = libc.signal(signal.SIGTERM, None)
            signal.signal(signal.SIGTERM, self._tell)

    def asked(self, step: int) -> bool:
        """Whether to stop after `step`; each process must ask at each step."""
        self.calls += 1
        if self.jax_handler:
            from jax.experimental import multihost_utils

            return multihost_utils.reached_preemption_sync_point(self.calls)
        return bool(self.told)

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """A signal in here raises Stopped at the end, or, among several processes, not at all: see `asked`."""
        self.starting, self.shield, self.deadline = False, True, None
        try:
            yield
        finally:
            self.shield = False
        self._raise()

    def end(self, text: str) -> None:
        """Says how the run has ended. If threads that wait for data keep the process, it is ended in GRACE seconds."""
        self.ended = True
        say(text)
        self.deadline = time.monotonic() + GRACE

    def __enter__(self) -> StopSignal:
        self.reads, self.writes = os.pipe()
        os.set_blocking(self.writes, False)
        self.old = {number: signal.signal(number, self._tell) for number in SIGNALS}
        self.old_descriptor = signal.set_wakeup_fd(self.writes, warn_on_full_buffer=False)
        threading.Thread(target=self._listen, name="signals", daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        if not self.told:  # otherwise the process is to end, and a second signal or the deadline may have to end it
            signal.set_wakeup_fd(self.old_descriptor)
            for number, handler in self.old.items():
                signal.signal(number, handler)
            os.close(self.writes)

    def _tell(self, number: int, _) -> None:
        """Python's handler, in the main thread."""
        raises, self.told, self.nudged = self.nudged or not self.told, number, False
        if raises and not self.shield:
            self._raise()

    def _raise(self) -> None:
        if self.told and not self.ended and (self.starting or not self.jax_handler):
            raise Stopped

    def _listen(self) -> None:
        """The thread: answers signals at once, unless the main thread does, and ends the process if it must."""
        first, answered, nudges, own = 0.0, 0.0, 0, threading.main_thread().ident
        while True:
            now = time.monotonic()
            if self.deadline and now > self.deadline:
                leave(0)
            if first and not answered and now - first > ONE:
                answered = now
                self._answer()
            elif answered and now - answered > NUDGE and not (self.shield or self.ended or self.jax_handler):
                answered, nudges, self.nudged = now, nudges + 1, True
                signal.pthread_kill(own, self.told or signal.SIGTERM)
            if not select.select([self.reads], [], [], 0.5 if answered or not first else ONE)[0]:
                continue
            data = os.read(self.reads, 64)
            if not data:
                return os.close(self.reads)
            for number in (byte for byte in data if byte in SIGNALS):
                if nudges:
                    nudges -= 1
                elif not first:
                    first = time.monotonic()
                    self._first()
                elif time.monotonic() - first > ONE:
                    say(f"{signal.Signals(number).name} again: ended at once; the checkpoints stay")
                    leave(128 + number)

    def _first(self) -> None:
        """What follows from the first signal in any case."""
        if self.starting:
            self.deadline = time.monotonic() + GRACE
        elif self.jax_handler:
            ctypes.CFUNCTYPE(None, ctypes.c_int)(self.jax_handler)(signal.SIGTERM)

    def _answer(self) -> None:
        if self.ended:
            return
        if self.starting:
            say(f"told to stop: nothing is trained yet; ends in {GRACE:.0f} s at the latest")
        else:
            say("told to stop: saves and ends when this step is done (a compilation must end first); again: at once")


def say(text: str) -> None:
    """Prints a line to stderr at once, in place of a progress bar."""
    start = "\r\x1b[2K" if sys.stderr.isatty() else ""
    print(f"{start}jaxmllm: {text}", file=sys.stderr, flush=True)
