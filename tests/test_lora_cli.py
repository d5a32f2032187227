"""LoRA by the command line: train, interrupt, resume, export merged and as an adapter, verify, chat."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest

from jaxmllm.nn.lora import is_adapter
from jaxmllm.train.checkpoint import open_checkpoints
from jaxmllm.weights.safetensors import open_folder
from tests.test_your_weights import blocks, run, write_data, write_weights

# The recipe of docs/your_weights.md with its two fields for adapters, and one stage that trains nothing else
LORA = 'lora=(LoRA(rank=4, alpha=8.0, dropout=0.05, targets=("^llm/.*/(attn|mlp)/",)),),'
CHANGES = {
    'name="mine",\n': f'name="mine",\n        {LORA}\n',
    'rules=(frozen, Rule(".*")),': 'rules=(Rule(r"/lora_[ab]$"), Rule(".*", lr=None)),',
    "from jaxmllm.mllm import MLLM\n": "from jaxmllm.mllm import MLLM\nfrom jaxmllm.nn.lora import LoRA\n",
    'encoders={"clip": CLIP})': 'encoders={"clip": CLIP}, aggregator="random")',
    "optim=AdamW(lr=2e-5)": "optim=AdamW(lr=0.05)",
}
SMALL = ["data.seq_len=96", "stages.0.rows=4", "stages.0.epochs=None", "stages.0.steps=4", "stages.0.evals=[]"]
TRAIN = ["train", "mine.py", "--set", *SMALL, "save_every=2", "keep=3", "mesh.fsdp=1"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with weights, data, the recipe, and a run of four steps."""
    root = tmp_path_factory.mktemp("mine")
    write_weights(root / "weights")
    write_data(root / "data")
    (recipe,) = blocks("python")
    for old, new in CHANGES.items():
        assert recipe.count(old) == 1, old
        recipe = recipe.replace(old, new)
    (root / "mine.py").write_text(without_align(recipe))
    run(root, "-m", "jaxmllm", *TRAIN)
    return root


def without_align(recipe: str) -> str:
    """The recipe without its first stage."""
    start = recipe.index("            # First the projector alone")
    return recipe[:start] + recipe[recipe.index('            Stage(\n                name="instruct"') :]


@pytest.mark.long
def test_checkpoints_hold_adapters_only(folder):
    (checkpoints,) = open_checkpoints(str(folder / "runs" / "mine"), ["instruct"])
    for step in (2, 4):
        stored = checkpoints.trained(step)
        assert len(stored) == 14 and all(is_adapter(path) for path in stored)
    assert (folder / "runs" / "mine" / "frozen").is_dir()


@pytest.mark.long
def test_a_run_resumes_exactly(folder, tmp_path):
    """Without its last checkpoint, the same command makes it again, bit by bit."""
    shutil.copytree(folder, tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "runs" / "mine" / "instruct" / "checkpoints" / "4")
    done = run(tmp_path / "again", "-m", "jaxmllm", *TRAIN)
    assert "weights/llm" not in done.stderr  # a resumed run reads no source
    for root in (folder, tmp_path / "again"):
        run(root, "-m", "jaxmllm", "export", "runs/mine", "merged", "--part", "llm")
    one, two = (open_folder(root / "merged") for root in (folder, tmp_path / "again"))
    assert set(one) == set(two) and all(np.array_equal(one[key], two[key]) for key in one)
    base = open_folder(folder / "weights" / "llm")
    changed = {key.split(".")[-2] for key in one if not np.array_equal(one[key], base[key])}
    assert changed == {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}


@pytest.mark.long
def test_the_whole_goes_out(folder):
    """Merged, and verified against the run, which chat and verify read with its adapters."""
    run(folder, "-m", "jaxmllm", "export", "runs/mine", "whole")
    assert run(folder, "-m", "jaxmllm", "verify", "runs/mine", "whole").stdout.endswith("\nequal\n")
    args = ["chat", "runs/mine", "--image", "data/images/pond.jpg", "--prompt", "What swims here?"]
    assert run(folder, "-m", "jaxmllm", *args).stdout.startswith("model: ")


@pytest.mark.torch
def test_peft_loads_the_adapter_of_a_run(folder, tmp_path):
    """Onto the folder that the run started from: the logits of the merged export."""
    peft, torch = pytest.importorskip("peft"), pytest.importorskip("torch")
    import transformers

    run(folder, "-m", "jaxmllm", "export", "runs/mine", str(tmp_path / "adapter"), "--part", "llm", "--adapter")
    run(folder, "-m", "jaxmllm", "export", "runs/mine", str(tmp_path / "merged"), "--part", "llm")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "weights/llm" and (config["r"], config["lora_alpha"]) == (4, 8.0)
    kind, base = transformers.AutoModelForCausalLM, folder / "weights" / "llm"
    adapted = peft.PeftModel.from_pretrained(kind.from_pretrained(base), str(tmp_path / "adapter")).eval()
    tokens = torch.arange(3, 63)[None]
    with torch.no_grad():
        found, plain = adapted(tokens).logits, kind.from_pretrained(base).eval()(tokens).logits
        expected = kind.from_pretrained(tmp_path / "merged").eval()(tokens).logits
    assert (found - plain).abs().max() > 1e-2
    assert (found - expected).abs().max() <= 1e-5
