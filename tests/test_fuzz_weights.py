"""Files of weights broken at random: refused in one line, or read as they are."""

from __future__ import annotations

import json
import struct

import numpy as np
from hypothesis import strategies as st
from safetensors import safe_open

from jaxmllm.weights.pickled import open_pickled
from jaxmllm.weights.safetensors import INDEX, SINGLE, open_folder, write_folder
from tests import pth_files as pth
from tests.fuzz import altered, broken, one_line, run, sizes

ARRAYS = {
    "a.weight": np.arange(6, dtype=np.float32).reshape(2, 3),
    "b": np.array([1.5, 2.5]),
    "n": np.array(7),
    "bytes": np.arange(5, dtype=np.uint8),
}
ALL = {name: (x.shape, x.tobytes()) for name, x in ARRAYS.items()}


def whole(path) -> bytes:
    return path.read_bytes()


def read(folder):
    """The tensors of a folder of safetensors; None if it is refused."""
    try:
        found = open_folder(folder)
    except ValueError as error:
        assert one_line(error)
        return None
    arrays = {name: np.array(found[name]) for name in found}
    with safe_open(folder / SINGLE, "numpy") as other:  # the format's own library reads the same
        for name, x in arrays.items():
            if x.dtype.kind != "V" and x.dtype.name != "bfloat16":
                np.testing.assert_array_equal(x, other.get_tensor(name))
    assert sum(x.nbytes for x in arrays.values()) <= (folder / SINGLE).stat().st_size
    return arrays


@sizes(200)
def test_safetensors_headers(tmp_path, examples):
    write_folder(tmp_path, ARRAYS)
    content = whole(tmp_path / SINGLE)
    length = struct.unpack("<Q", content[:8])[0]
    header, data = json.loads(content[8 : 8 + length]), content[8 + length :]
    outcomes = []

    def check(document, more):
        text = json.dumps(document).encode() + more
        (tmp_path / SINGLE).write_bytes(struct.pack("<Q", len(text)) + text + data)
        outcomes.append(read(tmp_path))

    run(check, examples, altered(header), st.sampled_from([b"", b" ", b"\0", b"{}"]))
    assert any(found is None for found in outcomes) and any(found is not None for found in outcomes)


@sizes(200)
def test_safetensors_bytes(tmp_path, examples):
    write_folder(tmp_path, ARRAYS)
    content = whole(tmp_path / SINGLE)

    def check(found):
        (tmp_path / SINGLE).write_bytes(found)
        read(tmp_path)

    run(check, examples, broken(content, focus=300))


@sizes(200)
def test_indexes_of_safetensors(tmp_path, examples):
    write_folder(tmp_path, ARRAYS)
    index = {"metadata": {"total_size": 9}, "weight_map": dict.fromkeys(ARRAYS, SINGLE)}

    def check(document):
        (tmp_path / INDEX).write_text(json.dumps(document))
        read(tmp_path)

    run(check, examples, altered(index))


def read_pickled(path):
    """The tensors of a PyTorch file; None if it is refused."""
    try:
        found = open_pickled(path)
    except ValueError as error:
        assert one_line(error)
        return None
    assert all(type(name) is str and type(x) is np.ndarray for name, x in found.items())
    assert sum(x.nbytes for x in found.values()) <= 4 * path.stat().st_size
    return {name: (x.shape, x.tobytes()) for name, x in found.items()}


@sizes(200)
def test_pickles_in_archives(tmp_path, examples):
    path = tmp_path / "a.pth"
    storages = {str(key): x.tobytes() for key, x in enumerate(ARRAYS.values())}
    assert read_pickled(pth.write_arrays(path, ARRAYS)) == ALL

    def check(content):
        read_pickled(pth.write_zip(path, content, storages))

    run(check, examples, broken(pth.state_dict(ARRAYS)))


@sizes(200)
def test_archives(tmp_path, examples):
    path = tmp_path / "a.pth"
    content = whole(pth.write_arrays(path, ARRAYS))

    def check(found):
        path.write_bytes(found)
        arrays = read_pickled(path)  # the sums of an archive cover all that is read
        assert arrays is None or all(ALL.get(name) == x for name, x in arrays.items())

    run(check, examples, broken(content))


@sizes(200)
def test_streams(tmp_path, examples):
    path = tmp_path / "a.pth"
    content = whole(pth.write_arrays(path, ARRAYS, zipped=False))
    assert read_pickled(path) == ALL

    def check(found):
        path.write_bytes(found)
        read_pickled(path)

    run(check, examples, broken(content))


@sizes(200)
def test_programs_of_random_instructions(tmp_path, examples):
    """Instructions in any order, most of them allowed."""
    path, storages = tmp_path / "a.pth", {"0": bytes(64)}
    pieces = [
        b"(", b"N", b"}", b"]", b")", b"\x85", b"\x86", b"\x87", b"t", b"e", b"a", b"s", b"u", b"b", b"R", b"0", b"1",
        b"Q", b"h\x00", b"q\x00", b"\x94", b"K\x05", pth.text("a"), pth.text("storage"), pth.number(-1), b"2", b".",
        pth.called("torch._utils", "_rebuild_tensor_v2"), pth.called("collections", "OrderedDict"),
        pth.called("torch", "FloatStorage"), pth.called("torch._utils", "_rebuild_parameter"),
        pth.called("os", "system"),
        pth.storage("FloatStorage", "0", 16), pth.tensor(pth.storage("FloatStorage", "0", 16), 0, (4, 4), (4, 1)),
    ]  # fmt: skip

    def check(parts):
        read_pickled(pth.write_zip(path, pth.program(b"".join(parts)), storages))

    run(check, examples, st.lists(st.sampled_from(pieces), max_size=40))
