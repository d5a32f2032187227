"""From a path to the source of its format."""

from __future__ import annotations

import os

from jaxmllm.data.sources.array_record import ArrayRecordSource
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.record import RecordSource
from jaxmllm.data.sources.tfds import TfdsSource


def open_source(path: str, image_root: str | None = None, outside_root: bool = False) -> RecordSource:
    """The source at `path`: a JSON or JSONL file, a folder or glob of ArrayRecord shards, or `TFDS_FOLDER:SPLIT`.

    outside_root: the records of a JSON file may name pictures outside `image_root`. Raises ValueError.
    """
    folder, _, split = str(path).rpartition(":")
    if folder and os.path.isfile(os.path.join(folder, "dataset_info.json")):
        return TfdsSource(folder, split)
    if str(path).endswith((".json", ".jsonl")):
        return LlavaSource(path, image_root, outside_root)
    return ArrayRecordSource(path)
