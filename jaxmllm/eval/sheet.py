"""One picture of what a model says: scenes with question, reply and, where that is wrong, the right answer."""

from __future__ import annotations

import functools

from PIL import Image, ImageDraw, ImageFont

from jaxmllm.eval.tasks.choices import Row, answer_text, is_right

WIDTH, PICTURE, MARGIN, GAP = 240, 220, 10, 6  # pixels: of a card, of its picture, around and between things
INK, PAPER, GROUND, RIGHT, WRONG = "#1d1d1f", "#ffffff", "#eef0f3", "#1a7f37", "#cf222e"
SMALL, LARGE = 13, 15  # sizes of letters: of the question, of the reply


def draw_sheet(rows: list[Row], replies: list[str], path: str, columns: int = 6, count: int = 24) -> None:
    """Writes a PNG of at most `count` cards, taken in turn from every task so that it shows all kinds of question.

    The cards of a line are as high as the one with the longest text needs.
    """
    tasks: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        tasks.setdefault(row["task"], []).append(i)
    picked = sorted(
        [i for group in zip(*tasks.values()) for i in group][:count], key=lambda i: place_of(tasks, rows[i])
    )
    cards = [card(rows[i], replies[i]) for i in picked]
    lines = [cards[start : start + columns] for start in range(0, len(cards), columns)]
    heights = [max(each.height for each in line) for line in lines]
    size = (columns * (WIDTH + MARGIN) + MARGIN, sum(heights) + (len(lines) + 1) * MARGIN)
    sheet, top = Image.new("RGB", size, GROUND), MARGIN
    for line, height in zip(lines, heights):
        for column, each in enumerate(line):
            left = MARGIN + column * (WIDTH + MARGIN)
            sheet.paste(PAPER, (left, top, left + WIDTH, top + height))
            sheet.paste(each, (left, top))
        top += height + MARGIN
    sheet.save(path)


def place_of(tasks: dict[str, list[int]], row: Row) -> int:
    """The place of a row's task among all."""
    return list(tasks).index(row["task"])


def card(row: Row, reply: str) -> Image.Image:
    """The (first) picture with its question, the model's reply and, if that is wrong, the right answer."""
    ok = is_right(row, reply)
    said = reply if ok else f"{reply or '(nothing)'}\ntruth: {answer_text(row)}"
    texts = [(row["question"], SMALL, INK), (said, LARGE, RIGHT if ok else WRONG)]
    drawn, top = [], 2 * MARGIN + PICTURE - GAP
    for text, size, color in texts:
        for line in wrapped(text, size, WIDTH - 2 * MARGIN):
            drawn.append(((MARGIN, top), line, color, font(size)))
            top += size + 3
        top += GAP
    image = Image.new("RGB", (WIDTH, top), PAPER)
    if row["images"]:
        with Image.open(row["images"][0]) as picture:
            shown = picture.convert("RGB").resize((PICTURE, PICTURE), Image.Resampling.LANCZOS)
            image.paste(shown, (MARGIN, MARGIN))
    draw = ImageDraw.Draw(image)
    for place, line, color, letters in drawn:
        draw.text(place, line, color, letters)
    return image


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's own font, in a size in pixels."""
    return ImageFont.load_default(size)


def wrapped(text: str, size: int, width: int) -> list[str]:
    """A text in lines of at most `width` pixels. Nothing is left out: a word that is longer is broken."""
    lines = []
    for part in text.splitlines():
        line = ""
        for word in part.split():
            joined = f"{line} {word}".strip()
            if font(size).getlength(joined) <= width:
                line = joined
                continue
            lines += [line] if line else []
            while font(size).getlength(word) > width:
                fits = next(n for n in range(1, len(word)) if font(size).getlength(word[: n + 1]) > width)
                lines.append(word[:fits])
                word = word[fits:]
            line = word
        lines += [line] if line else []
    return lines
