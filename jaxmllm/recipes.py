"""Recipes: read from a Python file or a workdir, and changed by dotted overrides."""

from __future__ import annotations

import ast
import dataclasses
import json
import re
import runpy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxmllm.config import Run
from jaxmllm.documents import (
    WRONG,
    check_format,
    field_names,
    from_document,
    is_storable,
    read_document,
    to_document,
)
from jaxmllm.errors import ConfigError, shown, suggest, suggest_path
from jaxmllm.fields import problem

MAX_TEXT = 10_000  # characters of an override that are read as Python
# Fields that may change when a run resumes: the start of their paths.
RESUMABLE = re.compile(r"mesh|log_every|save_every|keep|loggers|data\.max_bad|stages\.\d+\.evals")


def load(target: str) -> Run:
    """FILE.py[:function], or a workdir or its config.json, whose recipe a new run then takes -> Run. Raises
    ConfigError."""
    path, _, name = target.partition(":")
    if Path(path).is_dir() or path.endswith(".json"):
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        return read_run(str(folder))
    functions = {k: v for k, v in namespace(path).items() if callable(v) and is_own(v)}
    name = name or "config"
    if name not in functions:
        raise ConfigError(f"{path} has no variant {name!r}{suggest(name, functions)}")
    run = functions[name]()
    check_values(run, path)
    return run


def check_values(node: Any, path: str) -> None:
    """Raises ConfigError, naming `path`, for a value in a config that does not fit its field."""
    if isinstance(node, Mapping):
        values = node
    elif isinstance(node, tuple):
        values = dict(enumerate(node))
    elif dataclasses.is_dataclass(node) and not isinstance(node, type):
        values = {name: getattr(node, name) for name in field_names(node)}
        if wrong := problem(type(node), values):
            raise ConfigError(f"{path}: {type(node).__name__}: {wrong}")
    else:
        return
    for value in values.values():
        check_values(value, path)


def namespace(path: str) -> dict[str, Any]:
    """What a config file defines. Raises ConfigError if there is no such file."""
    if not Path(path).is_file():
        near = suggest_path(path) or suggest(path, [str(p) for p in Path("configs").glob("*.py")])
        raise ConfigError(f"no config file {path!r}{near}")
    return runpy.run_path(path)


def is_own(value: Any) -> bool:
    """Whether a function or class is defined in the config file itself."""
    return getattr(value, "__module__", "") == "<run_path>" and not isinstance(value, type)


# Overrides


@dataclasses.dataclass(frozen=True)
class Assignment:
    """The value of one override, and its text for messages."""

    value: Any
    text: str


def override(root: Any, assignments: list[str]) -> Any:
    """Applies dotted assignments, e.g. ["stages.align.steps=10", "model.llm.layers=2"]: all of them, then checks.

    Raises ConfigError.
    """
    tree: dict[str, Any] = {}
    for text in assignments:
        path, equals, value = text.partition("=")
        if not equals:
            raise ConfigError(f"--set {shown(text)}: write it as name=value")
        *parents, last = path.split(".")
        branch = tree
        for key in parents:
            branch = branch.setdefault(key, {})
            if isinstance(branch, Assignment):
                raise ConfigError(f"--set {shown(text)}: {branch.text} sets the whole already")
        if isinstance(branch.get(last), dict):
            raise ConfigError(f"--set {shown(text)}: it sets the whole of {_texts(branch[last])[0]}")
        branch[last] = Assignment(parse(value), shown(text))
    return _apply(root, tree) if tree else root


def parse(text: str) -> Any:
    """A Python literal, its lists as tuples, or else the text itself."""
    if len(text) > MAX_TEXT:
        return text
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that Python does not know
            return tupled(ast.literal_eval(text))
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def tupled(value: Any) -> Any:
    """A value with its lists as tuples, as a config read from JSON has them."""
    if isinstance(value, (list, tuple)):
        return tuple(map(tupled, value))
    return {k: tupled(v) for k, v in value.items()} if isinstance(value, dict) else value


