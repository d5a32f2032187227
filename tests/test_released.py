"""Released multimodal checkpoints in their authors' layouts: in, and back again."""

from __future__ import annotations

import dataclasses
import json
import re

import ml_dtypes
import numpy as np
import pytest

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.aggregators.sva import SVA, SVALayer
from jaxmllm.cli.main import main
from jaxmllm.encoders.vit import ViT
from jaxmllm.fusers.dense_connector import sci
from jaxmllm.fusers.mmfuser import MMFuser
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.llms.inserts import VisualInserts
from jaxmllm.mllm import MLLM
from jaxmllm.objectives.embed_distill import EmbedDistill
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.weights import encoder_key_maps, released
from jaxmllm.weights.convert import export_weights
from jaxmllm.weights.export import export
from jaxmllm.weights.parts import load_parts
from jaxmllm.weights.released_model import model_of
from jaxmllm.weights.safetensors import open_folder, write_folder
from tests.run_case import abstract_of, random_of, run_of, save
from tests.test_export import words  # noqa: F401

CLIP = dict(activation="quick_gelu", class_token=True, pre_norm=True, patch_bias=False)
NEXT = {"next_token": NextToken()}
# LlavaConfig and CambrianConfig extend LlamaConfig; other fields than "mm_.." of theirs are left out here.
CONFIG = {
    "architectures": ["LlavaLlamaForCausalLM"], "model_type": "llava", "hidden_size": 16, "intermediate_size": 24,
    "num_attention_heads": 4, "num_hidden_layers": 3, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "vocab_size": 40, "mm_projector_type": "mlp2x_gelu", "mm_vision_select_layer": -2,
    "mm_vision_tower": "openai/clip-vit-large-patch14-336", "tie_word_embeddings": False,
}  # fmt: skip


def mllm(fuser=Single(), taps=(1, 2), aggregator=None, objectives=(), **llm) -> MLLM:
    sizes = {"a": 28, "b": 56} if isinstance(aggregator, SVA) else {"a": 28}
    encoders = {name: ViT(size, 14, 16, 2, 2, 24, taps=taps, **CLIP) for name, size in sizes.items()}
    decoder = Decoder(40, 16, 3, 4, 2, 24, **llm)
    return MLLM(
        encoders, dict.fromkeys(encoders, fuser), aggregator or MLPProjector(2), decoder, NEXT | dict(objectives)
    )


TEACHERS = {
    "depth": EmbedDistill(4, 6, (2,), tokens=2, extra_heads=3, predictor_width=8),
    "gen": EmbedDistill(1, 6, (3,), tokens=2, pooled=False, blocks=2),
}
# Name -> (model, some of the keys that its authors' code has, end of its model_type)
MODELS = {
    "llava": (mllm(), ["model.mm_projector.0.weight", "model.mm_projector.2.bias"], "llava_llama"),
    "dense_connector": (mllm(sci(2)), ["model.mm_projector.0.weight"], "llava_llama"),
    "mmfuser": (
        mllm(MMFuser(4, 2)),
        ["model.mm_projector.0.gamma1", "model.mm_projector.0.gamma2", "model.mm_projector.3.weight"],
        "llava_llama",
    ),
    "cambrian": (
        mllm(aggregator=SVA(16, 2, depth=2, heads=4), inserts=VisualInserts(SVALayer(16, 4), 0, 1, 2)),
        ["model.vision_query", "model.mm_projector_aux_1.3.weight", "model.image_newline"]
        + [f"model.{x}.layers.0.proj_context.weight" for x in ("vision_sampler_0", "vision_sampler_layers.1")],
        "cambrian_llama",
    ),
    "visper": (
        mllm(objectives=TEACHERS),
        ["model.special_depth_tokens", "depth_logit_scale", "image_gen_heads.0.projector.proj_in.weight"],
        "llava_llama",
    ),
}  # fmt: skip


def without_encoders(params: dict) -> dict:
    return {path: x for path, x in params.items() if not path.startswith("encoders_")}


def folder_of(folder, model, params, **config):
    tensors = export_weights(released.key_map(model), without_encoders(params))
    write_folder(folder, {key: x.astype(ml_dtypes.bfloat16) for key, x in tensors.items()})
    (folder / "config.json").write_text(json.dumps(CONFIG | config))
    return tensors


def load(run, folder, **sources):
    named = {f"encoders.{name}": "random" for name in run.model.encoders} | {"rest": str(folder)} | sources
    return load_parts(run.model, named, abstract_of(run))


