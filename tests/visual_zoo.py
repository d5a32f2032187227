"""Toy visual paths of all kinds, and one forward and backward pass through them.

`python -m tests.visual_zoo` runs each part once, on 8 devices (fsdp 4 x tensor 2), and prints one JSON line.
"""

from __future__ import annotations

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import mesh as meshes
from jaxmllm import sharded
from jaxmllm.aggregators.c_abstractor import CAbstractor
from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.aggregators.mof import AdditiveMoF, InterleavedMoF
from jaxmllm.aggregators.pixel_shuffle import PixelShuffle
from jaxmllm.aggregators.qformer import QFormer
from jaxmllm.aggregators.resampler import Resampler
from jaxmllm.aggregators.sva import SVA
from jaxmllm.encoders.convnext import ConvNeXt
from jaxmllm.encoders.efficientnet import EfficientNet
from jaxmllm.encoders.swin import Swin
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.average import Average, WeightedAverage
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.dense_connector import STI, dci, sci
from jaxmllm.fusers.fpn import FPN
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mesh import Mesh
from jaxmllm.mllm import MLLM, content_mask
from jaxmllm.train.state import flatten, unflatten

WIDTH, LLM, IMAGES = 16, 24, 8
LAYERS = {"remat": "none"}
DECODER = Decoder(40, LLM, 1, 2, 2, 24, **LAYERS)

ENCODERS = {
    "clip": ViT(16, 4, WIDTH, 3, 2, 24, (1, 2, 3), "quick_gelu", class_token=True, pre_norm=True, **LAYERS),
    "siglip": ViT(18, 4, WIDTH, 3, 2, 24, (1, 2, 3), "gelu_tanh", **LAYERS),
    "dino": ViT(16, 4, WIDTH, 3, 2, 24, (1, 2, 3), class_token=True, registers=2, layer_scale=True, **LAYERS),
    "fine": ViT(16, 2, WIDTH, 3, 2, 24, (1, 2, 3), **LAYERS),  # twice the grid of the others
    "wide": ViT(16, 4, 2 * WIDTH, 3, 2, 24, (1, 2, 3), **LAYERS),
    # a single map with the grid and width of the others
    "convnext": ConvNeXt(32, (8, 8), (1, 1), (1, 2), resize=4, **LAYERS),
    "swin": Swin(32, 8, (2, 2), (2, 2), 2, (2,), **LAYERS),
    "efficient": EfficientNet(16, (2,), ((1, 3, 1, 1, 8), (1, 5, 2, 2, WIDTH)), stem=8, **LAYERS),
}
FUSERS: dict[str, nn.Module] = {
    "single": Single(),
    "average": Average(),
    "weighted": WeightedAverage(),
    "concat": Concat(),
    "fpn": FPN(),
    "external": Concat(((0, 1), (2,))),
    "sti": STI(pool=3),
    "sci": sci(),
    "dci": dci(1, final=2),
    "mmfuser": MMFuser(heads=2, points=2),
    "global": MMFuser(heads=2, attention="global"),
    "linear": MMFuser(heads=2, attention="linear", pooled=3),
}
ONE_MAP = ("single", "average", "weighted", "concat", "fpn")  # fusers that accept a single map
AGGREGATORS: dict[str, nn.Module] = {
    "linear": MLPProjector(4, depth=1),
    "mlp": MLPProjector(4, newline=True),
    "additive": AdditiveMoF(alpha=0.25),
    "interleaved": InterleavedMoF(),
    "resampler": Resampler(WIDTH, tokens=3, depth=2, heads=2, head_dim=8, mlp_ratio=2),
    "qformer": QFormer(tokens=3, width=8, depth=2, heads=2, mlp=16),
    "shuffle": PixelShuffle(2),
    "abstractor": CAbstractor(2, width=8, depth=1),
    "sva": SVA(8, 2, depth=1, heads=2),
}


def model(encoders: tuple[str, ...], fuser: str, aggregator: str) -> MLLM:
    """A model with the same fuser for all encoders. Raises ValueError if the parts do not fit."""
    chosen = {name: ENCODERS[name] for name in encoders}
    return MLLM(chosen, dict.fromkeys(encoders, FUSERS[fuser]), AGGREGATORS[aggregator], DECODER, {})


