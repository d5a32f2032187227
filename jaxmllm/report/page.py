"""Sections of simple blocks -> one HTML page that needs no other file and no network.

All text is escaped; only drawings (Figure.svg), which plots.py makes, are put in as they are.
"""

from __future__ import annotations

import base64
import dataclasses
import functools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup


class Share(float):
    """A part of 1, which is shown as a percentage."""


class Block:
    """A part of a section. The template shows each kind by the name of its class."""

    @property
    def kind(self) -> str:
        """The name of the class."""
        return type(self).__name__


@dataclasses.dataclass(frozen=True)
class Text(Block):
    """A paragraph."""

    text: str


@dataclasses.dataclass(frozen=True)
class Missing(Block):
    """What cannot be shown, why, and the command that makes it, if there is one."""

    text: str
    command: str = ""


@dataclasses.dataclass(frozen=True)
class Table(Block):
    """Rows of cells; numbers are right-aligned, and shown as `show` says."""

    head: Sequence[str]
    rows: Sequence[Sequence[Any]]
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Figure(Block):
    """A drawing."""

    svg: Markup
    caption: str = ""


@dataclasses.dataclass(frozen=True)
class Picture(Block):
    """A PNG; alt: what it shows, in words."""

    png: bytes
    alt: str
    caption: str = ""

    @property
    def source(self) -> str:
        """The picture as a data: URL."""
        return f"data:image/png;base64,{base64.b64encode(self.png).decode()}"


@dataclasses.dataclass(frozen=True)
class Card(Block):
    """A picture with a few lines of text, each a (text, style) pair; style: "", "right", "wrong" or "quiet"."""

    picture: Picture
    lines: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Code(Block):
    """Preformatted text, shown on demand under its title."""

    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Spans(Block):
    """Running text in (text, style) parts; style: "trained", "untrained" or "picture"."""

    parts: Sequence[tuple[str, str]]


@dataclasses.dataclass(frozen=True)
class Grid(Block):
    """Blocks side by side, as many as the width allows; small: cards rather than plots."""

    blocks: Sequence[Block]
    small: bool = False


@dataclasses.dataclass(frozen=True)
class Section:
    """A titled part of the page."""

    title: str
    blocks: Sequence[Block]

    @property
    def anchor(self) -> str:
        """What links to the section name."""
        return self.title.lower().replace(" ", "-")


def show(value: Any) -> str:
    """A cell as text: whole numbers with separators, others with four significant digits; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, Share):
        return f"{value:.1%}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:,.1f}" if abs(value) >= 1000 else f"{value:.4g}"


def is_number(value: Any) -> bool:
    """Whether a cell is aligned as a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


@functools.cache
def template() -> jinja2.Template:
    """The page's template."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["show"], environment.tests["amount"] = show, is_number
    return environment.from_string(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))


def render(title: str, lead: str, sections: Sequence[Section]) -> str:
    """The page as HTML. lead: the sentence under the title."""
    return template().render(title=title, lead=lead, sections=sections)
