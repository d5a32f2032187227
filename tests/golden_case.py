"""What a golden file holds, and what is needed to run it here; golden.py compares the results."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path

import jax
import numpy as np
from flax import linen as nn

from jaxmllm.train.state import flatten
from jaxmllm.weights.convert import KeyMap

Arrays = dict[str, np.ndarray]


class Unreadable(ValueError):
    """Raised for a file that is not a golden file; the message says why."""


@dataclasses.dataclass(frozen=True)
class Case:
    """One file. grads are keyed as they are stored, e.g. "weights/norm.weight", "partial/inputs/predictions"."""

    kind: str
    config: dict
    weights: Arrays
    inputs: Arrays
    outputs: Arrays
    grads: Arrays


@dataclasses.dataclass(frozen=True)
class Check:
    """How a case runs here.

    forward: our flat parameters, inputs -> each stored output by name, and the scalars that are differentiated.
    key_map, shapes: how the reference's weights become our parameters, and their shapes. compare: output -> bool mask
    of the entries that are compared (default: all). scalars: prefix of stored gradients -> the output whose gradients
    they are. from_grads: gradients -> further outputs.
    """

    forward: Callable[[dict, dict], dict]
    key_map: KeyMap = KeyMap()
    shapes: Mapping[str, tuple[int, ...]] = dataclasses.field(default_factory=dict)
    compare: Mapping[str, np.ndarray] = dataclasses.field(default_factory=dict)
    scalars: Mapping[str, str] = dataclasses.field(default_factory=lambda: {"": "scalar"})
    from_grads: Callable[[Arrays], Arrays] = lambda grads: {}


def load(path: str | Path) -> Case:
    """Reads a file without unpickling anything. Raises Unreadable."""
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = dict(file)
        meta = json.loads(str(arrays.pop("meta")))
        kind, config = meta["kind"], meta["config"]
    except Exception as error:  # a damaged archive raises almost anything
        raise Unreadable(f"not a golden file: {type(error).__name__}: {error}".splitlines()[0]) from None
    parts: dict[str, Arrays] = {"weights": {}, "inputs": {}, "outputs": {}, "grads": {}}
    for name, array in arrays.items():
        part, _, rest = name.partition("/")
        if part not in parts:
            raise Unreadable(f"not a golden file: array {name!r}")
        parts[part][rest] = array
    return Case(kind, config, **parts)


def shapes(module: nn.Module, *args, **options) -> dict[str, tuple[int, ...]]:
    """{path: shape} of the module's parameters; arrays in args may be numpy arrays or jax.ShapeDtypeStruct."""
    init = lambda *args: module.init(jax.random.key(0), *args, **options)
    tree = jax.eval_shape(init, *args)["params"]
    return {path: x.shape for path, x in flatten(tree).items()}


def numbered(inputs: dict, name: str) -> list:
    """[inputs["name_0"], inputs["name_1"], ..]."""
    return [inputs[f"{name}_{i}"] for i in range(len(inputs)) if f"{name}_{i}" in inputs]
