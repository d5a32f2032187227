"""What a process does before it trains: it joins the other processes of a run and sets up its memory allocator."""

from __future__ import annotations

import ctypes
import math
import os
import socket
import sys
import threading
import time

from jaxmllm.watched import leave


def keep_freed_memory() -> None:
    """Tells glibc not to give freed memory back to the system.

    XLA's CPU backend allocates its scratch memory anew in every step. By default glibc maps and unmaps it each time,
    and the page faults (90,000 in a toy step) cost a third of the step's CPU time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mmap_max, trim_threshold, arena_max = -4, -1, -8  # malloc.h
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1)):
            mallopt(option, value)


def join_processes(distributed: bool) -> None:
    """Waits for the other processes if this is one of several: `distributed`, or JAX_COORDINATOR_ADDRESS is set."""
    if distributed or "JAX_COORDINATOR_ADDRESS" in os.environ:
        start_processes()


def start_processes(timeout: float = 1800) -> None:
    """Joins the processes of a pod slice, or those named by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES, JAX_PROCESS_ID.

    First says what it waits for, since this is where a start can hang. If some processes are still missing after
    `timeout` seconds, it says so in one line and ends this process with exit code 1.
    """
    import jax  # a second that commands without JAX need not spend

    address = os.environ.get("JAX_COORDINATOR_ADDRESS")
    count, index = (os.environ.get(f"JAX_{name}") for name in ("NUM_PROCESSES", "PROCESS_ID"))
    if address and not (count and index):
        raise ValueError("JAX_COORDINATOR_ADDRESS is set; set JAX_NUM_PROCESSES and JAX_PROCESS_ID as well")
    place = f"process {index} of {count} on {socket.gethostname()}, coordinator {address}"
    place = place if address else f"a process on {socket.gethostname()}, coordinator and number from the platform"
    say(f"{place}: waiting for the others (up to {timeout:g} s)")

    def give_up():
        say(f"{place}: some are still missing after {timeout:g} s; {who_is_missing(address)}")
        leave(1)

    # JAX's own time-out comes a little later, as an abort with a stack trace.
    timer = threading.Timer(timeout, give_up)
    timer.daemon = True
    timer.start()
    given = dict(coordinator_address=address, num_processes=int(count), process_id=int(index)) if address else {}
    jax.distributed.initialize(initialization_timeout=math.ceil(timeout) + 60, **given)
    timer.cancel()
    say(f"all {jax.process_count()} are here")


def who_is_missing(address: str | None) -> str:
    """What to look at when processes do not find each other."""
    if not address:
        return "see whether the command runs on every host of the slice"
    host, _, port = address.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=5).close()
    except OSError as error:
        return f"the coordinator does not answer ({error}): is process 0 running, and its port open to this host?"
    return "the coordinator answers: another process has not been started, or does not reach it"


def say(text: str) -> None:
    """Prints a line with the time to stderr at once."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)
