"""A source with text, pictures and maps, and what the tests of the loader do with its batches."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

from jaxmllm.batch import Batch, EncoderInput, TokenLayout, VisualLayout
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.loader import Loader
from jaxmllm.data.samples import SampleSpec
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.targets import MapTargets
from jaxmllm.data.templates import TOY
from jaxmllm.data.tokenizer import train_word_tokenizer

RECORDS = 41
ENCODERS = {"a": EncoderInput(8, 2, (1, 2, 3)), "b": EncoderInput(12, 4, (0, 0, 0))}
LAYOUT = VisualLayout(ENCODERS, TokenLayout(grid=2, newline=True, unpad=True), task_tokens=1)


def write_source(root: Path) -> LlavaSource:
    """Writes a source: every fourth record is text only, some have two pictures, every third has a map."""
    rng = np.random.default_rng(0)
    records = []
    for k in range(RECORDS):
        pictures = 0 if k % 4 == 3 else 2 if k % 5 == 4 else 1
        names = [f"{k}-{j}.png" for j in range(pictures)]
        for name in names:
            size = tuple(rng.integers(4, 20, 2))
            Image.fromarray(rng.integers(0, 255, (*size, 3), dtype=np.uint8)).save(root / name)
        question = "<image>" * pictures + " why" * (1 + 5 * k % 11)
        turns = [{"from": "human", "value": question}, {"from": "gpt", "value": f"because {k}"}]
        record = {"id": f"r{k}", "image": names, "conversations": turns}
        if k % 3 == 0:
            Image.fromarray(rng.integers(0, 3, size, dtype=np.uint8)).save(root / f"{k}.map.png")
            record |= {"instances": f"{k}.map.png", "objects": ["frog", "pond"]}
        records.append(record)
    (root / "data.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return LlavaSource(root / "data.jsonl")


def sample_spec(root: Path) -> SampleSpec:
    """How the records of write_source become samples; writes a tokenizer."""
    words = "why because " + " ".join(map(str, range(RECORDS)))
    tokenizer = train_word_tokenizer([words], root / "words")
    return SampleSpec(tokenizer, TOY, LAYOUT, seq_len=48, image_slots=3, targets=MapTargets(grid=2))


def open_loader(source, spec: SampleSpec, folder: Path, **changes) -> Loader:
    """A loader of a source, or of a list of (source, weight); its ledger is FOLDER/bad_samples.jsonl."""
    sources = source if isinstance(source, list) else [(source, 1.0)]
    settings = {"rows": 8, "num_shards": 4, "seed": 5, "threads": 0, **changes}
    return Loader(sources, spec, Ledger(folder / "bad_samples.jsonl", 1000), **settings)


def take(loader: Loader, count: int) -> list:
    """The next batches, each with its info."""
    return [next(loader) for _ in range(count)]


def arrays(batch: Batch) -> dict[str, np.ndarray]:
    """The arrays of a batch by name, such as "tokens" and "images/a"."""
    named = {}
    for field, value in vars(batch).items():
        named.update({f"{field}/{k}": v for k, v in value.items()} if isinstance(value, dict) else {field: value})
    return named


def assert_same(one: list, two: list) -> None:
    """Two lists of batches with their infos are equal."""
    for (a, a_info), (b, b_info) in zip(one, two, strict=True):
        assert arrays(a).keys() == arrays(b).keys()
        for name, value in arrays(a).items():
            np.testing.assert_array_equal(value, arrays(b)[name], err_msg=name)
        np.testing.assert_array_equal(a_info["sample_ids"], b_info["sample_ids"])
        assert a_info["tokens"] == b_info["tokens"] and a_info["images"] == b_info["images"]


def ids_of(batches: list) -> list[int]:
    """The ids of the samples of batches, in order."""
    return [id for _, info in batches for id in info["sample_ids"].ravel().tolist() if id >= 0]
