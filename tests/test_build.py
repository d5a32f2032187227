"""From a config to the data of a run: shards, steps and divisions are settled before anything compiles."""

import dataclasses
import json
import math
from types import SimpleNamespace

import numpy as np
import pytest

from jaxmllm import bench, recipes
from jaxmllm.data import build
from jaxmllm.data.build import check_division, resolve, resolve_shards, resolve_steps
from jaxmllm.data.sizes import steps_of_epochs
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.errors import ConfigError
from jaxmllm.plan import report
from jaxmllm.plan.chips import topology
from tests.conftest import settings
from tests.loader_case import RECORDS, ids_of, open_loader, sample_spec, take, write_source


@pytest.mark.parametrize("rows, expected", [(256, 256), (1024, 256), (12, 4), (7, 1), (96, 32)])
def test_default_number_of_shards(rows, expected):
    assert resolve_shards(SimpleNamespace(shards=None), rows) == expected
    assert resolve_shards(SimpleNamespace(shards=3), rows) == 3


@pytest.mark.parametrize(
    "numbers, says",
    [
        (
            (12, 8, 1),
            "12 rows in 8 virtual shards: the virtual shards must divide the rows; set stages.align.data.shards=12",
        ),
        ((12, 4, 3), "the 3 processes that read rows must divide the virtual shards; set stages.align.data.shards=12"),
        (
            (512, 8, 16),
            "the 16 processes that read rows must divide the virtual shards; set stages.align.data.shards=256",
        ),
        ((12, 4, 8), "the 8 processes .*; set stages.align.rows=16"),
        ((12, 4, 1, 8), "8 data shards x accumulate=1 must divide the rows; set stages.align.rows=16"),
        ((24, 8, 8, 8, 2), "8 data shards x accumulate=2 must divide the rows; set stages.align.rows=32"),
        ((12, 0, 1), "the virtual shards must divide the rows"),
    ],
)
def test_numbers_that_do_not_divide_get_one_line_with_a_mend(numbers, says):
    with pytest.raises(ConfigError, match=f"stages.align: .*{says}"):
        check_division("align", *numbers)


def test_the_mend_of_a_division_helps():
    """For many numbers: what the line says to set is accepted."""
    draw = np.random.default_rng(0)
    for _ in range(300):
        rows, shards, processes, data_shards, accumulate = (int(draw.integers(1, top)) for top in (99, 40, 9, 9, 4))
        for _ in range(2):  # after new rows, the shards may need a mend too
            try:
                check_division("a", rows, shards, processes, data_shards, accumulate)
            except ConfigError as error:
                name, _, value = str(error).rpartition(" ")[2].partition("=")
                rows, shards = (int(value), shards) if name == "stages.a.rows" else (rows, int(value))
        check_division("a", rows, shards, processes, data_shards, accumulate)


@pytest.fixture
def run(scenes):
    config, _, *overrides = settings(scenes)
    return recipes.override(recipes.load(config), overrides)


def with_epochs(run, number, epochs, **changes):
    """The run with a stage given in epochs."""
    stages = [*run.stages]
    stages[number] = dataclasses.replace(stages[number], steps=None, epochs=epochs, **changes)
    return dataclasses.replace(run, stages=tuple(stages))


def test_resolving_fills_in_numbers_and_keeps_them(run, tmp_path, capsys, monkeypatch):
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, shards=None))
    run = with_epochs(run, 0, 2.0, data={"packing": False, "seq_len": 200})
    found = resolve(run)
    align, instruct = found.stages
    assert align.steps == math.ceil(2 * len(LlavaSource(run.stages[0].sources[0].path)) / align.rows)
    assert align.epochs is None and instruct.steps == run.stages[1].steps
    assert align.data == {"packing": False, "seq_len": 200, "shards": 8} and instruct.data == {"shards": 8}
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 1 and f"stage align: epochs=2 makes {align.steps} steps" in said[0]
    assert resolve(found) == found == recipes.from_document(recipes.to_document(found), "config.json")

    monkeypatch.setattr(build, "steps_of_epochs", lambda *_: 12345)  # the data has changed
    workdir = str(tmp_path)
    assert resolve(run, workdir).stages[0].steps == 12345  # nothing is saved there
    (tmp_path / "config.json").write_text(json.dumps(recipes.to_document(found)))
    says = (
        f"12345 steps, but the workdir's config.json has {align.steps}: .*--accept-changed-data keeps the {align.steps}"
    )
    with pytest.raises(ConfigError, match=says):
        resolve(run, workdir)
    assert resolve(run, workdir, accept_changed=True) == found
    assert f"stage align keeps its {align.steps} steps" in capsys.readouterr().err


