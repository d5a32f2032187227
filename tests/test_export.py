"""`jaxmllm export`: what it writes, what our own import makes of it, and what it refuses."""

from __future__ import annotations

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmllm import recipes
from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.cli.main import main
from jaxmllm.data.tokenizer import load_tokenizer, train_word_tokenizer
from jaxmllm.encoders import presets as encoders
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.concat import Concat
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms import presets as llms
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mllm import MLLM
from jaxmllm.nn.rope import LinearScaling
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.weights import export as export_module
from jaxmllm.weights.export import export
from jaxmllm.weights.exported import ExportedSource
from jaxmllm.weights.layouts import no_llava
from jaxmllm.weights.parts import load_parts
from jaxmllm.weights.safetensors import INDEX, open_folder
from tests.run_case import abstract_of, random_of, run_of, save
from tests.test_your_weights import write_tokenizer

CLIP = dict(activation="quick_gelu", class_token=True, pre_norm=True, patch_bias=False)
NEXT = {"next_token": NextToken()}


def llava(vocab: int, fuser=Single(), taps=(3,), vit: dict = CLIP, llm: dict | None = None) -> MLLM:
    clip = ViT(42, 14, 16, 4, 2, 24, taps=taps, **{"fit": "squash"} | vit)
    decoder = Decoder(vocab, 16, 2, 4, 2, 24, **llm or {})
    return MLLM({"clip": clip}, {"clip": fuser}, MLPProjector(clip.grid), decoder, NEXT)


def text_only(vocab: int, **fields) -> MLLM:
    return MLLM({}, {}, None, Decoder(vocab, 16, 3, 4, 2, 24, **fields), NEXT)


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """A tokenizer that has <image>."""
    folder = tmp_path_factory.mktemp("words")
    train_word_tokenizer(["what swims here"], str(folder))
    return folder


@pytest.fixture(scope="module")
def bytes_(tmp_path_factory):
    """A tokenizer without <image>."""
    folder = tmp_path_factory.mktemp("bytes")
    write_tokenizer(folder)
    return folder


def workdir(tmp_path, model, tokenizer, **kwargs):
    run = run_of(model, tokenizer)
    params = random_of(run)
    save(run, params, tmp_path / "run", **kwargs)
    return run, params


def imported(run, folder, part: str = "") -> dict:
    """What our own import makes of a folder, for the parts whose paths start with `part`."""
    abstract = {path: x for path, x in abstract_of(run).items() if path.startswith(part)}
    return load_parts(run.model, {"rest": str(folder)}, abstract)[0]


def assert_equal(found, params):
    assert found.keys() == params.keys()
    for path, x in found.items():
        assert x.dtype == params[path].dtype
        np.testing.assert_array_equal(x, params[path], path)


@pytest.mark.parametrize(
    "name, fields",
    [
        ("LlamaForCausalLM", {}),
        ("Qwen2ForCausalLM", {"qkv_bias": True, "tied": True}),
        ("Qwen3ForCausalLM", {"qk_norm": True, "head_dim": 8}),
    ],
)
def test_a_decoder(tmp_path, words, name, fields):
    scaling = LinearScaling(factor=2.0)
    run, params = workdir(tmp_path, text_only(40, rope_scaling=scaling, rope_theta=5e5, eps=1e-6, **fields), words)
    made = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert made.layout == name
    assert_equal(imported(run, tmp_path / "out"), params)
    built = llms.from_folder(tmp_path / "out")
    assert built.clone(head_dim=run.model.llm.head_dim) == run.model.llm
    assert load_tokenizer(str(tmp_path / "out")).size == load_tokenizer(str(words)).size


@pytest.mark.parametrize(
    "fuser, taps, vit, layers",
    [
        (Single(0), (1, 3), CLIP, 1),
        (Concat(), (1, 3), CLIP, [1, 3]),
        (Single(), (4,), {"activation": "gelu_tanh", "eps": 1e-6}, 4),
    ],
)
def test_llava(tmp_path, words, fuser, taps, vit, layers):
    run, params = workdir(tmp_path, llava(16, fuser, taps, vit), words)
    made = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert made.layout == "LlavaForConditionalGeneration" and not made.notes
    assert made.source.endswith("/only/2")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_feature_layer"] == layers and config["vision_config"]["num_hidden_layers"] == max(taps)
    assert config["image_token_index"] == load_tokenizer(str(words)).id("<image>")
    assert_equal(imported(run, tmp_path / "out"), params)
    encoder = encoders.from_folder(tmp_path / "out")
    assert encoder.size == 42 and encoder.fit == "squash" and encoder.mean == run.model.encoders["clip"].mean


@pytest.mark.parametrize("spare", [0, 3])
def test_a_tokenizer_without_image_gets_one(tmp_path, bytes_, spare):
    size = load_tokenizer(str(bytes_)).size
    run, params = workdir(tmp_path, llava(size + spare), bytes_)
    made = export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert made.notes[0].startswith(f"added <image> as token {size}")
    before, after = (load_tokenizer(str(path)).encode for path in (bytes_, tmp_path / "out"))
    assert after("a<image>b") == [*before("a"), size, *before("b")]
    tables = [open_folder(tmp_path / "out")[f"language_model.{x}.weight"] for x in ("model.embed_tokens", "lm_head")]
    assert [len(x) for x in tables] == [max(size + 1, size + spare)] * 2
    for table, path in zip(tables, ("llm/embedding/embedding", "llm/lm_head/embedding")):
        np.testing.assert_array_equal(table[: size + spare], params[path])
        if not spare:
            np.testing.assert_allclose(table[-1], params[path].mean(0), atol=1e-6)


