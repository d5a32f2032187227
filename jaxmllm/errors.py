"""What is wrong with a request, in one line. Light to import: the command line needs it before JAX."""

from __future__ import annotations

import difflib
import itertools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

MOST_NAMES = 10_000  # of a folder, among which a near one is looked for
MOST_TEXT = 2500  # characters of a message


class ConfigError(ValueError):
    """What the user asked for is wrong; the message is one line that says what is wrong and how to mend it."""

    def __init__(self, message: str):
        super().__init__(shown(message, MOST_TEXT))  # it may hold names out of files of others


def suggest(name: str, known: Iterable[Any]) -> str:
    """ "; did you mean ..?" with the nearest known name, or the list of them."""
    known = [str(k) for k in known]
    close = difflib.get_close_matches(name, known, 1, 0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; known: {', '.join(sorted(known))}" if known else ""


def suggest_path(path: str | os.PathLike[str]) -> str:
    """ "; did you mean ..?" with the file or folder whose name is nearest to the first name in `path` that is not
    there; "" if none is near."""
    missing, rest = Path(path), Path()
    while not missing.parent.exists():
        missing, rest = missing.parent, missing.name / rest
    names = itertools.islice(os.scandir(missing.parent) if missing.parent.is_dir() else (), MOST_NAMES)
    close = difflib.get_close_matches(missing.name, [entry.name for entry in names], 1, 0.6)
    if not close or missing.exists():
        return ""
    found = missing.with_name(close[0])
    return f"; did you mean {str(found / rest if (found / rest).exists() else found)!r}?"


def shown(text: Any, limit: int = 200) -> str:
    """Text of others for a message: at most `limit` characters, and escapes for what would steer a terminal or cannot
    be written as UTF-8."""
    text = str(text)
    text = text if len(text) <= limit else f"{text[: limit - 3]}..."
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def check_local(what: str, path: str | None) -> None:
    """Raises ConfigError for a URL such as gs://bucket/folder: files are read and written on this machine."""
    scheme, separator, _ = str(path).partition("://")
    if separator:
        raise ConfigError(f"{what} {path}: {scheme}:// is not supported; mount the bucket (gcsfuse) or copy the files")
