"""An epoch of real training on planted faults names the same records as `data check`, and trains all others once."""

from __future__ import annotations

import json

import pytest

from jaxmllm.cli.main import main
from jaxmllm.data.tokenizer import train_word_tokenizer
from jaxmllm.train import metrics
from tests.conftest import settings
from tests.planted import BAD, GOOD, write_planted
from tests.records import WORDS

ROWS = 5  # odd, so that one shard holds the whole epoch


@pytest.mark.long
def test_training_names_what_check_names_and_trains_the_others_once(scenes, tmp_path, monkeypatch):
    path, kinds = write_planted(tmp_path)
    train_word_tokenizer([WORDS], str(tmp_path / "words"))
    values = {"data.tokenizer": tmp_path / "words", "data.packing": False, "data.seq_len": 100, "data.image_slots": 2}
    values |= {
        "stages.align.sources.0.path": path,
        "stages.align.rows": ROWS,
        "stages.align.steps": GOOD // ROWS + 1,
    }  # one more, so that the last of the epoch has been met
    values |= {"stages.instruct.steps": 1, "stages.instruct.rows": ROWS, "log_every": 100, "save_every": 100}
    config, *options = settings(scenes, **values)
    checked = tmp_path / "check.json"
    assert main(["data", "check", config, *options, "--stage", "align", "--json", str(checked)]) == 1
    problems = json.loads(checked.read_text())["sources"][0]["problems"]
    assert len(problems) == BAD and {problem["index"] for problem in problems} == kinds.keys()

    trained, count = [], metrics.Reporter.count

    def noting(self, info, wait):
        if self.stage.name == "align":
            trained.extend(int(i) for i in info["sample_ids"].ravel() if i >= 0)
        count(self, info, wait)

    monkeypatch.setattr(metrics.Reporter, "count", noting)
    workdir = tmp_path / "run"
    assert main(["train", config, *options, "--workdir", str(workdir)]) == 0
    named = [json.loads(line) for line in open(workdir / "bad_samples.jsonl")]
    assert {(row["index"], row["reason"]) for row in named} == {(p["index"], p["reason"]) for p in problems}
    assert len(named) == BAD
    assert sorted(trained[:GOOD]) == [i for i in range(GOOD + BAD) if i not in kinds]
