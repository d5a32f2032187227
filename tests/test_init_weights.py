"""load_parts: parts of a model from Hugging Face folders, the hub and workdirs."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxmllm.documents import FORMAT
from jaxmllm.mesh import Mesh
from jaxmllm.train.checkpoint import StageCheckpoints
from jaxmllm.train.state import TrainState
from jaxmllm.weights import load, sources
from jaxmllm.weights.parts import PartReport, load_parts
from jaxmllm.weights.safetensors import write_folder
from jaxmllm.weights.sources import ranges
from jaxmllm.weights.workdir import part_of
from tests import init_case
from tests.conftest import finish, start_processes
from tests.hf_files import write
from tests.init_case import LAYOUTS, TEXT, VISION, llama, llava_folder, own, tower

MODEL = init_case.model()
ABSTRACT = init_case.abstract_params(MODEL, Mesh(fsdp=1).build(jax.devices()[:1]))
PARAMS = init_case.random(ABSTRACT)
HELD = ("llm/", "encoders_a/", "aggregator/")


def assert_equal(arrays: dict, prefixes: tuple[str, ...], dtype=np.float32):
    """The arrays are all parameters of these parts, and equal PARAMS."""
    assert arrays.keys() == {path for path in PARAMS if path.startswith(prefixes)}
    for path, x in arrays.items():
        assert x.dtype == dtype and x.sharding == ABSTRACT[path].sharding
        np.testing.assert_array_equal(x, PARAMS[path].astype(dtype), path)


def refused(named: dict, model=MODEL, abstract=ABSTRACT, **options) -> str:
    with pytest.raises(ValueError) as error:
        load_parts(model, named, abstract, **options)
    return str(error.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_llava_folder(layout, tmp_path):
    folder = llava_folder(tmp_path, MODEL, PARAMS, layout)
    arrays, reports = load_parts(MODEL, {"rest": str(folder), "fusers.a": "random"}, ABSTRACT)
    assert_equal(arrays, HELD)
    found = {report.part: report for report in reports}
    assert found.keys() == {"llm", "encoders.a", "fusers.a", "aggregator"}
    prefix = LAYOUTS[layout][2]
    left_out = f"{prefix}encoder.layers.3 to 4, {prefix}post_layernorm: after the last tap"
    assert found["encoders.a"].left_out == left_out and found["llm"].left_out == ""
    assert found["llm"].tensors == 3 * 9 + 3 and found["aggregator"].tensors == 4
    assert found["llm"].parameters == sum(x.size for path, x in PARAMS.items() if path.startswith("llm/"))
    assert found["fusers.a"].source == "random" and found["fusers.a"].fingerprint == ""
    assert len(found["llm"].fingerprint) == 16 and found["llm"].fingerprint == found["aggregator"].fingerprint


def test_parts_of_different_folders(tmp_path):
    """A whole CLIP with its text tower and a Llama in bfloat16; the others start at random."""
    text = {"text_model.final_layer_norm.weight": np.ones(3, np.float32), "logit_scale": np.float32(1)}
    write_folder(tmp_path / "clip", tower(MODEL, PARAMS, "vision_model.") | text)
    write(tmp_path / "clip", {"model_type": "clip", "vision_config": VISION})
    half = {key: x.astype(ml_dtypes.bfloat16) for key, x in llama(MODEL, PARAMS).items()}
    write_folder(tmp_path / "llama", half)
    write(tmp_path / "llama", TEXT)
    named = {"encoders.a": str(tmp_path / "clip"), "llm": str(tmp_path / "llama"), "aggregator": "random"}
    arrays, _ = load_parts(MODEL, {"encoders.a": named["encoders.a"]}, ABSTRACT)
    assert_equal(arrays, ("encoders_a/",))
    abstract = {
        path: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=x.sharding) if path.startswith("llm/") else x
        for path, x in ABSTRACT.items()
    }
    arrays, reports = load_parts(MODEL, named, abstract)
    assert_equal({path: x for path, x in arrays.items() if path.startswith("llm/")}, ("llm/",), jnp.bfloat16)
    assert [report.source for report in reports if report.part in ("aggregator", "fusers.a")] == ["random"] * 2
    assert {"bfloat16"} == {dtype for report in reports if report.part == "llm" for dtype in report.dtypes}


def test_nothing_is_loaded_at_random(tmp_path):
    arrays, reports = load_parts(MODEL, {}, ABSTRACT)
    assert arrays == {} and {report.source for report in reports} == {"random"}


def test_everything_wrong_is_said_at_once_and_nothing_is_read(tmp_path, monkeypatch):
    """Sizes of one part, a missing and a surplus tensor of another, a folder that is not there, an unknown part."""
    folder = llava_folder(tmp_path / "llava", MODEL, PARAMS)
    gone, new = "multi_modal_projector.linear_1.bias", "multi_modal_projector.linear_3.bias"
    file = next(path for path in folder.glob("*.safetensors") if gone in load_file(path))
    tensors = load_file(file)
    tensors[new] = tensors.pop(gone)
    save_file(tensors, file)
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    del index["weight_map"][gone]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    write_folder(tmp_path / "llama", llama(MODEL, PARAMS))
    write(tmp_path / "llama", TEXT | {"hidden_size": 64, "num_hidden_layers": 2})
    monkeypatch.setattr(load, "_on_devices", lambda *args: pytest.fail("a tensor was read"))
    message = refused(
        {
            "llm": str(tmp_path / "llama"), "aggregator": str(folder), "encoders.b": "random",
            "encoders.a": str(tmp_path / "none"),
        }
    )  # fmt: skip
    lines = message.splitlines()
    assert lines[0].startswith("encoders.b: the model has no such part with parameters; did you mean 'encoders.a'?")
    assert lines[1].startswith(f"{tmp_path}/none is no folder; a source is FOLDER, hf:")
    assert lines[2] == "aggregator: 2 weights do not fit:"
    assert lines[3].startswith(f"  + {new}: in the file, but")
    assert lines[4] == f"  - {gone}: not in the file, wanted by aggregator/projector/linear_0/bias"
    assert lines[5].startswith("llm: hidden_size 64 there, width 16 here; num_hidden_layers 2 there, layers 3 here; ")
    assert lines[5].endswith(f"({tmp_path}/llama)") and len(lines) == 6


def test_a_folder_that_does_not_hold_the_part(tmp_path):
    folder = llava_folder(tmp_path, MODEL, PARAMS)
    message = refused({"rest": str(folder)})
    assert message == "fusers.a: a llava folder holds llm, encoder, aggregator, not fusers.a"


def test_sliding_window_and_length(tmp_path):
    write_folder(tmp_path, llama(MODEL, PARAMS))
    write(tmp_path, TEXT | {"model_type": "mistral", "sliding_window": 64, "max_position_embeddings": 128})
    assert_equal(load_parts(MODEL, {"llm": str(tmp_path)}, ABSTRACT, length=64)[0], ("llm/",))
    assert "sliding_window 64 there, window None here" in refused({"llm": str(tmp_path)}, length=65)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tied_tables(layout, tmp_path):
    """A second table is left out if it equals the first, and refused if not."""
    model = init_case.model(tied=True)
    abstract = init_case.abstract_params(model, Mesh(fsdp=1).build(jax.devices()[:1]))
    params = init_case.random(abstract)
    named = {"llm": str(llava_folder(tmp_path, model, params, layout, tie_word_embeddings=True))}
    arrays, _ = load_parts(model, named, abstract)
    np.testing.assert_array_equal(arrays["llm/embedding/embedding"], params["llm/embedding/embedding"])
    head = f"{LAYOUTS[layout][1]}.weight"
    file = next(path for path in tmp_path.glob("*.safetensors") if head in load_file(path))
    tensors = load_file(file)
    tensors[head][-1, -1] += 1
    save_file(tensors, file)
    assert refused(named, model, abstract).startswith(f"llm: ! {head}: its numbers differ from those of ")


def test_pixels_must_be_normalised_as_the_folder_says(tmp_path):
    folder, encoder = llava_folder(tmp_path, MODEL, PARAMS), MODEL.encoders["a"]
    named, file = {"encoders.a": str(folder)}, folder / "preprocessor_config.json"
    file.write_text(json.dumps({"image_mean": [round(x, 3) for x in encoder.mean], "image_std": encoder.std}))
    load_parts(MODEL, named, ABSTRACT)
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": encoder.std}))
    assert f"encoders.a: image_mean [0.5, 0.5, 0.5] there, mean {list(encoder.mean)} here" in refused(named)
    file.write_text(json.dumps({"image_mean": [0.5] * 3, "image_std": encoder.std, "do_normalize": False}))
    assert "encoders.a: preprocessor_config.json: pixels must be divided by 255" in refused(named)


# Workdirs


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Two stages: align trained the aggregator for 2 steps, instruct everything but the encoder, in steps 1 and 3."""
    root = tmp_path_factory.mktemp("workdir")
    stages = [{"class": "jaxmllm.config:Stage", "name": name, "steps": 3} for name in ("align", "instruct", "later")]
    (root / "config.json").write_text(json.dumps({"format": FORMAT, "stages": stages}))

    def save(stage: str, trained: tuple[str, ...], steps: tuple[int, ...]):
        checkpoints = StageCheckpoints(str(root), stage, record={})
        first = stage == "align"  # its weights are those of instruct, more 1
        params = {k: x + np.float32(first and not k.startswith("encoders_")) for k, x in PARAMS.items()}
        if first:
            checkpoints.save_frozen({k: jnp.asarray(x) for k, x in params.items() if not k.startswith(trained)})
        for step in steps:
            moved = {k: jnp.asarray(x + 10 * (step == 1)) for k, x in params.items() if k.startswith(trained)}
            checkpoints.save(TrainState(jnp.array(step), moved, {}, {}), {})
        checkpoints.wait()

    save("align", ("aggregator/",), (2,))
    save("instruct", ("aggregator/", "llm/", "fusers_a/"), (1, 3))
    return root


