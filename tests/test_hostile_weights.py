"""PyTorch checkpoints that lie, or would call, reserve or repeat something: refused in one line, with little memory."""

from __future__ import annotations

import os
import pickle
import struct
import tracemalloc
import zipfile

import numpy as np
import pytest

from jaxmllm.weights.pickled import open_pickled
from tests import pth_files as pth
from tests.conftest import refusal

ARRAYS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.array(7), "none": np.zeros((0, 3), np.float64)}
FLOATS = np.arange(4, dtype=np.float32).tobytes()
pytestmark = pytest.mark.usefixtures("bounded")


def refused(path) -> str:
    line = refusal(open_pickled, path)
    assert line.startswith(f"cannot read {path} as weights: ")
    return line


@pytest.mark.parametrize("zipped", [True, False])
def test_checkpoints_are_read(tmp_path, zipped):
    found = open_pickled(pth.write_arrays(tmp_path / "a.pth", ARRAYS, zipped))
    assert found.keys() == ARRAYS.keys()
    for name, x in ARRAYS.items():
        np.testing.assert_array_equal(found[name], x)
        assert found[name].dtype == x.dtype and found[name].shape == x.shape


def test_views_and_shared_storages(tmp_path):
    one = pth.storage("FloatStorage", "0", 4)
    items = {
        "all": pth.tensor(one, 0, (2, 2), (2, 1)),
        "turned": pth.tensor(one, 0, (2, 2), (1, 2)),
        "last": pth.tensor(one, 3, (1,), (1,)),
        "one": pth.tensor(one, 2, (), ()),
        "ordered": pth.called("collections", "OrderedDict") + b")R",
    }
    wrapped = pth.dictionary({"epoch": pth.number(3), "state_dict": pth.dictionary(items)})
    found = open_pickled(pth.write_zip(tmp_path / "a.pth", pth.program(wrapped), {"0": FLOATS}))
    assert {k: x.tolist() for k, x in found.items()} == {
        "all": [[0, 1], [2, 3]], "turned": [[0, 2], [1, 3]], "last": [3], "one": 2,
    }  # fmt: skip
    assert found["turned"].flags.c_contiguous and not found["all"].flags.owndata


