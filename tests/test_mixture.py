"""The mixture: shares hold for what is trained and within each batch, and samples are made ahead within a bound."""

import json
import math
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from jaxmllm.data.mixture import Mixture
from jaxmllm.data.samples import Sample
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.record import BadSample
from tests.loader_case import RECORDS, assert_same, ids_of, open_loader, sample_spec, take, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return sample_spec(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def half_bad(source):
    """The same records, every second one without an answer."""
    records = [json.loads(line) for line in Path(source.path).read_text().splitlines()]
    for record in records[::2]:
        record["conversations"][1]["value"] = ""
    path = Path(source.path).with_name("half_bad.jsonl")
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return LlavaSource(path)


@pytest.mark.parametrize("threads", [0, 3])
def test_shares_hold_for_the_samples_that_are_trained(source, half_bad, spec, tmp_path, threads):
    """Half of the second source's records are bad; its share is a quarter all the same, in every shard."""
    pair, settings = [(source, 3.0), (half_bad, 1.0)], {"packing": False, "num_shards": 2, "threads": threads}
    with open_loader(pair, spec, tmp_path, **settings) as loader:
        batches = take(loader, 20)
        state = loader.get_state()["shards"]
    ids = np.concatenate([info["sample_ids"].reshape(2, -1) for _, info in batches], 1)
    assert ((ids >= RECORDS).mean(1) == 0.25).all()
    assert batches[-1][1]["dropped"] > 0
    for shard in state.values():
        first, second = shard["trained"]
        assert abs(first - 3 * second) <= 3 and shard["next"][1] > 1.2 * 2 * second  # it took more places than samples


def test_no_batch_lacks_a_source_or_holds_nothing_else(source, spec, tmp_path):
    """With a row per shard, as on a large pod: a batch of 16 rows holds two of a source with a share of an eighth."""
    sources = [(source, 7.0), (LlavaSource(source.path), 1.0)]
    with open_loader(sources, spec, tmp_path, packing=False, rows=16, num_shards=16) as loader:
        rare = [int((info["sample_ids"] >= RECORDS).sum()) for _, info in take(loader, 30)]
    assert rare == [2] * 30


def test_every_record_of_each_source_comes_once_an_epoch(source, spec, tmp_path):
    """Whatever the weights are, and in another order for each source."""
    sources = [(source, 0.7), (LlavaSource(source.path), 0.3)]
    with open_loader(sources, spec, tmp_path, packing=False, rows=1, num_shards=1) as loader:
        ids = ids_of(take(loader, 4 * RECORDS))
    one, other = ([id % RECORDS for id in ids if id // RECORDS == k] for k in (0, 1))
    assert sorted(one[:RECORDS]) == sorted(one[RECORDS : 2 * RECORDS]) == sorted(other[:RECORDS]) == [*range(RECORDS)]
    assert one[:RECORDS] != other[:RECORDS] and one[RECORDS : 2 * RECORDS] != other[:RECORDS]


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_not_positive_is_refused(source, spec, tmp_path, weight):
    with pytest.raises(ValueError, match=f"the weight of {source.path} is {weight}"):
        open_loader([(LlavaSource(source.path), 1.0), (source, weight)], spec, tmp_path)


def test_threads_do_not_change_several_sources_with_bad_records(source, half_bad, spec, tmp_path):
    runs = []
    for threads in (0, 1, 5):
        folder = tmp_path / str(threads)
        with open_loader([(half_bad, 2.0), (source, 1.0)], spec, folder, threads=threads) as loader:
            batches = take(loader, 10)
            runs.append((batches, loader.get_state(), [info["dropped"] for _, info in batches]))
    for batches, state, dropped in runs[1:]:
        assert_same(batches, runs[0][0])
        assert state == runs[0][1] and dropped == runs[0][2]


class CountingMaker:
    """Stands for SampleMaker: notes each call; the (source, place) for which `is_bad` is true are bad."""

    def __init__(self, is_bad=lambda source, place: (source, place) == (1, 3)):
        self.calls, self.is_bad = [], is_bad

    def record(self, source, place):
        return f"source{source}", place

    def __call__(self, source, place):
        self.calls.append((source, place))
        if self.is_bad(source, place):
            return BadSample(str(place), f"source{source}", "too long")
        none = np.zeros(0, np.int32)
        return Sample(place, none, none, none, {}, {}, {}, {}, 0)


class Notes:
    """Stands for a ledger."""

    def __init__(self):
        self.noted = []

    def add(self, *bad):
        self.noted.append(bad)


def test_samples_made_ahead_stay_within_the_bound_and_are_all_used():
    """No sample is made twice or in vain: whatever is made ahead is handed out next."""
    maker, notes = CountingMaker(), Notes()
    with ThreadPoolExecutor(3) as pool:
        mixture = Mixture([0.5, 0.5], maker, notes, 0, 1, pool, ahead=5)
        for taken in range(1, 30):
            next(mixture)
            assert len(maker.calls) <= taken + 5 + len(notes.noted)
    used = len(maker.calls)
    inline = CountingMaker()
    again = Mixture([0.5, 0.5], inline, Notes(), 0, 1)
    while len(inline.calls) < used:
        next(again)
    assert sorted(inline.calls) == sorted(maker.calls) and len(set(maker.calls)) == used
    assert [bad[:2] for bad in notes.noted] == [("source1", 3)]


@pytest.mark.parametrize("ahead", [0, 6])
def test_shares_hold_within_one_percent_over_10_000_samples(ahead):
    """In 8 shards; three quarters of the first source are bad, a tenth of the second, at random."""
    bad = np.random.default_rng(0).random((3, 100_000)) < np.array([[0.75], [0.1], [0.0]])
    shares, counts = [0.5, 0.3, 0.2], [0, 0, 0]
    with ThreadPoolExecutor(2) as pool:
        for shard in range(8):
            maker = CountingMaker(lambda source, place: bad[source, place])
            mixture = Mixture(shares, maker, Notes(), shard, 8, pool if ahead else None, ahead)
            for _ in range(1250):
                counts[next(mixture).source] += 1
    assert sum(counts) == 10_000
    np.testing.assert_allclose(np.array(counts) / 10_000, shares, rtol=0.01)


def test_the_shards_of_a_process_share_its_threads(source, spec, tmp_path):
    with open_loader(source, spec, tmp_path, rows=8, num_shards=8, threads=3) as loader:
        take(loader, 3)
        assert len(loader.pool._threads) <= 3
        ahead = sum(len(waiting) for rows in loader.shards.values() for waiting in rows.mixture.waiting)
    assert ahead < 4 * 3 + 8
