"""The attention kernels flash and splash, run by Pallas's interpreter on a CPU, against the plain form."""

import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from jaxmllm import mesh, sharded
from jaxmllm.nn import compiler
from jaxmllm.nn.attention import choose, heads, tpu_flash_kernels
from jaxmllm.nn.attention.choose import causal_blocks, choose_kernel, dot_product_attention
from jaxmllm.nn.attention.tpu_flash import block_bounds, flash_attention
from jaxmllm.nn.attention.tpu_splash import splash_attention
from tests.conftest import ROOT, simulated

ONE = mesh.Mesh(1, 1, 1, 1, 1)
# Two samples and padding; the second row is full.
SEGMENTS = [[1] * 70 + [2] * 100 + [0] * 30, [1] * 200]


def example(s: int, segments: list | None, dtype=jnp.float32):
    """q, k, v, segments or None, and weights of the outputs (0 for padding), laid out on the mesh that is set."""
    rng = np.random.default_rng(0)
    split = ("batch", "length", "heads")
    shapes = [(2, s, 2, 2, 64), (2, s, 2, 64), (2, s, 2, 64), (2, s, 2, 2, 64)]
    q, k, v, w = (sharded.shard(jnp.asarray(rng.normal(size=shape), dtype), *split) for shape in shapes)
    if segments is None:
        return q, k, v, None, w
    segments = sharded.shard(jnp.asarray(segments, jnp.int32), "batch", "length")
    return q, k, v, segments, w * (segments > 0)[..., None, None, None]


def with_gradients(f):
    """f(q, k, v) -> (its output, the gradients of its sum)."""
    return jax.jit(lambda *x: (f(*x), jax.grad(lambda *x: f(*x).sum(), (0, 1, 2))(*x)))


def assert_equals_plain(kernel, s: int, segments: list | None, causal: bool, interpret) -> None:
    """Outputs and gradients of q, k and v, except those of padding; call with a mesh set."""
    q, k, v, segments, w = example(s, segments)

    def plain(q, k, v):
        return dot_product_attention(q, k, v, causal=causal, q_segments=segments, kv_segments=segments) * w

    def special(q, k, v):
        return kernel(q, k, v, causal, segments, segments, interpret=interpret) * w

    wanted, found = with_gradients(plain), with_gradients(special)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), found(q, k, v), wanted(q, k, v))


@pytest.mark.parametrize("s, segments, causal", [(200, SEGMENTS, True), (300, None, False)])
def test_splash_equals_plain(monkeypatch, s, segments, causal):
    """Causal with segments in two blocks; full in three blocks with padding."""
    monkeypatch.setattr(heads, "MAX_BLOCK", 128)
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        assert_equals_plain(splash_attention, s, segments, causal, True)


# Block, chunk, length, segments, causal. First case: the second row is one sample. Second case: the chunks of a block
# differ in size, and the last queries see part of a block before one that they see whole. Last two cases: neither
# segments nor padding.
CASES = [
    (256, 128, 640, [[1] * 300 + [2] * 250 + [0] * 90, [1] * 640], True),
    (384, 256, 1152, [[1] * 100 + [2] * 1052, [1] * 1152], True),
    (256, 128, 640, [[1] * 300 + [2] * 250 + [0] * 90, [1] * 640], False),
    (256, 128, 300, None, False),
    (256, 128, 300, None, True),
    (256, 128, 512, None, True),
    (256, 128, 512, None, False),
]


@pytest.mark.parametrize("block, chunk, s, segments, causal", CASES)
def test_flash_equals_plain(monkeypatch, block, chunk, s, segments, causal):
    monkeypatch.setattr(heads, "MAX_BLOCK", block)
    monkeypatch.setattr(tpu_flash_kernels, "CHUNK", chunk)
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        assert_equals_plain(flash_attention, s, segments, causal, True)


def test_flash_reads_nothing_before_it_is_written(monkeypatch):
    """In a simulation of a TPU's memory, where unwritten memory holds NaN."""
    monkeypatch.setattr(heads, "MAX_BLOCK", 128)
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        simulation = pltpu.InterpretParams(uninitialized_memory="nan")
        assert_equals_plain(flash_attention, 200, SEGMENTS, True, simulation)


