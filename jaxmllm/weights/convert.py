"""Converts foreign state dicts to our flat parameters {"llm/blocks/layers/block/attn/q/kernel": array} and back.

A key map is a list of entries, each of which says where one foreign tensor lives here. Plain functions build it from
the sizes of a module (key_maps.py), so every name is known before anything is read: errors can name what is missing,
surplus or filled twice, and export reads the same key map backwards.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping

import ml_dtypes
import numpy as np

from jaxmllm.weights.tables import Grown, Shape, grows


@dataclasses.dataclass(frozen=True)
class Transform:
    """How the layout of a tensor changes. It is exact both ways, since elements are only moved.

    name: how a key map in a file calls it (exported.py), e.g. "linear:1".
    """

    name: str
    shape: Callable[[Shape], Shape]  # our shape -> the foreign one
    load: Callable[[np.ndarray, Shape], np.ndarray]  # foreign array, our shape -> ours
    save: Callable[[np.ndarray], np.ndarray]  # ours -> foreign


def reshape(name: str, shape: Callable[[Shape], Shape]) -> Transform:
    """Keeps the elements in their order; `shape` gives the foreign shape for ours."""
    return Transform(name, shape, lambda w, ours: w.reshape(ours), lambda w: w.reshape(shape(w.shape)))


def linear(inputs: int = 1) -> Transform:
    """torch.nn.Linear's [out, in] <-> our kernel [in dims, out dims], of which the first `inputs` are in dims."""

    def shape(ours: Shape) -> Shape:
        return math.prod(ours[inputs:]), math.prod(ours[:inputs])

    def save(w: np.ndarray) -> np.ndarray:
        return w.reshape(shape(w.shape)[::-1]).T

    return Transform(f"linear:{inputs}", shape, lambda w, ours: w.T.reshape(ours), save)


SAME = reshape("same", lambda s: s)
FLAT = reshape("flat", lambda s: (math.prod(s),))  # what torch keeps in one dimension: biases of heads, a single row
LEADING_ONE = reshape("leading_one", lambda s: (1, *s))  # learned arrays that torch keeps with a batch dimension
FLAT_GRID = reshape("flat_grid", lambda s: (s[0] * s[1], *s[2:]))  # a grid [h, w, C] that torch keeps as [h*w, C]
CONV = Transform(  # torch.nn.Conv2d's [out, in, h, w] <-> [h, w, in, out]
    "conv",
    lambda s: (s[3], s[2], s[0], s[1]),
    lambda w, _: w.transpose(2, 3, 1, 0),
    lambda w: w.transpose(3, 2, 0, 1),
)


def patches(side: int) -> Transform:
    """torch.nn.Conv2d's [out, in, side, side] <-> [side*side*in, out], for a convolution whose stride is its size."""

    def shape(ours: Shape) -> Shape:
        return ours[1], ours[0] // side**2, side, side

    def save(w: np.ndarray) -> np.ndarray:
        return w.reshape(side, side, -1, w.shape[1]).transpose(3, 2, 0, 1)

    return Transform(f"patches:{side}", shape, lambda w, ours: w.transpose(2, 3, 1, 0).reshape(ours), save)


@dataclasses.dataclass(frozen=True)
class Entry:
    """Foreign tensor `key` is our parameter `path` (at `index`, where layers are stacked).

    Several entries with the same key are parts of one tensor, concatenated in order along its dimension `axis`.
    """

    key: str
    path: str
    transform: Transform = SAME
    index: tuple[int, ...] = ()
    axis: int = 0


@dataclasses.dataclass(frozen=True)
class KeyMap:
    """Entries, and what is known of the foreign keys that have no entry.

    ignore: regular expressions for keys that are left out on purpose (they match whole keys). left_out: modules that no
    tap needs, such as "encoder.layers.23". equal: pairs (key, other key); the first is left out if the file has it, and
    must then hold the same numbers as the other.
    """

    entries: tuple[Entry, ...] = ()
    ignore: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    equal: tuple[tuple[str, str], ...] = ()

    def __add__(self, other: KeyMap) -> KeyMap:
        return KeyMap(*(getattr(self, f.name) + getattr(other, f.name) for f in dataclasses.fields(KeyMap)))

    def under(self, key: str, path: str, index: tuple[int, ...] = ()) -> KeyMap:
        """The key map of a submodule: with these prefixes for foreign keys and our paths, at this index of a stack."""
        entries = tuple(
            dataclasses.replace(e, key=key + e.key, path=path + e.path, index=index + e.index) for e in self.entries
        )
        ignored = tuple(re.escape(key) + pattern for pattern in self.ignore)
        equal = tuple((key + a, key + b) for a, b in self.equal)
        return KeyMap(entries, ignored, tuple(key + module for module in self.left_out), equal)

    def ignores(self, key: str) -> bool:
        """Whether a foreign key is left out on purpose."""
        unused = any(key == module or key.startswith(f"{module}.") for module in self.left_out)
        return unused or key in dict(self.equal) or any(re.fullmatch(pattern, key) for pattern in self.ignore)


