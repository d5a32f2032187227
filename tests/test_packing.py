"""Packed rows hold exactly the samples, and the loader refuses numbers that do not fit."""

from types import SimpleNamespace

import numpy as np
import pytest

from jaxmllm.batch import TokenLayout, VisualLayout, empty_batch
from jaxmllm.data.packing import Bins
from jaxmllm.data.samples import SampleSpec, make_sample
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.templates import TOY
from tests.loader_case import LAYOUT, arrays, open_loader, sample_spec, take, write_source


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_source(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    return sample_spec(tmp_path_factory.mktemp("tokenizer"))


def assert_rows_hold_samples(batch, info, source, spec):
    """Unpacks every row by its segments and compares with the samples made one by one."""
    tokens = images = 0
    for row in range(len(batch.tokens)):
        slot = 0
        ids = [id for id in info["sample_ids"][row].tolist() if id >= 0]
        assert batch.segment_ids[row].max() == len(ids)
        for segment, id in enumerate(ids, start=1):
            sample = make_sample(source[id], id, spec)
            places = np.flatnonzero(batch.segment_ids[row] == segment)
            length, count = len(sample.tokens), sample.image_count
            assert places.tolist() == list(range(places[0], places[0] + length))
            assert (batch.positions[row, places] == np.arange(length)).all()
            assert (batch.tokens[row, places] == sample.tokens).all()
            assert (batch.labels[row, places] == sample.labels).all()
            expected = np.where(sample.visual_index >= 0, sample.visual_index + slot * LAYOUT.block, -1)
            assert (batch.visual_index[row, places] == expected).all()
            slots = slice(slot, slot + count)
            for field in ("images", "padding", "targets", "target_mask"):
                for name, value in getattr(batch, field).items():
                    np.testing.assert_array_equal(value[row, slots], getattr(sample, field)[name])
            slot += count
            tokens, images = tokens + length, images + count
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
        made = arrays(next(loader)[0])
    empty = arrays(empty_batch(LAYOUT, 8, spec.seq_len, spec.image_slots, spec.target_shapes))
    assert {k: (v.shape, v.dtype) for k, v in made.items()} == {k: (v.shape, v.dtype) for k, v in empty.items()}


def test_rows_of_a_model_without_encoders():
    bins = Bins((8, 0), 2)
    assert [bins.add(item, (4, 0)) for item in range(4)] == [None] * 4  # two full rows
    assert bins.add(4, (4, 0)) in ([0, 1], [2, 3])
    tokenizer = SimpleNamespace(backend=SimpleNamespace(token_to_id=lambda marker: 1), path="none")
    text = VisualLayout({}, TokenLayout(), 0)
    assert SampleSpec(tokenizer, TOY, text, 48, 0).image_slots == 0
    for layout, slots in ((text, 1), (LAYOUT, 0)):
        with pytest.raises(ValueError, match=f"image_slots is {slots}"):
            SampleSpec(tokenizer, TOY, layout, 48, slots)


def test_rows_whose_items_have_grown_are_split():
    """As when a picture was replaced by a larger one between a save and the restart: nothing is lost or cut."""
    bins = Bins((8, 2), 2)
    bins.reopen([[("a", (3, 1)), ("b", (3, 1))], [("c", (7, 0)), ("d", (4, 1)), ("e", (4, 1))], []])
    assert bins.rows == [(["a", "b"], [6, 2]), (["c"], [7, 0]), (["d", "e"], [8, 2])]
    assert bins.add("f", (1, 1)) is None  # fits beside c
    assert bins.add("g", (2, 1)) in (["a", "b"], ["c", "f"], ["d", "e"])


def test_wrong_numbers_are_refused(source, spec, tmp_path):
    with pytest.raises(ValueError, match=r"rows \(6\) must be a multiple of the virtual shards \(4\)"):
        open_loader(source, spec, tmp_path, rows=6)
    with pytest.raises(ValueError, match=r"the virtual shards a multiple of the processes \(3\)"):
        open_loader(source, spec, tmp_path, process_count=3)
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ValueError, match="must have records"):
        open_loader(LlavaSource(tmp_path / "empty.jsonl"), spec, tmp_path)
    with (
        open_loader(source, spec, tmp_path) as loader,
        pytest.raises(ValueError, match="lacks the virtual shards 2, 3"),
    ):
        state = loader.get_state()
        loader.set_state({**state, "shards": {k: v for k, v in state["shards"].items() if k in "01"}})