def test_newest_step_of_the_newest_stage(workdir):
    arrays, reports = load_parts(MODEL, {"rest": f"run:{workdir}"}, ABSTRACT)
    assert_equal(arrays, ("",))
    assert {report.source for report in reports} == {f"run:{workdir}/instruct/3"}
    assert len({report.fingerprint for report in reports}) == 1 and len(reports[0].fingerprint) == 16


@pytest.mark.parametrize("place, more", [("align", 1), ("instruct", 0), ("instruct/1", 10), ("align/2", 1)])
def test_a_stage_and_a_step(place, more, workdir):
    """One part, trained or frozen in the stage."""
    arrays, _ = load_parts(MODEL, {"llm": f"run:{workdir}/{place}"}, ABSTRACT)
    np.testing.assert_allclose(arrays["llm/norm/scale"], PARAMS["llm/norm/scale"] + more, rtol=1e-6)
    assert all(path.startswith("llm/") for path in arrays)


@pytest.mark.parametrize(
    "place, says",
    [
        ("/none", "there is no stage 'none'; known: align, instruct, later"),
        ("/later", "there is no checkpoint yet"),
        ("/instruct/2", "stage instruct has no step 2; steps: 1, 3"),
        ("/a/b/c", "is no workdir, for it has no config.json"),
    ],
)
def test_places_that_are_not_in_a_workdir(place, says, workdir):
    message = refused({"llm": f"run:{workdir}{place}"})
    assert says in message and "\n" not in message


