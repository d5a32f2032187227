"""Photographs of many shapes and colour modes go through the data pipeline, training and generation."""

import json

from jaxmllm.eval.model import Model
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
    model = Model(str(workdir), max_new_tokens=4)
    together = model.ask([str(p) for p in PHOTOS], ["Describe the image."] * len(PHOTOS), batch=12)
    assert len(together) == len(PHOTOS)
    alone = [model.ask([str(p)], ["Describe the image."], batch=1)[0] for p in PHOTOS[:3]]
    assert alone == together[:3]
