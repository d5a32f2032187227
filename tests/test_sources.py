"""Sources: every format gives the same records, and errors name the file at fault."""

import hashlib
import io
import json
import pickle
import random
import sys

import pytest

from jaxmllm.data.sources import json_bounds
from jaxmllm.data.sources.array_record import ArrayRecordSource, convert
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.open import open_source
from jaxmllm.data.sources.record import BadSample
from tests.records import chat, jpeg, write_good_records, write_jsonl


def assert_same(a, b):
    assert (a.id, a.data) == (b.id, b.data)
    assert [x.read() for x in a.images] == [x.read() for x in b.images]
    assert {k: x.read() for k, x in a.maps.items()} == {k: x.read() for k, x in b.maps.items()}


def test_all_formats_give_the_same_records(tmp_path, monkeypatch):
    records = write_good_records(tmp_path)
    (tmp_path / "data.json").write_text(json.dumps(records, indent=2, ensure_ascii=False))
    jsonl = LlavaSource(tmp_path / "data.jsonl")
    progress = []
    assert convert(jsonl, tmp_path / "shards", 3, lambda *counts: progress.append(counts)) == []
    assert progress[-1] == (4, 4)
    names = sorted(p.name for p in (tmp_path / "shards").iterdir())
    assert names == [f"part-0000{k}-of-00003.array_record" for k in range(3)]
    monkeypatch.setattr(json_bounds, "CHUNK", 37)  # so that records cross the borders of chunks
    sources = [open_source(str(tmp_path / name)) for name in ("data.jsonl", "data.json", "shards")]
    sources += [pickle.loads(pickle.dumps(source)) for source in sources]
    for source in sources:
        assert len(source) == len(records)
        for k in range(len(source)):
            assert_same(source[k], jsonl[k])
            assert source[k].data == records[k]


def test_array_bounds_with_any_escapes(tmp_path, monkeypatch):
    draw = random.Random(0)
    records = [{"t": "".join(draw.choices('\\"{}[],x\n', k=draw.randrange(12)))} for _ in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for chunk in (1, 5, 64, 1 << 20):
        monkeypatch.setattr(json_bounds, "CHUNK", chunk)
        source = LlavaSource(tmp_path / "a.json")
        assert [source[k].data for k in range(len(source))] == records


def test_source_errors(tmp_path):
    write_good_records(tmp_path)
    with pytest.raises(ValueError, match="no data file"):
        LlavaSource(tmp_path / "nothing.json")
    (tmp_path / "cut.json").write_text('[{"id": 1}, {"id": 2')
    with pytest.raises(ValueError, match="ends inside a record"):
        LlavaSource(tmp_path / "cut.json")
    (tmp_path / "cut.jsonl").write_text('{"id": 1}\n\n{"id": 2')
    source = LlavaSource(tmp_path / "cut.jsonl")
    assert source[0].id == "1" and len(source) == 2
    with pytest.raises(BadSample, match="not JSON"):
        source[1]
    with pytest.raises(ValueError, match="no ArrayRecord shards"):
        ArrayRecordSource(tmp_path / "nothing")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(source, tmp_path, 1)
    convert(LlavaSource(tmp_path / "data.jsonl"), tmp_path / "shards", 2)
    (tmp_path / "shards" / "part-00000-of-00002.array_record").unlink()
    with pytest.raises(ValueError, match="has 1 shards, but their names say 2"):
        ArrayRecordSource(tmp_path / "shards")


@pytest.mark.parametrize("kind", ["chat", "qa"])
def test_tfds_folders_need_no_tensorflow(tmp_path, kind):
    import tensorflow_datasets as tfds

    pairs = [(f"how {k} ?", f"a {k}") for k in range(3)]
    conversations = [chat(f"<image>\n{question}", answer) for question, answer in pairs]

    text = tfds.features.Text()
    turns = tfds.features.Sequence({"from": text, "value": text})
    text_features = {"chat": {"conversations": turns}, "qa": {"question": text, "answer": text}}[kind]

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "__main__"  # as in a script; elsewhere TFDS requires a package that it does not install
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), **text_features})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k, (question, answer) in enumerate(pairs):
                fields = {"chat": {"conversations": conversations[k]}, "qa": {"question": question, "answer": answer}}
                yield k, {"image": io.BytesIO(jpeg(8, 6 + k)), **fields[kind]}

    builder = Tiny(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = pickle.loads(pickle.dumps(open_source(f"{builder.data_path}:train")))
    records = sorted((source[k] for k in range(3)), key=lambda record: record.data["conversations"][1]["value"])
    assert [record.data["conversations"] for record in records] == conversations
    assert [record.images[0].read() for record in records] == [jpeg(8, 6 + k) for k in range(3)]
    assert "tensorflow" not in sys.modules
    noted = builder.data_path / "dataset_info.json"
    same, text = open_source(f"{builder.data_path}:train").fingerprint, noted.read_text()
    assert same == source.fingerprint and source.path == f"{builder.data_path}:train"
    noted.write_text(text.replace('"numBytes": "', '"numBytes": "1'))
    assert open_source(f"{builder.data_path}:train").fingerprint != same
    with pytest.raises(ValueError, match="has no split 'val'; known: train"):
        open_source(f"{builder.data_path}:val")


def test_fingerprints_of_llava_files_cover_every_byte(tmp_path, monkeypatch):
    records = write_good_records(tmp_path)
    text = (tmp_path / "data.jsonl").read_text()
    (tmp_path / "data.json").write_text(json.dumps(records))
    found = {name: open_source(str(tmp_path / name)).fingerprint for name in ("data.jsonl", "data.json")}
    assert found["data.jsonl"] == hashlib.sha256(text.encode()).hexdigest() != found["data.json"]
    monkeypatch.setattr(json_bounds, "CHUNK", 37)
    assert found == {name: open_source(str(tmp_path / name)).fingerprint for name in found}
    (tmp_path / "data.jsonl").write_text(text.replace("pond .", "pool .", 1))
    assert open_source(str(tmp_path / "data.jsonl")).fingerprint != found["data.jsonl"]
    (tmp_path / "moved").mkdir()
    (tmp_path / "data.json").rename(tmp_path / "moved" / "data.json")
    assert open_source(str(tmp_path / "moved" / "data.json")).fingerprint == found["data.json"]


def test_fingerprints_of_shards_change_with_their_records(tmp_path):
    records = write_good_records(tmp_path)
    convert(LlavaSource(tmp_path / "data.jsonl"), tmp_path / "one", 2)
    write_jsonl(tmp_path / "data.jsonl", [*records[:3], {**records[3], "id": "pear"}])
    convert(LlavaSource(tmp_path / "data.jsonl"), tmp_path / "two", 2)
    one, two = (ArrayRecordSource(tmp_path / name) for name in ("one", "two"))
    sizes = [[path.stat().st_size for path in sorted((tmp_path / name).iterdir())] for name in ("one", "two")]
    assert sizes[0] == sizes[1] and one.fingerprint != two.fingerprint
    (tmp_path / "one").rename(tmp_path / "moved")
    assert (
        ArrayRecordSource(tmp_path / "moved").fingerprint
        == one.fingerprint
        == pickle.loads(pickle.dumps(one)).fingerprint
    )
