"""Safetensors files whose headers or index lie: refused in one line, with little memory."""

from __future__ import annotations

import json
import struct

import numpy as np
import pytest

from jaxmllm.weights.safetensors import INDEX, SINGLE, open_folder, write_folder
from tests.conftest import refusal

pytestmark = pytest.mark.usefixtures("bounded")


def write_header(folder, header: str | bytes, size: int, length: int | None = None):
    text = header.encode() if isinstance(header, str) else header
    (folder / SINGLE).write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(size))


def entry(begin, end, shape=None, dtype="F32", **more):
    return {
        "dtype": dtype,
        "shape": [(end - begin) // 4] if shape is None else shape,
        "data_offsets": [begin, end],
        **more,
    }


@pytest.mark.parametrize(
    "tensors, size, says",
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "tensor 'b' starts at byte 4, and the one before ends at 8"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "tensor 'b' starts at byte 0, and the one before ends at 8"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "tensor 'b' starts at byte 12"),
        ({"a": entry(4, 8)}, 8, "tensor 'a' starts at byte 4"),
        ({"a": entry(0, 8)}, 4, "its tensors end at byte 8, and the file at 4"),
        ({"a": entry(0, 8)}, 12, "its tensors end at byte 8, and the file at 12"),
        ({}, 4, "its tensors end at byte 0, and the file at 4"),
        ({"a": entry(-8, 0, [2])}, 8, "'a' are not whole numbers"),
        ({"a": entry(8, 0, [2])}, 8, "'a' does not have the 8 bytes"),
        ({"a": entry(0, 8, [-2])}, 8, "'a' are not whole numbers"),
        ({"a": entry(0, 8, [2.0])}, 8, "'a' are not whole numbers"),
        ({"a": entry(0, 8, [True, 2])}, 8, "'a' are not whole numbers"),
        ({"a": entry(0, 8, [2**62, 2**62, 2**62])}, 8, "'a' does not have the"),
        ({"a": entry(0, 8, [2**64])}, 8, "'a' are not whole numbers"),
        ({"a": entry(0, 4, [1] * 33)}, 4, "'a' are not whole numbers"),
        ({"a": entry(0, 8, "2")}, 8, "'a' are not whole numbers"),
        ({"a": entry(0, 8, [2], "F16")}, 8, "'a' does not have the 4 bytes"),
        ({"a": entry(0, 8, [2], "F31")}, 8, "tensor 'a' has data type F31"),
        ({"a": entry(0, 8, [2], ["F32"])}, 8, "tensor 'a' has data type"),
        ({"a": entry(0, 8, more=1)}, 8, "'a' has not the fields"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "'a' has not the fields"),
        ({"a": [0, 8]}, 8, "'a' has not the fields"),
        ({"\x1b[2J" + "a" * 5000: 1}, 8, r"\x1b[2J"),
        ([], 0, "no JSON object"),
        ({"__metadata__": {"a": 3}}, 0, "cannot read"),
    ],
)
def test_headers_that_lie(tmp_path, tensors, size, says):
    write_header(tmp_path, json.dumps(tensors), size)
    assert says in refusal(open_folder, tmp_path)


def test_headers_that_are_none(tmp_path):
    for length in (0, 1, 100, 2**40, 2**63, 2**64 - 1):
        write_header(tmp_path, "{}", 0, length)
        refusal(open_folder, tmp_path)
    for header in (b"{", b"[" * 50_000, b"\xff{}", b'{"a": NaN}', b'{"\\ud800": 1}', json.dumps([[]] * 10**5).encode()):
        write_header(tmp_path, header, 0)
        refusal(open_folder, tmp_path)
    one = json.dumps(entry(0, 8))
    write_header(tmp_path, f'{{"a": {one}, "a": {one}}}', 8)
    assert "the key 'a' twice" in refusal(open_folder, tmp_path)
    with open(tmp_path / SINGLE, "wb") as file:  # a header that the format allows no file
        file.write(struct.pack("<Q", 17 << 20))
        file.truncate(20 << 20)
    assert "its header has 17825792 bytes" in refusal(open_folder, tmp_path)
    for content in (b"", b"\x02", struct.pack("<Q", 2)):
        (tmp_path / SINGLE).write_bytes(content)
        refusal(open_folder, tmp_path)


@pytest.mark.parametrize("file", ["../other.safetensors", "/etc/hostname", "", ".", "..", "a/b", "a\0", 7, None])
def test_an_index_names_only_files_of_its_folder(tmp_path, file):
    write_folder(tmp_path / "other", {"a": np.zeros(2, np.float32)})
    (tmp_path / "other" / SINGLE).rename(tmp_path / "other.safetensors")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    assert "not the index of safetensors files" in refusal(open_folder, folder)


@pytest.mark.parametrize("file, says", [("a" * 4096, "aaa..."), ("\n", r"\n: ")], ids=["long", "unprintable"])
def test_strange_names_in_an_index_are_shown_safely(tmp_path, file, says):
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    assert says in refusal(open_folder, tmp_path)
