"""Compares updates on several meshes with those on one device: `python -m tests.optimizer_meshes`, on 8 devices.

Every mesh gets the same made-up gradients of made-up parameters of all kinds, three times. Prints one JSON line per
optimizer and mesh: the largest difference of an update relative to its largest value, the parameters whose state is
not split like them, and what the compiled update sends between devices.
"""

import collections
import json
import math
import re

import jax
import numpy as np

from jaxmllm import mesh as meshes
from jaxmllm import sharded
from jaxmllm.config import Rule
from jaxmllm.nn.param_info import ParamInfo
from jaxmllm.train.optim import transformation
from jaxmllm.train.optimizers import Adafactor, AdamW, Muon

INFOS = {
    "q": ParamInfo("matrix", ("layers", "embed", "heads", None), 1),
    "out": ParamInfo("matrix", ("layers", "layers", "heads", None, "embed"), 2),
    "down": ParamInfo("matrix", ("mlp", "embed"), 1),
    "conv": ParamInfo("matrix", (None, None, "embed", None), 3),
    "table": ParamInfo("embedding", ("vocab", "embed")),
    "norm": ParamInfo("norm", ("layers", None)),
    "queries": ParamInfo("array", (None, None)),
}
SHAPES = {
    "q": (3, 64, 8, 16),
    "out": (2, 3, 8, 16, 64),
    "down": (96, 64),
    "conv": (3, 3, 16, 32),
    "table": (96, 64),
    "norm": (3, 64),
    "queries": (9, 64),
}
MESHES = ({"fsdp": 8}, {"data": 2, "fsdp": 2, "tensor": 2})


def made_up(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {path: random.normal(size=shape).astype(np.float32) for path, shape in SHAPES.items()}


def place(params):
    """Parameters or gradients, split like the weights of a model."""
    names = {path: tuple(None if d == "layers" else d for d in info.dims) for path, info in INFOS.items()}
    return jax.jit(lambda every: {path: sharded.shard_param(x, names[path], path) for path, x in every.items()})(params)


def updates(optimizer, sizes: dict[str, int]) -> tuple[dict[str, np.ndarray], list[str], dict[str, int]]:
    """(the third updates, paths of state that is split otherwise than its parameter, collectives of an update)."""
    mesh = meshes.Mesh(**{"fsdp": 1} | sizes).build(jax.devices()[: math.prod(sizes.values())])
    tx = transformation(optimizer, 10, {path: Rule(".*") for path in INFOS}, INFOS)
    with jax.set_mesh(mesh):
        params = place(made_up(0))
        state = jax.jit(tx.init)(params)
        update = jax.jit(tx.update).lower(params, state, params).compile()
        for seed in (1, 2, 3):
            last, state = update(place(made_up(seed)), state, params)
        found = jax.tree_util.tree_leaves_with_path(state)
    named = [(str(path[-1].key), x) for path, x in found if isinstance(path[-1], jax.tree_util.DictKey)]
    wrong = [path for path, x in named if x.shape == SHAPES[path] and x.sharding != params[path].sharding]
    sent = collections.Counter(re.findall(r" (all-gather|all-to-all|collective-permute)\(", update.as_text()))
    return jax.device_get(last), wrong, dict(sent)


def main() -> None:
    sharded.MIN_FSDP_SIZE = 512
    for optimizer in (AdamW(lr=1.0), Muon(lr=1.0, weight_decay=0.1, adam_rate=0.5), Adafactor(lr=1.0)):
        one, _, _ = updates(optimizer, {})
        for sizes in MESHES:
            many, wrong, sent = updates(optimizer, sizes)
            apart = {path: float(np.abs(many[path] - x).max() / np.abs(x).max()) for path, x in one.items()}
            print(json.dumps({"optimizer": type(optimizer).__name__, "apart": apart, "wrong": wrong, "sent": sent}))


if __name__ == "__main__":
    main()
