"""Visual tokens that the language model reads as mixtures of its own words: values, gradients, meshes, exports."""

from __future__ import annotations

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm import mesh as meshes
from jaxmllm import sharded
from jaxmllm.batch import empty_batch
from jaxmllm.llms.decoder import Decoder
from jaxmllm.recipes import load
from jaxmllm.weights import layouts, released
from tests.conftest import ROOT, simulated

V, H = 24, 16
TIED = Decoder(V - 3, H, 1, 2, 2, 16, remat="none", table_multiple=8)
UNTIED = TIED.clone(tied=False)


def table(seed: int) -> jax.Array:
    return jax.random.normal(jax.random.key(seed), (V, H))


def params_of(llm: Decoder) -> dict:
    """The tables alone: nothing else is read."""
    tables = {"embedding": {"embedding": table(0)}}
    return tables if llm.tied else tables | {"lm_head": {"embedding": table(1)}}


@pytest.mark.parametrize("llm", [TIED, UNTIED, TIED.clone(embed_scale=4.0)], ids=["tied", "untied", "scaled"])
def test_a_vector_becomes_a_mean_of_the_words_that_it_is_near(llm):
    """The table has 24 rows, of which the last three are padding and no words."""
    x = jax.random.normal(jax.random.key(2), (2, 3, H))
    found = llm.apply({"params": params_of(llm)}, x, method="as_words")
    words, to = table(0)[: V - 3], table(0 if llm.tied else 1)[: V - 3]
    expected = jax.nn.softmax(x @ to.T) @ words * (llm.embed_scale or 1)
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)
    sure = llm.apply({"params": params_of(llm)}, 100 * to[None, 4:5], method="as_words")
    np.testing.assert_allclose(sure[0, 0], words[4] * (llm.embed_scale or 1), rtol=1e-6)


def test_task_tokens_stay_as_they_are():
    model = load("configs/toy.py:tiny").model.clone(as_words=True)
    layout, width = model.layout, model.llm.width
    batch = empty_batch(layout, 1, layout.block + 1, 1, model.target_shapes)
    params = model.init(jax.random.key(0), batch, model.loss_names)["params"]
    block = jax.random.normal(jax.random.key(1), (1, 2 * layout.block, width))
    read = model.apply({"params": params}, block, method="in_words").reshape(2, layout.block, width)
    words = params["llm"]["embedding"]["embedding"][: model.llm.vocab]
    given, count = block.reshape(2, layout.block, width), layout.tokens.count
    assert count < layout.block
    np.testing.assert_array_equal(read[:, count:], given[:, count:])
    expected = jax.nn.softmax(given[:, :count] @ words.T) @ words
    np.testing.assert_allclose(read[:, :count], expected, rtol=1e-5, atol=1e-6)


def compare_on_a_mesh() -> None:
    """Values and gradients for four images and both tables on eight devices and on one."""
    images = jax.random.normal(jax.random.key(2), (4, 3, H))

    def total(x, params):
        x = sharded.shard(x, "batch", None, None)
        return jnp.square(UNTIED.apply({"params": params}, x, method="as_words")).sum()

    def everything(sizes, devices):
        with jax.set_mesh(meshes.Mesh(**sizes).build(devices)):
            split = lambda x: sharded.shard(x, "vocab", "embed")
            step = jax.jit(lambda x, params: jax.value_and_grad(total, (0, 1))(x, jax.tree.map(split, params)))
            return jax.tree.map(np.asarray, step(images, params_of(UNTIED)))

    one = everything({}, jax.devices()[:1])
    several = everything({"data": 2, "fsdp": 2, "tensor": 2}, jax.devices())
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), one, several)


def test_a_mesh_gives_the_values_of_one_device():
    code = "from tests.test_as_words import compare_on_a_mesh; compare_on_a_mesh()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=simulated(8), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_no_layout_of_others_has_it():
    """An export as a LLaVA would lose it, so it becomes a folder of ours; a released checkpoint is refused."""
    model = load("configs/llava_1_5.py").model
    assert not layouts.no_llava(model)
    assert layouts.no_llava(model.clone(as_words=True)) == ["visual tokens as words"]
    with pytest.raises(ValueError, match="no released checkpoint has visual tokens as words"):
        released.key_map(model.clone(as_words=True))
