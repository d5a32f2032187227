"""Whether values fit the fields of a dataclass, as their annotations say."""

from __future__ import annotations

import collections.abc
import functools
import re
import types
import typing
from typing import Annotated, Any

from jaxmllm.errors import shown

# Numbers with a least value, which annotations give as a second argument.
Positive = Annotated[int, 1]
Natural = Annotated[int, 0]
NonNegative = Annotated[float, 0]
PHRASES = {"Positive": "a positive int", "Natural": "an int of 0 or more", "NonNegative": "a float of 0 or more"}


def has(method: str, **more: Any) -> dict[str, Any]:
    """Metadata of a field annotated Any: its value, or each in a tuple, is None or has this method."""
    return {"method": method, **more}


def problem(kind: type, values: dict[str, Any]) -> str | None:
    """What is wrong with one of these values of fields of a dataclass, or None."""
    hints = annotations(kind)
    for name, value in values.items():
        field = kind.__dataclass_fields__[name]
        if not fits(value, hints.get(name, Any)):
            kind = re.sub("|".join(PHRASES), lambda found: PHRASES[found[0]], str(field.type))
            return f"{name} is {shown(repr(value))}, but must be {kind}"
        method = field.metadata.get("method")
        for each in value if isinstance(value, tuple) else (value,):
            missing = method and not callable(getattr(each, method, None))
            if missing and (each is not None or field.default is not None):
                return f"{name} is {shown(repr(each))}, which has no {method}()"
    return None


@functools.cache
def annotations(kind: type) -> dict[str, Any]:
    """Field -> type. Those whose names cannot be found in the class's module are left out."""
    found = {}
    for base in reversed(kind.__mro__):
        for name, hint in base.__dict__.get("__annotations__", {}).items():
            try:
                lone = type(base.__name__, (), {"__annotations__": {name: hint}, "__module__": base.__module__})
                found |= typing.get_type_hints(lone, include_extras=True)
            except (NameError, TypeError):
                found.pop(name, None)
    return found


def fits(value: Any, hint: Any) -> bool:
    """Whether a value is of an annotated type; True for annotations that say nothing of values here."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if hint is Any:
        return True
    if hint is None or hint is type(None):
        return value is None
    if origin is Annotated:
        return fits(value, args[0]) and value >= args[1]
    if origin in (typing.Union, types.UnionType):
        return any(fits(value, each) for each in args)
    if origin is typing.Literal:
        return value in args
    if origin is tuple:
        if not isinstance(value, tuple):
            return False
        if args[-1:] == (...,):
            return all(fits(each, args[0]) for each in value)
        return len(value) == len(args) and all(map(fits, value, args))
    if origin in (dict, collections.abc.Mapping):
        if not isinstance(value, collections.abc.Mapping):
            return False
        return all(fits(k, args[0]) and fits(v, args[1]) for k, v in value.items())
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if isinstance(hint, type) and not getattr(hint, "_is_protocol", False):
        return isinstance(value, hint)
    return True
