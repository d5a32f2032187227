"""Recipes: overrides are checked together, configs survive JSON, and no JSON file makes a module be imported."""

from __future__ import annotations

import json
import sys
import textwrap

import pytest

from jaxmllm.documents import FORMAT, from_document, to_document
from jaxmllm.errors import ConfigError
from jaxmllm.recipes import load, override, read_run
from tests.conftest import ROOT

TOY = str(ROOT / "configs" / "toy.py")
VARIANTS = ["toy.py", "toy.py:tiny", "cambrian_8b.py", "cambrian_8b.py:published", "cambrian_8b.py:lora"]
VARIANTS += ["llama3_8b.py", "llama3_8b.py:long"]


def through_json(run):
    return from_document(json.loads(json.dumps(to_document(run))), "config.json")


def write_workdir(folder, run) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(to_document(run)))
    return str(folder)


# Overrides


@pytest.mark.parametrize("order", [1, -1])
def test_overrides_are_applied_together_and_then_checked(order):
    """None of these can be applied alone: the heads must be a multiple of the key/value heads, 4 before."""
    assignments = ["model.llm.width=192", "model.llm.heads=6", "model.llm.kv_heads=6"][::order]
    llm = override(load(TOY), assignments).model.llm
    assert (llm.width, llm.heads, llm.kv_heads) == (192, 6, 6)
    with pytest.raises(ConfigError, match="heads 6 must be a multiple of kv_heads 4"):
        override(load(TOY), ["model.llm.heads=6"])


def test_fields_that_exclude_each_other_change_together():
    stage = override(load(TOY), ["stages.align.steps=None", "stages.align.epochs=2.5"]).stages[0]
    assert stage.steps is None and stage.epochs == 2.5
    with pytest.raises(ConfigError, match="stage align: give either steps or epochs"):
        override(load(TOY), ["stages.align.epochs=2.5"])


def test_a_value_of_another_type():
    run = override(load(TOY), ["stages.align.optim.lr=1", "model.encoders.clip.taps=[1, 3]", "name=7b"])
    assert isinstance(run.stages[0].optim.lr, float) and run.model.encoders["clip"].taps == (1, 3) and run.name == "7b"
    for wrong in ("model.llm.layers=two", "model.llm.layers=2.5", "data.packing=1", "model.llm=decoder"):
        with pytest.raises(ConfigError, match=f"--set {wrong}: expected "):
            override(load(TOY), [wrong])


@pytest.mark.parametrize("size", [0, -4])
@pytest.mark.parametrize("name", ["model.llm.heads", "model.encoders.clip.patch", "data.seq_len", "log_every", "keep"])
def test_sizes_are_positive(name, size):
    with pytest.raises(ConfigError, match=f"{name.split('.')[-1]} is {size}, but must be a positive int"):
        override(load(TOY), [f"{name}={size}"])


def test_a_file_is_checked_like_an_override(tmp_path):
    path = tmp_path / "own.py"
    text = f"import runpy, dataclasses\ndef config():\n    run = runpy.run_path({TOY!r})['config']()\n"
    path.write_text(text + "    return dataclasses.replace(run, keep=0)\n")
    with pytest.raises(ConfigError, match="own.py: Run: keep is 0, but must be a positive int"):
        load(str(path))


def test_schedule_is_a_value_with_fields():
    run = override(load(TOY), ["stages.instruct.optim.schedule.warmup=0.5"])
    assert [stage.optim.schedule.warmup for stage in run.stages] == [0.05, 0.5]


def test_new_keys_where_a_dict_is_open():
    run = override(
        load(TOY),
        ["init.encoders.clip=weights/clip", "init.rest=random", "stages.align.data.seq_len=480"],
    )
    assert run.init.sources() == {"encoders.clip": "weights/clip", "rest": "random"}
    align, instruct = run.stages
    assert run.data_of(align).seq_len == 480 and run.data_of(instruct) == run.data and run.data.seq_len == 240


@pytest.mark.parametrize(
    "assignment, says",
    [
        ("model.llm.layer=2", "Decoder has no 'layer'; did you mean 'layers'"),
        ("stages.instuct.steps=2", "did you mean 'instruct'"),
        ("stages.7.steps=2", "tuple has no '7'; known: align, instruct"),
        ("model.encoders.clap.size=8", "did you mean 'clip'"),
        ("model.objectives.dept.tokens=3", "did you mean 'depth'"),
        ("model.objectives.more=3", "dict has no 'more'"),  # only Init and Stage.data are open
        ("stages.align.losses.dept=1.0", "did you mean 'depth'"),
        ("stages.align.optim.learning_rate=1.0", "Muon has no 'learning_rate'"),
        ("stages.align.data.seqlen=1", "stages.align.data has no 'seqlen'; did you mean 'seq_len'"),
        ("stages.align.data.seq_len=many", "stages.align.data.seq_len: expected int, as in 240, not 'many'"),
        ("init.encoders.clap=x", "init.encoders.clap: the model has no such part; did you mean 'encoders.clip'"),
        ("init.encoder.clip=x", "did you mean 'encoders'"),
        ("name.first=x", "str has no fields, so no 'first'"),
        ("model.llm.layers", "write it as name=value"),
    ],
)
def test_what_does_not_exist_is_named(assignment, says):
    with pytest.raises(ConfigError) as error:
        override(load(TOY), [assignment])
    assert says in str(error.value) and assignment in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("order", [1, -1])
