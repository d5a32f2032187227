"""Plots as SVG for a page, drawn with matplotlib; pictures as PNG."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

SIZE = (4.6, 2.5)  # inches
COLORS = ("#0b57a4", "#c2570c", "#5f6368", "#1a7f37", "#8e24aa", "#00838f")
MARK = "#b3261e"
MAX_POINTS = 1000  # of a line
HEAT = "inferno"  # colour map of weights over a picture
STYLE = {
    "svg.fonttype": "none",  # text stays text: small files, and the browser's fonts
    "svg.hashsalt": "jaxmllm",  # equal plots have equal files
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa0a6",
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.grid": True,
    "grid.color": "#eceef1",
    "axes.axisbelow": True,
    "xtick.color": "#5f6368",
    "ytick.color": "#5f6368",
    "axes.labelcolor": "#5f6368",
    "text.parse_math": False,  # names of metrics may hold any characters
}
Line = tuple[Sequence[float], Sequence[float]]  # (x, y)


def lines(
    title: str, series: Mapping[str, Line], xlabel: str = "step", marks: Sequence[tuple[float, str]] = (), dots=False
) -> Markup:
    """Lines by name; with several of them there is a legend. dots: few values, each of which is shown.

    marks: vertical lines (x, name); those without a name are dashed. Of a line with more than MAX_POINTS points every
    n-th is drawn, and its last.
    """
    with matplotlib.rc_context(STYLE):
        figure, axes = new(title)
        for color, (name, (x, y)) in zip(COLORS, series.items()):
            keep = thinned(len(x))
            x, y = np.asarray(x, float)[keep], np.asarray(y, float)[keep]
            lonely = dots or len(x) < 3
            axes.plot(x, y, color=color, linewidth=1.4, label=name, marker="o" if lonely else None, markersize=3.5)
        for x, name in marks:
            axes.axvline(x, color="#9aa0a6" if name else MARK, linewidth=0.9, linestyle="-" if name else (0, (4, 3)))
            if name:
                axes.text(
                    x, 1.0, f" {name}", transform=axes.get_xaxis_transform(), fontsize=8, va="bottom", color="#5f6368"
                )
        axes.set_xlabel(xlabel)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        if len(series) > 1:
            axes.legend(frameon=False, fontsize=8)
        return svg(figure)


def thinned(count: int) -> np.ndarray:
    """The indices of at most MAX_POINTS + 1 of `count` points, the last one among them."""
    step = max(1, -(-count // MAX_POINTS))
    return np.unique(np.append(np.arange(0, count, step), max(count - 1, 0))) if count else np.arange(0)


def bars(
    title: str, groups: Sequence[str], series: Mapping[str, Sequence[float | None]], top: float | None = None
) -> Markup:
    """A group of bars for each of `groups`, one bar of each series; None is left out. The first series has numbers."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new(title, (9.4, 2.9))
        at, width = np.arange(len(groups)), 0.8 / len(series)
        for i, (color, (name, values)) in enumerate(zip(COLORS, series.items())):
            placed = at + (i - (len(series) - 1) / 2) * width
            drawn = axes.bar(
                placed, np.array(values, float), width * 0.92, color=color, label=name, alpha=1 if i == 0 else 0.45
            )
            if i == 0:
                axes.bar_label(drawn, fmt="%.0f", fontsize=8, color="#1d1d1f")
        axes.set_xticks(at, groups)
        axes.grid(axis="x", visible=False)
        axes.set_ylim(0, top)
        axes.legend(frameon=False, fontsize=8, ncols=len(series), loc="lower right", bbox_to_anchor=(1, 1.0))
        return svg(figure)


def histogram(title: str, values: Sequence[float], xlabel: str, limit: float | None = None) -> Markup:
    """How often values occur; limit: a value that is marked."""
    with matplotlib.rc_context(STYLE):
        figure, axes = new(title)
        axes.hist(values, bins=min(40, max(1, len(set(values)))), color=COLORS[0])
        if limit is not None:
            axes.axvline(limit, color=MARK, linewidth=0.9, linestyle=(0, (4, 3)))
        axes.set_xlabel(xlabel)
        axes.set_ylabel("samples")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        return svg(figure)


def new(title: str, size: tuple[float, float] = SIZE) -> tuple[Figure, Axes]:
    """An empty figure with one pair of axes."""
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots()
    axes.set_title(title, pad=14)
    return figure, axes


def svg(figure: Figure) -> Markup:
    """A figure as an <svg> element that fills its container; names that nothing refers to are left out, since all
    figures of a page would have the same."""
    file = io.StringIO()
    figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    text = file.getvalue()
    text = text[text.index("<svg") :]
    used = set(re.findall(r"#([\w-]+)", text))
    text = re.sub(r' id="([\w-]+)"', lambda found: found[0] if found[1] in used else "", text)
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    return Markup(
        re.sub(
            r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
        )
    )


def png(image: Image.Image) -> bytes:
    """A picture as the bytes of a PNG file."""
    file = io.BytesIO()
    image.save(file, "PNG", optimize=True)
    return file.getvalue()


def overlay(picture: np.ndarray, weights: np.ndarray, side: int = 240) -> Image.Image:
    """A square picture uint8[px, px, 3] in grey, with weights [L, L] over it as colours; beside it, the picture itself.

    The largest weight has the brightest colour. Cells whose weight is NaN keep the picture.
    """
    plain = Image.fromarray(picture).resize((side, side), Image.Resampling.BICUBIC)
    known, top = ~np.isnan(weights), np.nanmax(weights, initial=0)
    scaled = np.where(known, weights, 0) / (top or 1)
    heat = matplotlib.colormaps[HEAT](scaled, bytes=True)
    heat[..., 3] = np.where(known, 160, 0)
    over = plain.convert("L").convert("RGBA")
    over.alpha_composite(Image.fromarray(heat).resize((side, side), Image.Resampling.NEAREST))
    both = Image.new("RGB", (2 * side + 6, side), "white")
    both.paste(plain, (0, 0))
    both.paste(over.convert("RGB"), (side + 6, 0))
    return both