def test_flash_in_bfloat16_equals_plain_in_float32_for_fewer_queries_than_keys(monkeypatch):
    """300 queries, 500 keys of which 450 may be seen, one head."""
    monkeypatch.setattr(heads, "MAX_BLOCK", 256)
    rng = np.random.default_rng(0)
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        shapes = (1, 300, 1, 1, 64), (1, 500, 1, 64), (1, 500, 1, 64)
        q, k, v = (sharded.shard(jnp.asarray(rng.normal(size=x), jnp.bfloat16), "batch", None, "heads") for x in shapes)
        ids = jnp.ones((1, 300), jnp.int32), jnp.array([[1] * 450 + [0] * 50])
        ids = [sharded.shard(x, "batch", None) for x in ids]
        found = jax.jit(lambda *x: flash_attention(*x, False, *ids, interpret=True))(q, k, v)
        single = [x.astype(jnp.float32) for x in (q, k, v)]
        wanted = dot_product_attention(*single, q_segments=ids[0], kv_segments=ids[1])
    assert found.dtype == jnp.bfloat16
    np.testing.assert_allclose(found.astype(jnp.float32), wanted, atol=4e-3)


def test_flash_is_chosen_if_the_keys_fit_on_the_chip(monkeypatch):
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        q, k, *_ = example(640, None, jnp.bfloat16)
        monkeypatch.setattr(compiler, "platform", lambda: "tpu")
        assert choose_kernel(q, k, True, 0) == ("flash", "")
        monkeypatch.setattr(choose, "CHIPS_16MIB_VMEM", (jax.devices()[0].device_kind,))
        assert choose_kernel(q, k, True, 0) == ("splash", "")
        monkeypatch.setattr(choose, "CHIPS_16MIB_VMEM", ())
        monkeypatch.setattr(choose, "MAX_KEYS", 639)
        assert choose_kernel(q, k, True, 0) == ("splash", "")


def test_the_plain_form_on_an_accelerator_has_a_reason(monkeypatch):
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        q, k, *_ = example(640, None, jnp.bfloat16)
        single, short, odd = q.astype(jnp.float32), q[:, :200], q[..., :48]
        monkeypatch.setattr(compiler, "platform", lambda: "tpu")
        assert choose_kernel(q, k, True, 0, window=9, cap=None) == ("splash", "")
        assert choose_kernel(q, k, True, 0, window=None, cap=9.0) == ("splash", "")
        assert choose_kernel(odd, k[..., :48], True, 0) == ("plain", "heads_of_48")
        assert choose_kernel(short, k[:, :200], True, 0) == ("plain", "rows_of_200")
        assert choose_kernel(single, k, True, 0) == ("plain", "float32")
        assert choose_kernel(q, k, True, jnp.int32(3)) == ("plain", "decoding")
        monkeypatch.setattr(compiler, "platform", lambda: "gpu")
        assert choose_kernel(q, k, True, 0, window=9) == ("cudnn", "")
        assert choose_kernel(q, k, True, 0, cap=9.0) == ("plain", "soft_cap")


def naive(q, k, v, segments, window, cap):
    """Attention without kernels, blocks and derivatives of its own."""
    place = jnp.arange(q.shape[1])
    seen = (place[:, None] >= place) & (place[:, None] - place < (window or 10**6))
    seen = seen & (segments[:, :, None] == segments[:, None]) & (segments > 0)[:, None]
    scores = jnp.einsum("bskgd,btkd->bkgst", q, k) * q.shape[-1] ** -0.5
    scores = cap * jnp.tanh(scores / cap) if cap else scores
    weights = jax.nn.softmax(jnp.where(seen[:, None, None], scores, -1e30), -1)
    return jnp.einsum("bkgst,btkd->bskgd", weights, v)


@pytest.mark.parametrize("window, cap", [(37, None), (None, 2.0), (150, 0.5)])
@pytest.mark.parametrize("kernel", ["plain", "splash"])
def test_windows_and_caps(monkeypatch, kernel, window, cap):
    """Two samples and padding, in blocks of 128: outputs and gradients."""
    monkeypatch.setattr(heads, "MAX_BLOCK", 128)
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        q, k, v, segments, w = example(200, SEGMENTS)

        def found(q, k, v):
            special = {name: x for name, x in (("window", window), ("cap", cap)) if x}
            if kernel == "splash":
                return splash_attention(q, k, v, True, segments, segments, interpret=True, **special) * w
            ids = dict(q_segments=segments, kv_segments=segments)
            return dot_product_attention(q, k, v, causal=True, **ids, **special) * w

        outputs = [jax.device_get(with_gradients(found)(q, k, v))]
        q, k, v, segments, w = jax.device_get((q, k, v, segments, w))
    outputs.append(with_gradients(lambda q, k, v: naive(q, k, v, segments, window, cap) * w)(q, k, v))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5), *outputs)


