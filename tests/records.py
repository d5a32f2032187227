"""A small data set of all kinds of records, good and bad, for the tests of sources and samples."""

import io
import json
from pathlib import Path

import numpy as np
from PIL import Image

WORDS = "how many frogs are there ? one two three four it's a pond .\nUSER : ASSISTANT"


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    """A JPEG file of noise."""
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def chat(*turns: str) -> list[dict[str, str]]:
    """Questions and answers, in turn, in LLaVA's form."""
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]


def write_jsonl(path: Path, records: list[dict]) -> str:
    """Writes one record per line; returns the path."""
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


def write_good_records(root: Path) -> list[dict]:
    """Writes three pictures, two maps and data.jsonl with every kind of good record; returns the records."""
    for k, size in enumerate([(40, 40), (60, 24), (20, 70)]):
        (root / f"{k}.jpg").write_bytes(jpeg(*size, k))
    depth = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    Image.fromarray(depth).save(root / "depth.png")
    instances = np.zeros((40, 40), np.uint8)
    instances[:20, :10], instances[30:, 35:] = 1, 2
    Image.fromarray(instances).save(root / "instances.png")
    maps = {"depth": "depth.png", "instances": "instances.png", "objects": ["frog", "pond"]}
    records = [
        {"id": "square", "image": "0.jpg", **maps, "conversations": chat("<image>\nhow many ?", "three")},
        {"id": "wide", "image": "1.jpg", "conversations": chat("a ? <image>", "two", "it's ?", "a pond .")},
        {"id": "text \"{é\\", "image": "nan", "conversations": chat("how many } ?", "four { \" \\")},
        {"id": "pair", "image": ["0.jpg", "2.jpg"], "conversations": chat("<image> a <image>", "one")},
    ]  # fmt: skip
    write_jsonl(root / "data.jsonl", records)
    return records


def write_bad_records(root: Path) -> dict[str, dict]:
    """What the error must say -> a bad record. Needs the files of write_good_records; writes some of its own."""
    (root / "cut.jpg").write_bytes(jpeg(64, 64)[:800])
    (root / "text.jpg").write_text("no picture")
    (root / "Upper").mkdir()
    (root / "Upper" / "Case.JPG").write_bytes(jpeg(8, 8))
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(root / "three.png")
    turns = chat("<image> how many ?", "one")
    return {
        "missing file": {"image": "none.jpg", "conversations": turns},
        "only the case differs: ": {"image": "upper/case.jpg", "conversations": turns},
        "unreadable picture: image file is truncated": {"image": "cut.jpg", "conversations": turns},
        "unreadable picture: cannot identify": {"image": "text.jpg", "conversations": turns},
        "wrong number of <image>: 1 in the text, 0 pictures": {"conversations": turns},
        "wrong number of <image>: 1 in the text, 2 pictures": {"image": ["0.jpg"] * 2, "conversations": turns},
        "wrong number of <image>: 2 in the text, 1 pictures": {
            "image": "0.jpg", "conversations": chat("<image><image>", "one"),
        },
        "empty answer: turn 3": {"conversations": chat("a", "one", "a", " \n")},
        "do not alternate: turn 1 is from 'human'": {"conversations": chat("a")[:1] * 2},
        "do not alternate: the last turn is a question": {"conversations": chat("a", "one", "a")},
        "no conversation": {"conversations": []},
        "no conversation: a list": {"text": "a"},
        "media that is not read: the field `video`": {"video": "a.mp4", "conversations": chat("a", "one")},
        "media that is not read: turn 0 has the marker <video>": {"conversations": chat("<video> a", "one")},
        "unknown role: turn 0 is from 'narrator'": {"conversations": [{"from": "narrator", "value": "a"}]},
        "system text: the field `system` is int": {"system": 3, "conversations": chat("a", "one")},
        "broken text: turn 1 holds U+FDD0": {"conversations": chat("a", "\ufdd0")},
        "too long: 207 tokens, but a row has 200": {"conversations": chat("a " * 203, "one")},
        "too many pictures: they need 5 image slots, but a row has 4": {
            "image": ["2.jpg"] * 5, "conversations": chat("<image>" * 5, "one"),
        },
        "unreadable target map: instance 3, but there are 1 objects": {
            "image": "0.jpg", "instances": "three.png", "objects": ["frog"], "conversations": turns,
        },
    }  # fmt: skip
