"""A light parent process that says what a training process was doing when that died without a word.

C code that crashes in a thread (a decoder of pictures, a driver), or the system when memory is short, ends a process at
once: nothing in it can report anything. So the training process is a child, which notes in shared memory which records
its threads are reading. The parent passes SIGTERM and SIGINT on, and dies with the child's exit code. If the parent is
killed, Linux kills the child too.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import mmap
import os
import signal
import sys
import threading
from typing import NoReturn

SIGNALS = {signal.SIGTERM, signal.SIGINT}
SLOTS, WIDTH = 256, 1024  # threads that can note something, bytes of a note; more threads share slots
SHOWN = 4  # notes in the line about a crash
PR_SET_PDEATHSIG = 1  # prctl.h

_shared: mmap.mmap | None = None  # the notes, then one byte: whether the process ended as it meant to
_slots, _own = itertools.count(), threading.local()


def note(what: str) -> None:
    """Notes what this thread is doing; "" when it is done."""
    if _shared is not None:
        if not hasattr(_own, "slot"):
            _own.slot = next(_slots) % SLOTS
        text = what.encode(errors="replace")[: WIDTH - 1] + b"\0"
        _shared[_own.slot * WIDTH : _own.slot * WIDTH + len(text)] = text


def leave(code: int) -> NoReturn:
    """Ends this process at once, as it means to."""
    _mark()
    os._exit(code)


def _mark() -> None:
    if _shared is not None:
        _shared[SLOTS * WIDTH] = 1


def watch() -> int | None:
    """Goes on in a child process, where it returns None; in the parent it returns the child's exit code when that ends.

    Where a process cannot be split, in one that has threads or JAX, or not on Linux, it goes on unwatched.
    """
    global _shared
    if sys.platform != "linux" or threading.active_count() > 1 or "jax" in sys.modules:
        return None
    shared = mmap.mmap(-1, SLOTS * WIDTH + 1)
    parent, old = os.getpid(), signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS | {signal.SIGCHLD})
    sys.stdout.flush()
    child = os.fork()
    if not child:
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it has died before
            os._exit(1)
        _shared = shared
        atexit.register(_mark)
        signal.pthread_sigmask(signal.SIG_SETMASK, old)
        return None
    code, passed_on = wait(child)
    if shared[SLOTS * WIDTH] or -code in passed_on:
        return code if code >= 0 else 128 - code
    how = f"with exit code {code}" if code >= 0 else f"by {signal.Signals(-code).name}"
    print(f"jaxmllm: the training process died {how}{doing(shared)}; what it has saved is intact", file=sys.stderr)
    return 1


def wait(child: int) -> tuple[int, set[int]]:
    """Waits for the child -> (its exit code, negative if a signal ended it; the signals passed on to it)."""
    passed_on: set[int] = set()
    while True:
        got = signal.sigwaitinfo(SIGNALS | {signal.SIGCHLD})
        if got.si_signo in SIGNALS:
            if got.si_code <= 0:  # from a process; what a terminal sends, the child gets as well
                os.kill(child, got.si_signo)
            passed_on.add(got.si_signo)
        else:
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status), passed_on


def doing(shared: mmap.mmap) -> str:
    """What the threads of the child were doing, in words."""
    slots = (shared[slot * WIDTH : (slot + 1) * WIDTH] for slot in range(SLOTS))
    notes = [text for slot in slots if (text := slot.partition(b"\0")[0].decode(errors="replace"))]
    more = f" and {len(notes) - SHOWN} more" if len(notes) > SHOWN else ""
    return f" while it read {', or '.join(notes[:SHOWN])}{more}" if notes else ""
