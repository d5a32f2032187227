"""docs/your_weights.md, as it stands, with tiny random models."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from jaxmllm.fusers.single import Single
from jaxmllm.mesh import Mesh
from jaxmllm.weights.safetensors import write_folder
from tests import hf_files, init_case
from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "your_weights.md").read_text()
# Fewer tokens and rows, and a rate at which five steps of so small a model can be told from none.
SMALL = ["data.seq_len=96", "stages.align.rows=4", "stages.instruct.rows=4", "stages.instruct.evals.0.every=1"]
SMALL += ["stages.instruct.optim.lr=0.02"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.M | re.S)


def run(folder: Path, *args: str) -> subprocess.CompletedProcess:
    """Python with these arguments, in a folder; it must succeed."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, *args], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done


def write_tokenizer(folder: Path) -> int:
    """A byte-level tokenizer with ChatML's tokens -> its size."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(special_tokens=special, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    return tokenizer.get_vocab_size()


def write_weights(root: Path) -> None:
    llm, clip = root / "llm", root / "clip"
    llm.mkdir(parents=True)
    model = init_case.model(vocab=write_tokenizer(llm)).clone(fusers={"a": Single()})
    abstract = init_case.abstract_params(model, Mesh(fsdp=1).build(jax.devices()[:1]))
    params = {path: 0.1 * x for path, x in init_case.random(abstract).items()}
    hf_files.write(llm, init_case.TEXT | {"vocab_size": model.llm.vocab})
    write_folder(llm, init_case.llama(model, params))
    pictures = hf_files.CLIP_L_336_PICTURES | {"size": {"shortest_edge": 28}, "crop_size": {"height": 28, "width": 28}}
    hf_files.write(clip, {"model_type": "clip", "vision_config": init_case.VISION}, pictures)
    write_folder(clip, init_case.tower(model, params, "vision_model."))


def write_data(root: Path) -> None:
    images = root / "images"
    images.mkdir(parents=True)
    rng = np.random.default_rng(0)
    names = ["pond.jpg", *(f"{i}.jpg" for i in range(11))]
    for name in names:
        Image.fromarray(rng.integers(0, 256, (30, 40, 3), dtype=np.uint8)).save(images / name)
    turns = [{"from": "human", "value": "<image>\nWhat swims here?"}, {"from": "gpt", "value": "Two ducks."}]
    records = [{"id": str(i), "image": name, "conversations": turns} for i, name in enumerate(names)]
    (root / "chat.json").write_text(json.dumps(records[:9]))
    (root / "heldout.json").write_text(json.dumps(records[9:]))


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> tuple[Path, dict[str, subprocess.CompletedProcess]]:
    """(the folder in which the commands of the page ran, what each of them printed by its first word)."""
    folder = tmp_path_factory.mktemp("mine")
    write_weights(folder / "weights")
    write_data(folder / "data")
    (recipe,) = blocks("python")
    (folder / "mine.py").write_text(recipe)
    outputs = {}
    for command in "".join(blocks("sh")).splitlines():
        program, *args = shlex.split(command)
        assert program == "jaxmllm"
        args += ["--set", *SMALL] * (args[0] == "train")
        outputs[args[0]] = run(folder, "-m", "jaxmllm", *args)
    return folder, outputs


def test_every_command_of_the_page_runs(page):
    _, outputs = page
    assert outputs.keys() == {"data", "train", "eval", "chat", "export", "verify"}
    assert outputs["data"].stdout.startswith("9 records, 9 pictures, 0 records unusable")
    assert outputs["chat"].stdout.startswith("model: ")
    assert "next_token" in outputs["eval"].stdout
    assert outputs["verify"].stdout.endswith("\nequal\n")
    assert outputs["export"].stdout.startswith(
        "exported/mine: LlavaForConditionalGeneration from run:runs/mine/instruct/5"
    )


def test_each_part_says_what_it_starts_from(page):
    text = page[1]["train"].stderr
    assert re.search(
        r"^llm: weights/llm, 30 tensors, [\d,]+ parameters, frozen, float32, fingerprint \w{16}$", text, re.M
    )
    left_out = r"left out: vision_model.encoder.layers.4, vision_model.post_layernorm: after the last tap$"
    assert re.search(
        rf"^encoders.clip: weights/clip, .*, frozen, float32, fingerprint \w{{16}}, {left_out}", text, re.M
    )
    assert re.search(r"^aggregator: random, 4 tensors, [\d,]+ parameters, trainable, rate x 1, float32$", text, re.M)
    assert "stage align: epochs=1 makes 3 steps" in text and "stage instruct: epochs=2 makes 5 steps" in text


def test_it_learns_and_is_measured(page):
    rows = [json.loads(line) for line in open(page[0] / "runs" / "mine" / "metrics.jsonl")]
    measured = [row["next_token"] for row in rows if row.get("eval") == "held_out_loss"]
    assert len(measured) == 5 and measured == sorted(measured, reverse=True) and measured[-1] < measured[0] - 0.05


def test_a_run_of_the_page_starts_another(page):
    """Its config is the recipe of a new run, and its weights are a source."""
    args = ["train", "runs/mine", "--workdir", "runs/next", "--set", "init.rest=run:runs/mine", "init.llm=None"]
    args += ["init.encoders={}", "stages.align.steps=1", "stages.instruct.steps=1"]
    done = run(page[0], "-m", "jaxmllm", *args)
    assert done.stderr.count(": run:runs/mine/instruct/5, ") == 3


def test_the_readme_snippet(page, tmp_path):
    folders = {"weights/clip-vit-large-patch14-336": "weights/clip", "weights/vicuna-7b-v1.5": "weights/llm"}
    (tmp_path / "weights").mkdir()
    for link, folder in folders.items():
        (tmp_path / link).symlink_to(page[0] / folder)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    (snippet,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    done = run(tmp_path, "-c", snippet)
    assert done.stdout.endswith("'aggregator'] 2 16\n") and "'encoders.clip'" in done.stdout
