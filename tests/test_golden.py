"""Our numbers are those of the reference implementations, and the harness would notice if they were not."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxmllm.batch import IGNORE_LABEL
from jaxmllm.nn import primitives
from jaxmllm.weights.convert import export_weights
from tests import golden
from tests.golden_case import Case, load

FILES = sorted((Path(__file__).parent / "goldens").glob("*.npz"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_reference(path):
    line, _ = golden.check_file(path)
    assert line["ok"], json.dumps(line)
    assert len(line["grads"]) == sum(name.startswith("grads/") for name in np.load(path))


@functools.cache
def case(kind: str) -> Case:
    return load(FILES[0].parent / f"{kind}_a.npz")


def passes(case: Case) -> bool:
    check = golden.KINDS[case.kind](case)
    return golden.judge(case, check, *golden.evaluate(case, check))[2]


def with_config(case: Case, **changes) -> Case:
    return dataclasses.replace(case, config=case.config | changes)


# Mistakes, each of which must be noticed.


def test_perturbed_weight():
    c = case("visper_gen_head")
    changed = {"projector.proj_in.weight": c.weights["projector.proj_in.weight"] * 1.001}
    assert not passes(dataclasses.replace(c, weights=c.weights | changed))


def test_perturbed_gradient():
    c = case("visper_loss")
    changed = {"inputs/predictions": c.grads["inputs/predictions"] * np.float32(1.0002)}
    assert not passes(dataclasses.replace(c, grads=c.grads | changed))


def test_missing_output_and_gradient():
    c = case("visper_loss")
    assert not passes(dataclasses.replace(c, outputs=c.outputs | {"more": np.zeros(3, np.float32)}))
    assert not passes(dataclasses.replace(c, grads=c.grads | {"weights/more": np.zeros(3, np.float32)}))


def test_unused_weight_is_refused():
    c = case("visper_gen_head")
    with pytest.raises(ValueError, match=r"\+ dead.weight: in the file"):
        passes(dataclasses.replace(c, weights=c.weights | {"dead.weight": np.zeros(3, np.float32)}))


def test_other_epsilon():
    assert not passes(with_config(case("mmfuser"), layer_norm_eps=1e-5))


def test_tanh_gelu(monkeypatch):
    monkeypatch.setitem(primitives.ACTIVATIONS, "gelu", primitives.ACTIVATIONS["gelu_tanh"])
    assert not passes(case("visper_gen_head"))


def test_swapped_axes():
    c = case("deformable_attention")
    swapped = {"reference_points": c.inputs["reference_points"][..., ::-1]}
    assert not passes(dataclasses.replace(c, inputs=c.inputs | swapped))


def test_masks_ignored():
    c = case("sva_in_llm")
    every = {name: np.ones_like(x) for name, x in c.inputs.items() if name.startswith("key_mask")}
    assert not passes(dataclasses.replace(c, inputs=c.inputs | every))


def test_sva_after_other_layers():
    c = dataclasses.replace(case("cambrian_full"), grads={})
    assert not passes(with_config(c, in_llm_after_layers=[0, 1]))


# Further cases, made from the stored ones, all of which must pass.


def test_other_order_of_encoders():
    """SVA's softmax treats all encoders alike, so their order may change if all names change with it."""
    c, order = case("sva_connector"), [3, 1, 0, 2]  # the encoder with windows comes first

    def rename(name: str) -> str:
        for new, old in enumerate(order):
            for stem in ("features_", "key_mask_", "k_proj_", "v_proj_", "pos_embed_"):
                if f"{stem}{old}" in name:
                    return name.replace(f"{stem}{old}", f"{stem}{new}")
        return name

    renamed = {
        part: {rename(name): x for name, x in getattr(c, part).items()} for part in ("weights", "inputs", "grads")
    }
    windows = [c.config["window_sides"][old] for old in order]
    assert passes(with_config(dataclasses.replace(c, **renamed), window_sides=windows))


def test_one_sample():
    """Samples do not affect each other: the first one alone gives the same. (Not weight gradients, which are sums.)"""
    c = case("mmfuser")
    first = functools.partial(jax.tree.map, lambda x: x[:1] if x.ndim else x)
    outputs = first(c.outputs)
    outputs["scalar"] = np.sum(outputs["output"].astype(np.float64) * c.inputs["cotangent"][:1])
    grads = {name: x[:1] for name, x in c.grads.items() if name.startswith("inputs/")}
    assert passes(dataclasses.replace(c, inputs=first(c.inputs), outputs=outputs, grads=grads))