@pytest.mark.parametrize(
    "module, name",
    [
        (os.system.__module__, "system"),
        ("builtins", "eval"),
        ("numpy", "zeros"),
        ("torch._utils", "x"),
        ("torch", "Size"),
    ],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_nothing_else_is_called(tmp_path, module, name, zipped):
    content = pth.program(pth.dictionary({"a": pth.called(module, name) + b"(" + pth.text("x") + b"tR"}))
    write = pth.write_zip if zipped else pth.write_stream
    assert f"it calls {module}.{name}, which is not allowed" in refused(write(tmp_path / "a.pth", content, {}))


def test_a_stack_global_is_not_called_either(tmp_path):
    content = b"\x80\x04" + pth.text("os") + pth.text("system") + b"\x93(" + pth.text("x") + b"tR."
    assert "it calls os.system" in refused(pth.write_zip(tmp_path / "a.pth", content, {}))


@pytest.mark.parametrize(
    "content",
    [
        b"\x82\x01",  # EXT1
        b"ios\nsystem\n",  # INST
        b"o",  # OBJ
        b"\x81",  # NEWOBJ
        b"P1\n",  # PERSID
        b"\x97",  # NEXT_BUFFER
        b"I1\n",  # INT
        b"\x8b" + struct.pack("<i", 2**31 - 1),  # LONG4
        b"\x8e" + struct.pack("<Q", 2**62),  # BINBYTES8
        b"\x96" + struct.pack("<Q", 2**40),  # BYTEARRAY8, for which the machine in C reserves 1 TB
        b"2",  # DUP
    ],
)
def test_other_instructions_are_refused(tmp_path, content):
    line = refused(pth.write_zip(tmp_path / "a.pth", pth.program(content), {}))
    assert f"it has the instruction {content[0]}, which is not allowed" in line


def test_numpy_types_cannot_be_called(tmp_path):
    """numpy.float32 would expand lists of lists of one list, a hundred times the one before in each step."""
    lists = b"](" + b"K\x01" * 100 + b"eq\x00"
    for level in range(1, 6):
        lists += b"](" + (b"h" + bytes([level - 1])) * 100 + b"eq" + bytes([level])
    content = pth.called("torch", "FloatStorage") + b"(" + lists + b"tR"
    assert "not callable" in refused(pth.write_zip(tmp_path / "a.pth", pth.program(content), {}))


def test_memory_that_a_pickle_asks_for_is_not_reserved(tmp_path):
    path = tmp_path / "a.pth"
    far = b"Nr" + struct.pack("<I", 2**31 - 1)  # a memo of 2^31 places, 16 GB in the machine in C
    assert "no dictionary" in refused(pth.write_zip(path, pth.program(far), {}))
    for code in (b"X" + struct.pack("<I", 2**32 - 1), b"\x95" + struct.pack("<Q", 2**62)):
        refused(pth.write_zip(path, pth.program(code), {}))


def test_long_descriptions(tmp_path):
    path = pth.write_zip(tmp_path / "a.pth", pth.program(pth.text("a" * (5 << 20))), {})
    assert "it needs more than 4194304 bytes to describe its tensors" in refused(path)


def test_repeated_dictionaries(tmp_path):
    """A list of pairs that OrderedDict is called with again and again."""
    pairs = b"](" + b"".join(b"K" + bytes([i]) + b"N\x86" for i in range(200)) * 50 + b"eq\x00"
    again = pth.called("collections", "OrderedDict") + b"(h\x00tR0"
    path = pth.write_zip(tmp_path / "a.pth", pth.program(pairs + again * 2000), {})
    assert "a dictionary of texts and numbers" in refused(path)


def test_keys_as_deep_as_the_file_is_long(tmp_path):
    deep = b")" + b"\x85" * 200_000
    for content in (b"}" + deep + b"Ns", b"}(" + deep + b"Nu"):
        path = pth.write_zip(tmp_path / "a.pth", pth.program(content), {})
        assert "a dictionary of texts and numbers" in refused(path)
    keys = b"\x80\x02]" + deep + b"a."
    head = b"".join(pickle.dumps(x, 2) for x in (pth.MAGIC, 1001, {}))
    (tmp_path / "b.pth").write_bytes(head + pth.program(b"}") + keys)
    assert "a storage that no tensor refers to" in refused(tmp_path / "b.pth")


def test_the_classes_cannot_be_changed(tmp_path):
    """BUILD would set attributes of the class itself, for all files that are read after this one."""
    state = b"N" + pth.dictionary({"array": pth.text("changed")}) + b"\x86b"
    content = pth.called("torch._utils", "_rebuild_tensor_v2") + state
    refused(pth.write_zip(tmp_path / "a.pth", pth.program(content), {}))
    assert open_pickled(pth.write_arrays(tmp_path / "b.pth", ARRAYS)).keys() == ARRAYS.keys()


def test_many_tensors_of_one_storage(tmp_path):
    data = np.zeros(250_000, np.float32)
    one = pth.tensor(pth.storage("FloatStorage", "0", data.size), 0, (500, 500), (1, 500))
    content = pth.program(pth.dictionary({str(k): one for k in range(1000)}))
    line = refused(pth.write_zip(tmp_path / "a.pth", content, {"0": data.tobytes()}))
    assert "its tensors have 1000000000 bytes, and the file only" in line


@pytest.mark.parametrize(
    "reference, view, says",
    [
        (("FloatStorage", "0", 5), (0, (1,), (1,)), "a storage of 20 bytes has 16 in the file"),
        (("FloatStorage", "0", -1), (0, (1,), (1,)), "a storage has -1 numbers"),
        (("FloatStorage", "1", 4), (0, (1,), (1,)), "archive/data/1"),
        (("FloatStorage", "../data.pkl", 4), (0, (1,), (1,)), "archive/data/../data.pkl"),
        (("FloatStorage", "0", 4), (0, (5,), (1,)), "reaches beyond its storage of 4 numbers"),
        (("FloatStorage", "0", 4), (0, (2,), (4,)), "reaches beyond its storage of 4 numbers"),
        (("FloatStorage", "0", 4), (4, (1,), (1,)), "reaches beyond its storage of 4 numbers"),
        (("FloatStorage", "0", 4), (0, (9,), (0,)), "reaches beyond its storage of 4 numbers"),
        (("FloatStorage", "0", 4), (-1, (1,), (1,)), "are not whole numbers"),
        (("FloatStorage", "0", 4), (0, (-1,), (1,)), "are not whole numbers"),
        (("FloatStorage", "0", 4), (3, (2,), (-1,)), "are not whole numbers"),
        (("FloatStorage", "0", 4), (0, (1, 1), (1,)), "2 dimensions and 1 strides"),
        (("FloatStorage", "0", 4), (0, (1,) * 33, (1,) * 33), "33 dimensions"),
        (("FloatStorage", "0", 4), (0, (0, 2**31 - 1, 2**31 - 1, 2**31 - 1), (1,) * 4), "cannot read"),
    ],
)
def test_tensors_that_lie(tmp_path, reference, view, says):
    content = pth.program(pth.dictionary({"a": pth.tensor(pth.storage(*reference), *view)}))
    assert says in refused(pth.write_zip(tmp_path / "a.pth", content, {"0": FLOATS}))


def test_a_storage_that_is_two(tmp_path):
    pair = {k: pth.tensor(pth.storage(k, "0", n), 0, (1,), (1,)) for k, n in (("FloatStorage", 4), ("ByteStorage", 16))}
    path = pth.write_zip(tmp_path / "a.pth", pth.program(pth.dictionary(pair)), {"0": FLOATS})
    assert "refers to storage 0 as two different ones" in refused(path)


def test_archives_that_expand(tmp_path):
    content = pth.state_dict({"a": np.zeros(25_000_000, np.float32)})
    with zipfile.ZipFile(tmp_path / "a.pth", "w") as archive:
        archive.writestr("archive/data.pkl", content)
        archive.writestr("archive/data/0", bytes(100_000_000), zipfile.ZIP_DEFLATED)
    assert (tmp_path / "a.pth").stat().st_size < 200_000
    tracemalloc.reset_peak()  # what was written was large
    assert "data/0 is compressed, which torch does not do" in refused(tmp_path / "a.pth")


def test_a_flipped_bit_of_an_archive_is_seen(tmp_path):
    path = pth.write_arrays(tmp_path / "a.pth", ARRAYS)
    content = path.read_bytes()
    place = content.index(ARRAYS["a"].tobytes()) + 5
    path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
    assert "archive/data/0 is damaged" in refused(path)


@pytest.mark.parametrize("content", [b"", b"text", pickle.dumps([1]), b"PK\x03\x04" * 20])
def test_what_is_no_checkpoint(tmp_path, content):
    (tmp_path / "a.pth").write_bytes(content)
    refused(tmp_path / "a.pth")
    assert "no dictionary" in refused(pth.write_zip(tmp_path / "b.pth", pth.program(b"]"), {}))
