"""Loads a folder and prints what that costs: `python -m tests.load_case SIZE FOLDER DTYPE AXIS=SIZE ..`

Makes the folder first if it is not there, of random bfloat16 tensors in the shape of a Llama: "large" has 3.1 GB,
"tables" 0.1 GB, mostly in its two tables. Compares all arrays with what the files hold. Prints a JSON line with bytes:
of the files, of their largest tensor and of the arrays, of the highest anonymous resident memory before and during
loading, and of the pages of the files that were mapped in; and with seconds.
"""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxmllm import sharded
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mesh import Mesh
from jaxmllm.processes import join_processes
from jaxmllm.train.checkpoint import abstract_on
from jaxmllm.train.state import flatten
from jaxmllm.weights import key_maps
from jaxmllm.weights.convert import Piece, by_key, pieces
from jaxmllm.weights.load import load_arrays
from jaxmllm.weights.safetensors import INDEX, open_folder

SIZES = {
    "large": Decoder(vocab=32000, width=4096, layers=6, heads=32, kv_heads=8, mlp=14336),
    "tables": Decoder(vocab=65536, width=512, layers=2, heads=8, kv_heads=8, mlp=512),
}


def abstract_params(decoder: Decoder, mesh: jax.sharding.Mesh, dtype: str) -> dict[str, jax.ShapeDtypeStruct]:
    """The decoder's parameters on the mesh, which must be set."""

    def run(decoder, ids):
        decoder.output_table()
        return decoder(decoder.embed(ids), ids, ids)[0]

    def init():
        ids = sharded.shard_rows(jnp.zeros((mesh.size, 8), jnp.int32))
        return flatten(decoder.init(jax.random.key(0), ids, method=run)["params"])

    found = abstract_on(mesh, jax.eval_shape(init))
    return {path: jax.ShapeDtypeStruct(x.shape, dtype, sharding=x.sharding) for path, x in found.items()}


def make_folder(folder: Path, decoder: Decoder, shapes: dict[str, tuple[int, ...]]) -> None:
    """Writes one file per layer, so that little is in memory at a time."""
    key_map, rng, weight_map, files = key_maps.llama(decoder), np.random.default_rng(0), {}, {}
    sizes = {piece.entry.key: piece.entry.transform.shape(piece.shape) for piece in pieces(key_map, shapes)}
    for key in by_key(key_map):
        layer = re.search(r"layers\.(\d+)\.", key)
        number = int(layer[1]) + 1 if layer else 0
        files.setdefault(f"model-{number:05d}-of-{decoder.layers + 1:05d}.safetensors", []).append(key)
    folder.mkdir(parents=True, exist_ok=True)
    for name, keys in files.items():
        bits = {key: np.frombuffer(rng.bytes(2 * int(np.prod(sizes[key]))), np.uint16) & 0x3FFF for key in keys}
        save_file({k: x.view(ml_dtypes.bfloat16).reshape(sizes[k]) for k, x in bits.items()}, folder / name)
        weight_map |= dict.fromkeys(keys, name)
    (folder / INDEX).write_text(json.dumps({"weight_map": weight_map}))


def resident() -> int:
    """Bytes of this process's anonymous memory."""
    return 1024 * int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1])


def mapped(folder: str) -> int:
    """Bytes of the folder's files that are mapped into this process's memory."""
    total, ours = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        name, *fields = line.split()
        if "-" in name:  # the first line of a mapping ends with its path
            ours = fields[-1].startswith(str(Path(folder).resolve()))
        elif name == "Rss:" and ours:
            total += 1024 * int(fields[0])
    return total


def watched(run) -> tuple[dict, int]:
    """-> (run(), the highest anonymous memory meanwhile)."""
    peak, done = [0], threading.Event()

    def watch():
        while not done.wait(0.002):
            peak[0] = max(peak[0], resident())

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        return run(), peak[0]
    finally:
        done.set()
        thread.join()


def own_slices(piece: Piece, array: jax.Array) -> Iterator[tuple[np.ndarray, tuple[slice, ...]]]:
    """What this process's devices hold of a piece, and where that is in the piece."""
    for shard in array.addressable_shards:
        yield np.asarray(shard.data)[piece.entry.index], shard.index[len(piece.entry.index) :]


def main(size: str, folder: str, dtype: str, *axes: str) -> None:
    join_processes(False)
    decoder, key_map = SIZES[size], key_maps.llama(SIZES[size])
    mesh = Mesh(**{name: int(count) for name, count in (axis.split("=") for axis in axes)}).build()
    with jax.set_mesh(mesh):
        abstract = abstract_params(decoder, mesh, dtype)
        shapes = {path: x.shape for path, x in abstract.items()}
        if not (Path(folder) / INDEX).exists():
            make_folder(Path(folder), decoder, shapes)
        found, before, start = open_folder(folder), resident(), time.perf_counter()
        params, peak = watched(lambda: load_arrays(key_map, found, abstract))
        seconds, pages = time.perf_counter() - start, mapped(folder)
        for piece in pieces(key_map, shapes):
            expected = piece.read(found)
            for ours, at in own_slices(piece, params[piece.entry.path]):
                np.testing.assert_array_equal(ours, expected[at].astype(ours.dtype), piece.entry.key)
    kept = sum(shard.data.nbytes for x in params.values() for shard in x.addressable_shards)
    files, largest = sum(file.size for file in found.files.values()), max(x.nbytes for x in found.values())
    figures = dict(files=files, largest=largest, kept=kept, before=before, peak=peak, mapped=pages, seconds=seconds)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