@pytest.mark.parametrize("name", MODELS)
def test_in(tmp_path, words, name):  # noqa: F811
    model, keys, _ = MODELS[name]
    run = run_of(model, words)
    params = random_of(run)
    tensors = folder_of(tmp_path, model, params)
    assert set(keys) <= tensors.keys()
    found, reports = load(run, tmp_path)
    assert found.keys() == without_encoders(params).keys()
    for path, x in found.items():
        np.testing.assert_array_equal(x, params[path].astype(ml_dtypes.bfloat16).astype(np.float32), path)
    if name == "mmfuser":  # which transformers 4 renames and loses
        gamma = open_folder(tmp_path)["model.mm_projector.0.gamma1"].astype(np.float32)
        np.testing.assert_array_equal(found["fusers_a/scale_outer/value"], gamma)
        assert np.abs(gamma).min() > 0
    assert {report.part for report in reports if report.source == str(tmp_path)} >= {"llm"}


def test_back_again(tmp_path, words):  # noqa: F811
    for name in ("mmfuser", "cambrian"):
        model, _, model_type = MODELS[name]
        run, root = run_of(model, words), tmp_path / name
        params = random_of(run)
        save(run, params, root / "run")
        made = export(str(root / "run"), str(root / "out"), authors=True)
        assert made.layout.startswith("authors' layout of ") and made.dtype == "float32"
        assert json.loads((root / "out" / "config.json").read_text())["model_type"] == model_type
        expected, there = export_weights(released.key_map(model), without_encoders(params)), open_folder(root / "out")
        assert set(there) == expected.keys()
        assert all(np.array_equal(there[key], x) for key, x in expected.items())
        found, _ = load(run, root / "out")
        assert all(np.array_equal(x, params[path]) for path, x in found.items())


def test_a_tower_inside(tmp_path, words):  # noqa: F811
    model = MODELS["llava"][0]
    run = run_of(model, words)
    params = random_of(run)
    tensors = folder_of(tmp_path, model, params)
    own = {path.removeprefix("encoders_a/"): x for path, x in params.items() if path.startswith("encoders_a/")}
    tower = export_weights(encoder_key_maps.clip_vision(model.encoders["a"]), own)
    write_folder(tmp_path, tensors | {f"model.vision_tower.vision_tower.vision_model.{k}": x for k, x in tower.items()})
    found, _ = load(run, tmp_path, **{"encoders.a": str(tmp_path)})
    assert found.keys() == params.keys() and all(np.array_equal(x, params[path]) for path, x in found.items())


def test_refusals(tmp_path, words):  # noqa: F811
    fused, plain = (run_of(MODELS[name][0], words) for name in ("mmfuser", "llava"))
    folder_of(tmp_path / "fused", fused.model, random_of(fused))
    folder_of(tmp_path / "other", plain.model, random_of(plain), rope_theta=5e5, num_hidden_layers=4)
    for run, folder, sources, says in (
        (plain, "fused", {}, r"aggregator: .*model.mm_projector.0.gamma1: in the file, but no parameter wants it"),
        (
            fused,
            "fused",
            {"encoders.a": str(tmp_path / "fused")},
            r"has no encoders.a; .* give init.encoders.a a folder",
        ),
        (
            plain,
            "other",
            {},
            r"num_hidden_layers 4 there, layers 3 here; rope_theta 500000.0 there, rope_theta 10000.0",
        ),
    ):
        with pytest.raises(ValueError) as error:
            load(run, tmp_path / folder, **sources)
        text = " ".join(str(error.value).split())
        assert re.search(says, text), text
    other = mllm(aggregator=SVA(16, 2, depth=1, heads=4)).clone(aggregator=None, encoders={}, fusers={})
    with pytest.raises(ValueError, match="no released checkpoint has 0 encoders and NoneType"):
        released.key_map(other)


CAMBRIAN = {
    "model_type": "cambrian_llama", "mm_projector_type": "sva", "image_token_len": 4, "vision_hidden_size": 16,
    "query_num_list": [4], "num_query_group": 1, "connector_depth": 2, "connector_only": False,
    "num_of_vision_sampler_layers": 2, "start_of_vision_sampler_layers": 0, "stride_of_vision_sampler_layers": 1,
}  # fmt: skip


VISPER = {
    "aux_mode": "depth-gen", "num_task_tokens": 2, "contrastive_loss_weight": 0.3,
    "image_depth": {
        "depth": 1, "dim_head": 32, "num_heads": 4, "ff_mult": 1, "num_tokens": 4, "output_dim": 6,
        "depth_layer_indices": "2", "depth_loss_weight": 0.5,
    },
    "image_gen": {
        "depth": 2, "dim_head": 32, "num_heads": 4, "ff_mult": 1, "num_tokens": 1, "output_dim": 6,
        "img_layer_indices": "3", "img_loss_weight": 0.5,
    },
}  # fmt: skip


