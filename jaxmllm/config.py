"""The vocabulary of a recipe: frozen dataclasses, dotted overrides, JSON.

A recipe is a Python file with a function `config() -> Run`; another function of the file is a variant
(`configs/toy.py:name`). Model parts are Flax modules, which are dataclasses too, so the config *is* the model.
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
    """What the user asked for is wrong; the message is one line that says what and how to mend it."""


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
    targets: Any = None  # where teacher targets come from (data.targets), if any
    shards: int = 8  # virtual shards; processes must divide it, and resume works on any number that does
    packing: bool = True
    max_bad: int = 1000  # stop once more samples than this are unusable
    tiling: Any = None  # data.tiling.Tiling: pictures are seen in tiles too
    fast_jpeg: bool = False  # decode large JPEGs at a fraction of their size: faster, pixels differ slightly


@dataclasses.dataclass(frozen=True)
class Rule:
    """How parameters whose path matches the regex are trained; the first match counts, and each needs one."""

    pattern: str
    lr: float | None = 1.0  # factor on the learning rate; None = frozen
    decay: bool = True  # weight decay


@dataclasses.dataclass(frozen=True)
class Optim:
    """AdamW with linear warm-up and cosine decay."""

    lr: float
    warmup: float = 0.03  # share of the steps
    final: float = 0.0  # of the peak rate
    weight_decay: float = 0.0
    b1: float = 0.9
    b2: float = 0.999
    eps: float = 1e-8
    clip: float | None = 1.0  # global gradient norm


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training stage; it starts from the parameters of the one before."""

    name: str
    sources: tuple[Source, ...]
    steps: int
    rows: int  # B, rows of the global batch
    rules: tuple[Rule, ...]
    losses: dict[str, float]  # objective -> weight; objectives that are not named are not computed
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


# What may differ between a checkpoint's config and the one that resumes it.
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
    """Names of the settable fields of a dataclass or Flax module."""
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


def to_json(node: Any) -> Any:
    """Config -> plain JSON data; objects carry their class, so `from_json` can build them again."""
    if dataclasses.is_dataclass(node):
        kind = f"{type(node).__module__}:{type(node).__qualname__}"
        return {"class": kind} | {name: to_json(getattr(node, name)) for name in field_names(node)}
    if isinstance(node, Mapping):
        return {"dict": {k: to_json(v) for k, v in node.items()}}
    return [to_json(v) for v in node] if isinstance(node, (tuple, list)) else node


def from_json(data: Any) -> Any:
    """The inverse of `to_json`. Only classes of this package are built."""
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
    """Dotted paths at which two `to_json` results differ, with both values."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [k for k in {**old, **new}]
        parts = (differences(old.get(k), new.get(k), path if k == "dict" else f"{path}.{k}".lstrip(".")) for k in keys)
        return [line for part in parts for line in part]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, (a, b) in enumerate(zip(old, new)) for line in differences(a, b, f"{path}.{i}")]
    return [] if old == new else [f"{path}: {json.dumps(old)[:60]} there, {json.dumps(new)[:60]} now"]


def check_resumable(saved: Any, run: Run, workdir: str) -> None:
    """Raises ConfigError if the workdir belongs to another config (fields in RESUMABLE may differ)."""
    lines = [d for d in differences(saved, to_json(run)) if not d.startswith(RESUMABLE)]
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ConfigError(
            f"{workdir} belongs to another config: {lines[0]}{more}; use another --workdir or the old setting"
        )
