"""Reads a DINOv2 backbone out of an ONNX file and writes it as a Hugging Face folder of type `dinov2`.

    python tools/onnx_dinov2.py vit_s_focus.onnx data/real/dinov2

PyTorch's exporter keeps the names of parameters, except of those that it folds: the weight of a linear layer becomes an
unnamed, transposed constant, which is found by the name of the node that multiplies with it; the table of positions is
cut into the class token's and the patches'. Sizes come from the shapes, eps from the graph.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from jaxmllm.encoders.common import IMAGENET_MEAN, IMAGENET_STD
from jaxmllm.weights.safetensors import write_folder

HEAD_DIM = 64  # of all published DINOv2
EPS = "encoder/layer.0/norm1/Constant_1"  # after the exponent 2.0, the norm's second constant


def read_backbone(path: str | Path, prefix: str = "backbone") -> tuple[dict[str, np.ndarray], float]:
    """-> tensors under the names of transformers' Dinov2Model, and the eps of its norms.

    prefix: the attribute that holds the backbone in the module that was exported. Raises ValueError if the graph has
    no such backbone.
    """
    graph = onnx.load(path).graph
    constants = {x.name: numpy_helper.to_array(x) for x in graph.initializer}
    own = {name.removeprefix(f"{prefix}."): x for name, x in constants.items() if name.startswith(f"{prefix}.")}
    if not own:
        raise ValueError(f"{path} has no parameters below {prefix!r}")
    eps = None
    for node in graph.node:
        module = node.name.removeprefix(f"/{prefix}/")
        unnamed = next((x for x in node.input if x.startswith("onnx::") and x in constants), None)
        if module == EPS:
            eps = float(numpy_helper.to_array(node.attribute[0].t))
        elif node.name.startswith(f"/{prefix}/") and unnamed:
            x = constants[unnamed]
            if node.op_type == "MatMul":
                own[module.removesuffix("/MatMul").replace("/", ".") + ".weight"] = x.T
            elif module.startswith("embeddings/"):
                own["class_position" if x.shape[1] == 1 else "positions"] = x
    if eps is None or not {"class_position", "positions"} <= own.keys():
        raise ValueError(f"{path}: {prefix!r} is no DINOv2: its eps or its positions are missing")
    positions = own.pop("class_position"), own.pop("positions")
    return own | {"embeddings.position_embeddings": np.concatenate(positions, 1)}, eps


def config_of(tensors: dict[str, np.ndarray], eps: float) -> dict:
    """config.json of transformers' Dinov2Model with these tensors."""
    width, _, patch, _ = tensors["embeddings.patch_embeddings.projection.weight"].shape
    table = round((tensors["embeddings.position_embeddings"].shape[1] - 1) ** 0.5)
    layers = {match[1] for name in tensors if (match := re.match(r"encoder\.layer\.(\d+)\.", name))}
    return {
        "model_type": "dinov2",
        "architectures": ["Dinov2Model"],
        "hidden_size": width,
        "num_hidden_layers": len(layers),
        "num_attention_heads": width // HEAD_DIM,
        "mlp_ratio": tensors["encoder.layer.0.mlp.fc1.weight"].shape[0] // width,
        "image_size": table * patch,
        "patch_size": patch,
        "layer_norm_eps": float(f"{eps:.6g}"),  # stored as float32
        "hidden_act": "gelu",
        "use_mask_token": False,
        "dtype": "float32",
    }


# Of the repository facebook/dinov2-small
PICTURES = {
    "image_processor_type": "BitImageProcessor",
    "do_resize": True, "size": {"shortest_edge": 256}, "resample": 3,
    "do_center_crop": True, "crop_size": {"height": 224, "width": 224},
    "do_rescale": True, "rescale_factor": 1 / 255,
    "do_normalize": True, "image_mean": list(IMAGENET_MEAN), "image_std": list(IMAGENET_STD),
    "do_convert_rgb": True,
}  # fmt: skip


def convert(source: str | Path, folder: str | Path, prefix: str = "backbone") -> None:
    """ONNX file -> folder with config.json, model.safetensors and preprocessor_config.json. See read_backbone."""
    tensors, eps = read_backbone(source, prefix)
    write_folder(folder, tensors)
    for name, value in (("config.json", config_of(tensors, eps)), ("preprocessor_config.json", PICTURES)):
        (Path(folder) / name).write_text(json.dumps(value, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("source")
    parser.add_argument("folder")
    convert(**vars(parser.parse_args()))