def test_windows_reach_back_in_a_cache():
    """The last 3 of 40 queries, as after 37 tokens in a cache."""
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((1, 40, 2, 2, 8), (1, 40, 2, 8), (1, 40, 2, 8)))
    ones = jnp.ones((1, 40), jnp.int32)
    wanted = naive(q, k, v, ones, 7, None)[:, 37:]
    found = dot_product_attention(q[:, 37:], k, v, causal=True, q_offset=jnp.int32(37), window=7)
    np.testing.assert_allclose(found, wanted, atol=1e-5)


def test_block_bounds_name_the_blocks_of_keys_that_queries_see():
    """Six keys in blocks of two; samples of three and two tokens, and one token of padding."""
    ids = jnp.array([[1, 1, 1, 2, 2, 0]])
    fields = lambda *x: (
        block_bounds(tpu_flash_kernels.Blocks(2, 2, True), *x).reshape(-1, tpu_flash_kernels.FIELDS).tolist()
    )
    # The first block of queries sees itself, with a mask. The second sees the first and itself. The third, of segments
    # 2 and 0, sees both before it, since only the ranges of segments are compared.
    assert fields((1, 6, 6), (ids, ids), 0) == [[0, 0, 0, 1, 0], [0, 0, 0, 2, 2], [0, 0, 0, 3, 4]]
    # The last part of a row sees two blocks without a mask, then its own.
    assert fields((1, 2, 6), None, 4) == [[0, 0, 2, 3, 4]]
    ids = jnp.array([[1, 2, 2, 2, 2, 2]])
    assert fields((1, 6, 6), (ids, ids), 0)[2] == [0, 1, 2, 3, 4]  # part of the first block, all of the second


def heads_and_rows_split() -> None:
    """Compares the kernels with the plain form on four devices: heads over tensor 2, queries over context 2."""
    heads.MAX_BLOCK = 128
    with jax.set_mesh(mesh.Mesh(fsdp=1, tensor=2, context=2).build()):
        for causal in (True, False):
            for kernel in (flash_attention, splash_attention):
                assert_equals_plain(kernel, 256, [[1] * 100 + [2] * 120 + [0] * 36, [1] * 256], causal, True)


@pytest.mark.long
def test_kernels_equal_plain_with_heads_and_rows_split():
    code = "from tests.test_attention import heads_and_rows_split; heads_and_rows_split()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=simulated(4), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_blocks_cover_rows_with_little_padding():
    assert [heads.block_size(s) for s in (512, 577, 1024, 1370, 2048, 8192)] == [512, 640, 1024, 768, 1024, 1024]


def test_cpus_take_the_plain_form():
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        q, k, *_ = example(200, None, jnp.bfloat16)
        assert compiler.platform() == "cpu" and choose_kernel(q, k, True, 0) == ("plain", "")


def test_causal_attention_in_blocks_equals_one_block():
    """1024 tokens of two samples on a CPU mesh, in four blocks, against one block without a mesh."""
    q, k, v, w = (jax.random.normal(key, (2, 1024, 2, 8)) for key in jax.random.split(jax.random.key(0), 4))
    segments = jnp.repeat(jnp.array([[1, 2], [1, 0]]), 512, 1)

    def run(q, k, v):
        own = sharded.shard(segments, "batch", None)
        y = dot_product_attention(q[:, :, :, None], k, v, causal=True, q_segments=own, kv_segments=own)
        return (y[:, :, :, 0] * w * (segments > 0)[..., None, None]).sum()

    both = jax.value_and_grad(run, (0, 1, 2))
    wanted = both(q, k, v)
    with jax.set_mesh(ONE.build(jax.devices()[:1])):
        assert causal_blocks(q, k) == 4
        q, k, v = (sharded.shard(x, "batch", None, "heads") for x in (q, k, v))
        found = jax.jit(both)(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), found, wanted)
