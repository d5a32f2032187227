"""The vocabulary of a recipe: frozen dataclasses, dotted overrides, JSON.

A recipe is a Python file with a function `config() -> Run`; every other function of the file is a variant
(`configs/toy.py:name`). The parts of the model are Flax modules, which are dataclasses too, so the config *is* the
model.
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
import json
import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxmllm.mesh import Mesh


class ConfigError(ValueError):
    """What the user asked for is wrong; the message is one line that says what is wrong and how to mend it."""


@dataclasses.dataclass(frozen=True)
class Source:
    """A data set: LLaVA JSON(L), a folder of ArrayRecord shards, or TFDS_FOLDER:SPLIT."""

    path: str
    image_root: str | None = None  # default: the folder of `path`
    weight: float = 1.0  # share in the mixture


@dataclasses.dataclass(frozen=True)
class Data:
    """How records become rows."""

    tokenizer: str  # Hugging Face tokenizer folder
    template: Any  # data.templates.ChatTemplate
    seq_len: int  # S, tokens of a row
    image_slots: int  # I, images of a row
    targets: Any = None  # data.targets: where the teachers' targets come from
    shards: int = 8  # virtual shards; the number of processes must divide it, and may change on resume
    packing: bool = True
    max_bad: int = 1000  # stop when more samples than this are unusable
    tiling: Any = None  # data.tiling.Tiling: pictures are also shown in tiles
    fast_jpeg: bool = False  # decode large JPEGs at a fraction of their size: faster, but pixels differ slightly


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters are trained whose path matches the regex. The first matching rule counts; each path needs one."""

    pattern: str
    lr: float | None = 1.0  # factor of the learning rate; None: frozen
    decay: bool = True  # whether weight decay applies


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up and cosine decay."""

    lr: float
    warmup: float = 0.03  # as a share of the steps
    final: float = 0.0  # as a share of the peak rate
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0  # largest global gradient norm


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage; it starts from the parameters of the previous stage."""

    name: str
    sources: tuple[Source, ...]
    steps: int
    rows: int  # B, rows of the global batch
    rules: tuple[Rule, ...]
    losses: dict[str, float]  # objective -> weight; other objectives are not computed
    optim: Optim
    accumulate: int = 1  # micro-batches per step


@dataclasses.dataclass(frozen=True)
class Run:
    """A whole experiment."""

    name: str
    model: nn.Module  # mllm.MLLM
    data: Data
    stages: tuple[Stage, ...]
    mesh: Mesh = Mesh()
    compute_dtype: str = "bfloat16"  # masters are float32
    seed: int = 0
    log_every: int = 20  # steps
    save_every: int = 500  # steps
    keep: int = 2  # checkpoints per stage


# The format of config.json, and the version of jaxmllm that reads each. It changes when older workdirs cannot be read.
FORMAT = 2
READ_BY = {1: "0.1", 2: "0.2"}

# Fields that may change when a run resumes.
RESUMABLE = ("mesh", "log_every", "save_every", "keep", "data.max_bad")


def load(target: str) -> Run:
    """`FILE.py[:function]` -> Run. Raises ConfigError."""
    path, _, name = target.partition(":")
    if not Path(path).is_file():
        raise ConfigError(f"no config file {path!r}{suggest(path, [str(p) for p in Path('configs').glob('*.py')])}")
    functions = {
        k: v for k, v in runpy.run_path(path).items() if callable(v) and getattr(v, "__module__", "") == "<run_path>"
    }
    name = name or "config"
    if name not in functions:
        raise ConfigError(f"{path} has no variant {name!r}{suggest(name, functions)}")
    return functions[name]()