def test_a_whole_and_its_part_are_not_both_set(order):
    pair = ["stages.align.losses={'next_token': 2.0}", "stages.align.losses.depth=1.0"][::order]
    with pytest.raises(ConfigError, match="sets the whole"):
        override(load(TOY), pair)


def test_an_unknown_loss_is_named():
    with pytest.raises(ConfigError, match=r"stages.align.losses: the model has no objective 'dept'; did you mean"):
        override(load(TOY), ["stages.align.losses={'dept': 1.0}"])


# JSON


@pytest.mark.parametrize("name", VARIANTS)
def test_every_config_survives_json(name):
    run = load(str(ROOT / "configs" / name))
    assert through_json(run) == run


def test_what_overrides_changed_survives_json():
    run = override(load(TOY), ["init.llm=run:runs/a/align/7", "stages.align.data.packing=False", "model.llm.layers=7"])
    assert through_json(run) == run != load(TOY)


@pytest.mark.parametrize("number, says", [(None, "jaxmllm 0.1 reads it"), (3, "a newer jaxmllm may read it")])
def test_another_format_is_refused(number, says):
    document = to_document(load(TOY))
    assert document["format"] == FORMAT == 2
    document["format"] = number
    if number is None:  # the first format had no number
        del document["format"]
    with pytest.raises(ConfigError, match=rf"there/config.json has format {number or 1}, and .* format 2; {says}"):
        from_document(document, "there/config.json")


def test_a_run_from_the_config_of_another(tmp_path):
    run = override(load(f"{TOY}:tiny"), ["seed=5"])
    workdir = write_workdir(tmp_path, run)
    assert load(workdir) == load(f"{workdir}/config.json") == read_run(workdir) == run
    assert override(load(workdir), ["seed=6"]).seed == 6
    with pytest.raises(ConfigError, match="empty holds no run"):
        (tmp_path / "empty").mkdir()
        load(str(tmp_path / "empty"))


# Parts that are not of jaxmllm

FUSER = """
    class Last(nn.Module):
        scale: float = 1.0

        def output(self, maps):
            return maps[-1]

        def __call__(self, taps):
            return FeatureMap(self.scale * taps[-1])
"""
IMPORTS = """
    import dataclasses

    import flax.linen as nn

    from jaxmllm.batch import FeatureMap
"""
CONFIG = """
    from jaxmllm.recipes import load


    def config():
        base = load({toy!r} + ":tiny")
        fusers = dict.fromkeys(base.model.fusers, Last(scale=0.5))
        return dataclasses.replace(base, name="own", model=base.model.clone(fusers=fusers))
"""


@pytest.fixture(params=["in the config file", "in a module that it imports"])
def foreign(request, tmp_path, monkeypatch):
    """(config file, its module or None): a recipe with a fuser of its own."""
    module = None
    if request.param == "in the config file":
        text = IMPORTS + FUSER + CONFIG
    else:
        module = "parts_of_somebody"
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(IMPORTS + FUSER))
        monkeypatch.syspath_prepend(tmp_path)
        text = f"\n    import dataclasses\n\n    from {module} import Last\n" + CONFIG
    path = tmp_path / "own.py"
    path.write_text(textwrap.dedent(text).replace("{toy!r}", repr(TOY)))
    yield str(path), module
    sys.modules.pop(module, None)


def test_foreign_classes_need_the_config_file(foreign, tmp_path):
    config, module = foreign
    run = load(config)
    workdir = write_workdir(tmp_path / "run", run)
    sys.modules.pop(module, None)  # as in a process that has not read the config file
    with pytest.raises(ConfigError, match="the config names .*:Last, which is not a class of jaxmllm; add --config"):
        read_run(workdir)
    assert module not in sys.modules
    for name in (config, f"{config}:config"):
        found = read_run(workdir, name).model
        assert [fuser.scale for fuser in found.fusers.values()] == [0.5, 0.5]
        assert type(found.fusers["clip"]).__name__ == "Last" and found.layout == run.model.layout


@pytest.mark.parametrize("with_config", [False, True])
def test_a_json_file_imports_nothing(tmp_path, monkeypatch, with_config):
    (tmp_path / "harmful.py").write_text(
        "import dataclasses\n\n\n@dataclasses.dataclass\nclass Part:\n    x: int = 1\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    document = to_document(load(f"{TOY}:tiny"))
    document["model"]["fusers"]["dict"]["dino"] = {"class": "harmful:Part", "x": 2}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match="harmful:Part, which is not a class of jaxmllm"):
        read_run(str(tmp_path), TOY if with_config else None)
    assert "harmful" not in sys.modules


@pytest.mark.parametrize(
    "kind", ["subprocess:Popen", "jaxmllm.recipes:load", "jaxmllm.nothing:Part", "jaxmllm.mesh:Nome"]
)
def test_a_json_file_calls_nothing_but_parts(tmp_path, kind):
    """Also if the module is loaded, or of jaxmllm."""
    document = to_document(load(f"{TOY}:tiny"))
    document["mesh"] = {"class": kind, "args": ["false"]}
    (tmp_path / "config.json").write_text(json.dumps(document))
    with pytest.raises(ConfigError, match=f"the config names {kind}"):
        read_run(str(tmp_path), TOY)