def of_folder(folder, model) -> MLLM:
    """model_of, with the toy's sizes of what config.json does not name: Cambrian-1 has 16 heads."""
    found = model_of(folder, model.encoders)
    if isinstance(model.aggregator, SVA):
        layer = dataclasses.replace(found.llm.inserts, layer=found.llm.inserts.layer.clone(heads=4))
        found = found.clone(aggregator=found.aggregator.clone(heads=4), llm=found.llm.clone(inserts=layer))
    if found.fusers == {"a": MMFuser()}:
        found = found.clone(fusers={"a": MMFuser(4, 2)})
    return found.clone(llm=found.llm.clone(head_dim=None))


@pytest.mark.parametrize(
    "name, config",
    [
        ("llava", {}),
        ("dense_connector", {"mm_dense_connector_type": "sci"}),
        ("mmfuser", {}),
        ("cambrian", CAMBRIAN),
        ("visper", VISPER),
    ],
)
def test_the_model_of_a_folder(tmp_path, words, name, config):  # noqa: F811
    model = MODELS[name][0]
    folder_of(tmp_path, model, random_of(run_of(model, words)), **config)
    found = of_folder(tmp_path, model)
    assert found == model and list(found.objectives) == list(model.objectives)


def test_task_tokens_without_predictors(tmp_path, words):  # noqa: F811
    """VisPer-LM's last stage: its checkpoints hold the tokens, and no stage can weigh a loss of theirs."""
    bare = {name: each.clone(layers=(), predictor_width=None, extra_heads=0) for name, each in TEACHERS.items()}
    model = mllm(objectives=bare)
    run = run_of(model, words)
    params = random_of(run)
    tensors = folder_of(tmp_path, model, params, **VISPER)
    assert {key for key in tensors if re.search("special|head|scale", key)} == {
        "model.special_depth_tokens",
        "model.special_gen_tokens",
        "lm_head.weight",
    }
    assert of_folder(tmp_path, model) == model and model.loss_names == ("next_token",) and not model.target_shapes
    found, _ = load(run, tmp_path)
    assert found.keys() == without_encoders(params).keys()
    for change, says in (
        ({"aux_mode": "depth-pose"}, "aux_mode names 'pose', of which config.json has no image_pose"),
        ({"num_task_tokens": 0}, "num_task_tokens is 0; predictors with queries of their own are not known"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(CONFIG | VISPER | change))
        with pytest.raises(ValueError, match=says):
            model_of(tmp_path, model.encoders)


@pytest.mark.parametrize("name", MODELS)
def test_verify(tmp_path, words, name, capsys):  # noqa: F811
    """A folder in its authors' layout against the run that it comes from, and against another one."""
    model, folder = MODELS[name][0], str(tmp_path / "out")
    run = run_of(model, words)
    params = random_of(run)
    save(run, params, tmp_path / "run")
    export(str(tmp_path / "run"), folder, authors=True)
    assert of_folder(tmp_path / "out", model) == model  # config.json says what it is
    assert main(["verify", folder, str(tmp_path / "run")]) == 0
    text = capsys.readouterr().out
    assert "encoders.a: not in " in text and re.search(r"^llm: .*, parameters equal", text, re.M)
    parts = {"mmfuser": "fusers.a", "cambrian": "inserts", "visper": "objectives.depth"}
    assert re.search(rf"^{parts.get(name, 'aggregator')}: .*parameters equal", text, re.M), text
    if name == "llava":
        params["aggregator/projector/linear_0/bias"][0] += 0.5
        save(run, params, tmp_path / "other")
        assert main(["verify", str(tmp_path / "other"), folder]) == 1
        assert main(["verify", folder, folder]) == 2
        assert "is in its authors' layout, without encoders; compare it with a run" in capsys.readouterr().err


def test_an_unknown_projector_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"mm_projector_type": "CAbstractor"}))
    with pytest.raises(ValueError, match="mm_projector_type 'CAbstractor' with 1 encoders is not known"):
        model_of(tmp_path, MODELS["llava"][0].encoders)


def test_a_missing_field_is_named(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"mm_projector_type": "sva", "image_token_len": 576}))
    with pytest.raises(ValueError, match="config.json has no vision_hidden_size, which this kind of checkpoint needs"):
        model_of(tmp_path, MODELS["llava"][0].encoders)
