"""One picture of what a model says: scenes with question, reply and, where that is wrong, the right answer."""

from __future__ import annotations

import textwrap

from PIL import Image, ImageDraw, ImageFont

from jaxmllm.eval.tasks.choices import Row, answer_text, is_right

CARD, PICTURE, MARGIN = (250, 340), 230, 10  # pixels; CARD and PICTURE include one margin
INK, PAPER, RIGHT, WRONG = "#1d1d1f", "#ffffff", "#1a7f37", "#cf222e"


def draw_sheet(rows: list[Row], replies: list[str], path: str, columns: int = 6, count: int = 24) -> None:
    """Writes a PNG of at most `count` cards, taken in turn from every task so that it shows all kinds of question."""
    tasks: dict[str, list[int]] = {}
    for i, row in enumerate(rows):
        tasks.setdefault(row["task"], []).append(i)
    picked = [i for group in zip(*tasks.values()) for i in group][:count]
    lines = -(-len(picked) // columns)
    sheet = Image.new("RGB", (columns * CARD[0] + MARGIN, lines * CARD[1] + MARGIN), "#eef0f3")
    for place, i in enumerate(sorted(picked, key=lambda i: list(tasks).index(rows[i]["task"]))):
        corner = (MARGIN + place % columns * CARD[0], MARGIN + place // columns * CARD[1])
        sheet.paste(card(rows[i], replies[i]), corner)
    sheet.save(path)


def card(row: Row, reply: str) -> Image.Image:
    """The (first) picture with its question, the model's reply and, if that is wrong, the right answer."""
    width, height = CARD[0] - MARGIN, CARD[1] - MARGIN
    image = Image.new("RGB", (width, height), PAPER)
    if row["images"]:
        with Image.open(row["images"][0]) as picture:
            side = PICTURE - MARGIN
            image.paste(picture.convert("RGB").resize((side, side), Image.Resampling.LANCZOS), (MARGIN, MARGIN))
    draw, font, bold = ImageDraw.Draw(image), ImageFont.load_default(13), ImageFont.load_default(15)
    question = "\n".join(textwrap.wrap(row["question"], 36)[:2])
    draw.multiline_text((MARGIN, PICTURE + 6), question, INK, font, spacing=3)
    ok = is_right(row, reply)
    text = reply if ok else f"{reply or '(nothing)'}\ntruth: {answer_text(row)}"
    text = "\n".join(line for part in text.splitlines() for line in textwrap.wrap(part, 32))
    draw.multiline_text((MARGIN, PICTURE + 46), text, RIGHT if ok else WRONG, bold, spacing=2)
    return image
