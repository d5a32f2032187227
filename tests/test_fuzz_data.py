"""Records, pictures and rows of questions broken at random: refused by name, or used as they are."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from jaxmllm.data.picture import decode, open_image
from jaxmllm.data.samples import Sample, make_sample
from jaxmllm.data.show import show_record, to_document
from jaxmllm.data.sources import json_bounds
from jaxmllm.data.sources.array_record import unpacked
from jaxmllm.data.sources.json_bounds import parse, scan
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.record import BadSample, Blob, Record
from jaxmllm.eval.tasks.base import is_bad
from jaxmllm.eval.tasks.choices import blind_rules, is_right
from jaxmllm.eval.tasks.cv_bench import load, scores
from tests.fuzz import JSON, altered, broken, one_line, run, sizes
from tests.loader_case import sample_spec
from tests.records import chat, write_good_records

# Where records start and end


def parsed(content: bytes):
    """The records of a file, BadSample where one is refused; None if the file is."""
    try:
        bounds, _ = scan(content, "f")
    except ValueError as error:
        assert one_line(error)
        return None
    found = []
    for index, (start, end) in enumerate(bounds.tolist()):
        try:
            found.append(parse(content, start, end, index, "f"))
        except BadSample as error:
            assert one_line(error)
            found.append(error)
    return found


OBJECTS = st.lists(st.dictionaries(st.text(max_size=6), JSON, max_size=4), max_size=5)


@sizes(100)
def test_whole_files_are_read_as_json_reads_them(monkeypatch, examples):
    def check(records, indent, chunk):
        monkeypatch.setattr(json_bounds, "CHUNK", chunk)
        for text in (json.dumps(records, indent=indent), json.dumps(records, ensure_ascii=False)):
            content = text.encode("utf-8", "surrogatepass")
            expected = json.loads(text)
            found = parsed(content)
            assert len(found) == len(expected)
            for one, other in zip(found, expected):
                assert isinstance(one, BadSample) or repr(one) == repr(other)
        lines = "\n".join(map(json.dumps, records)).encode()
        assert [repr(one) for one in parsed(lines)] == [repr(one) for one in records]

    run(check, examples, OBJECTS, st.sampled_from([None, 1]), st.sampled_from([16, 64, 1 << 20]))


@sizes(200)
def test_broken_files_lose_no_record(monkeypatch, examples):
    """Every element of what is an array is there; of what is none, the file or a record is refused."""
    text = json.dumps([{"id": 1, "a": ['"', "}]", {}]}, {"id": "\\"}, {"b": [[]], "c": {"d": None}}], indent=1)

    def check(content, chunk):
        monkeypatch.setattr(json_bounds, "CHUNK", chunk)
        found = parsed(content)
        if not content.lstrip(b" \n\t\r").startswith(b"["):
            return
        try:
            expected = json.loads(content.decode())
        except ValueError:
            comma = content.rstrip(b"] \n\t\r").endswith(b",")  # before the end of the array, which is let pass
            assert found is None or comma or any(isinstance(one, BadSample) for one in found)
            return
        assert len(found) == len(expected)
        for one, other in zip(found, expected):
            assert isinstance(one, BadSample) or repr(one) == repr(other)

    run(check, examples, broken(text.encode()), st.sampled_from([16, 64, 1 << 20]))


# From records to samples


@pytest.fixture(scope="module")
def spec_and_folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("records")
    write_good_records(root)
    return sample_spec(root), root


GOOD = {
    "id": "a",
    "image": ["0.jpg", "1.jpg"],
    "depth": "depth.png",
    "instances": "instances.png",
    "objects": ["frog", "pond"],
    "conversations": chat("<image> why <image> ?", "because 3", "<user> <end> why", "because 4"),
}


@sizes(200)
def test_records(spec_and_folder, examples):
    spec, root = spec_and_folder
    outcomes = []

    def check(record):
        (root / "fuzz.jsonl").write_text("{}\n" + json.dumps(record) + "\n")  # a list alone would be a file of records
        source = LlavaSource(root / "fuzz.jsonl")
        try:
            sample = make_sample(source[1], 1, spec)
        except BadSample as error:
            assert one_line(error)
            outcomes.append(str(error))
        else:
            outcomes.append(None)
            assert isinstance(sample, Sample) and len(sample.tokens) <= spec.seq_len
            trained = sample.labels >= 0
            assert (sample.labels[:-1][trained[:-1]] == sample.tokens[1:][trained[:-1]]).all()
            assert sample.image_count <= spec.image_slots and not trained[-1:].any()
            assert all(np.isfinite(x).all() for x in sample.targets.values())
        document = to_document(show_record([source], 1, spec))
        assert document["error"] == outcomes[-1]
        if document["error"] is None:
            assert [i for piece in document["pieces"] for i in piece["ids"]] == sample.tokens.tolist()

    run(check, examples, altered(GOOD, most=2))
    assert any(outcomes) and not all(outcomes)


def shard_record() -> bytes:
    header = json.dumps({"id": "a", "data": {"a": 1}, "blobs": [["image", "0.jpg", 3], ["depth", "d.png", 2]]}).encode()
    return len(header).to_bytes(4, "little") + header + b"12345"


@sizes(200)
def test_records_of_shards(examples):
    good = unpacked(memoryview(shard_record()), "f")
    assert good.images[0].read() == b"123" and good.maps["depth"].read() == b"45"

    class Shards:
        files = ["f"]

    def check(content):
        from jaxmllm.data.sources.array_record import ArrayRecordSource

        source = ArrayRecordSource.__new__(ArrayRecordSource)
        source.path, source.records = "f", [content]
        try:
            record = source[0]
        except BadSample as error:
            assert one_line(error) and error.kind == "damaged record"
        else:
            assert sum(len(blob.read()) for blob in (*record.images, *record.maps.values())) <= len(content)

    run(check, examples, broken(shard_record()))


# Pictures


def encoded(kind: str, mode: str, **options) -> bytes:
    values = np.random.default_rng(0).integers(0, 255, (9, 13, len(mode)), dtype=np.uint8)
    image = Image.fromarray(values.squeeze()) if mode != "P" else Image.fromarray(values.squeeze()).convert("P")
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "kind, mode",
    [("JPEG", "RGB"), ("PNG", "RGBA"), ("PNG", "L"), ("GIF", "P"), ("TIFF", "RGB"), ("BMP", "RGB"), ("WEBP", "RGB")],
)
@sizes(40)
def test_pictures(kind, mode, examples):
    content = encoded(kind, mode)
    outcomes = []

    def check(found):
        record = Record("a", "f", {}, [], {})
        blob = Blob("a.img", lambda: found)
        try:
            picture = open_image(record, blob)
            image = decode(record, blob, picture)
        except BadSample as error:
            assert one_line(error)
            outcomes.append(False)
        else:
            assert image.mode == "RGB" and image.size == picture.size and np.asarray(image).dtype == np.uint8
            outcomes.append(True)

    run(check, examples, broken(content, focus=80))
    assert not all(outcomes)


# Rows of questions

ROW = {
    "idx": 1, "type": "2D", "task": "Count", "image": "a.jpg", "question": "How many?", "choices": ["1", "2"],
    "answer": "(B)", "prompt": "How many? (A) 1 (B) 2", "source": "COCO",
}  # fmt: skip


@sizes(200)
def test_rows_of_questions(tmp_path, examples):
    path = tmp_path / "rows.jsonl"
    outcomes = []

    def check(row, reply):
        path.write_text(json.dumps(row) + "\n" + json.dumps(ROW) + "\n")
        rows = load(str(path))
        assert len(rows) == 2 and not is_bad(rows[1])
        outcomes.append(is_bad(rows[0]))
        if is_bad(rows[0]):
            assert rows[0]["place"].endswith(":1") and isinstance(rows[0]["bad"], str) and "\n" not in rows[0]["bad"]
        good = [one for one in rows if not is_bad(one)]
        for one in good:
            assert is_right(one, reply) in (True, False)
            # A choice whose text is the letter of another one leaves open which is meant.
            assert is_right(one, one["answer"]) or one["answer"] in one["choices"]
        for rule in blind_rules(good).values():
            assert isinstance(rule(good[-1]), str)
        assert 0 <= scores(good, [reply] * len(good))["overall"] <= 100

    run(
        check,
        examples,
        altered(ROW, most=2),
        st.text(max_size=20) | st.sampled_from(["(A)", "B", "2", "The answer is 1."]),
    )
    assert any(outcomes) and not all(outcomes)


@sizes(200)
def test_bytes_of_rows(tmp_path, examples):
    path = tmp_path / "rows.jsonl"

    def check(content):
        path.write_bytes(content)
        try:
            rows = load(str(path))
        except ValueError as error:
            assert one_line(error) and "has no rows" in str(error)
        else:
            assert all(is_bad(row) or row["choices"] == [*map(str, row["choices"])] for row in rows)

    run(check, examples, broken((json.dumps(ROW) + "\n").encode() * 2))
