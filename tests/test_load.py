"""Loading into shards: the same numbers on every mesh, pages that are not needed stay unread, little extra memory."""

from __future__ import annotations

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from jaxmllm.weights.convert import CONV, Entry, KeyMap, dense, export_weights, linear, norm, patches
from jaxmllm.weights.load import COMPARED, load_arrays, unequal
from jaxmllm.weights.safetensors import open_folder, write_folder
from tests.conftest import ROOT, finish, simulated, start_processes

DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


def load(devices: int, *args) -> dict:
    """Runs tests.load_case, which compares all numbers, and returns its figures."""
    command = [sys.executable, "-m", "tests.load_case", *map(str, args)]
    done = subprocess.run(command, cwd=ROOT, env=simulated(devices), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def abstract(shapes: dict, dtype) -> dict:
    return {path: jax.ShapeDtypeStruct(shape, dtype, sharding=DEVICE) for path, shape in shapes.items()}


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """A folder of 0.14 GB."""
    folder = tmp_path_factory.mktemp("tables") / "folder"
    assert load(1, "tables", folder, "float32", "fsdp=1")["files"] == 141_565_096
    return folder


@pytest.mark.parametrize("axes", [("data=2", "fsdp=2", "tensor=2"), ("fsdp=8",)], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_eight_devices(axes, dtype, tables):
    assert load(8, "tables", tables, dtype, *axes)["kept"] > 0


def test_a_process_reads_the_rows_of_its_devices(tables):
    """Two tables of 65,536 rows are nearly all of the folder; each of two processes holds half of their rows."""
    args = ("tables", tables, "bfloat16", "tensor=8")
    outputs = finish(start_processes(2, 4, *args, prefix=("-m", "tests.load_case")))
    for figures in (json.loads(out) for out, _ in outputs):
        assert 0.4 < figures["mapped"] / figures["files"] < 0.6


@pytest.mark.long
@pytest.mark.parametrize(
    "devices, axes, dtype",
    [(1, ("fsdp=1",), "float32"), (1, ("fsdp=1",), "bfloat16"), (8, ("fsdp=4", "tensor=2"), "float32")],
)
def test_memory_beyond_the_arrays(devices, axes, dtype, large):
    figures = load(devices, "large", large, dtype, *axes)
    assert figures["files"] > 3e9
    assert figures["peak"] - figures["kept"] <= 3 * figures["largest"] + 2**30, figures


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A place for a folder of 3.1 GB, which is deleted afterwards."""
    folder = tmp_path_factory.mktemp("large") / "folder"
    yield folder
    for path in folder.glob("*"):
        path.unlink()


def test_every_layout(tmp_path):
    """Transposed, split, stacked and convolution weights: what export writes is loaded again, in any dtype."""
    key_map = dense("a", "a", inputs=2) + norm("n", "n") + KeyMap(
        (
            Entry("c", "c", CONV), Entry("p", "p", patches(2)), Entry("s", "s"),
            *(Entry("qk", f"{x}", linear(), (i,)) for x in "qk" for i in range(1)),
            *(Entry(f"m.{i}.{j}", "m", linear(), (i, j)) for i in range(2) for j in range(3)),
        )
    )  # fmt: skip
    shapes = {"a/kernel": (2, 3, 4), "a/bias": (4,), "n/scale": (5,), "n/bias": (5,), "c": (3, 3, 2, 4), "p": (12, 5)}
    shapes |= {"s": (), "q": (1, 3, 2), "k": (1, 3, 4), "m": (2, 3, 5, 4)}
    rng = np.random.default_rng(0)
    params = {path: np.asarray(rng.standard_normal(shape), np.float32) for path, shape in shapes.items()}
    write_folder(tmp_path, export_weights(key_map, params))
    for dtype in (jnp.float32, jnp.bfloat16):
        found = load_arrays(key_map, open_folder(tmp_path), abstract(shapes, dtype))
        assert found.keys() == params.keys()
        for path, x in params.items():
            assert found[path].dtype == dtype
            np.testing.assert_array_equal(found[path], x.astype(dtype), path)


def test_arrays_outlive_the_file(tmp_path):
    """An array of the file's dtype is a copy, although JAX on a CPU makes views of mapped data that is aligned."""
    values, path = np.arange(2**16, dtype=np.float32), tmp_path / "model.safetensors"
    for more in range(64):
        save_file({"a": values}, path, metadata={"padding": "x" * more})
        if (path.stat().st_size - values.nbytes) % 64 == 0:
            break
    found = load_arrays(KeyMap((Entry("a", "a"),)), open_folder(tmp_path), abstract({"a": values.shape}, jnp.float32))
    with open(path, "r+b") as file:
        file.seek(-values.nbytes, 2)
        file.write(bytes(values.nbytes))
    np.testing.assert_array_equal(found["a"], values)


def test_nothing_is_read_before_all_fits():
    class Headers(dict):
        """Arrays whose shape and dtype are known, but not their numbers."""

        def __getitem__(self, key):
            return type("Header", (), {"shape": (2,), "dtype": np.dtype(ml_dtypes.bfloat16)})()

    with pytest.raises(ValueError, match="2 weights do not fit") as error:
        load_arrays(
            KeyMap((Entry("a", "a"), Entry("b", "b"))), Headers(a=0, c=0), abstract({"a": (2,), "b": (2,)}, "float32")
        )
    assert "- b: not in the file" in str(error.value) and "+ c: in the file" in str(error.value)


def test_whole_numbers_are_no_weights():
    with pytest.raises(ValueError, match="! a: int8 in the file, but a is floating point"):
        load_arrays(KeyMap((Entry("a", "a"),)), {"a": np.zeros(2, np.int8)}, abstract({"a": (2,)}, "float32"))


def test_tables_that_should_be_equal():
    key_map = KeyMap(equal=(("head", "table"),))
    table = np.zeros((3, COMPARED // 2), ml_dtypes.bfloat16)  # compared in two turns
    other = table.copy()
    other[2, -1] = 1
    assert unequal(key_map, {"table": table}) == unequal(key_map, {"table": table, "head": table.copy()}) == []
    for head in (other, table[:2]):
        (line,) = unequal(key_map, {"table": table, "head": head})
        assert line.startswith("! head: its numbers differ from those of table")
