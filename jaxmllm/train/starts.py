"""WORKDIR/starts.jsonl: when the processes of a run were started, where in training, on what, with which versions."""

from __future__ import annotations

import importlib.metadata
import platform
import time

import jax

from jaxmllm.json_lines import append_line

PACKAGES = ("jaxmllm", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "transformers", "numpy")


def note_start(workdir: str, stage: str, step: int) -> None:
    """Appends a row about this process: it trains `stage` from `step` on. The first of several processes does.

    The row: "time" (local, ISO 8601), "stage", "step", "device" (their kind), "devices" and "hosts" (their numbers),
    "versions" (package -> version).
    """
    if jax.process_index() > 0:
        return
    row = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "stage": stage,
        "step": step,
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "hosts": jax.process_count(),
        "versions": versions(),
    }
    append_line(f"{workdir}/starts.jsonl", row)


def versions() -> dict[str, str]:
    """The versions of Python and of the packages that decide what a run computes; those not installed are left out."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # jaxmllm itself, used from its folder
            continue
    return found
