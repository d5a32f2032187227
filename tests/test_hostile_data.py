"""Records of others: what leads out of the image root, exhausts memory or is no file of its kind is refused by name."""

from __future__ import annotations

import json
import os
import re
import struct
import tracemalloc

import numpy as np
import pytest

from jaxmllm import json_text
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.sources import json_bounds
from jaxmllm.data.sources.array_record import ArrayRecordSource, convert
from jaxmllm.data.sources.json_bounds import scan
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.open import open_source
from jaxmllm.data.sources.record import BadSample, read_file
from jaxmllm.data.sources.tfds import TfdsSource
from jaxmllm.errors import shown
from tests.records import chat, jpeg, write_good_records, write_jsonl

TURNS = chat("<image> how many ?", "one")


def refused(source, index=0) -> str:
    """The line that says what is wrong with a record."""
    with pytest.raises(BadSample) as error:
        record = source[index]
        for blob in (*record.images, *record.maps.values()):
            record.read(blob)
    text = str(error.value)
    assert len(text) < 2000 and text.isprintable()
    return text


@pytest.fixture
def rooted(tmp_path):
    """A folder of pictures with a link out of it, beside a file that no record may reach."""
    (tmp_path / "secret.jpg").write_bytes(jpeg(8, 8))
    root = tmp_path / "root"
    (root / "inner").mkdir(parents=True)
    (root / "a.jpg").write_bytes(jpeg(8, 8, 1))
    (root / "inner" / "b.jpg").write_bytes(jpeg(8, 8, 2))
    (root / "link.jpg").symlink_to("../secret.jpg")
    (root / "out").symlink_to("..")
    (root / "within.jpg").symlink_to("inner/b.jpg")
    return root


def named(root, name, field="image", **options):
    return LlavaSource(write_jsonl(root / "d.jsonl", [{"id": "x", field: name, "conversations": TURNS}]), **options)


@pytest.mark.parametrize("field", ["image", "depth", "instances"])
@pytest.mark.parametrize("name", ["../secret.jpg", "inner/../../secret.jpg", "link.jpg", "out/secret.jpg", "{root}/a"])
def test_paths_out_of_the_image_root_are_refused_unless_allowed(rooted, name, field):
    name = name.replace("{root}/a", str(rooted.parent / "secret.jpg"))
    text = refused(named(rooted, name, field))
    assert "not a path in the image root" in text and name in text and "outside_root=True" in text
    allowed = named(rooted, name, field, outside_root=True)[0]
    (blob,) = (*allowed.images, *allowed.maps.values())
    assert allowed.read(blob) == jpeg(8, 8)


@pytest.mark.parametrize("name", ["a.jpg", "inner/../a.jpg", "within.jpg", "{root}/a.jpg", "./inner/b.jpg"])
def test_paths_within_the_image_root_are_read(rooted, name):
    record = named(rooted, name.format(root=rooted))[0]
    assert record.read(record.images[0]) in (jpeg(8, 8, 1), jpeg(8, 8, 2))
    link = rooted.parent / "as_link"
    link.symlink_to(rooted)
    record = named(rooted, "a.jpg", image_root=str(link))[0]
    assert record.read(record.images[0]) == jpeg(8, 8, 1)


def test_names_that_are_no_paths(rooted):
    assert "NUL" in refused(named(rooted, "a\0.jpg"))
    assert "surrogate" in refused(named(rooted, "a\ud800.jpg"))
    assert "surrogate" in refused(named(rooted, "a\udc80.jpg"))
    assert "not a path" in refused(named(rooted, 7)) and "not a path" in refused(named(rooted, {"a": 1}))
    assert "not a path: depth is 3" in refused(named(rooted, 3, "depth"))
    assert "unreadable file: File name too long" in refused(named(rooted, "a" * 5000))
    assert "1025, and the limit is 1024" in refused(named(rooted, ["a.jpg"] * 1025))


def test_devices_and_pipes_are_not_read(rooted):
    os.mkfifo(rooted / "pipe.jpg")
    assert "a device or a pipe" in refused(named(rooted, "pipe.jpg"))
    assert "a device or a pipe" in refused(named(rooted, "/dev/zero", outside_root=True))
    assert "a folder" in refused(named(rooted, "inner"))
    with open(rooted / "large.jpg", "wb") as file:
        file.truncate(300 << 20)
    assert "the limit is 268435456" in refused(named(rooted, "large.jpg"))
    with pytest.raises(OSError, match="limit"):
        read_file(str(rooted / "large.jpg"))


