"""Records of a TensorFlow Datasets folder."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from typing import Any

from jaxmllm import json_text
from jaxmllm.data.sources.record import BadSample, Blob, Record
from jaxmllm.errors import shown, suggest

FEATURES = "tensorflow_datasets.core.features."
CLASS_KEYS = ("pythonClassName", "python_class_name", "type")  # those of features.json that name a class


class TfdsSource:
    """A TFDS folder in ArrayRecord format, read without TensorFlow.

    Features: `image` if there are pictures, and either `conversations` (a Sequence of {"from", "value"}) or `question`
    and `answer`; `id` if there are ids. Raises ValueError for any other folder and for an unknown split.
    """

    def __init__(self, folder: str, split: str = "train"):
        self.folder, self.split = str(folder), split
        self.path = f"{folder}:{split}"
        if not os.path.isfile(os.path.join(folder, "dataset_info.json")):
            raise ValueError(f"{folder} is not a TFDS folder: it has no dataset_info.json")
        check_features(os.path.join(folder, "features.json"))
        splits, features = self.builder.info.splits, set(self.builder.info.features)
        if split not in splits:
            raise ValueError(f"{folder} has no split {split!r}{suggest(split, splits)}")
        if not features & {"conversations", "question"}:
            raise ValueError(f"{folder} has neither `conversations` nor `question`, but {', '.join(features)}")

    @functools.cached_property
    def builder(self) -> Any:
        """TFDS's description of the folder."""
        import tensorflow_datasets as tfds

        return tfds.builder_from_directory(self.folder)

    @functools.cached_property
    def records(self) -> Any:
        """The split, opened."""
        import tensorflow_datasets as tfds

        # Pictures stay encoded: data/images.py decodes them, for all sources alike.
        encoded = {"image": tfds.decode.SkipDecoding()} if "image" in self.builder.info.features else None
        return self.builder.as_data_source(self.split, decoders=encoded)

    @functools.cached_property
    def fingerprint(self) -> str:
        """A hash of what TFDS notes about the split: name, version, lengths of the shards, bytes, checksums."""
        info = self.builder.info
        split = info.splits[self.split]
        lengths = [int(length) for length in split.shard_lengths]
        checksums = sorted(info.as_proto.download_checksums.items())
        noted = [info.full_name, self.split, split.num_examples, lengths, int(split.num_bytes), checksums]
        return hashlib.sha256(json.dumps(noted).encode()).hexdigest()

    def __getstate__(self) -> dict[str, Any]:
        return {k: v for k, v in self.__dict__.items() if k not in ("builder", "records")}

    def __len__(self) -> int:
        return self.builder.info.splits[self.split].num_examples

    def __getitem__(self, index: int) -> Record:
        try:
            return self.record(index)
        except Exception as error:  # a file of others may hold anything
            reason = shown(error, 400) or type(error).__name__
            raise BadSample(str(index), self.path, "damaged record", reason) from None

    def record(self, index: int) -> Record:
        """A record. Raises an error of any type for a damaged one."""
        example = self.records[index]
        marker = "<image>\n" if "image" in example else ""
        if "conversations" in example:
            turns = list(zip(*(map(as_text, example["conversations"][key]) for key in ("from", "value"))))
        else:
            turns = [("human", marker + as_text(example["question"])), ("gpt", as_text(example["answer"]))]
        id = as_text(example.get("id", index))
        data = {"id": id, "conversations": [{"from": speaker, "value": text} for speaker, text in turns]}
        images = [Blob(f"{self.path}[{index}]", lambda: example["image"])] if marker else []
        return Record(id, self.path, data, images, {})


def check_features(path: str) -> None:
    """Raises ValueError if features.json is damaged, or names a class that is not of TFDS: TFDS would import it."""
    try:
        with open(path, "rb") as file:
            waiting = [json_text.loads(file.read(json_text.MAX_BYTES + 1))]
        while waiting:
            node = waiting.pop()
            for key, value in node.items() if isinstance(node, dict) else ():
                if key in CLASS_KEYS and isinstance(value, str) and not value.startswith(FEATURES):
                    raise ValueError(f"it names the class {shown(value)}, and only those in {FEATURES} are allowed")
                # TFDS's older format has JSON in a string.
                waiting.append(json_text.loads(value.encode()) if key == "json" and isinstance(value, str) else value)
            waiting += node if isinstance(node, list) else []
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {path}: {error}") from None


def as_text(value: Any) -> str:
    """A value of a TFDS example as a string; its strings are bytes."""
    return value.decode() if isinstance(value, bytes) else str(value)