def _texts(tree: dict[str, Any] | Assignment) -> list[str]:
    return [tree.text] if isinstance(tree, Assignment) else [t for branch in tree.values() for t in _texts(branch)]


def _apply(node: Any, tree: dict[str, Any] | Assignment, is_open: bool = False) -> Any:
    if isinstance(tree, Assignment):
        return _checked(node, tree)
    said = shown(" ".join(_texts(tree)), 400)
    if isinstance(node, Mapping):
        known, opened = dict(node), {}
    elif isinstance(node, tuple):
        known, opened = {str(i): item for i, item in enumerate(node)}, {}
        numbers = {str(getattr(item, "name", i)): str(i) for i, item in enumerate(node)}
        tree = {numbers.get(key, key): branch for key, branch in tree.items()}
    elif dataclasses.is_dataclass(node):
        known = {name: getattr(node, name) for name in field_names(node)}
        opened = {field.name: bool(field.metadata.get("open")) for field in dataclasses.fields(node)}
    else:
        raise ConfigError(f"--set {said}: {type(node).__name__} has no fields, so no {shown(next(iter(tree)))!r}")
    for key in tree:
        if key not in known and not is_open:
            names = numbers if isinstance(node, tuple) else known
            wrong, kind = shown(" ".join(_texts(tree[key])), 400), type(node).__name__
            raise ConfigError(f"--set {wrong}: {kind} has no {shown(key)!r}{suggest(shown(key), names)}")
    changes = {key: _apply(known.get(key), branch, opened.get(key, False)) for key, branch in tree.items()}
    if isinstance(node, Mapping):
        return {**known, **changes}
    if isinstance(node, tuple):
        return tuple(changes.get(str(i), item) for i, item in enumerate(node))
    if wrong := problem(type(node), changes):
        raise ConfigError(f"--set {said}: {type(node).__name__}: {wrong}")
    try:
        return node.clone(**changes) if isinstance(node, nn.Module) else dataclasses.replace(node, **changes)
    except WRONG as error:
        raise ConfigError(f"--set {said}: {shown(error, 500)}") from error


def _checked(old: Any, assignment: Assignment) -> Any:
    new = assignment.value
    if isinstance(old, float) and isinstance(new, int) and not isinstance(new, bool):
        new = float(new)
    if not is_storable(new):
        holds = "None, True, False, texts, finite numbers of 64 bits, and lists and dicts of them"
        raise ConfigError(f"--set {assignment.text}: a config holds {holds}")
    if old is not None and new is not None and type(old) is not type(new):
        kind = f"expected {type(old).__name__}, as in {shown(repr(old), 80)}, not {shown(repr(new))}"
        raise ConfigError(f"--set {assignment.text}: {kind}")
    return new


# Workdirs


def read_run(workdir: str, config: str | None = None) -> Run:
    """The recipe that a workdir was made with.

    config: FILE.py[:variant] of a recipe with parts that are not jaxmllm's. The file is run, and the workdir may then
    name its classes, and those of packages that it imports; without it they are refused. Raises ConfigError.
    """
    path = Path(workdir) / "config.json"
    if not path.is_file():
        command = f"train one with `jaxmllm train CONFIG --workdir {workdir}`"
        raise ConfigError(f"{workdir} holds no run (no config.json); {command}{suggest_path(workdir)}")
    trusted = namespace(config.partition(":")[0]) if config else None
    return from_document(read_document(path), str(path), trusted)


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
    lines = [d for d in differences(saved, to_document(run)) if not RESUMABLE.match(d)]
    if lines:
        more = f" (and {len(lines) - 1} more)" if len(lines) > 1 else ""
        raise ConfigError(
            f"{workdir} belongs to another config: {lines[0]}{more}; use another --workdir or the old setting"
        )
