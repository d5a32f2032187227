"""Composed scenes on disk: images, exact dense targets, and questions in common formats.

Scene i of a split depends only on (seed, split, i), the nouns, the kinds and the size of the images; see `scene_at`.
"""

import json
import multiprocessing
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from jaxmllm.data.tokenizer import train_word_tokenizer
from jaxmllm.scenes.backgrounds import PHOTO_SPLITS, photo_paths, photographs, texture
from jaxmllm.scenes.compose import KINDS, MIN_NOUNS, SIZES, Scene, compose, plurals
from jaxmllm.scenes.questions import Question, caption, conversation, heldout_questions

FIRST_NOUNS = (
    "frog", "banana", "strawberry", "airplane", "penguin", "octopus", "carrot", "bus",
    "duck", "dog", "crab", "pizza", "tulip", "guitar", "umbrella", "butterfly",
)  # fmt: skip
HELDOUT_NOUNS = ("rocket", "mushroom", "turtle", "owl", "cactus", "pineapple", "bicycle", "snowman")

FORMAT = 5  # raise it when the same arguments would give other files

# Scenes of each kind that training repeats, in this order: more of what is slow to learn. Held-out kinds are balanced.
_TRAIN_SHARES = {"count": 8, "depth": 8, "single": 3, "relation": 4, "distance": 4}
DEFAULT_KINDS = ("count", "depth", "single")  # what the toy recipe learns in minutes
_SPLITS = ("train", "heldout", "heldout_nouns")
_FILES = ("align", "instruct", "train_rows", "heldout", "heldout_nouns")  # their texts train the tokenizer
_CAPTIONS = "heldout_captions"
_TRAIN_ROWS = 2000  # training scenes that also become rows, from which a rule that ignores the picture can learn
_JOB = 100  # scenes that a worker makes between two progress reports

_README = """\
# Composed scenes

Made by jaxmllm (`jaxmllm.scenes.files.make_scenes`) with the arguments in `scenes.json`: sprites of
Microsoft Fluent Emoji on plain textures or pieces of photographs, with questions whose answers are exact. This is not
CV-Bench; held-out rows only have its columns, so that the same scorer reads both. "Distance" is filed under
"3D" as there, but is measured in the image plane.

- `align.jsonl`: LLaVA's format, one turn per training scene: the caption.
- `instruct.jsonl`: LLaVA's format, one to four turns per training scene. "objects" names the objects: the
  k-th has the value k in the instance map.
- `heldout.jsonl`: questions about other scenes of the same nouns. `heldout_nouns.jsonl`: about scenes of
  nouns that training never shows. `prompt` is what is asked; `choices` come in random order.
- `heldout_captions.jsonl`: as `align.jsonl`, about all scenes of `heldout.jsonl`.
- `train_rows.jsonl`: such rows about training scenes, for references that do not look at the picture.
- `tokenizer/`: one token per word of all texts here.
- `images/SPLIT/ID.jpg`.
- `depth/SPLIT/ID.png`: 16 bits, nearness * 65535. Where objects stand on ground under a horizon, nearness is
  proportional to 1 / distance: 1 at the lower edge of the image, 0 from the horizon up. Elsewhere objects are
  cards on a wall that faces the camera: 0 on the wall, 0.5 on a card.
- `instances/SPLIT/ID.png`: 8 bits, 0 for the background.
- `nouns.json`: the nouns of training and the held-out ones, each with its plural.
"""


def scene_at(
    split: str,
    index: int,
    *,
    nouns: Sequence[str],
    size: int,
    seed: int,
    kinds: Sequence[str] = DEFAULT_KINDS,
    backgrounds: str | None = None,
) -> tuple[Scene, np.random.Generator]:
    """Scene `index` of a split ("train", "heldout", "heldout_nouns") and the generator for its questions.

    backgrounds: folder of photographs, see `backgrounds.photo_paths`; None for textures.
    """
    surface = photographs(photo_paths(backgrounds, split)) if backgrounds else texture
    rng = np.random.default_rng([seed, _SPLITS.index(split), index])
    order = [kind for kind in kinds for _ in range(_TRAIN_SHARES[kind] if split == "train" else 1)]
    return compose(rng, nouns, size, order[index % len(order)], surface), rng


def _paths(split: str, index: int) -> dict[str, str]:
    return {
        "image": f"images/{split}/{index:06d}.jpg",
        "depth": f"depth/{split}/{index:06d}.png",
        "instances": f"instances/{split}/{index:06d}.png",
    }


