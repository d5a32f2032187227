"""What each parameter is: its kind and the names of its dimensions. Decay, freezing and optimizers depend on it."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator

KINDS = ("matrix", "embedding", "norm", "bias", "statistic", "array")


@dataclasses.dataclass(frozen=True)
class ParamInfo:
    """kind: one of KINDS. "norm": the scale of a norm; "statistic": of batch normalisation, never trained; "array": a
    learned array, such as positions, queries or scales.

    dims: logical name (mesh.RULES) of each dimension, None for none; in front of them, "layers" for each dimension in
    which layers are stacked. inputs: of a matrix, how many dimensions after those are contracted with its input.
    linear: whether it is the kernel of a primitives.Linear, which can have an adapter (nn/lora.py).
    """

    kind: str
    dims: tuple[str | None, ...]
    inputs: int = 0
    linear: bool = dataclasses.field(default=False, compare=False)

    def stacked(self, ndim: int) -> ParamInfo:
        """The same for a parameter of `ndim` dimensions, of which the first ones stack layers."""
        return dataclasses.replace(self, dims=("layers",) * (ndim - len(self.dims)) + self.dims)


_described: contextvars.ContextVar[dict[str, ParamInfo] | None] = contextvars.ContextVar("described", default=None)


@contextlib.contextmanager
def describing() -> Iterator[dict[str, ParamInfo]]:
    """While entered, every parameter that a module makes or reads is described in the dict: path -> ParamInfo.

    Inside another one, both get all.
    """
    found: dict[str, ParamInfo] = {}
    token = _described.set(found)
    try:
        yield found
    finally:
        _described.reset(token)
    outer = _described.get()
    if outer is not None:
        outer |= found


def describe_param(path: str, info: ParamInfo) -> None:
    """Notes what a parameter is; nn/primitives.py calls it where it makes one."""
    found = _described.get()
    if found is not None:
        found[path] = info