def test_the_toy_goes_to_a_folder_of_ours_and_back(tmp_path, words):
    model = recipes.load("configs/toy.py:tiny").model
    run, params = workdir(tmp_path, model, words)
    made = export(str(tmp_path / "run"), str(tmp_path / "out"), shard_bytes=50_000)
    assert made.layout == "jaxmllm" and made.why == "2 encoders"
    names = set(json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"].values())
    assert len(names) > 2 and all((tmp_path / "out" / name).stat().st_size < 70_000 for name in names)
    tensors = open_folder(tmp_path / "out")
    assert "model.layers.2.self_attn.q_proj.weight" in tensors
    assert "encoders.dino.encoder.layers.1.mlp.fc1.weight" in tensors and "aggregator.query.value" in tensors
    assert_equal(imported(run, tmp_path / "out"), params)
    assert ExportedSource("", tmp_path / "out").run() == run


@pytest.mark.parametrize(
    "model, why",
    [
        (lambda: llava(16, MMFuser(2, 2), (1, 2)), "fuser MMFuser"),
        (lambda: llava(16, vit=CLIP | {"final_norm": True}), "its ViT is no CLIP or SigLIP as it is published"),
        (lambda: llava(16, vit=CLIP | {"table": 2}), "its ViT is no CLIP or SigLIP as it is published"),
        (lambda: llava(16).clone(aggregator=MLPProjector(2)), "grid 2"),
        (lambda: llava(16).clone(aggregator=MLPProjector(3, newline=True)), "newline True"),
        (lambda: llava(16, llm={"qk_norm": True, "qkv_bias": True}), "its decoder is none of transformers'"),
    ],
)
def test_what_transformers_cannot_hold(model, why):
    assert "; ".join(no_llava(model())) == why


def test_averages_frozen_parameters_and_dtypes(tmp_path, words):
    """The moving average is exported, frozen parameters keep their dtype unless one dtype must hold all."""
    run = run_of(llava(16), words)
    params = {path: x.astype(jnp.bfloat16) for path, x in random_of(run).items()}
    trained = {path: x.astype(np.float32) for path, x in params.items() if path.startswith("aggregator/")}
    frozen = {path: x for path, x in params.items() if path not in trained}
    average = {path: x + 1 for path, x in trained.items()}
    save(run, trained, tmp_path / "run", frozen=frozen, average=average)
    wanted = {path: x.astype(np.float32) for path, x in (params | average).items()}
    for part, dtype, kind in ((None, None, "float32"), ("llm", None, "bfloat16"), ("llm", "float16", "float16")):
        made = export(str(tmp_path / "run"), str(tmp_path / f"{part}{dtype}"), part=part, dtype=dtype)
        assert made.dtype == kind
        config = json.loads((tmp_path / f"{part}{dtype}" / "config.json").read_text())
        assert config["dtype"] == kind
        found = imported(run, tmp_path / f"{part}{dtype}", "llm/" if part else "")
        for path, x in found.items():
            rounded = wanted[path].astype(np.float16).astype(np.float32) if dtype else wanted[path]
            np.testing.assert_array_equal(x, rounded, path)


def test_parameters_are_read_a_group_at_a_time(monkeypatch):
    monkeypatch.setattr(export_module, "GROUP", 100)
    shapes = {str(n): jax.ShapeDtypeStruct((n,), np.float32) for n in (10, 10, 5, 50, 3)}
    shapes |= {"x": jax.ShapeDtypeStruct((10,), np.float32), "y": jax.ShapeDtypeStruct((10,), np.float32)}
    assert [list(few) for few in export_module.groups(shapes)] == [["10", "5"], ["50"], ["3", "x", "y"]]


def test_nothing_is_left_after_an_error(tmp_path, words, monkeypatch):
    workdir(tmp_path, text_only(40), words)
    monkeypatch.setattr(export_module, "put", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export(str(tmp_path / "run"), str(tmp_path / "out"))
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_refusals_and_the_command(tmp_path, words, capsys):
    workdir(tmp_path, text_only(40, inserts=None), words)
    run, out, near = str(tmp_path / "run"), str(tmp_path / "out"), f"; did you mean '{tmp_path}/run'?"
    for args, says in {
        (run, run): f"jaxmllm: {run} exists; an export goes to a new folder",
        (f"{run}/other", out): f"jaxmllm: run:{run}/other: there is no stage 'other'; known: only",
        (f"{run}/only/3", out): f"jaxmllm: run:{run}/only/3: stage only has no step 3; steps: 2",
        (f"{run}2", out): f"jaxmllm: run:{run}2: {run}2 is no workdir, for it has no config.json{near}",
        (run, out, "--part", "vit"): "jaxmllm: --part vit: only llm, the language model, can be exported alone",
        (run, out, "--dtype", "int8"): "jaxmllm: --dtype int8: known are float32, bfloat16, float16",
    }.items():
        assert main(["export", *args]) == 2 and capsys.readouterr().err == says + "\n"
    assert main(["export", run, out]) == 0
    line = capsys.readouterr().out
    facts = r"30 tensors, [\d,]+ parameters, float32"
    assert re.fullmatch(rf"{out}: LlamaForCausalLM from run:{run}/only/2, {facts}\n", line)
