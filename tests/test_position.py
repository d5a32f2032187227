"""The saved data position: going on is exact with everything at once, and changed data is refused or accepted."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxmllm.data.sources.array_record import ArrayRecordSource, convert
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.train.checkpoint import join
from tests.loader_case import arrays, assert_same, open_loader, sample_spec, take, write_source


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return sample_spec(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def records(tmp_path):
    """Records with pictures and maps, as dicts; their files are in tmp_path."""
    source = write_source(tmp_path)
    return [json.loads(line) for line in Path(source.path).read_text().splitlines()]


def write(path, records) -> LlavaSource:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return LlavaSource(path)


@pytest.fixture
def mixture(tmp_path, records):
    """Three sources of two formats, one of them with bad records, and weights unlike their sizes."""
    bad = [{**record, "image": "gone.png"} if k % 4 == 0 else record for k, record in enumerate(records)]
    convert(LlavaSource(tmp_path / "data.jsonl"), tmp_path / "shards", 2)
    return [
        (write(tmp_path / "bad.jsonl", bad), 0.6),
        (ArrayRecordSource(tmp_path / "shards"), 0.3),
        (write(tmp_path / "few.jsonl", records[:5]), 0.1),
    ]


def steps_of(mixture, spec, folder, processes, threads, count, state=None):
    """`count` batches of each process, from a state or the start, and the joined state after them."""
    parts, states = [], []
    for process in range(processes):
        settings = {"process_index": process, "process_count": processes, "threads": threads}
        with open_loader(mixture, spec, folder, **settings) as loader:
            if state:
                loader.set_state(state)
            parts.append(take(loader, count))
            states.append(json.loads(json.dumps(loader.get_state())))
    return parts, join(states, "position")


@pytest.mark.parametrize("threads", [0, 3])
@pytest.mark.parametrize("before, after", [(1, 1), (1, 4), (4, 2), (2, 1)])
def test_two_halves_are_the_whole(mixture, spec, tmp_path, before, after, threads):
    """2N batches in one process are N in some processes, and N after the restart in others."""
    (whole,), end = steps_of(mixture, spec, tmp_path, 1, 0, 12)
    first, state = steps_of(mixture, spec, tmp_path, before, threads, 6)
    second, last = steps_of(mixture, spec, tmp_path, after, threads, 6, state)
    assert last == end
    for parts, batches in ((first, whole[:6]), (second, whole[6:])):
        if len(parts) == 1:
            assert_same(parts[0], batches)
        for k, (batch, _) in enumerate(batches):
            for name, value in arrays(batch).items():
                joined = np.concatenate([arrays(part[k][0])[name] for part in parts])
                np.testing.assert_array_equal(joined, value, err_msg=name)


def test_the_position_says_what_it_counts_in(mixture, spec, tmp_path):
    _, state = steps_of(mixture, spec, tmp_path, 1, 0, 5)
    for saved, (source, _) in zip(state["sources"], mixture, strict=True):
        assert saved == {"path": source.path, "records": len(source), "fingerprint": source.fingerprint}
    assert [*state["shards"]] == ["0", "1", "2", "3"]
    shard = state["shards"]["2"]
    assert all(place % 4 == 2 for place in shard["next"])
    assert all(place % 4 == 2 and place < shard["next"][source] for row in shard["open"] for source, place in row)
    assert sum(shard["trained"]) > sum(map(len, shard["open"])) > 0


def test_changed_data_is_refused_or_accepted(spec, tmp_path, records, capsys):
    before = write(tmp_path / "data.jsonl", records)
    with open_loader(before, spec, tmp_path) as loader:
        take(loader, 3)
        state = loader.get_state()
    more = write(tmp_path / "data.jsonl", [*records, records[0]])
    refused = r"data.jsonl had 41 records and has 42 now.*--accept-changed-data"
    with open_loader(more, spec, tmp_path) as loader, pytest.raises(ValueError, match=refused):
        loader.set_state(state)
    with open_loader(more, spec, tmp_path, accept_changed=True) as loader:
        loader.set_state(state)
        said = capsys.readouterr().err.splitlines()
        assert len(said) == 1 and "had 41 records and has 42 now" in said[0] and "seen twice or never" in said[0]
        take(loader, 3)
        state = loader.get_state()
    with open_loader(more, spec, tmp_path) as loader:
        loader.set_state(state)  # once accepted and saved, it is no change any more
    edited = write(tmp_path / "data.jsonl", [*records, records[1]])
    refused = "had 42 records and has 42 now, with another content"
    with open_loader(edited, spec, tmp_path) as loader, pytest.raises(ValueError, match=refused):
        loader.set_state(state)
    assert capsys.readouterr().err == ""


def test_other_sources_are_refused(mixture, spec, tmp_path):
    _, state = steps_of(mixture, spec, tmp_path, 1, 0, 1)
    refused = "is in the sources .*bad.jsonl, .*shards, .*few.jsonl, in this order"
    for other in (mixture[::-1], mixture[:2]):
        loader = open_loader(other, spec, tmp_path, accept_changed=True)
        with loader, pytest.raises(ValueError, match=refused):
            loader.set_state(state)


def test_a_waiting_sample_that_has_become_bad_is_noted(spec, tmp_path, records):
    """Its picture is gone when the open rows are read again: the ledger names it, and the others go on."""
    source = write(tmp_path / "data.jsonl", records)
    with open_loader(source, spec, tmp_path, rows=1, num_shards=1) as loader:
        next(loader)
        state = loader.get_state()
        waiting = [placed for rows in loader.shards.values() for items, _ in rows.bins.rows for placed in items]
    gone = next(placed.sample.id for placed in waiting if placed.sample.image_count)
    for name in records[gone]["image"]:
        (tmp_path / name).unlink()
    with open_loader(source, spec, tmp_path, rows=1, num_shards=1) as loader:
        loader.set_state(state)
        assert loader.ledger.count == 1
    (entry,) = map(json.loads, (tmp_path / "bad_samples.jsonl").read_text().splitlines())
    assert entry["index"] == gone and entry["reason"] == "missing file"


def test_processes_that_contradict_each_other_are_refused():
    one, two = ({"sources": [1], "shards": {str(k): {"next": [k]}}} for k in range(2))
    assert join([one, two], "position") == {"sources": [1], "shards": {"0": {"next": [0]}, "1": {"next": [1]}}}
    assert join([one, one], "position") == one
    with pytest.raises(ValueError, match="the processes disagree about position/sources"):
        join([one, {**two, "sources": [2]}], "position")
