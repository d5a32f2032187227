"""The tools that read pretrained models out of ONNX and GGUF files, on tiny files that are written here."""

from __future__ import annotations

import importlib
import json
import sys

import jax
import numpy as np
import pytest

from jaxmllm.encoders import presets as encoders
from jaxmllm.llms import presets as llms
from jaxmllm.train.state import flatten
from jaxmllm.weights.safetensors import open_folder
from jaxmllm.weights.sources import open_source
from tests.conftest import ROOT

WIDTH, LAYERS, PATCH, TABLE = 64, 2, 4, 3
HEADS, KV_HEADS, MLP = 4, 2, 96


@pytest.fixture
def tool(monkeypatch):
    """Imports a module of tools/."""
    monkeypatch.syspath_prepend(ROOT / "tools")
    yield importlib.import_module
    for name in ("onnx_dinov2", "gguf_llama"):
        sys.modules.pop(name, None)


# DINOv2 out of ONNX


def dinov2_tensors(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Under transformers' names."""
    shape = {
        "embeddings.cls_token": (1, 1, WIDTH),
        "embeddings.position_embeddings": (1, 1 + TABLE**2, WIDTH),
        "embeddings.patch_embeddings.projection.weight": (WIDTH, 3, PATCH, PATCH),
        "embeddings.patch_embeddings.projection.bias": (WIDTH,),
        "layernorm.weight": (WIDTH,),
        "layernorm.bias": (WIDTH,),
    }
    for i in range(LAYERS):
        layer = f"encoder.layer.{i}"
        linear = {f"attention.attention.{x}": (WIDTH, WIDTH) for x in ("query", "key", "value")}
        linear |= {"attention.output.dense": (WIDTH, WIDTH)}
        linear |= {"mlp.fc1": (4 * WIDTH, WIDTH), "mlp.fc2": (WIDTH, 4 * WIDTH)}
        for name, size in linear.items():
            shape |= {f"{layer}.{name}.weight": size, f"{layer}.{name}.bias": size[:1]}
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shape[f"{layer}.{name}"] = (WIDTH,)
        shape |= {f"{layer}.layer_scale{k}.lambda1": (WIDTH,) for k in (1, 2)}
    return {name: rng.standard_normal(size).astype(np.float32) for name, size in shape.items()}


def write_onnx(path, tensors: dict[str, np.ndarray]) -> None:
    """As PyTorch's exporter stores them: linear weights unnamed and transposed, the table of positions cut."""
    from onnx import helper, numpy_helper, save

    named, nodes = {}, []
    table = tensors["embeddings.position_embeddings"]
    folded = {"onnx::Concat_1": table[:, :1], "onnx::Reshape_2": table[:, 1:]}
    nodes.append(helper.make_node("Reshape", ["onnx::Reshape_2", "shape"], ["b"], "/net/embeddings/Reshape_1"))
    nodes.append(helper.make_node("Concat", ["onnx::Concat_1", "b"], ["c"], "/net/embeddings/Concat_6", axis=1))
    for name, x in tensors.items():
        if name.startswith("encoder.layer") and x.ndim == 2:
            key = f"onnx::MatMul_{len(folded) + 1}"
            folded[key] = np.ascontiguousarray(x.T)
            node = "/net/" + name.removesuffix(".weight").replace(".", "/").replace("layer/", "layer.")
            nodes.append(helper.make_node("MatMul", ["a", key], ["d"], f"{node}/MatMul"))
        elif x is not table:
            named[f"net.{name}"] = x
    for k, value in enumerate((2.0, 1e-6)):
        constant = numpy_helper.from_array(np.float32(value))
        name = "/net/encoder/layer.0/norm1/Constant" + (f"_{k}" if k else "")
        nodes.append(helper.make_node("Constant", [], [f"e{k}"], name, value=constant))
    other = {"decoder.weight": np.ones(3, np.float32)}
    stored = [numpy_helper.from_array(x, name) for name, x in (named | folded | other).items()]
    save(helper.make_model(helper.make_graph(nodes, "net", [], [], stored)), path)


def test_dinov2_out_of_onnx(tmp_path, tool):
    """Every tensor comes out under transformers' name, and the folder is a source of our encoder's weights."""
    tensors = dinov2_tensors(np.random.default_rng(0))
    write_onnx(tmp_path / "net.onnx", tensors)
    made, eps = tool("onnx_dinov2").read_backbone(tmp_path / "net.onnx", "net")
    assert eps == pytest.approx(1e-6) and made.keys() == tensors.keys()
    for name, x in tensors.items():
        np.testing.assert_array_equal(made[name], x)

    module = tool("onnx_dinov2")
    with pytest.raises(ValueError, match="no parameters below 'backbone'"):
        module.convert(tmp_path / "net.onnx", tmp_path / "folder")
    module.convert(tmp_path / "net.onnx", tmp_path / "folder", "net")
    encoder = encoders.from_folder(tmp_path / "folder", size=3 * PATCH)
    assert (encoder.width, encoder.layers, encoder.heads, encoder.patch, encoder.grid) == (WIDTH, LAYERS, 1, PATCH, 3)
    images = np.zeros((1, encoder.size, encoder.size, 3), np.uint8)
    abstract = jax.eval_shape(lambda: flatten(encoder.init(jax.random.key(0), images)["params"]))
    part = open_source(str(tmp_path / "folder")).part(
        "encoders.x", encoder, {f"encoders_x/{path}": x for path, x in abstract.items()}, None
    )
    assert part.problems() == []


def test_an_onnx_file_without_positions_is_refused(tmp_path, tool):
    from onnx import helper, numpy_helper, save

    stored = [numpy_helper.from_array(np.ones(3, np.float32), "backbone.x")]
    save(helper.make_model(helper.make_graph([], "net", [], [], stored)), tmp_path / "net.onnx")
    with pytest.raises(ValueError, match="no DINOv2"):
        tool("onnx_dinov2").read_backbone(tmp_path / "net.onnx")


# A Llama out of GGUF


def q4_1(rng: np.random.Generator, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """-> bytes of Q4_1 blocks, uint8[rows, bytes], and the numbers that they stand for, float32 `shape`.

    A block is float16 d, float16 m and 16 bytes; its 32 numbers are d * q + m for the low nibbles, then for the high.
    """
    rows, blocks = shape[0], shape[1] // 32
    d, m = (rng.standard_normal((rows, blocks, 1)).astype(np.float16) for _ in range(2))
    q = rng.integers(0, 16, (rows, blocks, 32), np.uint8)
    data = np.concatenate([d.view(np.uint8), m.view(np.uint8), q[..., :16] | q[..., 16:] << 4], -1)
    values = d.astype(np.float32) * q.astype(np.float32) + m.astype(np.float32)
    return data.reshape(rows, -1), values.reshape(shape)


def pairs(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows of q or k as llama.cpp stores them (`permute` of its convert_hf_to_gguf.py)."""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def alphabet() -> list[str]:
    from tokenizers.pre_tokenizers import ByteLevel

    return sorted(ByteLevel.alphabet())


@pytest.fixture
def llama(tmp_path):
    """A GGUF file, and its tensors under transformers' names."""
    from gguf import GGMLQuantizationType, GGUFWriter

    rng, expected = np.random.default_rng(0), {}
    writer = GGUFWriter(tmp_path / "tiny.gguf", "llama")
    tokens = ["<|end|>", "<|user|>", *alphabet(), "th", "the"]
    for name, value in {
        "block_count": LAYERS, "context_length": 128, "embedding_length": WIDTH, "feed_forward_length": MLP,
        "attention.head_count": HEADS, "attention.head_count_kv": KV_HEADS, "rope.dimension_count": WIDTH // HEADS,
    }.items():  # fmt: skip
        writer.add_uint32(f"llama.{name}", value)
    writer.add_float32("llama.rope.freq_base", 100000.0)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3] + [1] * (len(tokens) - 2))
    writer.add_token_merges(["t h", "th e"])
    writer.add_eos_token_id(0)
    writer.add_chat_template("{{ messages[0]['content'] }}")

    def matrix(theirs: str, name: str, shape: tuple[int, int], heads: int = 0) -> None:
        data, values = q4_1(rng, shape)
        writer.add_tensor(f"{theirs}.weight", data, raw_dtype=GGMLQuantizationType.Q4_1)
        # The rows of `data` are in llama.cpp's order: the inverse of `pairs`, sorted out by indices.
        order = np.argsort(pairs(np.arange(shape[0])[:, None], heads)[:, 0]) if heads else slice(None)
        expected[f"{name}.weight"] = values[order]

    def vector(theirs: str, name: str) -> None:
        expected[f"{name}.weight"] = rng.standard_normal(WIDTH).astype(np.float32)
        writer.add_tensor(f"{theirs}.weight", expected[f"{name}.weight"])

    matrix("token_embd", "model.embed_tokens", (len(tokens), WIDTH))
    vector("output_norm", "model.norm")
    for i in range(LAYERS):
        theirs, name, kv = f"blk.{i}", f"model.layers.{i}", WIDTH // HEADS * KV_HEADS
        vector(f"{theirs}.attn_norm", f"{name}.input_layernorm")
        vector(f"{theirs}.ffn_norm", f"{name}.post_attention_layernorm")
        matrix(f"{theirs}.attn_q", f"{name}.self_attn.q_proj", (WIDTH, WIDTH), HEADS)
        matrix(f"{theirs}.attn_k", f"{name}.self_attn.k_proj", (kv, WIDTH), KV_HEADS)
        matrix(f"{theirs}.attn_v", f"{name}.self_attn.v_proj", (kv, WIDTH))
        matrix(f"{theirs}.attn_output", f"{name}.self_attn.o_proj", (WIDTH, WIDTH))
        matrix(f"{theirs}.ffn_gate", f"{name}.mlp.gate_proj", (MLP, WIDTH))
        matrix(f"{theirs}.ffn_up", f"{name}.mlp.up_proj", (MLP, WIDTH))
        matrix(f"{theirs}.ffn_down", f"{name}.mlp.down_proj", (WIDTH, MLP))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tmp_path / "tiny.gguf", expected


def test_a_llama_out_of_gguf(tmp_path, tool, llama):
    """Blocks become exactly their numbers, q and k come into the order of halves, and the folder is our decoder's."""
    source, expected = llama
    tool("gguf_llama").convert(source, tmp_path / "folder")
    made = open_folder(tmp_path / "folder")
    assert set(made) == set(expected)
    for name, x in expected.items():
        np.testing.assert_array_equal(made[name], x, name)
    decoder = llms.from_folder(tmp_path / "folder")
    assert (decoder.heads, decoder.kv_heads, decoder.rope_theta, decoder.tied) == (HEADS, KV_HEADS, 100000.0, True)
    assert decoder.eps == 1e-5


def test_the_order_of_q_is_not_that_of_the_file(tmp_path, tool, llama):
    """With the rows as they are in the file, the check above would fail."""
    w = np.arange(16.0)[:, None]
    halves = tool("gguf_llama").halves
    np.testing.assert_array_equal(halves(pairs(w, 2), 2), w)
    assert (halves(w, 2)[:8, 0] == [0, 2, 4, 6, 1, 3, 5, 7]).all()


def test_the_tokenizer_out_of_gguf(tmp_path, tool, llama):
    """Merges, single digits, control tokens and the chat template, as transformers reads them."""
    from jaxmllm.hf_library import transformers

    tool("gguf_llama").convert(llama[0], tmp_path / "folder")
    tokenizer = transformers().AutoTokenizer.from_pretrained(str(tmp_path / "folder"))
    assert tokenizer.tokenize("<|user|>the 42") == ["<|user|>", "the", "Ġ", "4", "2"]
    text = "the 42 thés\n\n  #"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert tokenizer.eos_token == "<|end|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False) == "Hi"
    assert json.loads((tmp_path / "folder/config.json").read_text())["eos_token_id"] == 0


def test_other_architectures_are_refused(tmp_path, tool):
    from gguf import GGUFWriter

    writer = GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="holds a mamba; only llama"):
        tool("gguf_llama").convert(tmp_path / "other.gguf", tmp_path / "folder")
