"""A LLaVA folder that transformers wrote gives its logits and loss here, on one device, on eight, in two processes."""

from __future__ import annotations

import numpy as np
import pytest

from tests.conftest import finish, start_processes
from tests.llava_case import IMAGE, PICTURES
from tests.parity import TOLERANCE, randomise

torch = pytest.importorskip("torch", reason="the parity extra is not installed")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.torch

# (processes, devices of each, mesh)
MESHES = [
    (1, 1, ["fsdp=1"]),
    (1, 8, ["data=2", "fsdp=2", "tensor=2"]),
    (2, 2, ["data=2", "fsdp=2"]),
]
TOWERS = {
    "clip": (transformers.CLIPVisionConfig, dict(hidden_act="quick_gelu"), "default"),
    "siglip": (transformers.SiglipVisionConfig, {}, "full"),
}
LLMS = {
    "llama": (transformers.LlamaConfig, dict(rope_theta=5e5, rms_norm_eps=1e-5)),
    "qwen2": (transformers.Qwen2Config, dict(rope_theta=1e6, tie_word_embeddings=True)),
}


def make(folder, tower, llm):
    """A random LLaVA in sizes that no preset has, saved by transformers."""
    vision, more, strategy = TOWERS[tower]
    text, fields = LLMS[llm]
    torch.manual_seed(0)
    config = transformers.LlavaConfig(
        vision_config=vision(
            hidden_size=40, num_hidden_layers=4, num_attention_heads=4, intermediate_size=56, image_size=42,
            patch_size=14, **more,
        ),
        text_config=text(
            hidden_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, intermediate_size=80,
            vocab_size=64, pad_token_id=0, bos_token_id=1, eos_token_id=2, **fields,
        ),
        image_token_index=IMAGE, vision_feature_layer=-2, vision_feature_select_strategy=strategy,
    )  # fmt: skip
    model = randomise(transformers.LlavaForConditionalGeneration(config), 0.05)
    model.save_pretrained(folder)
    return model


def rows(count: int = 8, length: int = 24, before: int = 6, tokens: int = 9):
    """Rows of text with an image in the middle, whose tokens and those before it have no label."""
    rng = np.random.default_rng(0)
    ids = rng.integers(3, IMAGE, (count, length), dtype=np.int32)
    ids[:, before : before + tokens] = IMAGE
    labels = np.where(np.arange(length) < before + tokens, -100, ids).astype(np.int32)
    return dict(tokens=ids, labels=labels, images=rng.integers(0, 256, (count, 42, 42, 3), dtype=np.uint8))


@pytest.mark.parametrize("tower, llm", [("clip", "llama"), ("siglip", "qwen2")])
def test_llava(tower, llm, tmp_path):
    model, inputs = make(tmp_path / "folder", tower, llm), rows()
    np.savez(tmp_path / "inputs.npz", **inputs)
    pixels = (inputs["images"] / 255 - np.array(PICTURES["mean"])) / np.array(PICTURES["std"])
    with torch.no_grad():
        theirs = model(
            input_ids=torch.tensor(inputs["tokens"], dtype=torch.long),
            labels=torch.tensor(inputs["labels"], dtype=torch.long),
            pixel_values=torch.tensor(pixels.transpose(0, 3, 1, 2), dtype=torch.float32),
        )
    for processes, devices, axes in MESHES:
        out = tmp_path / f"{processes}_{devices}.npz"
        paths = tmp_path / "folder", tmp_path / "inputs.npz", out
        finish(start_processes(processes, devices, *paths, *axes, prefix=("-m", "tests.llava_case")))
        ours = np.load(out)
        np.testing.assert_allclose(ours["logits"], theirs.logits.numpy(), rtol=0, atol=TOLERANCE)
        np.testing.assert_allclose(ours["loss"], theirs.loss.numpy(), rtol=0, atol=TOLERANCE)
        assert any("left out: " in line and "encoder.layers.3" in line for line in ours["reports"])
