"""What `jaxmllm bench` measures, on random and on real data."""

import json

import pytest

from jaxmllm.cli.main import main
from jaxmllm.plan import chips
from jaxmllm.recipes import load
from tests.conftest import settings

COMPONENTS = {"encoder_clip", "encoder_dino", "fuser_clip", "aggregator", "llm", "llm_insert", "head"}


@pytest.mark.parametrize("data", [pytest.param("synthetic", marks=pytest.mark.long), "real"])
def test_bench(scenes, tmp_path, monkeypatch, capsys, data):
    monkeypatch.setattr(chips, "PEAKS", {"cpu": 1e12})  # so that MFU has a peak to be a share of
    run = load("configs/toy.py:tiny")
    args = ["bench", *settings(scenes, **{"mesh.fsdp": 1}), "--steps", "3", "--json", str(tmp_path / "bench.json")]
    assert not main([*args, *["--real"] * (data == "real")])
    found = json.loads((tmp_path / "bench.json").read_text())
    assert found["data"] == data and found["devices"] == 1 and found["loss"] > 0
    shares = found["mfu_by_component"]
    assert set(shares) >= COMPONENTS and all(share >= 0 for share in shares.values())
    assert found["mfu"] == pytest.approx(sum(shares.values()))
    assert found["mfu"] == pytest.approx(found["model_flops"] / found["step_seconds"] / 1e12)
    assert found["tokens_per_second_per_device"] == pytest.approx(8 * run.data.seq_len / found["step_seconds"])
    assert found["images_per_second_per_device"] == pytest.approx(8 * run.data.image_slots / found["step_seconds"])
    assert found["data_wait_seconds"] >= 0 and found["compile_seconds"] > 0
    # At least the master parameters, their two moments and the gradients.
    assert found["peak_memory_bytes"] > 4 * 4 * 50_000 and found["peak_memory_from"] == "compiler"
    printed = capsys.readouterr().out
    assert "mfu_by_component" in printed and "tokens_per_second_per_device" in printed