def test_check_data_covers_every_stage(run, tmp_path):
    build.check_data(run)
    last = run.stages[1]
    (tmp_path / "empty.jsonl").write_text("")
    empty = dataclasses.replace(last.sources[0], path=str(tmp_path / "empty.jsonl"))
    for weight in (math.nan, math.inf, 0, -1):
        with pytest.raises(ConfigError, match=f"instruct.jsonl is {weight}; it must be positive"):
            dataclasses.replace(last.sources[0], weight=weight)
    for stage, says in [
        (dataclasses.replace(last, sources=(empty,)), "empty.jsonl must have records"),
        (dataclasses.replace(last, data={"shards": 3}), "8 rows in 3 virtual shards"),
        (dataclasses.replace(last, data={"tokenizer": "nowhere"}), "no tokenizer at nowhere"),
    ]:
        with pytest.raises(ValueError, match=says):
            build.check_data(dataclasses.replace(run, stages=(run.stages[0], stage)))


def test_a_stage_has_its_own_data(run, tmp_path):
    stage = dataclasses.replace(run.stages[0], data={"packing": False, "image_slots": 1, "shards": 2, "max_bad": 7})
    with build.make_loader(run, stage, str(tmp_path)) as loader:
        batch, info = next(loader)
        assert [*loader.shards] == ["0", "1"] and loader.ledger.max_bad == 7
    assert info["sample_ids"].shape == (8, 1) and batch.visual_positions.shape[:2] == (8, 1)


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return sample_spec(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("epochs", [1, 2, 0.7, 1.1])
def test_steps_of_epochs_are_exact_without_packing(source, spec, epochs):
    pair = [(source, 0.9), (LlavaSource(source.path), 0.1)]
    assert steps_of_epochs(epochs, 4, pair, spec, packing=False) == math.ceil(round(epochs * 2 * RECORDS, 6) / 4)
    assert steps_of_epochs(1.0, 41, pair, spec, packing=False) == 2  # exactly
    assert steps_of_epochs(0.3, 3, [(source, 1.0)], spec, packing=False) == 5  # 12.3 samples


def test_steps_of_epochs_with_packing_and_bad_records(source, spec, tmp_path):
    """The loader itself hands out about as many samples in these steps, and the records that are bad do not count."""
    records = [json.loads(line) for line in open(source.path)]
    records[5]["conversations"] = []
    (tmp_path / "bad.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    bad = LlavaSource(tmp_path / "bad.jsonl", source.root)
    assert steps_of_epochs(1, 10, [(bad, 1.0)], spec, packing=False) == 4  # 40 samples
    pair, epochs = [(source, 0.8), (bad, 0.2)], 10
    steps = steps_of_epochs(epochs, 8, pair, spec, packing=True)
    assert steps == steps_of_epochs(epochs, 8, pair, spec, packing=True)
    with open_loader(pair, spec, tmp_path) as loader:
        trained = len(ids_of(take(loader, steps)))
    assert trained == pytest.approx(epochs * (2 * RECORDS - 1), rel=0.04)


def test_epochs_that_mean_nothing_are_refused(source, spec, tmp_path):
    for epochs in (0, -1, math.nan, math.inf):
        with pytest.raises(ValueError, match="epochs must be positive and finite"):
            steps_of_epochs(epochs, 8, [(source, 1.0)], spec, packing=True)
    (tmp_path / "bad.jsonl").write_text('{"id": 1}\n')
    with pytest.raises(ValueError, match="none of the 1 records examined in .*bad.jsonl is usable"):
        steps_of_epochs(1, 8, [(LlavaSource(tmp_path / "bad.jsonl"), 1.0)], spec, packing=True)


def test_resolved_steps_use_the_packing_of_the_stage(run):
    packed, single = (
        resolve_steps(run, with_epochs(run, 1, 4.0, data={"packing": p}).stages[1]) for p in (True, False)
    )
    assert 1 < packed < single


@dataclasses.dataclass(frozen=True)
class Device:
    """Stands for a TPU chip of a topology."""

    id: int
    process_index: int
    slice_index: int = 0
    platform: str = "cpu"
    device_kind: str = "cpu"


def test_plan_checks_the_processes_of_a_slice_before_it_compiles(run, monkeypatch):
    """16 hosts of 4 chips cannot share 8 virtual shards."""

    def compiled(*_):
        raise AssertionError("it compiles")

    devices = [Device(k, k // 4) for k in range(64)]
    monkeypatch.setattr(report, "devices_of", lambda topology: devices)
    monkeypatch.setattr(report, "plan_stage", compiled)
    stages = tuple(dataclasses.replace(stage, rows=128, data={"shards": 8}) for stage in run.stages)
    with pytest.raises(ConfigError, match="stages.align: .*the 16 processes .*; set stages.align.data.shards=128"):
        report.plan(dataclasses.replace(run, stages=stages), topology("v5p:4x4x4"), say=str)
    stages = tuple(dataclasses.replace(stage, data={"shards": None}) for stage in stages)
    with pytest.raises(AssertionError, match="it compiles"):
        report.plan(dataclasses.replace(run, stages=stages), topology("v5p:4x4x4"), say=str)


def test_plan_and_bench_need_no_data_for_epochs(run):
    """Nothing is measured: the program of a step is that of any number of steps."""
    stage = with_epochs(run, 1, 2.0).stages[1]
    assert report.fixed_steps(stage).steps == 1 and report.fixed_steps(run.stages[1]) is run.stages[1]
    assert bench.choose_stage(with_epochs(run, 1, 2.0)).steps == 1
