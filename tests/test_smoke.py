"""The whole path in one minute: train, resume, evaluate, chat. Also run on the newest Python."""

import json

from tests.conftest import jaxmllm, settings


def test_train_resume_eval_chat(scenes, tmp_path):
    args = settings(scenes, **{"stages.align.steps": 4, "stages.instruct.steps": 2})
    jaxmllm("train", *args, "--workdir", tmp_path)
    again = jaxmllm("train", *args, "--workdir", tmp_path)
    assert "compiling" not in again.stderr  # nothing is left to do
    rows = ("--rows", scenes / "heldout.jsonl", "--train-rows", scenes / "train_rows.jsonl")
    table = jaxmllm("eval", tmp_path, *rows).stdout
    assert table.split()[:7] == ["kind", "n", "model", "unparsed", "blind", "shuffled", "unparsed"]
    result = json.loads((tmp_path / "eval.json").read_text())
    assert {"heldout", "blind", "shuffled", "train_seconds", "steps"} <= set(result)
    assert result["steps"] == 6 and set(result["heldout"]) >= {"overall", "by_kind"}
    assert (tmp_path / "eval.png").stat().st_size > 10_000
    picture = next((scenes / "images" / "heldout").iterdir())
    assert jaxmllm("chat", tmp_path, "--image", picture, "--prompt", "Describe the image.").stdout.startswith("model:")
    assert len((tmp_path / "starts.jsonl").read_text().splitlines()) == 1  # the second command had nothing to train
    assert "report.html shows the run" in jaxmllm("report", tmp_path).stdout
    page = (tmp_path / "report.html").read_text()
    assert page.count("of the attention to the picture") == 9
