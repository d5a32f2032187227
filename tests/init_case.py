"""A small model, and folders with its weights in the layouts of Hugging Face, written without torch.

As a program it loads parts and prints their reports as JSON, or the error:
`python -m tests.init_case SOURCES AXIS=SIZE ..`, where SOURCES is JSON and "{process}" in it is the process's number.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.batch import empty_batch
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mesh import Mesh
from jaxmllm.mllm import MLLM
from jaxmllm.processes import join_processes
from jaxmllm.train.state import flatten
from jaxmllm.weights import encoder_key_maps, key_maps
from jaxmllm.weights.convert import KeyMap, export_weights
from jaxmllm.weights.parts import load_parts
from jaxmllm.weights.safetensors import write_folder
from tests.hf_files import write

TEXT = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "vocab_size": 40,
    "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "rope_theta": 10000.0,
}  # fmt: skip
VISION = {
    "model_type": "clip_vision_model", "hidden_act": "quick_gelu", "hidden_size": 16, "intermediate_size": 24,
    "image_size": 28, "layer_norm_eps": 1e-5, "num_attention_heads": 2, "num_hidden_layers": 5, "patch_size": 14,
}  # fmt: skip
LLAVA = {"model_type": "llava", "text_config": TEXT, "vision_config": VISION, "vision_feature_layer": -3}
# Prefixes of the language model, its output table, the tower and the projector
LAYOUTS = {
    "published": (
        "language_model.model", "language_model.lm_head", "vision_tower.vision_model.", "multi_modal_projector",
    ),
    "transformers 5": ("language_model.model", "language_model.lm_head", "vision_tower.", "multi_modal_projector"),
    "in memory": ("model.language_model", "lm_head", "model.vision_tower.", "model.multi_modal_projector"),
}  # fmt: skip


def model(vocab: int = 40, **llm) -> MLLM:
    """CLIP with a fuser that no Hugging Face folder holds, projector, Llama."""
    fields = dict(activation="quick_gelu", class_token=True, pre_norm=True, patch_bias=False)
    vit = ViT(28, 14, 16, 5, 2, 24, taps=(1, 3), **fields)
    return MLLM({"a": vit}, {"a": MMFuser(4, 2)}, MLPProjector(2), Decoder(vocab, 16, 3, 4, 2, 24, **llm), {})


def abstract_params(model: MLLM, mesh: jax.sharding.Mesh, dtype=jnp.float32) -> dict[str, jax.ShapeDtypeStruct]:
    """Path -> shape, dtype and sharding."""

    def init():
        batch = jax.tree.map(jnp.asarray, empty_batch(model.layout, 1, 16, 1, {}))
        return flatten(model.init(jax.random.key(0), batch, ("next_token",))["params"])

    shapes = jax.eval_shape(init)
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    return {path: jax.ShapeDtypeStruct(x.shape, dtype, sharding=whole) for path, x in shapes.items()}


def random(abstract: dict) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {path: np.asarray(rng.standard_normal(x.shape), np.float32) for path, x in abstract.items()}


def own(params: dict, part: str) -> dict:
    """The parameters of a part, relative to it."""
    return {path.removeprefix(f"{part}/"): x for path, x in params.items() if path.startswith(f"{part}/")}


def tower(model: MLLM, params: dict, prefix: str) -> dict[str, np.ndarray]:
    """CLIP with the layers after the last tap, and a buffer of old files."""
    found = export_weights(encoder_key_maps.clip_vision(model.encoders["a"]), own(params, "encoders_a"))
    later = {
        key.replace("layers.2", f"layers.{i}"): x for key, x in found.items() if "layers.2." in key for i in (3, 4)
    }
    later |= {"post_layernorm.weight": np.ones(16, np.float32), "embeddings.position_ids": np.arange(5)[None]}
    return {prefix + key: x for key, x in (found | later).items()}


def llama(model: MLLM, params: dict, body: str = "model", head: str = "lm_head") -> dict[str, np.ndarray]:
    """Llama, also with a second table if it is tied."""
    key_map = key_maps.llama(model.llm, body, head)
    found = export_weights(key_map, own(params, "llm"))
    return found | {copy: found[key].copy() for copy, key in key_map.equal}


def llava_folder(folder: Path, model: MLLM, params: dict, layout: str = "published", **config) -> Path:
    """A LLaVA folder in one of the LAYOUTS, in several files."""
    body, head, vision, projector = LAYOUTS[layout]
    mlp: KeyMap = key_maps.llava_projector(projector)
    tensors = llama(model, params, body, head) | tower(model, params, vision)
    write_folder(folder, tensors | export_weights(mlp, own(params, "aggregator")), shard_bytes=20_000)
    return write(folder, LLAVA | config)


def main(sources: str, *axes: str) -> None:
    join_processes(False)
    mesh = Mesh(**{name: int(count) for name, count in (axis.split("=") for axis in axes)}).build()
    named = json.loads(sources.replace("{process}", str(jax.process_index())))
    try:
        _, reports = load_parts(model(), named, abstract_params(model(), mesh))
        print(json.dumps([str(report) for report in reports]))
    except ValueError as error:
        print(json.dumps(str(error)))


if __name__ == "__main__":
    main(*sys.argv[1:])
