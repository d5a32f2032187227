"""Records of every kind of fault, planted among good ones."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tests.records import chat, jpeg

GOOD, BAD = 500, 60
TURNS = chat("<image> how many ?", "one")


def faults() -> list[tuple[str, dict | str]]:
    """(kind, record or line of JSON) of one fault each. The files that they name are those of `write_files`."""
    picture = {"image": "a.jpg", "conversations": TURNS}
    talk = chat("how many ?", "one")
    records = [
        ("missing file", {"image": "gone.jpg", "conversations": TURNS}),
        ("only the case differs", {"image": "A.JPG", "conversations": TURNS}),
        ("unreadable picture", {"image": "cut.jpg", "conversations": TURNS}),
        ("unreadable picture", {"image": "text.jpg", "conversations": TURNS}),
        ("unreadable picture", {"image": "int32.tif", "conversations": TURNS}),
        ("unreadable picture", {"image": "float.tif", "conversations": TURNS}),
        ("too large picture", {"image": "thin.png", "conversations": TURNS}),
        ("not a path in the image root", {"image": "a\0b.jpg", "conversations": TURNS}),
        ("not a path in the image root", {"image": "../a.jpg", "conversations": TURNS}),
        ("not a path", {"image": 17, "conversations": TURNS}),
        ("wrong number of <image>", {"conversations": TURNS}),
        ("wrong number of <image>", {"image": "a.jpg", "conversations": talk}),
        ("wrong number of <image>", {"image": "a.jpg", "conversations": chat("<image> <image> a", "one")}),
        ("wrong number of <image>", {"image": "a.jpg", "conversations": chat("how many ?", "<image> one")}),
        ("empty answer", {"conversations": chat("how many ?", " \n")}),
        ("turns do not alternate", {"conversations": [*talk[:1], *talk]}),
        ("turns do not alternate", {"conversations": chat("how many ?", "one", "a")}),
        ("no conversation", {"text": "a"}),
        ("no conversation", {"conversations": [{"from": "human", "value": None}, *talk[1:]]}),
        ("no conversation", {"conversations": talk, "messages": talk}),
        ("unknown role", {"conversations": [{"from": "tool", "value": "a"}, *talk]}),
        ("unknown role", {"conversations": [*talk, {"from": "system", "value": "a"}]}),
        ("weight of a turn", {"conversations": [talk[0], {**talk[1], "loss": False}]}),
        ("system text", {"system": 3, "conversations": talk}),
        ("media that is not read", {"video": "a.mp4", "conversations": talk}),
        ("media that is not read", {"images": ["a.jpg"], "conversations": talk}),
        ("media that is not read", {"conversations": chat("<video> how many ?", "one")}),
        ("broken text", {"conversations": chat("how many ?", "one \ufdd0")}),
        ("missing file", {**picture, "depth": "gone.png"}),
        ("unreadable target map", {**picture, "depth": "a.jpg"}),
        ("unreadable target map", {**picture, "depth": "float.tif"}),
        ("unreadable target map", {**picture, "instances": "three.png", "objects": ["frog"]}),
        ("target map of another shape", {**picture, "depth": "wide.png"}),
        ("too long", {"conversations": chat("a " * 100, "one")}),
        ("too many pictures", {"image": ["a.jpg"] * 3, "conversations": chat("<image> <image> <image>", "one")}),
    ]
    lines = ["null", '"how many ?"', "[1, 2]", '{"id": 3,', "[" * 100 + "]" * 100, r'{"id": "x", "note": "\ud83d"}']
    return records + [("not JSON", line) for line in lines]


def write_files(root: Path) -> None:
    """Writes the files that the records name."""
    (root / "a.jpg").write_bytes(jpeg(24, 24))
    (root / "cut.jpg").write_bytes(jpeg(64, 64)[:800])
    (root / "text.jpg").write_text("no picture")
    values = np.tile(np.linspace(0, 65535, 24), (24, 1))
    images = {
        "int32.tif": values.astype(np.int32),
        "float.tif": values.astype(np.float32),
        "wide.png": np.zeros((12, 24), np.uint8),
        "depth.png": values.astype(np.uint16),
        "three.png": np.full((24, 24), 3, np.uint8),
        "instances.png": np.tile(np.arange(24, dtype=np.uint8) % 3, (24, 1)),
    }
    for name, array in images.items():
        Image.fromarray(array).save(root / name)
    Image.new("1", (20000, 1)).save(root / "thin.png")


def write_planted(root: Path) -> tuple[str, dict[int, str]]:
    """Writes data.jsonl with GOOD good and BAD bad records, mixed; returns its path, and index -> kind of the bad."""
    write_files(root)
    kinds = faults()
    lines = [(kind, fault) for kind, fault in (kinds + kinds)[:BAD]]
    for k in range(GOOD):
        record = {"conversations": chat("how many ?", "three")}
        if k % 2:
            record = {"image": "a.jpg", "conversations": TURNS}
        if k % 4 == 3:
            record |= {"depth": "depth.png", "instances": "instances.png", "objects": ["frog", "pond"]}
        lines.append(("", record))
    order = np.random.default_rng(0).permutation(len(lines))
    lines = [lines[k] for k in order]
    texts = [
        fault if isinstance(fault, str) else json.dumps({"id": f"r{k}", "source": "ab"[k % 2], **fault})
        for k, (_, fault) in enumerate(lines)
    ]
    (root / "data.jsonl").write_text("\n".join(texts) + "\n")
    return str(root / "data.jsonl"), {k: kind for k, (kind, _) in enumerate(lines) if kind}
