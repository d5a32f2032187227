"""`python -m tests.encoder_mesh NAME` compares an encoder on fsdp 2 x tensor 2 with one device and prints JSON."""

import json
import sys

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm import mesh, sharded
from jaxmllm.encoders.convnext import ConvNeXt
from jaxmllm.encoders.efficientnet import EfficientNet
from jaxmllm.encoders.swin import Swin
from jaxmllm.encoders.vit import ViT

ROTARY = dict(class_token=True, registers=2, rope_theta=100.0, key_bias=False, layer_scale=True)
MODULES = {
    "dinov3": ViT(32, 8, 32, 2, 4, 48, taps=(0, 2), resize=6, **ROTARY),
    "resampled": ViT(32, 8, 32, 2, 4, 48, taps=(1, 2), class_token=True, table=7, interpolation="bicubic_antialias"),
    "convnext": ConvNeXt(64, (8, 16, 16, 32), (1, 2, 2, 2), taps=(1, 2, 3, 4), resize=6),
    "swin": Swin(56, 16, (2, 2), (2, 4), 4, taps=(1, 2), resize=6),
    "efficientnet": EfficientNet(32, (3, 4), ((1, 3, 1, 1, 8), (2, 5, 2, 6, 8)), stem=8, head=16, resize=4),
}


def main(name: str) -> None:
    module = MODULES[name]
    images = np.random.default_rng(0).integers(0, 256, (4, module.size, module.size, 3), np.uint8)

    def loss(params, x):
        y = module.apply({"params": params}, x).astype(jnp.float32)
        return jnp.sin(y).mean(), y

    run = jax.jit(jax.value_and_grad(loss, has_aux=True))
    params = jax.jit(lambda x: module.init(jax.random.key(0), x)["params"])(images)
    (_, one), one_grads = run(params, images)
    with jax.set_mesh(mesh.Mesh(fsdp=2, tensor=2).build()):
        x = sharded.shard(jnp.asarray(images), "batch")
        places = jax.tree.map(lambda w: w.sharding, jax.jit(lambda x: module.init(jax.random.key(0), x)["params"])(x))
        (_, four), four_grads = run(jax.device_put(params, places), x)

    def difference(a, b):
        """The largest difference, relative to the largest value."""
        return float(np.abs(np.asarray(a) - np.asarray(b)).max() / np.abs(np.asarray(a)).max())

    grads = {jax.tree_util.keystr(path): g for path, g in jax.tree.leaves_with_path(one_grads)}
    pairs = zip(grads.items(), jax.tree.leaves(four_grads))
    worst = max((difference(a, b), path) for (path, a), b in pairs if np.abs(a).max() > 1e-8)
    print(json.dumps({"output": difference(one, four), "gradient": worst}))


if __name__ == "__main__":
    main(sys.argv[1])