def covering() -> dict[str, MLLM]:
    """Each fuser (Concat once) with one encoder, and each aggregator but "linear" with two encoders."""
    found = {f"{f}+mlp": model(("clip",), f, "mlp") for f in FUSERS if f not in ("external", "sci", "dci")}
    return found | {f"single+{a}": model(("clip", "dino"), "single", a) for a in AGGREGATORS if a != "linear"}


class Path(nn.Module):
    """Fusers and aggregator of a model: taps [taps, N, h, w, C] of each encoder -> tokens [N, P, H]."""

    fusers: dict[str, nn.Module]
    aggregator: nn.Module

    def __call__(self, taps: dict[str, jax.Array], masks: dict[str, jax.Array]) -> jax.Array:
        return self.aggregator({name: fuse(taps[name]) for name, fuse in self.fusers.items()}, masks, LLM).tokens


def random_maps(*shape: int) -> jax.Array:
    """Normal random numbers, always the same."""
    return jnp.asarray(np.random.default_rng(3).normal(size=shape).astype(np.float32))


def apply(module: nn.Module, params: dict, *args):
    """The module's output, with full float32 products."""
    with jax.default_matmul_precision("highest"):
        return module.apply({"params": params}, *args)


def random_like(shapes: dict, seed: int) -> dict[str, jax.Array]:
    """Random parameters, also where fresh ones are zero, with the sharding of fresh ones; variances are positive."""
    rng, found = np.random.default_rng(seed), {}
    for path, x in shapes.items():
        values = rng.normal(0, 2 * max(np.prod(x.shape[:-1]), 4) ** -0.5, x.shape).astype(np.float32)
        values = np.abs(values) + 0.5 if path.endswith("/var") else values
        found[path] = jax.sharding.reshard(values, x.sharding.spec) if meshes.has_mesh() else jnp.asarray(values)
    return found


def inputs(models: dict[str, MLLM]) -> tuple[dict, dict]:
    """Random taps and padding masks of all encoders."""
    rng, taps, masks = np.random.default_rng(0), {}, {}
    encoders = {name: encoder for model in models.values() for name, encoder in model.encoders.items()}
    for name, encoder in sorted(encoders.items()):
        (h, w, c, _), *_ = encoder.maps
        x = rng.normal(size=(len(encoder.maps), IMAGES, h, w, c)).astype(np.float32)
        taps[name] = sharded.shard(jnp.asarray(x), None, "batch", None, None, None)
        padding = sharded.shard(jnp.asarray([[0, i % 2] for i in range(IMAGES)]), "batch", None)
        masks[name] = content_mask(padding, h)
    return taps, masks


def run(models: dict[str, MLLM]) -> tuple[dict, dict]:
    """({model: tokens}, {model: {path: gradient}}) of a random linear function of the tokens, in one program."""
    taps, masks = inputs(models)
    paths = {name: Path(model.fusers, model.aggregator) for name, model in models.items()}
    params, cotangents = {}, {}
    for i, (name, path) in enumerate(paths.items()):
        init = lambda *args, path=path: path.init(jax.random.key(0), *args)["params"]
        mine = {encoder: taps[encoder] for encoder in path.fusers}, masks
        params[name] = random_like(flatten(jax.eval_shape(init, *mine)), i)
        shape = (IMAGES, models[name].layout.tokens.count, LLM)
        cotangents[name] = np.random.default_rng(i).normal(size=shape).astype(np.float32)

    def loss(params, taps):
        tokens, total = {}, 0.0
        for name, path in paths.items():
            mine = {encoder: taps[encoder] for encoder in path.fusers}
            tokens[name] = path.apply({"params": unflatten(params[name])}, mine, masks)
            total = total + jnp.sum(tokens[name] * sharded.shard(jnp.asarray(cotangents[name]), "batch", None, None))
        return total, tokens

    grads, tokens = jax.jit(jax.grad(loss, has_aux=True))(params, taps)
    return jax.device_get((tokens, grads))


def norms(tokens: dict, grads: dict) -> dict[str, float]:
    """L2 norms of all tokens and gradients."""
    found = {name: tokens[name] for name in tokens}
    found |= {f"{name}: {path}": g for name in grads for path, g in grads[name].items()}
    return {name: float(np.linalg.norm(x)) for name, x in found.items()}


if __name__ == "__main__":
    meshes.MIN_FSDP_SIZE = 64  # so that toy weights are split over fsdp too
    with jax.set_mesh(Mesh(fsdp=4, tensor=2).build()):
        print(json.dumps(norms(*run(covering()))))
