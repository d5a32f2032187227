"""The sheet of scenes: no text is cut, however long it is."""

import pytest
from PIL import Image

from jaxmllm.eval.sheet import MARGIN, SMALL, WIDTH, card, draw_sheet, font, wrapped

LONG = "2 red ducks, 3 umbrellas, 1 octopus and a very small airplane far behind all of them. " * 4


def row(path, question="What?", answer="dog", task="Name"):
    return {"task": task, "question": question, "choices": [], "answer": answer, "images": [str(path)]}


@pytest.fixture
def picture(tmp_path):
    Image.new("RGB", (50, 30), "blue").save(tmp_path / "a.png")
    return tmp_path / "a.png"


@pytest.mark.parametrize("text", [LONG, "a" * 500, "two\nlines", "", "W" * 33 + " " + "i" * 300])
def test_lines_fit_and_hold_the_whole_text(text):
    lines = wrapped(text, SMALL, 200)
    assert "".join(lines).replace(" ", "") == "".join(text.split())
    assert all(font(SMALL).getlength(line) <= 200 for line in lines)


def ink(image: Image.Image, box) -> int:
    """Pixels in a box that are not paper."""
    return sum(pixel != (255, 255, 255) for pixel in image.crop(box).getdata())


def test_a_card_grows_with_its_text(picture):
    short, long = card(row(picture), "dog"), card(row(picture, LONG, LONG), LONG[:90])
    assert short.height < 290 < long.height
    for each in (short, long):
        assert ink(each, (WIDTH - MARGIN, 0, WIDTH, each.height)) == 0, "text runs over the right edge"
        assert ink(each, (0, each.height - 3, WIDTH, each.height)) == 0, "text runs over the lower edge"
        assert ink(each, (0, each.height - 30, WIDTH, each.height - 3)) > 0, "there is text at the end"


def test_a_sheet_is_as_high_as_its_longest_texts_need(picture, tmp_path):
    rows = [row(picture, task="Name"), row(picture, LONG, task="Caption")] * 3
    draw_sheet(rows, ["dog"] * 6, str(tmp_path / "sheet.png"), columns=3)
    high = [card(each, "dog").height for each in rows[:2]]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.size == (3 * (WIDTH + MARGIN) + MARGIN, sum(high) + 3 * MARGIN)