def llava_record(split: str, index: int, scene: Scene, questions: Sequence[Question]) -> dict[str, Any]:
    """An example in LLaVA's format, with the paths of the dense targets and each instance's noun."""
    turns = []
    for question in questions:
        turns.append({"from": "human", "value": question.text if turns else f"<image>\n{question.text}"})
        turns.append({"from": "gpt", "value": question.answer})
    nouns = [thing.noun for thing in scene.objects]
    return {"id": f"{split}-{index:06d}", **_paths(split, index), "objects": nouns, "conversations": turns}


def benchmark_row(rng: np.random.Generator, image: str, question: Question) -> dict[str, Any]:
    """A held-out question in the columns of CV-Bench, except "idx"; the choices are in random order."""
    choices = [question.choices[i] for i in rng.permutation(len(question.choices))]
    return {
        "type": "3D" if question.task in ("Depth", "Distance") else "2D",
        "task": question.task,
        "image": image,
        "question": question.text,
        "choices": choices,
        "answer": f"({'ABCD'[choices.index(question.answer)]})" if choices else question.answer,
        "prompt": question.text,
        "source": "Composed",
        "source_dataset": "composed-sprites",
    }


def make_scenes(
    out_dir: str | os.PathLike[str],
    *,
    train: int = 12_000,
    heldout: int = 1_500,
    nouns: int = 16,
    size: int = 96,
    seed: int = 0,
    kinds: Sequence[str] = DEFAULT_KINDS,
    backgrounds: str | None = None,
    processes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Path:
    """Write a folder of composed scenes with questions; its README.md says what each file holds.

    The folder is either complete or absent: it is written as `<out_dir>.partial` and renamed at the end. What an
    interrupted run left behind is thrown away by the next one. A complete folder made with the same arguments is kept.

    Args:
      out_dir: the folder to make, on a local disk. Only one caller at a time may write it.
      train: training scenes.
      heldout: held-out scenes; in addition, a third as many are made of nouns that no training scene shows.
      nouns: how many nouns training uses, starting with `FIRST_NOUNS`. The 8 `HELDOUT_NOUNS` are not among them.
      size: side of the images in pixels.
      seed: not negative.
      kinds: kinds of scenes, from `scenes.compose.KINDS`; each has a kind of question of its own.
      backgrounds: a folder with photographs in train/ and heldout/, pieces of which stand behind the sprites; None for
        plain textures. No piece of a held-out photograph is in a training scene.
      processes: how many write at once; None for one per core. The files do not depend on it.
      progress: called with (scenes done, scenes in all) from time to time.

    Returns:
      `out_dir` as a path.

    Raises:
      ValueError: an argument is out of range, or `out_dir` holds something else.
    """
    more_nouns = [noun for noun in plurals() if noun not in FIRST_NOUNS + HELDOUT_NOUNS]
    available = [*FIRST_NOUNS, *more_nouns]
    if not MIN_NOUNS <= nouns <= len(available):
        raise ValueError(f"nouns must be {MIN_NOUNS} to {len(available)}, not {nouns}")
    if not SIZES[0] <= size <= SIZES[1]:
        raise ValueError(f"size must be {SIZES[0]} to {SIZES[1]} pixels, not {size}")
    if min(train, heldout, seed) < 0:
        raise ValueError(f"train, heldout and seed must not be negative, not {train}, {heldout} and {seed}")
    if not kinds or len(set(kinds)) < len(kinds) or set(kinds) - set(KINDS):
        raise ValueError(f"kinds must be different ones of {', '.join(KINDS)}, not {', '.join(kinds) or 'none'}")
    if processes is not None and processes < 1:
        raise ValueError(f"processes must be 1 or more, not {processes}")

    out_dir = Path(out_dir)
    made_with = {"format": FORMAT, "train": train, "heldout": heldout}
    made_with |= {"nouns": nouns, "size": size, "seed": seed, "kinds": list(kinds), "backgrounds": backgrounds}
    for split in PHOTO_SPLITS if backgrounds else ():
        photo_paths(backgrounds, split)
    if out_dir.exists():
        _check_same(out_dir, made_with)
        return out_dir

    partial_dir = out_dir.with_name(out_dir.name + ".partial")
    shutil.rmtree(partial_dir, ignore_errors=True)
    jobs = []
    for split, count in {"train": train, "heldout": heldout, "heldout_nouns": heldout // 3}.items():
        chosen = HELDOUT_NOUNS if split == "heldout_nouns" else tuple(available[:nouns])
        for kind in ("images", "depth", "instances"):
            (partial_dir / kind / split).mkdir(parents=True)
        for start in range(0, count, _JOB):
            how = {"nouns": chosen, "size": size, "seed": seed, "kinds": tuple(kinds), "backgrounds": backgrounds}
            jobs.append(_Job(partial_dir, split, range(start, min(start + _JOB, count)), how))
    _write_records(partial_dir, jobs, processes or os.cpu_count() or 1, progress)
    train_word_tokenizer(_texts(partial_dir), str(partial_dir / "tokenizer"))
    lists = {"train": available[:nouns], "heldout": HELDOUT_NOUNS}
    plural_of = {split: {noun: plurals()[noun] for noun in chosen} for split, chosen in lists.items()}
    (partial_dir / "nouns.json").write_text(json.dumps(plural_of, indent=1) + "\n")
    (partial_dir / "README.md").write_text(_README)
    (partial_dir / "scenes.json").write_text(json.dumps(made_with) + "\n")
    partial_dir.rename(out_dir)
    return out_dir


def _texts(folder: Path) -> Iterator[str]:
    """All texts in the records and rows of a folder."""
    for name in _FILES:
        with open(folder / f"{name}.jsonl") as file:
            for line in file:
                record = json.loads(line)
                if "conversations" in record:
                    yield from (turn["value"] for turn in record["conversations"])
                else:
                    yield from (record["prompt"], record["answer"], *record["choices"])


class _Job(NamedTuple):
    """Some scenes of one split, for one worker."""

    folder: Path
    split: str
    indices: range
    how: dict[str, Any]  # the keyword arguments of `scene_at`


def _run(job: _Job) -> dict[str, list[dict[str, Any]]]:
    """Write the images and maps of a job; return the records of each JSONL file, without the "idx" of rows."""
    names = {"train": ("align", "instruct", "train_rows"), "heldout": ("heldout", _CAPTIONS)}
    records = {name: [] for name in names.get(job.split, (job.split,))}
    nouns, kinds = job.how["nouns"], job.how["kinds"]
    for index in job.indices:
        scene, rng = scene_at(job.split, index, **job.how)
        paths = _paths(job.split, index)
        Image.fromarray(scene.image).save(job.folder / paths["image"], quality=90)
        depth = np.rint(scene.depth * 65535).astype(np.uint16)
        Image.fromarray(depth).save(job.folder / paths["depth"], compress_level=1)
        Image.fromarray(scene.instances).save(job.folder / paths["instances"], compress_level=1)
        if job.split == "train":
            records["align"].append(llava_record(job.split, index, scene, [caption(scene)]))
            records["instruct"].append(llava_record(job.split, index, scene, conversation(rng, scene, nouns)))
        if job.split == "heldout":
            records[_CAPTIONS].append(llava_record(job.split, index, scene, [caption(scene)]))
        if job.split != "train" or index < _TRAIN_ROWS:
            turn, offset = divmod(index, len(kinds))
            questions = heldout_questions(rng, turn, offset, scene, nouns)
            rows = [benchmark_row(rng, paths["image"], question) for question in questions]
            records["train_rows" if job.split == "train" else job.split] += rows
    return records


def _write_records(
    folder: Path, jobs: Sequence[_Job], processes: int, progress: Callable[[int, int], None] | None
) -> None:
    done, total = 0, sum(len(job.indices) for job in jobs)
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(folder / f"{name}.jsonl", "w")) for name in (*_FILES, _CAPTIONS)}
        written = dict.fromkeys(files, 0)
        results: Iterable[dict[str, list[dict[str, Any]]]] = map(_run, jobs)
        if processes > 1 and len(jobs) > 1:
            # Spawned, not forked: the caller may run JAX, whose threads do not survive a fork.
            spawn = multiprocessing.get_context("spawn")
            pool = ProcessPoolExecutor(min(processes, len(jobs)), mp_context=spawn)
            stack.callback(pool.shutdown, cancel_futures=True)
            results = pool.map(_run, jobs)
        for job, records in zip(jobs, results, strict=True):
            for name, rows in records.items():
                for row in rows:
                    numbered = row if "id" in row else {"idx": written[name], **row}
                    files[name].write(json.dumps(numbered, ensure_ascii=False) + "\n")
                    written[name] += 1
            done += len(job.indices)
            if progress:
                progress(done, total)


def _check_same(folder: Path, made_with: dict[str, Any]) -> None:
    try:
        existing = json.loads((folder / "scenes.json").read_text())
    except (OSError, ValueError):
        raise ValueError(f"{folder} holds no composed scenes: remove it or choose another folder") from None
    if differing := [f"{key}={existing.get(key)}" for key in made_with if existing.get(key) != made_with[key]]:
        raise ValueError(f"{folder} was made with {', '.join(differing)}: remove it or choose another folder")
