"""What the model sees of a record, as a page."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from PIL import Image

from jaxmllm.data.show import ShownPiece, ShownRecord, target_map
from jaxmllm.errors import shown
from jaxmllm.report.page import Block, Card, Grid, Missing, Picture, Section, Spans, Table, Text, render
from jaxmllm.report.plots import png


def page(config: str, found: ShownRecord) -> str:
    """The page of a record; config: what it was read with."""
    title = f"Record {found.index}: {shown(found.id)}"
    lead = f"Record {found.record} of {found.source}, as {config} shows it to the model."
    return render(title, lead, list(sections(found)))


def sections(found: ShownRecord) -> Iterator[Section]:
    """Why it is refused, or its text and pictures."""
    blocks: list[Block] = [Missing(f"Training leaves this record out: {found.error}")] if found.error else []
    spans = [(piece.text, style(piece)) for piece in found.pieces]
    lead = "Green is trained, grey is only read, and where blue stands come the tokens of a picture."
    yield Section("Text", [*blocks, *([Text(lead), Spans(spans)] if spans else [])])
    sample = found.sample
    if sample and sample.image_count:
        cards = []
        for name, pixels in sample.images.items():
            for slot, picture in enumerate(pixels):
                columns, rows = sample.padding[name][slot].tolist()
                size = f"{picture.shape[1]} x {picture.shape[0]} pixels; padding {columns} columns, {rows} rows"
                lines = [(f"{name}, slot {slot}", ""), (size, "quiet")]
                cards.append(card(picture, f"what the encoder {name} sees", lines))
        yield Section("Pictures", [Grid(cards, small=True)])
        maps = []
        for name, values in sample.targets.items():
            for slot in np.flatnonzero(sample.target_mask[name]).tolist():
                lines = [(f"{name}, slot {slot}", ""), (figures(values[slot]), "quiet")]
                maps.append(card(target_map(values[slot]), f"target of {name}", lines))
        yield Section("Targets", [Grid(maps, small=True)] if maps else [Missing("This record has no targets.")])
    if found.pieces:
        rows = [(piece.text, style(piece), len(piece.ids), " ".join(map(str, piece.ids))) for piece in found.pieces]
        yield Section("Tokens", [Table(["text", "", "tokens", "ids"], rows)])


def style(piece: ShownPiece) -> str:
    """What a piece is for the model."""
    return "picture" if piece.image is not None else "trained" if piece.trained else "untrained"


def figures(values: np.ndarray) -> str:
    """Shape and range of a target."""
    queries, dim = values.shape
    return f"{queries} queries of {dim}; {values.min():.3g} to {values.max():.3g}, on average {values.mean():.3g}"


def card(pixels: np.ndarray, alt: str, lines: list[tuple[str, str]]) -> Card:
    """A picture with lines below it."""
    return Card(Picture(png(Image.fromarray(pixels)), alt), lines)