def copy(key: str, path: str, transform: Transform = SAME) -> KeyMap:
    """Maps one tensor."""
    return KeyMap((Entry(key, path, transform),))


def dense(key: str, path: str, *, inputs: int = 1, bias: bool = True) -> KeyMap:
    """Maps a torch Linear to our Linear."""
    key_map = copy(f"{key}.weight", f"{path}/kernel", linear(inputs))
    return key_map + copy(f"{key}.bias", f"{path}/bias", FLAT) if bias else key_map


def norm(key: str, path: str, *, bias: bool = True) -> KeyMap:
    """Maps a torch LayerNorm or an RMSNorm to our Norm."""
    key_map = copy(f"{key}.weight", f"{path}/scale")
    return key_map + copy(f"{key}.bias", f"{path}/bias") if bias else key_map


def ignore(*patterns: str) -> KeyMap:
    """Leaves out foreign keys on purpose."""
    return KeyMap(ignore=patterns)


def leave_out(*modules: str) -> KeyMap:
    """Leaves out whole modules, because no tap needs them."""
    return KeyMap(left_out=modules)


def join(key_maps: Iterable[KeyMap]) -> KeyMap:
    """Joins several key maps into one."""
    return sum(key_maps, KeyMap())


@dataclasses.dataclass(frozen=True)
class Piece:
    """What an entry takes of its foreign tensor: all of it, or the elements of `share` along the entry's axis."""

    entry: Entry
    shape: Shape  # of the place in our parameter that it fills
    share: slice | None

    def read(self, foreign: Mapping[str, np.ndarray]) -> np.ndarray | Grown:
        """These elements in our layout: a view of the foreign tensor, except where the layout needs a copy."""
        array = foreign[self.entry.key]
        if grows(self.entry.path, array.shape, self.shape):
            return Grown(array, self.shape[0])
        if self.share:
            array = array[(slice(None),) * self.entry.axis + (self.share,)]
        return self.entry.transform.load(array, self.shape)


def misfits(key_map: KeyMap, foreign: Mapping[str, np.ndarray], ours: Mapping[str, Shape]) -> list[str]:
    """Everything that keeps foreign tensors from filling `ours` ({path: shape}). Reads names, shapes and dtypes only.

    Every parameter (every index of a stacked one) must be filled exactly once, every foreign key must be used or
    ignored by the key map, every shape must fit (a table of tokens may have fewer rows, tables.Grown), and numbers must
    be floating point. "-" marks what is missing, "+" what is surplus, "!" what does not fit.
    """
    problems, tensors = unfilled(key_map, ours), by_key(key_map)
    surplus = (key for key in foreign if key not in tensors and not key_map.ignores(key))
    problems += [f"+ {key}: in the file, but no parameter wants it" for key in surplus]
    for key, entries in tensors.items():
        if not all(_place_exists(entry, ours) for entry in entries):
            continue  # reported by `unfilled`
        if key not in foreign:
            problems.append(f"- {key}: not in the file, wanted by {_where(entries[0])}")
            continue
        array, expected = foreign[key], foreign_shape(entries, ours)
        if array.shape != expected and not grows(entries[0].path, array.shape, expected):
            problems.append(f"! {key}: {array.shape} in the file, {expected} wanted by {_where(entries[0])}")
        elif not np.issubdtype(array.dtype, np.floating) and array.dtype != ml_dtypes.bfloat16:
            problems.append(f"! {key}: {array.dtype} in the file, but {_where(entries[0])} is floating point")
    return problems


def pieces(key_map: KeyMap, ours: Mapping[str, Shape]) -> Iterator[Piece]:
    """The pieces that fill `ours`, in the order of the key map."""
    for entries in by_key(key_map).values():
        end = 0
        for entry in entries:
            shape, share = _place_shape(entry, ours), None
            if len(entries) > 1:
                start, end = end, end + entry.transform.shape(shape)[entry.axis]
                share = slice(start, end)
            yield Piece(entry, shape, share)


