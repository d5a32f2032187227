"""The loader: packed rows hold exactly the samples, whoever makes them, and go on where they stopped."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout, empty_batch
from jaxmllm.data.ledger import Ledger, TooManyBadSamples
from jaxmllm.data.loader import Loader
from jaxmllm.data.packing import Bins
from jaxmllm.data.samples import BadSample, SampleSpec, make_sample
from jaxmllm.data.sources import LlavaSource
from jaxmllm.data.targets import MapTargets
from jaxmllm.data.templates import TOY
from jaxmllm.data.tokenizer import train_word_tokenizer

RECORDS = 41
ENCODERS = {"a": EncoderInput(8, 2, (1, 2, 3)), "b": EncoderInput(12, 4, (0, 0, 0))}
LAYOUT = VisualLayout(ENCODERS, TokenLayout(8, grid=2, newline=True, unpad=True), task_tokens=1)


def conversation(k: int, pictures: int) -> list[dict[str, str]]:
    question = "<image>" * pictures + " why" * (1 + 5 * k % 11)
    return [{"from": "human", "value": question}, {"from": "gpt", "value": f"because {k}"}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A source: every fourth record is text only, some have two pictures, every third has a map."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    records = []
    for k in range(RECORDS):
        pictures = 0 if k % 4 == 3 else 2 if k % 5 == 4 else 1
        names = [f"{k}-{j}.png" for j in range(pictures)]
        for name in names:
            size = (*rng.integers(4, 20, 2), 3)
            Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(root / name)
        record = {"id": f"r{k}", "image": names, "conversations": conversation(k, pictures)}
        if k % 3 == 0:
            Image.fromarray(rng.integers(0, 3, (6, 6), dtype=np.uint8)).save(root / f"{k}.map.png")
            record |= {"instances": f"{k}.map.png", "objects": ["frog", "pond"]}
        records.append(record)
    (root / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return root


@pytest.fixture(scope="module")
def source(folder):
    return LlavaSource(folder / "data.jsonl")


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    words = "why because " + " ".join(map(str, range(RECORDS)))
    tokenizer = train_word_tokenizer([words], tmp_path_factory.mktemp("words"))
    return SampleSpec(tokenizer, TOY, LAYOUT, seq_len=48, image_slots=3, targets=MapTargets(grid=2))


def test_rows_of_a_model_without_encoders():
    bins = Bins((8, 0), 2)
    assert [bins.add(item, (4, 0)) for item in range(4)] == [None] * 4  # two full rows
    assert bins.add(4, (4, 0)) in ([0, 1], [2, 3])
    tokenizer = SimpleNamespace(backend=SimpleNamespace(token_to_id=lambda marker: 1), path="none")
    text = VisualLayout({}, TokenLayout(8), 0)
    assert SampleSpec(tokenizer, TOY, text, 48, 0).image_slots == 0
    for layout, slots in ((text, 1), (LAYOUT, 0)):
        with pytest.raises(ValueError, match=f"image_slots is {slots}"):
            SampleSpec(tokenizer, TOY, layout, 48, slots)


def open_loader(source, spec, tmp_path, **changes) -> Loader:
    sources = source if isinstance(source, list) else [(source, 1.0)]
    settings = {"rows": 8, "num_shards": 4, "seed": 5, "threads": 0, **changes}
    return Loader(sources, spec, Ledger(tmp_path / "bad_samples.jsonl", 1000), **settings)


def take(loader: Loader, count: int) -> list:
    return [next(loader) for _ in range(count)]


def leaves(batch) -> dict[str, np.ndarray]:
    found = {}
    for name, value in vars(batch).items():
        found.update({f"{name}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {name: value})
    return found


def assert_same(one, two):
    for (a, a_info), (b, b_info) in zip(one, two, strict=True):
        assert leaves(a).keys() == leaves(b).keys()
        for name, value in leaves(a).items():
            np.testing.assert_array_equal(value, leaves(b)[name], err_msg=name)
        np.testing.assert_array_equal(a_info["sample_ids"], b_info["sample_ids"])
        assert a_info["tokens"] == b_info["tokens"] and a_info["images"] == b_info["images"]


def ids_of(batches) -> list[int]:
    return [id for _, info in batches for id in info["sample_ids"].ravel().tolist() if id >= 0]


def assert_rows_hold_samples(batch, info, source, spec):
    """Unpacks every row by its segments and compares with the samples made alone."""
    tokens = images = 0
    for row in range(len(batch.tokens)):
        slot = 0
        ids = [id for id in info["sample_ids"][row].tolist() if id >= 0]
        assert batch.segment_ids[row].max() == len(ids)
        for segment, id in enumerate(ids, start=1):
            sample = make_sample(source[id], id, spec)
            places = np.flatnonzero(batch.segment_ids[row] == segment)
            n, m = len(sample.tokens), sample.image_count
            assert places.tolist() == list(range(places[0], places[0] + n))
            assert (batch.positions[row, places] == np.arange(n)).all()
            assert (batch.tokens[row, places] == sample.tokens).all()
            assert (batch.labels[row, places] == sample.labels).all()
            visual = batch.visual_index[row, places]
            expected = np.where(sample.visual >= 0, sample.visual + slot * LAYOUT.block, -1)
            assert (visual == expected).all()
            slots = slice(slot, slot + m)
            for field in ("images", "padding", "targets", "target_mask"):
                for name, value in getattr(batch, field).items():
                    np.testing.assert_array_equal(value[row, slots], getattr(sample, field)[name])
            slot += m
            tokens, images = tokens + n, images + m
        padding = batch.segment_ids[row] == 0
        assert (batch.labels[row, padding] == -100).all() and (batch.visual_index[row, padding] == -1).all()
        for field in ("images", "targets", "target_mask"):
            assert not any(value[row, slot:].any() for value in getattr(batch, field).values())
        flat = batch.visual_positions[row].ravel()
        inverse = np.full(spec.seq_len, -1)
        inverse[flat[flat >= 0]] = np.flatnonzero(flat >= 0)
        assert (inverse == batch.visual_index[row]).all()
    assert (info["tokens"], info["images"]) == (tokens, images)


def test_packed_rows_hold_exactly_the_samples(source, spec, tmp_path):
    with open_loader(source, spec, tmp_path) as loader:
        batches = take(loader, 12)
    assert any((info["sample_ids"][:, 1] >= 0).any() for _, info in batches)
    for batch, info in batches:
        assert_rows_hold_samples(batch, info, source, spec)


def test_without_packing_a_row_is_a_sample(source, spec, tmp_path):
    with open_loader(source, spec, tmp_path, packing=False) as loader:
        batches = take(loader, 6)
    for batch, info in batches:
        assert info["sample_ids"].shape == (8, 1) and (info["sample_ids"] >= 0).all()
        assert_rows_hold_samples(batch, info, source, spec)


def test_shapes_are_those_of_an_empty_batch(source, spec, tmp_path):
    with open_loader(source, spec, tmp_path) as loader:
        found = leaves(next(loader)[0])
    empty = leaves(empty_batch(LAYOUT, 8, spec.seq_len, spec.image_slots, spec.target_shapes))
    assert {k: (v.shape, v.dtype) for k, v in found.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}


def test_every_record_comes_once_an_epoch_in_a_new_order(source, spec, tmp_path):
    # One shard and one sample per row: the order of the data itself.
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
        for name, value in leaves(batch).items():
            np.testing.assert_array_equal(np.concatenate([leaves(b)[name] for b, _ in pieces]), value, name)
        ids = np.concatenate([i["sample_ids"] for _, i in pieces])
        np.testing.assert_array_equal(ids, info["sample_ids"])
        assert sum(i["tokens"] for _, i in pieces) == info["tokens"]


def test_threads_and_prefetch_do_not_change_the_batches(source, spec, tmp_path):
    found = []
    for settings in ({"threads": 0, "prefetch": 1}, {"threads": 4, "prefetch": 3}):
        with open_loader(source, spec, tmp_path, **settings) as loader:
            found.append(take(loader, 10))
    assert_same(*found)


@pytest.mark.parametrize("packing", [True, False])
def test_resume_is_exact_at_every_batch(source, spec, tmp_path, packing):
    # 41 records and about 16 samples in a batch: the ten batches pass several epochs.
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
    state = halves[0].get_state() | halves[1].get_state()
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


def test_bad_samples_do_not_change_the_others(folder, spec, tmp_path, source):
    """The good samples come in the same order as they would if the bad ones were simply taken out."""
    lines = (folder / "data.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    records[4]["image"] = "gone.png"
    records[7]["conversations"][1]["value"] = ""
    records[20]["conversations"][0]["value"] += " why" * 60  # longer than a row
    lines = [json.dumps(r) for r in records]
    lines[30] = lines[30][:25]  # not JSON
    (folder / "bad.jsonl").write_text("\n".join(lines) + "\n")
    plain = {"packing": False, "rows": 1, "num_shards": 1}
    with open_loader(source, spec, tmp_path, **plain) as loader:
        expected = [id for id in ids_of(take(loader, 2 * RECORDS)) if id not in (4, 7, 20, 30)]
    for threads in (0, 3):
        with open_loader(LlavaSource(folder / "bad.jsonl"), spec, tmp_path, threads=threads, **plain) as loader:
            batches = take(loader, 2 * (RECORDS - 4))
        assert ids_of(batches) == expected
        assert batches[-1][1]["dropped"] == 4
    entries = [json.loads(line) for line in (tmp_path / "bad_samples.jsonl").read_text().splitlines()]
    reasons = {entry["id"]: entry["reason"].split(":")[0] for entry in entries}
    assert len(entries) == 4  # each once, over epochs and loaders
    assert reasons == {"r4": "missing file", "r7": "empty answer", "r20": "too long", "30": "not JSON"}
    assert "74 tokens, and a row has 48" in next(e["reason"] for e in entries if e["id"] == "r20")


def test_too_many_bad_samples_end_the_run(folder, spec, tmp_path):
    (folder / "all_bad.jsonl").write_text("".join(json.dumps({"id": str(k)}) + "\n" for k in range(60)))
    source = LlavaSource(folder / "all_bad.jsonl")
    loader = Loader([(source, 1.0)], spec, Ledger(tmp_path / "bad.jsonl", 20), rows=4, num_shards=2, threads=2)
    with pytest.raises(TooManyBadSamples, match=r"2\d samples are bad, the limit is 20"):
        next(loader)
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    loader = open_loader(source, spec, tmp_path)
    with pytest.raises(
        TooManyBadSamples, match="1000 samples in a row"
    ):  # fewer than the limit, but there is nothing else
        next(loader)


def test_ledger(tmp_path):
    path = tmp_path / "run" / "bad_samples.jsonl"
    ledger = Ledger(path, max_bad=2)
    for name in ("a", "a", "b"):
        ledger.add(BadSample(name, "file", "too long", "9"))
    path.write_bytes(path.read_bytes() + b'{"id": "c", "pa')  # killed while it wrote
    ledger = Ledger(path, max_bad=2)
    assert ledger.count == 2
    ledger.add(BadSample("b", "file", "too long", "9"))
    with pytest.raises(TooManyBadSamples, match="3 samples are bad, the limit is 2; the first: a: too long: 9;"):
        ledger.add(BadSample("c", "file", "missing file"))
    lines = path.read_text().splitlines()
    assert len(lines) == 4 and json.loads(lines[-1]) == {"id": "c", "path": "file", "reason": "missing file"}
    assert Ledger(path).count == 3


def test_errors_of_the_thread_reach_the_consumer(source, spec, tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmllm.data.loader.make_sample", lambda *_: 1 / 0)
    with open_loader(source, spec, tmp_path) as loader, pytest.raises(ZeroDivisionError):
        next(loader)


def test_sources_are_mixed_by_weight_in_every_shard(source, spec, tmp_path):
    pair = [(source, 3.0), (LlavaSource(source.path), 1.0)]
    with open_loader(pair, spec, tmp_path, packing=False, num_shards=2) as loader:
        ids = np.concatenate([info["sample_ids"].reshape(2, -1) for _, info in take(loader, 20)], 1)
    assert ((ids >= RECORDS).mean(1) == 0.25).all()
    assert ids.max() < 2 * RECORDS


def test_wrong_numbers_are_refused(source, spec, tmp_path):
    with pytest.raises(ValueError, match=r"rows \(6\) must be a multiple of the virtual shards \(4\)"):
        open_loader(source, spec, tmp_path, rows=6)
    with pytest.raises(ValueError, match=r"of the processes \(3\)"):
        open_loader(source, spec, tmp_path, process_count=3)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="must have records"):
        open_loader(LlavaSource(tmp_path / "empty.jsonl"), spec, tmp_path)
    with (
        open_loader(source, spec, tmp_path) as loader,
        pytest.raises(ValueError, match="lacks the virtual shards 2, 3"),
    ):
        loader.set_state({k: v for k, v in loader.get_state().items() if k in "01"})