def test_parts_that_are_not_in_a_workdir(workdir):
    model = init_case.model(tied=True)
    shapes = {"encoders_b/w": (2,), "llm/norm/scale": (17,), "llm/more": (2,)}
    sharding = next(iter(ABSTRACT.values())).sharding
    abstract = {path: jax.ShapeDtypeStruct(shape, "float32", sharding=sharding) for path, shape in shapes.items()}
    model = model.clone(encoders={"b": model.encoders["a"]}, fusers={"b": model.fusers["a"]})
    message = refused({"rest": f"run:{workdir}"}, model, abstract)
    assert message.splitlines() == [
        f"encoders.b: run:{workdir}/instruct/3 has no such part; parts: aggregator, encoders.a, fusers.a, llm",
        f"llm: llm/more is not there; llm/norm/scale (16,) there, (17,) here (run:{workdir}/instruct/3)",
    ]


def test_a_workdir_of_another_format(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"format": FORMAT + 1, "stages": []}))
    assert f"has format {FORMAT + 1}" in refused({"llm": f"run:{tmp_path}"})


# The hub, reports, processes


def test_the_hub_is_asked_once_per_source(tmp_path, monkeypatch):
    folder, asked = llava_folder(tmp_path, MODEL, PARAMS), []

    def download(source):
        asked.append(source)
        return "hf:org/name@0123", folder

    monkeypatch.setattr(sources, "download", download)
    named = dict.fromkeys(("llm", "aggregator"), "hf:org/name@main")
    arrays, reports = load_parts(MODEL, named, ABSTRACT)
    assert_equal(arrays, ("llm/", "aggregator/"))
    assert asked == ["hf:org/name@main"] and reports[-1].source == "hf:org/name@0123"