def suggest(name: str, known: Any) -> str:
    """ "; did you mean ..?" with the nearest known name, or the list of them."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(name, known, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def field_names(node: Any) -> list[str]:
    """Names of the fields of a dataclass or Flax module that can be set."""
    return [
        f.name
        for f in dataclasses.fields(node)
        if f.init and f.name not in ("parent", "name" * isinstance(node, nn.Module))
    ]


def override(node: Any, assignments: list[str]) -> Any:
    """Applies dotted assignments, e.g. ["stages.align.steps=10", "model.llm.layers=2"]. Raises ConfigError."""
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        if not equals:
            raise ConfigError(f"--set {assignment}: write it as name=value")
        try:
            value = ast.literal_eval(text)
        except (ValueError, SyntaxError):
            value = text
        node = _assign(node, path.split("."), value, assignment)
    return node


def _assign(node: Any, path: list[str], value: Any, assignment: str) -> Any:
    if not path:
        return _checked(node, value, assignment)
    key, rest = path[0], path[1:]
    if isinstance(node, Mapping):
        known = dict(node)
    elif isinstance(node, tuple):
        known = {str(getattr(item, "name", i)): item for i, item in enumerate(node)} | {
            str(i): v for i, v in enumerate(node)
        }
    elif dataclasses.is_dataclass(node):
        known = {name: getattr(node, name) for name in field_names(node)}
    else:
        raise ConfigError(f"--set {assignment}: {type(node).__name__} has no fields, so no {key!r}")
    if key not in known:
        raise ConfigError(f"--set {assignment}: {type(node).__name__} has no {key!r}{suggest(key, known)}")
    new = _assign(known[key], rest, value, assignment)
    if isinstance(node, Mapping):
        return {**known, key: new}
    if isinstance(node, tuple):
        return tuple(new if item is known[key] else item for item in node)
    try:
        return node.clone(**{key: new}) if isinstance(node, nn.Module) else dataclasses.replace(node, **{key: new})
    except ValueError as error:
        raise ConfigError(f"--set {assignment}: {error}") from error


def _checked(old: Any, new: Any, assignment: str) -> Any:
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        new = float(new)
    if old is not None and new is not None and type(old) is not type(new):
        raise ConfigError(f"--set {assignment}: expected {type(old).__name__}, as in {old!r}, not {new!r}")
    return new


def to_document(run: Run) -> dict[str, Any]:
    """Run -> what config.json holds: the config as JSON data, and the number of its format."""
    return {"format": FORMAT, **to_json(run)}


def from_document(document: Any, path: str) -> Run:
    """The inverse of `to_document`. Raises ConfigError, naming `path`, for another format."""
    check_format(document, path)
    return from_json({key: value for key, value in document.items() if key != "format"})


def check_format(document: Any, path: str) -> None:
    """Raises ConfigError, naming `path` and the version that reads it, unless the document has today's format."""
    found = document.get("format", 1) if isinstance(document, dict) else None
    if found == FORMAT:
        return
    reader = f"jaxmllm {READ_BY[found]} reads it" if found in READ_BY else "a newer jaxmllm may read it"
    raise ConfigError(f"{path} has format {found}, and this version reads format {FORMAT}; {reader}")


def to_json(node: Any) -> Any:
    """Config -> plain JSON data. Objects carry the name of their class, so that `from_json` can build them again."""
    if dataclasses.is_dataclass(node):
        kind = f"{type(node).__module__}:{type(node).__qualname__}"
        return {"class": kind} | {name: to_json(getattr(node, name)) for name in field_names(node)}
    if isinstance(node, Mapping):
        return {"dict": {k: to_json(v) for k, v in node.items()}}
    return [to_json(v) for v in node] if isinstance(node, (tuple, list)) else node


def from_json(data: Any) -> Any:
    """The inverse of `to_json`. Builds classes of this package only."""
    if isinstance(data, list):
        return tuple(from_json(v) for v in data)
    if not isinstance(data, dict):
        return data
    if "dict" in data:
        return {k: from_json(v) for k, v in data["dict"].items()}
    module, _, name = data["class"].partition(":")
    if not module.startswith("jaxmllm."):
        raise ConfigError(f"config names {data['class']}, which is not a class of jaxmllm")
    fields = {k: from_json(v) for k, v in data.items() if k != "class"}
    return getattr(importlib.import_module(module), name)(**fields)


def differences(old: Any, new: Any, path: str = "") -> list[str]:
    """Dotted paths where two `to_json` results differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new}]
        parts = (differences(old.get(k), new.get(k), path if k == "dict" else f"{path}.{k}".lstrip(".")) for k in keys)
        return [line for part in parts for line in part]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new)) for line in differences(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {json.dumps(old)[:60]} there, {json.dumps(new)[:60]} now"]


def check_resumable(saved: Any, run: Run, workdir: str) -> None:
    """Raises ConfigError if the workdir has another format or another config; fields in RESUMABLE may differ."""
    check_format(saved, f"{workdir}/config.json")
    lines = [d for d in differences(saved, to_document(run)) if not d.startswith(RESUMABLE)]
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ConfigError(
            f"{workdir} belongs to another config: {lines[0]}{more}; use another --workdir or the old setting"
        )
