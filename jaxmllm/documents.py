"""A config as JSON data, as WORKDIR/config.json holds it, and back.

A document may come from others. It builds the classes of configs and nothing else, imports only modules of jaxmllm, and
its values must fit the fields of those classes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import math
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn

from jaxmllm import json_text
from jaxmllm.config import Run
from jaxmllm.errors import ConfigError, shown, suggest
from jaxmllm.fields import problem

# The format of config.json, and the version of jaxmllm that reads each. It changes when older workdirs cannot be read.
FORMAT = 2
READ_BY = {1: "0.1", 2: "0.2"}
# Modules of jaxmllm whose classes a config is made of; their import has no effect.
OWN = re.compile(r"jaxmllm(\.[a-z]\w*)+")
FOREIGN = re.compile(r"jaxmllm\.(cli|plan|report|scenes|bench|processes|__main__)\b")
WRONG = (ValueError, TypeError, ArithmeticError, AttributeError, LookupError)  # what a class may raise of its values


def field_names(node: Any) -> list[str]:
    """Names of the fields of a dataclass or Flax module, or of its class, that can be set."""
    is_module = isinstance(node, nn.Module) or isinstance(node, type) and issubclass(node, nn.Module)
    return [f.name for f in dataclasses.fields(node) if f.init and f.name not in ("parent", "name" * is_module)]


def to_document(run: Run) -> dict[str, Any]:
    """Run -> what config.json holds: the config as JSON data, and the number of its format."""
    return {"format": FORMAT, **to_json(run)}


def from_document(document: Any, path: str, trusted: Mapping[str, Any] | None = None) -> Run:
    """The inverse of `to_document`. Raises ConfigError, naming `path`, for another format and for a document that does
    not describe a run. trusted: see `from_json`."""
    check_format(document, path)
    run = from_json({key: value for key, value in document.items() if key != "format"}, trusted)
    if not isinstance(run, Run):
        raise ConfigError(f"{path} describes no run, but a {shown(type(run).__name__)}")
    return run


def read_document(path: Path) -> Any:
    """The JSON data of a file. Raises ConfigError, naming it, for what is not JSON, too large or too deep."""
    try:
        with open(path, "rb") as file:
            return json_text.loads(file.read(json_text.MAX_BYTES + 1), unique=True)
    except ValueError as error:
        raise ConfigError(f"cannot read {path}: {error}") from None


def check_format(document: Any, path: str) -> None:
    """Raises ConfigError, naming `path` and the version that reads it, unless the document has today's format."""
    if not isinstance(document, dict):
        raise ConfigError(f"{path} holds no JSON object")
    found = document.get("format", 1)
    if type(found) is int and found == FORMAT:
        return
    reader = f"jaxmllm {READ_BY[found]} reads it" if found in [*READ_BY] else "a newer jaxmllm may read it"
    raise ConfigError(f"{path} has format {shown(found)}, and this version reads format {FORMAT}; {reader}")


def stages_of(document: Any, path: str) -> list[dict[str, Any]]:
    """The stages in a document, each with a name and steps. Raises ConfigError, naming `path`, if there are none."""
    stages = document.get("stages") if isinstance(document, dict) else None
    for stage in stages if isinstance(stages, list) else [None]:
        if not isinstance(stage, dict) or not isinstance(stage.get("name"), str) or type(stage.get("steps")) is not int:
            raise ConfigError(f"{path} does not say the names and steps of its stages")
    return stages


def to_json(node: Any) -> Any:
    """Config -> plain JSON data. Objects carry the name of their class, so that `from_json` can build them again."""
    if dataclasses.is_dataclass(node):
        kind = f"{type(node).__module__}:{type(node).__qualname__}"
        return {"class": kind} | {name: to_json(getattr(node, name)) for name in field_names(node)}
    if isinstance(node, Mapping):
        return {"dict": {k: to_json(v) for k, v in node.items()}}
    return [to_json(v) for v in node] if isinstance(node, (tuple, list)) else node


def from_json(data: Any, trusted: Mapping[str, Any] | None = None) -> Any:
    """The inverse of `to_json`.

    trusted: the names of the user's own config file; classes that it defines or imports may be built too. Raises
    ConfigError for other classes, for fields that a class lacks, and for values that do not fit.
    """
    if isinstance(data, list):
        return tuple(from_json(v, trusted) for v in data)
    if not isinstance(data, dict):
        return data
    if data.keys() == {"dict"} and isinstance(data["dict"], dict):
        return {k: from_json(v, trusted) for k, v in data["dict"].items()}
    if not isinstance(data.get("class"), str):
        raise ConfigError(f"the config has an object without a class: {shown(data, 80)}")
    kind = find_class(data["class"], trusted)
    values = {k: from_json(v, trusted) for k, v in data.items() if k != "class"}
    known = field_names(kind)
    for name in values:
        if name not in known:
            raise ConfigError(f"the config's {kind.__name__} has no {shown(name)!r}{suggest(shown(name), known)}")
    if wrong := problem(kind, values):
        raise ConfigError(f"the config's {kind.__name__}: {wrong}")
    try:
        return kind(**values)
    except ConfigError:
        raise
    except WRONG as error:
        raise ConfigError(f"the config's {kind.__name__}: {shown(error, 500)}") from None


def find_class(kind: str, trusted: Mapping[str, Any] | None) -> type:
    """ "module:Class" -> the class. Raises ConfigError unless it is a dataclass, of this package or trusted."""
    module, _, name = kind.partition(":")
    is_ours, scope = bool(OWN.fullmatch(module)) and not FOREIGN.match(module), {}
    if is_ours:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module(module)
    # Modules that the config file has imported are loaded already; no other is imported by its name in a JSON file.
    if trusted is not None and module == "<run_path>":
        scope = trusted
    elif is_ours or (trusted is not None and module.partition(".")[0] in packages(trusted)):
        scope = getattr(sys.modules.get(module), "__dict__", {})
    found = scope.get(name)
    if not (isinstance(found, type) and dataclasses.is_dataclass(found) and found.__module__ == module):
        mend = "add --config with its FILE.py, or train from that file"
        raise ConfigError(f"the config names {shown(kind)}, which is not a class of jaxmllm; {mend}")
    return found


def packages(names: Mapping[str, Any]) -> set[str]:
    """The packages that a config file has imported something from, other than Python's own."""
    modules = {getattr(v, "__module__", None) or getattr(v, "__name__", None) for v in names.values()}
    found = {module.partition(".")[0] for module in modules if isinstance(module, str)}
    return found - sys.stdlib_module_names


def is_storable(value: Any) -> bool:
    """Whether config.json can hold a value and give the same one back: None, true, false, texts, finite numbers,
    integers of 64 bits, and tuples and dictionaries of them."""
    if isinstance(value, tuple):
        return all(map(is_storable, value))
    if isinstance(value, dict):
        return all(type(k) is str and is_storable(k) and is_storable(v) for k, v in value.items())
    if type(value) is str:
        return not re.search("[\ud800-\udfff]", value)
    if type(value) is int:
        return -(2**63) <= value < 2**63
    return value is None or type(value) is bool or type(value) is float and math.isfinite(value)