def test_a_bad_record_cannot_steer_the_terminal_or_break_the_ledger(rooted):
    name = "\x1b[2J\n\u202ea" + "b" * 10_000
    text = refused(named(rooted, name))
    assert r"\x1b[2J\n\u202ea" in text
    bad = BadSample("id\ud800\n", "path\udc80", "missing file", "\x07")
    Ledger(str(rooted / "bad.jsonl")).add("d.jsonl", 0, bad)
    assert json.loads((rooted / "bad.jsonl").read_text())["id"] == r"id\ud800\n"
    assert shown("a" * 201) == "a" * 197 + "..." and shown("é 中 a") == "é 中 a"


# JSON


@pytest.mark.parametrize("text", ["[" * 10_000 + "]" * 10_000, '{"a":' * 10_000 + "1" + "}" * 10_000, "[" * 100_000])
def test_deep_documents_are_refused(tmp_path, text):
    with pytest.raises(ValueError, match="nested deeper than 64 levels"):
        json_text.loads(text.encode())
    (tmp_path / "d.jsonl").write_text(f'{{"id": {text}}}\n{{"id": 2}}\n')
    source = LlavaSource(tmp_path / "d.jsonl")
    assert "nested deeper than 64 levels" in refused(source) and source[1].id == "2"


def test_brackets_in_strings_are_not_depth():
    text = json.dumps({'a\\"[': ["[{" * 500, '\\"[[', "\\"]})
    assert json_text.loads(text.encode()) == json.loads(text) and json_text.depth(text.encode()) == 2
    assert json_text.depth(b"[" * 70 + b'"]]"' + b"]" * 70) == 70


@pytest.mark.parametrize(
    "content, says",
    [
        (b'{"a": "\\ud800"}', "surrogate"),
        (b'{"\\udfff": 1}', "surrogate"),
        (b'{"a": "\xed\xa0\x80"}', "not UTF-8 at byte 7"),
        (b'"\xff"', "not UTF-8 at byte 1"),
        (b"9" * 5000, "limit"),
        (b" " * (json_text.MAX_BYTES + 1), "the limit is"),
    ],
)
def test_what_is_no_text_is_refused(content, says):
    with pytest.raises(ValueError, match=says):
        json_text.loads(content)
    assert json_text.loads(b'"\\ud83d\\ude00 \\\\ud800"') == "\U0001f600 \\ud800"


def test_a_key_twice_is_refused_where_asked():
    assert json_text.loads(b'{"a": 1, "a": 2}') == {"a": 2}
    with pytest.raises(ValueError, match="the key 'a' twice"):
        json_text.loads(b'[{"b": {"a": 1, "c": 0, "a": 2}}]', unique=True)


@pytest.mark.parametrize("megabytes", [96, pytest.param(2048, marks=pytest.mark.long)])
@pytest.mark.parametrize(
    "name, start, end", [("d.jsonl", b'{"id": "', b'"}\n{"id": 2}\n'), ("d.json", b'[{"id": "', b'"}, {"id": 2}]')]
)
def test_a_record_of_any_size_takes_no_memory(tmp_path, megabytes, name, start, end):
    """A line, or a string in an array, of NUL characters in a sparse file."""
    with open(tmp_path / name, "wb") as file:
        file.write(start)
        file.seek(megabytes << 20)
        file.write(end)
    tracemalloc.start()
    source = LlavaSource(tmp_path / name)
    assert len(source) == 2 and source[1].id == "2"
    assert re.search(r"too large: \d+ bytes, and the limit is 4194304", refused(source))
    _, peak = tracemalloc.get_traced_memory()  # of Python and NumPy; the file itself is mapped
    tracemalloc.stop()
    assert peak < 64 << 20


def test_too_many_records_in_a_file(monkeypatch):
    monkeypatch.setattr(json_bounds, "MAX_RECORDS", 10)
    for text in (b"1\n" * 11, b"[" + b"1," * 10 + b"1]"):
        with pytest.raises(ValueError, match="f has more than 10 records"):
            scan(text, "f")
    assert len(scan(b"1\n" * 10, "f")[0]) == len(scan(b"[" + b"1," * 9 + b"1]", "f")[0]) == 10


@pytest.mark.parametrize("chunk", [1, 3, 1 << 20])
@pytest.mark.parametrize(
    "text, records",
    [
        (b"", []),
        (b"\n \r\n\t\n", []),
        (b"1\n{}", [b"1", b"{}"]),
        (b'\xef\xbb\xbf{"a": 1}\r\n\n 2\n', [b'{"a": 1}\r', b" 2"]),
        (b"[]", []),
        (b" [ \n] \n", []),
        (b'\xef\xbb\xbf[{"a": [1, {}]}, null,"x,]", [2] ,\n]\n', [b'{"a": [1, {}]}', b" null", b'"x,]"', b" [2] "]),
        (b"[1,,2]", [b"1", b"", b"2"]),
    ],
)
def test_every_element_and_line_counts(monkeypatch, chunk, text, records):
    monkeypatch.setattr(json_bounds, "CHUNK", chunk)
    assert [text[start:end] for start, end in scan(text, "f")[0]] == records


