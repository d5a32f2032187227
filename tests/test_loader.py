"""The loader: batches do not depend on who makes them, go on where they stopped, and survive bad samples."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest

from jaxmllm.data.ledger import Ledger, TooManyBadSamples
from jaxmllm.data.loader import Loader
from jaxmllm.data.samples import make_sample
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.record import BadSample
from jaxmllm.train.checkpoint import join
from tests.loader_case import RECORDS, arrays, assert_same, ids_of, open_loader, sample_spec, take, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return sample_spec(tmp_path_factory.mktemp("tokenizer"))


def test_every_record_comes_once_an_epoch_in_a_new_order(source, spec, tmp_path):
    # One shard and one sample per row show the order of the data itself.
    with open_loader(source, spec, tmp_path, packing=False, rows=1, num_shards=1) as loader:
        ids = ids_of(take(loader, 2 * RECORDS))
    assert sorted(ids[:RECORDS]) == sorted(ids[RECORDS:]) == list(range(RECORDS))
    assert ids[:RECORDS] != ids[RECORDS:]
    with open_loader(source, spec, tmp_path, packing=False, rows=1, num_shards=1, seed=6) as loader:
        assert ids_of(take(loader, RECORDS)) != ids[:RECORDS]


@pytest.mark.parametrize("processes", [2, 4])
def test_batches_do_not_depend_on_the_number_of_processes(source, spec, tmp_path, processes):
    with open_loader(source, spec, tmp_path) as loader:
        whole = take(loader, 8)
    parts = []
    for process in range(processes):
        with open_loader(source, spec, tmp_path, process_index=process, process_count=processes) as loader:
            parts.append(take(loader, 8))
    for k, (batch, info) in enumerate(whole):
        pieces = [part[k] for part in parts]
        for name, value in arrays(batch).items():
            np.testing.assert_array_equal(np.concatenate([arrays(b)[name] for b, _ in pieces]), value, name)
        ids = np.concatenate([i["sample_ids"] for _, i in pieces])
        np.testing.assert_array_equal(ids, info["sample_ids"])
        assert sum(i["tokens"] for _, i in pieces) == info["tokens"]


def test_threads_and_prefetch_do_not_change_the_batches(source, spec, tmp_path):
    batches = []
    for settings in ({"threads": 0, "prefetch": 1}, {"threads": 4, "prefetch": 3}):
        with open_loader(source, spec, tmp_path, **settings) as loader:
            batches.append(take(loader, 10))
    assert_same(*batches)


def test_sources_are_mixed_by_weight_in_every_shard(source, spec, tmp_path):
    pair = [(source, 3.0), (LlavaSource(source.path), 1.0)]
    with open_loader(pair, spec, tmp_path, packing=False, num_shards=2) as loader:
        ids = np.concatenate([info["sample_ids"].reshape(2, -1) for _, info in take(loader, 20)], 1)
    assert ((ids >= RECORDS).mean(1) == 0.25).all()
    assert ids.max() < 2 * RECORDS


@pytest.mark.parametrize("packing", [True, False])
def test_resume_is_exact_at_every_batch(source, spec, tmp_path, packing):
    # With 41 records and about 16 samples in a batch, the ten batches cover several epochs.
    loader = open_loader(source, spec, tmp_path, packing=packing, prefetch=3, threads=2)
    states, whole = [loader.get_state()], []
    for _ in range(10):
        whole.append(next(loader))
        states.append(json.loads(json.dumps(loader.get_state())))
    loader.close()
    assert loader.get_state() == states[-1]
    assert len(ids_of(whole)) > 2 * RECORDS or not packing
    for k in (0, 1, 2, 5, 9):
        with open_loader(source, spec, tmp_path, packing=packing) as again:
            again.set_state(states[k])
            assert again.get_state() == states[k]
            assert_same(take(again, 10 - k), whole[k:])
            assert again.get_state() == states[10]


def test_resume_on_another_number_of_processes(source, spec, tmp_path):
    halves = [open_loader(source, spec, tmp_path, process_index=p, process_count=2) for p in range(2)]
    for loader in halves:
        take(loader, 3)
    state = join([loader.get_state() for loader in halves], "position")
    rest = [take(loader, 4) for loader in halves]
    for loader in halves:
        loader.close()
    with open_loader(source, spec, tmp_path) as one:
        one.set_state(state)
        for k, (batch, _) in enumerate(take(one, 4)):
            joined = np.concatenate([part[k][0].tokens for part in rest])
            np.testing.assert_array_equal(batch.tokens, joined)


def test_a_loader_can_go_back(source, spec, tmp_path):
    with open_loader(source, spec, tmp_path) as loader:
        take(loader, 2)
        state, first = loader.get_state(), take(loader, 3)
        loader.set_state(state)
        assert_same(take(loader, 3), first)


@pytest.mark.parametrize("threads", [0, 3])
def test_an_error_names_the_record_and_ends_the_loader(source, spec, tmp_path, monkeypatch, threads):
    def fail_at_8(record, id, spec):
        return 1 / 0 if id == 8 else make_sample(record, id, spec)

    monkeypatch.setattr("jaxmllm.data.mixture.make_sample", fail_at_8)
    says = rf"record 8 of {source.path}, .*8-0.png failed: ZeroDivisionError: division by zero"
    with open_loader(source, spec, tmp_path, threads=threads) as loader:
        with pytest.raises(RuntimeError, match=says):
            take(loader, RECORDS)
        with pytest.raises(ValueError, match="closed"):
            next(loader)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("samples", "loader"))]


def test_bad_samples_do_not_change_the_others(source, spec, tmp_path):
    """The good samples come in the same order as if the bad ones were simply taken out."""
    folder = Path(source.path).parent  # where the pictures are
    records = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    records[4]["image"] = "gone.png"
    records[7]["conversations"][1]["value"] = ""
    records[20]["conversations"][0]["value"] += " why" * 60  # longer than a row
    lines = [json.dumps(r) for r in records]
    lines[30] = lines[30][:25]  # not JSON
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    single_samples = {"packing": False, "rows": 1, "num_shards": 1}
    with open_loader(source, spec, tmp_path, **single_samples) as loader:
        expected = [id for id in ids_of(take(loader, 2 * RECORDS)) if id not in (4, 7, 20, 30)]
    bad_source = LlavaSource(folder / "bad.jsonl")
    for threads in (0, 3):
        with open_loader(bad_source, spec, tmp_path, threads=threads, **single_samples) as loader:
            batches = take(loader, 2 * (RECORDS - 4))
        assert ids_of(batches) == expected
        assert batches[-1][1]["dropped"] == 4
    entries = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"].split(":")[0] for entry in entries}
    assert {entry["index"] for entry in entries} == {4, 7, 20, 30}
    assert {entry["source"] for entry in entries} == {bad_source.path}
    assert len(entries) == 4  # each is written once, over all epochs and loaders
    assert reasons == {"r4": "missing file", "r7": "empty answer", "r20": "too long", "30": "not JSON"}
    assert "74 tokens, but a row has 48" in next(e["reason"] for e in entries if e["id"] == "r20")


def test_too_many_bad_samples_end_the_run(spec, tmp_path):
    (tmp_path / "all_bad.jsonl").write_text("".join(json.dumps({"id": str(k)}) + "\n" for k in range(60)))
    source = LlavaSource(tmp_path / "all_bad.jsonl")
    loader = Loader([(source, 1.0)], spec, Ledger(tmp_path / "bad.jsonl", 20), rows=4, num_shards=2, threads=2)
    with pytest.raises(TooManyBadSamples, match=r"2\d samples are bad, the limit is 20"):
        next(loader)
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    loader = open_loader(source, spec, tmp_path)  # fewer than the limit, but there are no good ones
    with pytest.raises(TooManyBadSamples, match="1000 consecutive samples of .*all_bad.jsonl were bad"):
        next(loader)


def test_ledger(tmp_path):
    path = tmp_path / "run" / "bad_samples.jsonl"
    ledger = Ledger(path, max_bad=2)
    for index in (0, 0, 1):  # two records with the same id
        ledger.add("data.jsonl", index, BadSample("a", "file", "too long", "9"))
    path.write_bytes(path.read_bytes() + b'{"id": "c", "pa')  # killed while it was writing
    ledger = Ledger(path, max_bad=2)
    assert ledger.count == 2
    ledger.add("data.jsonl", 1, BadSample("a", "file", "too long", "9"))
    with pytest.raises(TooManyBadSamples, match="3 samples are bad, the limit is 2; the first: a: too long: 9;"):
        ledger.add("other.jsonl", 1, BadSample("a", "file", "missing file"))
    lines = path.read_text().splitlines()
    expected = {"source": "other.jsonl", "index": 1, "id": "a", "path": "file", "reason": "missing file"}
    assert len(lines) == 4 and json.loads(lines[-1]) == expected
    assert Ledger(path).count == 3


def test_lines_of_an_old_ledger_count_once_each(tmp_path):
    path = tmp_path / "bad_samples.jsonl"
    path.write_text('{"id": "a", "path": "file", "reason": "too long"}\n' * 2)
    ledger = Ledger(path)
    ledger.add("data.jsonl", 0, BadSample("a", "file", "too long"))
    assert ledger.count == Ledger(path).count == 3