def test_loss_of_several_ranks():
    """Negatives come from all ranks, and the mean over equal parts is the mean of their means."""
    c = case("visper_loss")

    def split(x):
        return x.reshape(2, -1, *x.shape[1:])

    inputs = {name: split(x) if x.ndim else np.full(2, x) for name, x in c.inputs.items() if name != "mask_partial"}
    outputs = {name: split(x) if x.ndim else x for name, x in c.outputs.items() if "partial" not in name}
    grads = {"inputs/predictions": split(c.grads["inputs/predictions"])}
    several = dataclasses.replace(with_config(c, ranks=2), inputs=inputs, outputs=outputs, grads=grads)
    assert passes(several)


def test_padded_pictures_on_both_paths():
    """Other sizes and padded pictures: the layout with masked tokens and the layout without them agree."""
    train = larger_cambrian()
    outputs, _ = golden.evaluate(train, golden.KINDS["cambrian_full"](train))
    at, valid = train.config["image_position"], outputs["attention_mask"]
    for b, kept in enumerate(outputs["unpadded_grid"]):
        patches = valid[b, at : at + 4 * 5].reshape(4, 5)[:, :4]
        assert patches.sum() == kept.prod() < 16
        alone = {name: outputs[name][b : b + 1, valid[b]] for name in ("logits", "inputs_embeds", "position_ids")}
        for name in ("in_llm_0_output", "in_llm_1_query", "in_llm_1_output"):
            alone[name] = outputs[name][b][patches].reshape(1, *kept, -1)
        alone["unpadded_grid"] = kept[None]
        inputs = {name: x[b : b + 1] for name, x in train.inputs.items()}
        config = {"path": "infer", "text_lengths": train.config["text_lengths"][b : b + 1]}
        infer = dataclasses.replace(with_config(train, **config), inputs=inputs, outputs=alone, grads={})
        assert passes(infer)


def larger_cambrian() -> Case:
    """A made-up case: three window sides, two query groups, a picture padded in rows and one padded in columns."""
    rng, sides, widths = np.random.default_rng(0), [8, 4, 12], [6, 10, 8]
    c = with_config(
        case("cambrian_full"),
        num_encoders=3, encoder_widths=widths, encoder_grid_sides=sides, window_sides=[2, 1, 3],
        query_groups=2, query_group_sides=[4, 2], connector_depth=2, in_llm_after_layers=[1, 3],
        image_position=2, text_lengths=[9, 7],
        llm=case("cambrian_full").config["llm"] | {"num_layers": 5, "tied_embeddings": True},
    )  # fmt: skip
    ids = rng.integers(1, 70, (2, 9), np.int32)
    ids[:, 2], ids[1, 7:] = c.config["image_token_id"], 0
    labels = np.where((np.arange(9) > 4) & (ids > 0), ids, IGNORE_LABEL)
    inputs = {"input_ids": ids, "labels": labels, "image_sizes": np.array([[100, 50], [30, 90]], np.int32)}
    for k, (side, width) in enumerate(zip(sides, widths)):
        inputs[f"features_{k}"] = rng.standard_normal((2, side * side, width), np.float32)
    c = dataclasses.replace(c, inputs=inputs, outputs={}, grads={})
    check = golden.KINDS["cambrian_full"](c)
    params = {path: 0.3 * rng.standard_normal(shape, np.float32) for path, shape in check.shapes.items()}
    return dataclasses.replace(c, weights=export_weights(check.key_map, params))


def test_command(capsys, tmp_path):
    """The exit code is that of the worst file, and each file gets one line."""
    (tmp_path / "bad.npz").write_bytes(b"nothing")
    masks = str(FILES[0].parent / "cambrian_masks_a.npz")
    assert golden.main([masks]) == 0
    assert golden.main([masks, str(tmp_path / "bad.npz"), str(tmp_path / "none.npz"), masks]) == 2
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["ok"] for line in lines] == [True, True, False, False, True]
    assert set(lines[0]) == {"file", "kind", "outputs", "grads", "ok"}
