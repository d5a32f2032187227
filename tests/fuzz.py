"""Property tests in two sizes: a few hundred examples, the same each time, and 10,000 new ones in the long tests."""

from __future__ import annotations

import string
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

MANY = 10_000

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=12)
    | st.sampled_from(["", "nan", "a" * 3000]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=6)


def sizes(few: int):
    """Parametrizes `examples`: few, and in the long tests MANY."""
    return pytest.mark.parametrize("examples", [few, pytest.param(MANY, marks=pytest.mark.long)])


def run(check: Callable[..., None], examples: int, *strategies: st.SearchStrategy, seconds: float = 5) -> None:
    """Calls check with this many examples; seconds: how long each may take."""
    few = examples < MANY
    options = {"derandomize": few, "database": None, "suppress_health_check": [*HealthCheck]}
    settings(max_examples=examples, deadline=1000 * seconds, **options)(given(*strategies)(check))()


@st.composite
def broken(draw: Any, content: bytes, most: int = 4, focus: int | None = None) -> bytes:
    """The content with a few bytes changed, added, taken away, repeated or cut off; most of it within `focus` bytes."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        end = min(len(found), focus) if focus and draw(st.integers(0, 3)) else len(found)
        at, kind = draw(st.integers(0, max(end - 1, 0))), draw(st.integers(0, 5))
        piece = draw(st.binary(min_size=1, max_size=8) | st.sampled_from([b"\xff" * 4, b"\x7f\xff\xff\xff", bytes(8)]))
        if kind == 0:
            found[at : at + 1] = piece[:1]
        elif kind == 1:
            found[at : at + len(piece)] = piece
        elif kind == 2:
            found[at:at] = piece
        elif kind == 3:
            del found[at : at + draw(st.integers(1, 40))]
        elif kind == 4:
            found[at:at] = found[at : at + draw(st.integers(1, 40))]
        else:
            del found[at:]
    return bytes(found)


def places(node: Any, path: tuple = ()) -> list[tuple]:
    """The path of every value inside JSON data."""
    inner = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [path, *(found for key, value in inner for found in places(value, (*path, key)))]


def changed(node: Any, path: tuple, value: Any) -> Any:
    """JSON data with another value at a path; "delete me" removes it."""
    if not path:
        return value
    key, *rest = path
    items = dict(node) if isinstance(node, dict) else dict(enumerate(node))
    items[key] = changed(items[key], tuple(rest), value)
    if items[key] == "delete me":
        del items[key]
    return items if isinstance(node, dict) else [*items.values()]


def at(node: Any, path: tuple) -> Any:
    """The value at a path."""
    for key in path:
        node = node[key]
    return node


@st.composite
def altered(draw: Any, document: Any, most: int = 3) -> Any:
    """JSON data with a few values replaced, by others of its own or any, or removed."""
    for _ in range(draw(st.integers(1, most))):
        known = places(document)
        path = draw(st.sampled_from(known))
        other = draw(st.sampled_from(known)) if draw(st.booleans()) else None
        value = at(document, other) if other is not None else draw(st.just("delete me") | JSON)
        document = changed(document, path, value)
    return document


def one_line(error: BaseException) -> bool:
    """Whether an error says in one line of text, not too long, what is wrong."""
    text = str(error)
    return 0 < len(text) < 3000 and "\n" not in text and not any("\ud800" <= c <= "\udfff" for c in text)