def test_report(tmp_path):
    """One line a part, and JSON data that gives the same report again."""
    folder = llava_folder(tmp_path, MODEL, PARAMS)
    rates = {path: None if path.startswith("encoders_a/") else 0.1 if "norm" in path else 1.0 for path in PARAMS}
    rates["aggregator/projector/linear_0/bias"] = None
    _, reports = load_parts(MODEL, {"rest": str(folder), "fusers.a": "random"}, ABSTRACT, rates=rates)
    lines = {report.part: str(report) for report in reports}
    fingerprint = reports[0].fingerprint
    assert lines["encoders.a"].startswith(f"encoders.a: {folder}, 53 tensors, 15,416 parameters, frozen, float32, ")
    assert lines["llm"] == (
        f"llm: {folder}, 30 tensors, 7,152 parameters, trainable, rate x 1, 0.1, float32, fingerprint {fingerprint}"
    )
    assert "544 parameters, 528 of them trainable, rate x 1, float32" in lines["aggregator"]
    assert lines["fusers.a"].endswith("float32") and "random" in lines["fusers.a"]
    for report in reports:
        data = json.loads(json.dumps(dataclasses.asdict(report)))
        assert PartReport(**data | {k: tuple(data[k]) for k in ("rates", "dtypes")}) == report


@pytest.mark.parametrize("second", ["none", pytest.param("other", marks=pytest.mark.long)])
def test_two_processes_must_find_the_same_weights(second, tmp_path):
    """No weights on one host, or others, are an error on both; nobody waits."""
    llava_folder(tmp_path / "0", MODEL, PARAMS)
    if second == "other":
        llava_folder(tmp_path / "1", MODEL, PARAMS, "in memory")
    args = (json.dumps({"llm": f"{tmp_path}/{{process}}"}), "fsdp=2")
    outputs = finish(start_processes(2, 1, *args, prefix=("-m", "tests.init_case")))
    found = [json.loads(out.splitlines()[-1]) for out, _ in outputs]
    differ = "other processes cannot read these weights or find others; every host needs the same files"
    assert found[0] == differ
    assert found[1] == differ if second == "other" else "is no folder" in found[1]


def test_names():
    assert [part_of(f"{x}/w") for x in ("llm", "encoders_a_b", "objectives_x", "aggregator", "other_x")] == [
        "llm", "encoders.a_b", "objectives.x", "aggregator", "other_x",
    ]  # fmt: skip
    assert ranges(["a.1", "a.2", "a.4", "b.5", "c", "c.0"]) == ["a.1 to 2", "a.4", "b.5", "c", "c.0"]
    assert own({"llm/a": 1}, "llm") == {"a": 1}
