"""Photographs of many shapes and colour modes go through the data pipeline, training and generation."""

import json

from jaxmllm.eval.answer import Question
from jaxmllm.eval.restore import restore_answerer
from tests.conftest import ROOT, jaxmllm, settings

PHOTOS = sorted((ROOT / "tests" / "photos").glob("*.jpg"))


def test_photos_train_and_chat(scenes, tmp_path):
    assert len(PHOTOS) >= 10
    turns = [{"from": "human", "value": "<image>\nDescribe the image."}, {"from": "gpt", "value": "1 dog."}]
    records = [{"id": p.stem, "image": p.name, "conversations": turns} for p in PHOTOS]
    (tmp_path / "photos.json").write_text(json.dumps(records))
    source = {
        "stages.align.sources.0.path": tmp_path / "photos.json",
        "stages.align.sources.0.image_root": PHOTOS[0].parent,
        "stages.align.steps": 2,
        "stages.instruct.steps": 1,
    }
    workdir = tmp_path / "run"
    jaxmllm("train", *settings(scenes, **source), "--workdir", workdir)
    assert not (workdir / "bad_samples.jsonl").exists()
    answerer = restore_answerer(str(workdir), max_new_tokens=4)
    questions = [Question("Describe the image.", (str(p),)) for p in PHOTOS]
    together = list(answerer.ask(questions, batch=12))
    assert len(together) == len(PHOTOS)
    alone = [reply for question in questions[:3] for reply in answerer.ask([question], batch=1)]
    assert alone == together[:3]
