"""Compiled programs kept on disk for the next start, and the compile time that this saved."""

from __future__ import annotations

import os

import jax

_EVENT = "/jax/compilation_cache/compile_time_saved_sec"  # recorded for each program that JAX reads from the cache
_saved: list[float] = []  # seconds


def use_compile_cache(folder: str) -> None:
    """Keeps compiled programs in `folder`, or in JAX_COMPILATION_CACHE_DIR if that is set."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", os.path.abspath(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)
    jax.monitoring.register_event_duration_secs_listener(_count)


def _count(event: str, seconds: float, **_) -> None:
    if event == _EVENT:
        _saved.append(seconds)


def from_cache() -> str:
    """How many programs this process read from the cache, in words; "" if none."""
    return f"{len(_saved)} programs from the cache, {sum(_saved):.0f} s saved" if _saved else ""
