"""Composed scenes: the answers are derived again from the written maps, without the code that made them."""

import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from jaxmllm.scenes.compose import CARD_DEPTH, KINDS, MIN_VISIBLE, compose, plurals
from jaxmllm.scenes.files import FIRST_NOUNS, HELDOUT_NOUNS, make_scenes, scene_at
from jaxmllm.scenes.questions import conversation

ARGS = {"train": 400, "heldout": 300, "seed": 3, "kinds": KINDS}
SINGULAR = {plural: noun for noun, plural in plurals().items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_scenes(tmp_path_factory.mktemp("scenes") / "made", **ARGS, processes=1)


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def maps(folder: Path, image: str) -> tuple[np.ndarray, np.ndarray]:
    depth, instances = (folder / image.replace("images", kind).replace("jpg", "png") for kind in ("depth", "instances"))
    return np.asarray(Image.open(depth)), np.asarray(Image.open(instances))


def answer_from_maps(question: str, nouns: list[str], depth: np.ndarray, instances: np.ndarray) -> str:
    """The answer to any question except the caption, from pixels; `nouns[k - 1]` is the noun of instance k."""
    pixels = {noun: np.argwhere(instances == k) for k, noun in enumerate(nouns, start=1)}  # (row, column)
    if match := re.fullmatch(r"How many (.+) are there\?", question):
        visible = set(np.unique(instances)) - {0}
        return str(sum(nouns[k - 1] == SINGULAR[match[1]] for k in visible))
    if match := re.fullmatch(r"Is there an? (.+)\?", question):
        return "yes" if match[1] in nouns else "no"
    if match := re.fullmatch(r"Is the (.+) (left or right of|above or below) the (.+)\?", question):
        axis, before, after = (1, "left", "right") if "left" in match[2] else (0, "above", "below")
        a, b = (pixels[match[i]][:, axis] for i in (1, 3))
        assert a.max() < b.min() or b.max() < a.min(), "the two objects overlap along the axis of the question"
        return before if a.max() < b.min() else after
    if match := re.fullmatch(r"Which is closer, the (.+) or the (.+)\?", question):
        a, b = (depth[tuple(pixels[match[i]][0])] / 65535 for i in (1, 2))
        assert max(a, b) > 1.15 * min(a, b), "the depths are too similar"
        return match[1] if a > b else match[2]
    if match := re.fullmatch(r"Which is closer to the (.+), the (.+) or the (.+)\?", question):
        anchor, a, b = ((pixels[match[i]].min(0) + pixels[match[i]].max(0)) / 2 for i in (1, 2, 3))
        to_a, to_b = np.linalg.norm(a - anchor), np.linalg.norm(b - anchor)
        assert max(to_a, to_b) > 1.3 * min(to_a, to_b), "the distances are too similar"
        return match[2] if to_a < to_b else match[3]
    assert question == "What is this?"
    assert len(nouns) == 1
    return nouns[0]


def test_every_training_answer_follows_from_the_maps(folder: Path) -> None:
    seen = Counter()
    for record in read(folder / "instruct.jsonl"):
        depth, instances = maps(folder, record["image"])
        assert depth.dtype == np.uint16 and instances.dtype == np.uint8
        assert Image.open(folder / record["image"]).size == depth.shape == instances.shape == (96, 96)
        turns = record["conversations"]
        assert 2 <= len(turns) <= 8
        assert [turn["value"].startswith("<image>\n") for turn in turns] == [True] + [False] * (len(turns) - 1)
        for asked, given in zip(turns[::2], turns[1::2], strict=True):
            question = asked["value"].removeprefix("<image>\n")
            assert given["value"] == answer_from_maps(question, record["objects"], depth, instances)
            seen[question.split()[0]] += 1
    assert min(seen[first] for first in ("How", "Is", "Which", "What")) >= 30


@pytest.mark.parametrize("name, scenes", [("align", 400), ("heldout_captions", 300)])
def test_a_caption_counts_what_the_instance_map_shows(folder: Path, name: str, scenes: int) -> None:
    records = read(folder / f"{name}.jsonl")
    assert len({record["image"] for record in records}) == len(records) == scenes
    for record in records:
        _, instances = maps(folder, record["image"])
        counts = Counter(record["objects"][k - 1] for k in np.unique(instances) if k)
        question, given = (turn["value"] for turn in record["conversations"])
        assert question == "<image>\nDescribe the image."
        said = [part.split(" ", 1) for part in re.split(r", | and ", given.removesuffix("."))]
        nouns = [name if number == "1" else SINGULAR[name] for number, name in said]
        assert dict(zip(nouns, (int(number) for number, _ in said), strict=True)) == counts
        assert nouns == sorted(counts, key=lambda noun: (-counts[noun], noun))


@pytest.mark.parametrize("split", ["heldout", "heldout_nouns"])
def test_heldout_rows_are_right_and_every_kind_is_there(folder: Path, split: str) -> None:
    nouns = HELDOUT_NOUNS if split == "heldout_nouns" else FIRST_NOUNS
    rows = read(folder / f"{split}.jsonl")
    assert [row["idx"] for row in rows] == list(range(len(rows)))
    tasks = Counter(row["task"] for row in rows)
    assert set(tasks) == {"Count", "Relation", "Depth", "Distance", "Name", "Exist", "Caption"}
    scenes = 300 if split == "heldout" else 100
    assert min(tasks.values()) >= scenes // 5
    for row in rows:
        assert row["prompt"] == row["question"] and row["source"] == "Composed"
        index = int(Path(row["image"]).stem)
        objects = [thing.noun for thing in scene_at(split, index, nouns=nouns, size=96, seed=3, kinds=KINDS)[0].objects]
        if row["task"] == "Caption":
            assert row["choices"] == [] and row["answer"].endswith(".")
        else:
            answer = row["choices"]["ABCD".index(row["answer"][1])]
            assert answer == answer_from_maps(row["question"], objects, *maps(folder, row["image"]))
            assert len(set(row["choices"])) == len(row["choices"]) == (4 if row["task"] in ("Count", "Name") else 2)
    letters = Counter(row["answer"] for row in rows if row["task"] == "Exist")
    yes = Counter(row["choices"]["ABCD".index(row["answer"][1])] for row in rows if row["task"] == "Exist")
    assert abs(yes["yes"] - yes["no"]) <= 1
    assert min(letters.values()) > 0.2 * tasks["Exist"]


def test_the_maps_on_disk_are_those_of_the_scene(folder: Path) -> None:
    for index in range(20):
        scene, _ = scene_at("train", index, nouns=FIRST_NOUNS, size=96, seed=3, kinds=KINDS)
        depth, instances = maps(folder, f"images/train/{index:06d}.jpg")
        assert np.abs(depth / 65535 - scene.depth).max() < 1e-5
        np.testing.assert_array_equal(instances, scene.instances)


@pytest.mark.parametrize("kind", KINDS)
def test_depth_instances_and_visibility(kind: str) -> None:
    for i in range(40):
        scene = compose(np.random.default_rng(i), FIRST_NOUNS, 96, kind)
        assert scene.image.dtype == np.uint8 and scene.image.shape == (96, 96, 3)
        assert scene.depth.dtype == np.float32 and 0 <= scene.depth.min() <= scene.depth.max() <= 1
        background = scene.depth[scene.instances == 0]
        for k, thing in enumerate(scene.objects, start=1):
            mask = scene.instances == k
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= 96 and 0 <= top < bottom <= 96
            assert max(right - left, bottom - top) >= 24, "too small to be recognised"
            assert mask[top:bottom, left:right].sum() == mask.sum()
            np.testing.assert_allclose(scene.depth[mask], thing.depth, rtol=1e-6)
            if kind == "depth":
                # Other objects may hide it, but the ground in the row of its foot is as near as the foot.
                ground = scene.depth[bottom - 1][scene.instances[bottom - 1] == 0]
                assert abs(ground.max() - thing.depth) < 0.02
            else:
                assert thing.depth == CARD_DEPTH
        assert (background > 0).any() == (kind == "depth")


def test_enough_of_every_object_is_visible() -> None:
    fill = {}  # noun -> the share of its box that its sprite covers if nothing hides it
    for i in range(200):
        scene = compose(np.random.default_rng(i), FIRST_NOUNS, 96, "single")
        left, top, right, bottom = scene.objects[0].box
        fill[scene.objects[0].noun] = scene.instances[top:bottom, left:right].mean()
    for i in range(100):
        scene = compose(np.random.default_rng(i), FIRST_NOUNS, 96, "depth")
        for k, thing in enumerate(scene.objects, start=1):
            left, top, right, bottom = thing.box
            whole = fill[thing.noun] * (right - left) * (bottom - top)
            assert (scene.instances == k).sum() > (MIN_VISIBLE - 0.05) * whole  # smaller sprites differ a little
        depths = [thing.depth for thing in scene.objects]
        assert depths == sorted(depths)


def test_answers_are_balanced() -> None:
    exist, relation, count = Counter(), Counter(), Counter()
    exist_by_noun = {noun: Counter() for noun in FIRST_NOUNS}
    for index in range(3000):
        scene, rng = scene_at("train", index, nouns=FIRST_NOUNS, size=48, seed=1, kinds=KINDS)
        for question in conversation(rng, scene, FIRST_NOUNS):
            if question.task == "Exist":
                exist[question.answer] += 1
                exist_by_noun[question.nouns[0]][question.answer] += 1
            elif question.task == "Relation":
                relation[question.answer] += 1
            elif question.task == "Count":
                count[question.answer] += 1
    assert abs(exist["yes"] / exist.total() - 0.5) < 0.04
    assert all(0.3 < answers["yes"] / answers.total() < 0.7 for answers in exist_by_noun.values())
    assert abs(relation["left"] / (relation["left"] + relation["right"]) - 0.5) < 0.06
    assert abs(relation["above"] / (relation["above"] + relation["below"]) - 0.5) < 0.06
    assert all(abs(count[answer] / count.total() - 0.25) < 0.05 for answer in "1234")


def test_no_turn_asks_what_an_earlier_one_gave_away() -> None:
    for index in range(300):
        scene, rng = scene_at("train", index, nouns=FIRST_NOUNS, size=48, seed=2, kinds=KINDS)
        questions = conversation(rng, scene, FIRST_NOUNS)
        assert len({question.text for question in questions}) == len(questions)
        if scene.kind != "single":
            for position, question in enumerate(questions):
                named = {noun for earlier in questions[:position] for noun in earlier.nouns}
                assert question.task != "Exist" or question.nouns[0] not in named


def test_splits_share_no_noun_and_no_scene(folder: Path) -> None:
    nouns = json.loads((folder / "nouns.json").read_text())
    assert not set(nouns["train"]) & set(nouns["heldout"])
    assert len(nouns["train"]) == 16 and len(nouns["heldout"]) == 8
    for split, name in (("train", "instruct"), ("heldout", "heldout")):
        text = (folder / f"{name}.jsonl").read_text()
        assert not any(re.search(rf"\b{noun}s?\b", text) for noun in nouns["heldout"]), split
    images = [path.read_bytes() for path in (folder / "images").rglob("*.jpg")]
    assert len(set(images)) == len(images) == 400 + 300 + 100


def test_the_same_arguments_give_the_same_files(folder: Path, tmp_path: Path) -> None:
    again = make_scenes(tmp_path / "again", **ARGS, processes=2)
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    assert files == sorted(path.relative_to(again) for path in again.rglob("*") if path.is_file())
    assert all((folder / name).read_bytes() == (again / name).read_bytes() for name in files)


def test_an_interrupted_run_is_redone(tmp_path: Path) -> None:
    out = tmp_path / "scenes"

    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        make_scenes(out, train=10, heldout=3, processes=1, progress=interrupt)
    assert not out.exists()
    stray = tmp_path / "scenes.partial" / "images" / "train" / "stray.jpg"
    stray.touch()
    reports = []
    make_scenes(out, train=10, heldout=3, processes=1, progress=lambda *report: reports.append(report))
    assert reports == [(10, 14), (13, 14), (14, 14)]
    assert not (out / "images" / "train" / "stray.jpg").exists()
    assert not stray.exists()
    assert len(read(out / "instruct.jsonl")) == 10


def test_a_whole_folder_is_left_alone_and_other_arguments_are_refused(tmp_path: Path) -> None:
    out = make_scenes(tmp_path / "scenes", train=2, heldout=0, processes=1)
    marked = out / "align.jsonl"
    marked.write_text("mine")
    make_scenes(out, train=2, heldout=0)
    assert marked.read_text() == "mine"
    with pytest.raises(ValueError, match=r"scenes was made with train=2: remove it or choose another folder"):
        make_scenes(out, train=3, heldout=0)
    (tmp_path / "full").mkdir()
    with pytest.raises(ValueError, match="full holds no composed scenes: remove it"):
        make_scenes(tmp_path / "full")


@pytest.mark.parametrize(
    "bad", [{"nouns": 4}, {"nouns": 1000}, {"size": 16}, {"train": -1}, {"processes": 0}, {"kinds": ["duck"]}]
)
def test_bad_arguments_are_named(tmp_path: Path, bad: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))) as caught:
        make_scenes(tmp_path / "scenes", **bad)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_errors_of_compose_name_what_is_wrong() -> None:
    rng = np.random.default_rng(0)
    with pytest.raises(ValueError, match="no sprite of gryphon"):
        compose(rng, [*FIRST_NOUNS, "gryphon"], 96)
    with pytest.raises(ValueError, match="at least 5 different nouns"):
        compose(rng, ["duck"] * 9, 96)
    with pytest.raises(ValueError, match="kind must be one of"):
        compose(rng, FIRST_NOUNS, 96, "portrait")