@pytest.mark.parametrize("text", [b"[1", b"[", b'["', b"[1}", b"[[1]", b"[1] x", b"[1]]", b"[1][2]", b'[{"a": "]"'])
@pytest.mark.parametrize("chunk", [1, 1 << 20])
def test_what_is_not_one_array(monkeypatch, text, chunk):
    monkeypatch.setattr(json_bounds, "CHUNK", chunk)
    with pytest.raises(ValueError, match="f is not (a whole|one) JSON array"):
        scan(text, "f")


def test_utf_16_is_refused(tmp_path):
    (tmp_path / "d.json").write_text('[{"id": 1}]', encoding="utf-16")
    with pytest.raises(ValueError, match="d.json is UTF-16"):
        LlavaSource(tmp_path / "d.json")


# Shards


@pytest.mark.parametrize("content", [b"", b"text" * 50_000, bytes(131_072)])
def test_files_that_are_no_shards(tmp_path, content):
    (tmp_path / "a.array_record").write_bytes(content)
    with pytest.raises(ValueError, match="cannot read .* as ArrayRecord shards: .") as error:
        open_source(str(tmp_path))
    assert "\n" not in str(error.value)


def test_a_damaged_shard_names_its_records(tmp_path):
    write_good_records(tmp_path)
    convert(LlavaSource(tmp_path / "data.jsonl"), tmp_path / "shards", 1)
    (shard,) = (tmp_path / "shards").iterdir()
    content = shard.read_bytes()
    place = content.index(jpeg(60, 24, 1)[-40:])  # in the second record
    shard.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    source = ArrayRecordSource(str(tmp_path / "shards"))
    assert source[0].id == "square" and "sample 1" in refused(source, 1) and "damaged record" in refused(source, 1)
    assert source[2].images == []


HEADER = {"id": "a", "data": {}, "blobs": []}


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x01",
        struct.pack("<I", 2**32 - 1) + b"{}",
        struct.pack("<I", 2) + b"[]",
        *[
            struct.pack("<I", len(text)) + text + b"12"
            for text in (
                json.dumps(header).encode()
                for header in (
                    HEADER,
                    {**HEADER, "blobs": [["image", "a", 3]]},
                    {**HEADER, "blobs": [["image", "a", -1], ["image", "a", 3]]},
                    {**HEADER, "blobs": [["image", "a", True], ["image", "a", 1]]},
                    {**HEADER, "blobs": [["__class__", "a", 2]]},
                    {**HEADER, "blobs": [["image", ["a"], 2]]},
                    {**HEADER, "blobs": 7},
                    {**HEADER, "id": [], "blobs": [["image", "a", 2]]},
                    {**HEADER, "data": [], "blobs": [["image", "a", 2]]},
                )
            )
        ],
        struct.pack("<I", 20_000) + b"[" * 20_000,
    ],
)
def test_records_whose_header_lies(tmp_path, content):
    write_good_records(tmp_path)
    convert(LlavaSource(tmp_path / "data.jsonl"), tmp_path / "shards", 1)
    source = ArrayRecordSource(str(tmp_path / "shards"))
    source.records = [content]
    assert "damaged record: " in refused(source)


def test_a_tfds_folder_imports_nothing(tmp_path):
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "harmful.py").write_text("raise SystemExit('imported')")
    with pytest.raises(ValueError, match="cannot read .*features.json"):
        TfdsSource(str(tmp_path))
    inner = {"type": "harmful.Feature", "content": {}}
    for features in (
        {"pythonClassName": "harmful.Feature"},
        {"featuresDict": {"features": {"image": {"python_class_name": "harmful.Feature"}}}},
        {"json": {"json": json.dumps({"a": [inner]})}},
    ):
        (tmp_path / "features.json").write_text(json.dumps(features))
        with pytest.raises(ValueError, match="it names the class harmful.Feature, and only those in tensor"):
            open_source(f"{tmp_path}:train")


def test_bounds_of_many_records_are_exact():
    draw = np.random.default_rng(0)
    records = [{"t": "".join(draw.choice([*'\\"{}[],x\n é'], draw.integers(12)))} for _ in range(300)]
    for text in (json.dumps(records), json.dumps(records, indent=1), "\n".join(map(json.dumps, records))):
        bounds, _ = scan(text.encode(), "f")
        assert [json_bounds.parse(text.encode(), *at, 0, "f") for at in bounds.tolist()] == records