def import_weights(
    key_map: KeyMap, foreign: Mapping[str, np.ndarray], ours: Mapping[str, Shape]
) -> dict[str, np.ndarray]:
    """Converts foreign tensors to {path: array} for all of `ours` ({path: shape}), in the dtype of the foreign ones.

    Raises one ValueError that lists everything that is wrong, as `misfits` does.
    """
    raise_any(misfits(key_map, foreign, ours))
    result: dict[str, np.ndarray] = {}
    problems = []
    for piece in pieces(key_map, ours):
        entry, array = piece.entry, piece.read(foreign)
        whole = result.setdefault(entry.path, np.empty(ours[entry.path], array.dtype))
        if whole.dtype != array.dtype:
            others = f"other layers of {entry.path} are {whole.dtype}"
            problems.append(f"! {entry.key}: {array.dtype} in the file, but {others}")
        whole[entry.index] = array
    raise_any(problems)
    return result


def export_weights(key_map: KeyMap, params: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Converts {path: array} to a foreign state dict, the exact inverse of `import_weights`.

    Raises ValueError as `import_weights` does.
    """
    params = {path: np.asarray(array) for path, array in params.items()}
    raise_any(unfilled(key_map, {path: array.shape for path, array in params.items()}))
    result = {}
    for key, entries in by_key(key_map).items():
        parts = [entry.transform.save(params[entry.path][entry.index]) for entry in entries]
        result[key] = np.array(np.concatenate(parts, entries[0].axis) if len(parts) > 1 else parts[0], order="C")
    return result


def raise_any(problems: list[str]) -> None:
    """Raises one ValueError that lists the problems, if there are any."""
    if problems:
        raise ValueError(f"{len(problems)} weights do not fit:\n  " + "\n  ".join(problems))


def by_key(key_map: KeyMap) -> dict[str, list[Entry]]:
    """Foreign key -> its entries: one, or the parts of one tensor."""
    found: dict[str, list[Entry]] = {}
    for entry in key_map.entries:
        found.setdefault(entry.key, []).append(entry)
    return found


def _place_exists(entry: Entry, ours: Mapping[str, Shape]) -> bool:
    """Whether the entry's path and index exist among our parameters."""
    shape = ours.get(entry.path, ())
    indexed = len(entry.index) <= len(shape) and all(i < size for i, size in zip(entry.index, shape))
    return entry.path in ours and indexed


def _place_shape(entry: Entry, ours: Mapping[str, Shape]) -> Shape:
    return tuple(ours[entry.path][len(entry.index) :])


def foreign_shape(entries: list[Entry], ours: Mapping[str, Shape]) -> Shape:
    """The shape of a foreign tensor that its entries fill."""
    parts, axis = [entry.transform.shape(_place_shape(entry, ours)) for entry in entries], entries[0].axis
    return tuple(sum(s[i] for s in parts) if i == axis else size for i, size in enumerate(parts[0]))


def _where(entry: Entry) -> str:
    return entry.path + (f"[{', '.join(map(str, entry.index))}]" if entry.index else "")


def unfilled(key_map: KeyMap, ours: Mapping[str, Shape]) -> list[str]:
    """Where the key map and our parameters disagree: unknown paths, and places that are not filled exactly once."""
    problems, filled = [], {path: {} for path in ours}
    for entry in key_map.entries:
        if _place_exists(entry, ours):
            filled[entry.path].setdefault(entry.index, []).append(entry)
        else:
            reason = f"has shape {ours[entry.path]}" if entry.path in ours else "the model does not have"
            problems.append(f"+ {entry.key}: meant for {_where(entry)}, which {reason}")
    for path, places in filled.items():
        depths = {len(index) for index in places} or {0}
        if len(depths) > 1:
            problems.append(f"! {path}: filled both as a whole and in parts")
            continue
        for index in np.ndindex(tuple(ours[path][: depths.pop()])):
            entries = places.get(index, [])
            if not entries:
                problems.append(f"- {_where(Entry('', path, index=index))}: no entry of the key map fills it")
            elif len(entries) > 1:
                foreign = " and ".join(entry.key for entry in entries)
                problems.append(f"! {_where(entries[0])}: filled {len(entries)} times, by {foreign}")
    return problems
