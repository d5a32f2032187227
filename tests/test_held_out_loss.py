"""The held-out loss: every sample once, the mean over all tokens, the same for several processes."""

import json

import jax
import numpy as np
import pytest

from jaxmllm import host_batches
from jaxmllm.config import ConfigError, Source
from jaxmllm.data import build
from jaxmllm.data.one_pass import one_pass
from jaxmllm.data.sources.open import open_source
from jaxmllm.eval.tasks.held_out_loss import HeldOutLoss
from jaxmllm.train.state import unflatten
from tests.conftest import finish, jaxmllm, settings, start_processes
from tests.loader_case import arrays, sample_spec, write_source
from tests.tiny_run import random_params, tiny_run

RECORDS = 30


@pytest.fixture(scope="module")
def case(scenes, tmp_path_factory):
    """(run, parameters, file of records): some of the scenes; one of them has no picture file."""
    path = scenes / "held_out_records.jsonl"
    records = [json.loads(line) for line in open(scenes / "instruct.jsonl")][:RECORDS]
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    run = tiny_run(scenes)
    return run, random_params(run), str(path)


def measured(run, params, workdir, task):
    with jax.set_mesh(run.mesh.build()):
        measure = task.prepare(run, run.stages[1], str(workdir))
        with jax.transfer_guard("disallow"):
            return measure(params, lambda row: None)


def direct(run, params, path):
    """The mean over trained tokens, one sample a row, from the model's term."""
    spec, mesh = build.sample_spec(run, run.stages[1]), run.mesh.build()
    terms_of = jax.jit(lambda p, batch: run.model.apply({"params": unflatten(p)}, batch, ("next_token",))[0])
    with jax.set_mesh(mesh):
        (batch,) = one_pass(open_source(path), spec, print, rows=RECORDS, num_shards=1, packing=False)
        term = terms_of(params, host_batches.global_from_rows(batch, mesh))["next_token"]
    mask = np.asarray(term.mask)
    return float(np.asarray(term.values)[mask].mean(dtype=np.float64))


def test_mean_over_all_tokens_whatever_the_rows(case, tmp_path):
    run, params, path = case
    found = measured(run, params, tmp_path, HeldOutLoss(Source(path)))
    assert (found.numbers["samples"], found.numbers["bad"]) == (RECORDS, 0)
    assert found.numbers["next_token"] == pytest.approx(direct(run, params, path), rel=1e-5)
    fewer = measured(run, params, tmp_path, HeldOutLoss(Source(path), rows=2, losses=("next_token",)))
    assert fewer.numbers["next_token"] == pytest.approx(found.numbers["next_token"], rel=1e-5)
    assert fewer.numbers["accuracy"] == pytest.approx(found.numbers["accuracy"], rel=1e-5)
    assert set(fewer.numbers) == {"next_token", "accuracy", "samples", "bad"}
    assert not (tmp_path / "bad_eval_samples.jsonl").exists()


def test_bad_samples_are_counted_and_named(case, tmp_path):
    run, params, path = case
    records = [json.loads(line) for line in open(path)]
    records[3]["image"] = "gone.jpg"
    records[5]["conversations"][0]["from"] = "gpt"
    records[5]["id"] = records[3]["id"]
    broken = str(path).replace("held_out_records", "broken_records")
    open(broken, "w").write("".join(json.dumps(record) + "\n" for record in records))
    task = HeldOutLoss(Source(broken))
    for _ in range(2):
        found = measured(run, params, tmp_path, task)
        assert (found.numbers["samples"], found.numbers["bad"]) == (RECORDS - 2, 2)
    lines = [json.loads(line) for line in open(tmp_path / "bad_eval_samples.jsonl")]
    assert {(line["source"], line["index"], line["id"]) for line in lines} == {
        (broken, index, records[3]["id"]) for index in (3, 5)
    }


def test_a_loss_without_targets_is_none(case, tmp_path):
    run, params, path = case
    records = [json.loads(line) for line in open(path)]
    text = str(path).replace("held_out_records", "without_maps")
    drop = lambda record: {k: v for k, v in record.items() if k not in ("depth", "instances")}
    open(text, "w").write("".join(json.dumps(drop(record)) + "\n" for record in records))
    found = measured(run, params, tmp_path, HeldOutLoss(Source(text)))
    assert found.numbers["depth"] is None and found.numbers["next_token"] > 0 and "depth none" in found.line()


@pytest.mark.parametrize(
    ("change", "says"),
    [({"losses": ("nxt_token",)}, "did you mean 'next_token'"), ({"rows": 0, "source": "none"}, "no data file")],
)
def test_mistakes_are_named(case, tmp_path, change, says):
    run, _, path = case
    source = Source("none.jsonl" if change.pop("source", None) else path)
    with pytest.raises((ConfigError, ValueError), match=says):
        HeldOutLoss(source, **change).prepare(run, run.stages[1], str(tmp_path))


@pytest.mark.parametrize("packing", [True, False])
def test_one_pass_has_each_sample_once_and_the_processes_share_it(tmp_path, packing):
    source, spec = write_source(tmp_path), sample_spec(tmp_path)
    divided = {"rows": 8, "num_shards": 4, "packing": packing}
    whole = list(one_pass(source, spec, print, **divided))
    starts = sum(int(((batch.segment_ids > 0) & (batch.positions == 0)).sum()) for batch in whole)
    assert starts == len(source)
    parts = [list(one_pass(source, spec, print, **divided, process_index=i, process_count=2)) for i in range(2)]
    for step, batch in enumerate(whole):
        for half, own in enumerate(parts):
            rows = slice(4 * half, 4 * half + 4)
            for name, value in arrays(batch).items():
                if step < len(own):
                    np.testing.assert_array_equal(arrays(own[step])[name], value[rows], err_msg=name)
                elif name == "segment_ids":
                    assert not value[rows].any()


@pytest.mark.long
def test_two_processes_measure_what_one_does(scenes, case, tmp_path):
    """The devices differ too: 1, 2 x 2, and 2 x 1 with tensor parallelism, where both processes read the same rows."""
    steps = {"stages.align.steps": 1, "stages.instruct.steps": 1}
    jaxmllm("train", *settings(scenes, **steps), "--workdir", tmp_path)
    task = tmp_path / "task.py"
    source = "from jaxmllm.config import Source\nfrom jaxmllm.eval.tasks.held_out_loss import HeldOutLoss\n"
    task.write_text(f"{source}held_out = HeldOutLoss(Source({case[2]!r}))\n")
    args = ("eval", tmp_path, "--task", f"{task}:held_out")
    jaxmllm(*args, "--out", tmp_path / "one.json")
    one = json.loads((tmp_path / "one.json").read_text())
    for devices, mesh in ((2, "mesh.tensor=1"), (1, "mesh.tensor=2")):
        finish(start_processes(2, devices, *args, "--out", tmp_path / "two.json", "--set", mesh, "mesh.fsdp=-1"))
        two = json.loads((tmp_path / "two.json").read_text())
        assert one.keys() == two.keys()
        assert [two[k] for k in one if k != "train_seconds"] == pytest.approx(
            [one[k] for k in one if k != "train_seconds"], rel=1e-4
        )
