"""Records, templates, tokens, pictures, targets: what one sample is made of, and what is refused."""

import io
import json
import pickle
import random
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout
from jaxmllm.data import sources
from jaxmllm.data.check import check, stats
from jaxmllm.data.images import key_mask, padding, prepare, token_mask
from jaxmllm.data.samples import BadSample, SampleSpec, make_sample
from jaxmllm.data.sources import ArrayRecordSource, LlavaSource, convert, open_source
from jaxmllm.data.targets import MapTargets, area_means, noun_code
from jaxmllm.data.templates import CHATML, LLAMA3, PLAIN, TOY, VICUNA_V1
from jaxmllm.data.tokenizer import load_tokenizer, train_word_tokenizer

LAYOUT = VisualLayout(
    {"a": EncoderInput(24, 4, (122, 116, 104)), "b": EncoderInput(32, 8, (0, 0, 0))},
    TokenLayout(8, grid=4, newline=True, unpad=True), task_tokens=3,
)  # fmt: skip
WORDS = "how many frogs are there ? one two three four it's a pond .\nUSER : ASSISTANT"


def jpeg(width: int, height: int, seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG")
    return file.getvalue()


def chat(*turns: str) -> list[dict[str, str]]:
    return [{"from": ("human", "gpt")[k % 2], "value": text} for k, text in enumerate(turns)]


def write_jsonl(path: Path, records: list[dict]) -> str:
    path.write_text("".join(json.dumps(r) + "\n" for r in records))
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Three pictures, and records of all the kinds that are fine."""
    for k, size in enumerate([(40, 40), (60, 24), (20, 70)]):
        (tmp_path / f"{k}.jpg").write_bytes(jpeg(*size, k))
    depth = np.linspace(0, 65535, 40 * 40).reshape(40, 40).astype(np.uint16)
    Image.fromarray(depth).save(tmp_path / "depth.png")
    instances = np.zeros((40, 40), np.uint8)
    instances[:20, :10], instances[30:, 35:] = 1, 2
    Image.fromarray(instances).save(tmp_path / "instances.png")
    maps = {"depth": "depth.png", "instances": "instances.png", "objects": ["frog", "pond"]}
    records = [
        {"id": "square", "image": "0.jpg", **maps, "conversations": chat("<image>\nhow many ?", "three")},
        {"id": "wide", "image": "1.jpg", "conversations": chat("a ? <image>", "two", "it's ?", "a pond .")},
        {"id": "text \"{é\\", "image": "nan", "conversations": chat("how many } ?", "four { \" \\")},
        {"id": "pair", "image": ["0.jpg", "2.jpg"], "conversations": chat("<image> a <image>", "one")},
    ]  # fmt: skip
    write_jsonl(tmp_path / "data.jsonl", records)
    return tmp_path, records


@pytest.fixture(scope="session")
def words(tmp_path_factory):
    return train_word_tokenizer([WORDS], tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def llama_like(tmp_path_factory):
    """A word tokenizer with the special tokens of all templates."""
    tokenizer = train_word_tokenizer([WORDS, LLAMA3.system, VICUNA_V1.system], tmp_path_factory.mktemp("all"))
    markers = [m for t in (PLAIN, VICUNA_V1, LLAMA3, CHATML) for m in t.markers()]
    tokenizer.backend.add_special_tokens(markers)
    return tokenizer


def spec_of(tokenizer, template=TOY, **changes) -> SampleSpec:
    return SampleSpec(tokenizer, template, LAYOUT, **{"seq_len": 200, "image_slots": 4, **changes})


# Sources


def same(a, b):
    assert (a.id, a.data) == (b.id, b.data)
    assert [x.read() for x in a.images] == [x.read() for x in b.images]
    assert {k: x.read() for k, x in a.maps.items()} == {k: x.read() for k, x in b.maps.items()}


def test_all_formats_give_the_same_records(folder, monkeypatch):
    root, records = folder
    (root / "data.json").write_text(json.dumps(records, indent=2, ensure_ascii=False))
    jsonl = LlavaSource(root / "data.jsonl")
    done = []
    assert convert(jsonl, root / "shards", 3, lambda *now: done.append(now)) == []
    assert done[-1] == (4, 4)
    names = sorted(p.name for p in (root / "shards").iterdir())
    assert names == [f"part-0000{k}-of-00003.array_record" for k in range(3)]
    monkeypatch.setattr(sources, "CHUNK", 37)  # records cross the borders of chunks
    found = [open_source(str(root / name)) for name in ("data.jsonl", "data.json", "shards")]
    found += [pickle.loads(pickle.dumps(source)) for source in found]
    for source in found:
        assert len(source) == len(records)
        for k in range(len(source)):
            same(source[k], jsonl[k])
            assert source[k].data == records[k]


def test_array_bounds_with_any_escapes(tmp_path, monkeypatch):
    draw = random.Random(0)
    records = [{"t": "".join(draw.choices('\\"{}[],x\n', k=draw.randrange(12)))} for _ in range(300)]
    (tmp_path / "a.json").write_text(json.dumps(records))
    for chunk in (1, 5, 64, 1 << 20):
        monkeypatch.setattr(sources, "CHUNK", chunk)
        source = LlavaSource(tmp_path / "a.json")
        assert [source[k].data for k in range(len(source))] == records


def test_source_errors(folder):
    root, _ = folder
    with pytest.raises(ValueError, match="no data file"):
        LlavaSource(root / "nothing.json")
    (root / "cut.json").write_text('[{"id": 1}, {"id": 2')
    with pytest.raises(ValueError, match="ends inside a record"):
        LlavaSource(root / "cut.json")
    (root / "cut.jsonl").write_text('{"id": 1}\n\n{"id": 2')
    source = LlavaSource(root / "cut.jsonl")
    assert source[0].id == "1" and len(source) == 2
    with pytest.raises(BadSample, match="not JSON"):
        source[1]
    with pytest.raises(ValueError, match="no ArrayRecord shards"):
        ArrayRecordSource(root / "nothing")
    with pytest.raises(ValueError, match="not an empty folder"):
        convert(source, root, 1)
    convert(LlavaSource(root / "data.jsonl"), root / "shards", 2)
    (root / "shards" / "part-00000-of-00002.array_record").unlink()
    with pytest.raises(ValueError, match="has 1 shards, but their names say 2"):
        ArrayRecordSource(root / "shards")


@pytest.mark.parametrize("kind", ["chat", "qa"])
def test_tfds_folders_need_no_tensorflow(tmp_path, kind):
    import tensorflow_datasets as tfds

    says = [(f"<image>\nhow {k} ?", f"a {k}") for k in range(3)]

    words = tfds.features.Text()
    turn = tfds.features.Sequence({"from": words, "value": words})
    said = {"chat": {"conversations": turn}, "qa": {"question": words, "answer": words}}[kind]

    class Tiny(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        __module__ = "__main__"  # as in a script; elsewhere TFDS wants a package that it does not install
        VERSION = tfds.core.Version("1.0.0")

        def _info(self):
            features = tfds.features.FeaturesDict({"image": tfds.features.Image(), **said})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            for k, turns in enumerate(says):
                pair = {"question": f"how {k} ?", "answer": f"a {k}"}
                item = {"conversations": chat(*turns)} if kind == "chat" else pair
                yield k, {"image": io.BytesIO(jpeg(8, 6 + k)), **item}

    builder = Tiny(data_dir=tmp_path, file_format="array_record")
    builder.download_and_prepare()
    source = pickle.loads(pickle.dumps(open_source(f"{builder.data_path}:train")))
    records = sorted((source[k] for k in range(3)), key=lambda record: record.data["conversations"][1]["value"])
    assert [record.data["conversations"] for record in records] == [chat(*turns) for turns in says]
    assert [record.images[0].read() for record in records] == [jpeg(8, 6 + k) for k in range(3)]
    assert "tensorflow" not in sys.modules
    with pytest.raises(ValueError, match="has no split 'val'; it has train"):
        open_source(f"{builder.data_path}:val")


# Templates and tokens


@pytest.mark.parametrize("template", [PLAIN, VICUNA_V1, LLAMA3, CHATML, TOY], ids=lambda t: t.name)
def test_labels_are_the_answers_and_their_ends(folder, llama_like, template):
    source, spec = LlavaSource(folder[0] / "data.jsonl"), spec_of(llama_like, template)
    for k in range(len(source)):
        sample = make_sample(source[k], k, spec)
        tokens, labels = sample.tokens, sample.labels
        trained = np.flatnonzero(labels >= 0)
        assert (labels[trained] == tokens[trained + 1]).all()
        answers = [turn["value"] for turn in source[k].data["conversations"][1::2]]
        expected = [token for answer in answers for token in llama_like.encode(answer + template.end)]
        assert labels[trained].tolist() == expected
        prompt = {"conversations": source[k].data["conversations"][:1]}
        opened = make_sample(source[k].__class__("p", "", prompt, source[k].images, {}), 0, spec, True)
        n = len(opened.tokens)  # the answer follows what inference would see
        assert (opened.tokens == tokens[:n]).all() and trained[0] == n - 1
        assert (opened.labels == -100).all()


def test_templates_write_what_the_references_write():
    turns = [("hi <image>", "yes"), ("more", "no")]
    text = lambda template: "".join(piece.text for piece in template.pieces(turns))
    assert text(VICUNA_V1).endswith(
        "answers to the user's questions. USER: <image>\nhi ASSISTANT:yes</s>USER: more ASSISTANT:no</s>"
    )
    assert text(PLAIN) == "<s><image>yes\nno\n"
    assert text(TOY) == "<user>hi <image><assistant>yes<end><user>more<assistant>no<end>"
    assert text(LLAMA3).endswith(
        "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nmore<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nno<|eot_id|>"
    )
    assert "<|im_start|>user\n<image>\nhi<|im_end|>\n<|im_start|>assistant\nyes<|im_end|>\n<|im_start|>" in text(CHATML)


def test_word_tokenizer(words):
    text = "how many frogs? it's\n a  pond."
    assert words.decode(words.encode(text)) == "how many frogs? it's a pond."
    assert words.decode(words.encode("<user>how?<assistant>three<end>")) == "how? three"
    assert words.encode("<image>") == [words.id("<image>")] == [2]
    assert words.encode("zebra") == [words.id("<unk>")]
    assert words.size == 6 + len(set(WORDS.replace("it's", "it ' s").split())) + 1  # and the lone blank


def test_word_tokenizer_opens_in_transformers(words):
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(words.path, local_files_only=True)
    for text in ("how many frogs? it's a pond.", "<user>how<assistant>three<end>"):
        assert theirs.encode(text, add_special_tokens=False) == words.encode(text)
    assert (theirs.pad_token_id, theirs.eos_token) == (0, "<end>")


def test_tokenizer_errors(tmp_path, words):
    with pytest.raises(ValueError, match="no tokenizer at"):
        load_tokenizer(tmp_path)
    with pytest.raises(ValueError, match=r"template llama3 needs the token <\|begin_of_text\|>"):
        spec_of(words, LLAMA3)


# Pictures


def test_padding_equals_the_golden_masks():
    golden = np.load(Path(__file__).parent / "goldens" / "cambrian_masks_a.npz")
    config = json.loads(str(golden["meta"]))["config"]
    coarse, fine = config["query_grid_side"], config["encoder_grid_side"]
    for k, (width, height) in enumerate(golden["inputs/image_sizes"].tolist()):
        (x, y), (fine_x, fine_y) = padding(width, height, coarse), padding(width, height, fine)
        assert golden["outputs/padding"][k].tolist() == [x, x, y, y, fine_x, fine_x, fine_y, fine_y]
        assert (token_mask(width, height, coarse, True) == golden["outputs/token_mask"][k]).all()
        assert (key_mask((fine_x, fine_y), fine) == golden["outputs/key_mask"][k]).all()


@pytest.mark.parametrize("size", [(3000, 10), (10, 3000), (1, 1)])
def test_some_tokens_stay_at_any_aspect(size):
    for grid in (1, 2, 4, 24, 27):
        assert token_mask(*size, grid, newline=False).any()


def test_prepare_pads_in_the_middle():
    encoder = EncoderInput(5, 1, (1, 2, 3))
    picture = Image.new("RGB", (5, 2), (200, 200, 200))
    pixels = prepare(picture, encoder)
    assert (pixels[1:3] == 200).all() and (pixels[[0, 3, 4]] == (1, 2, 3)).all()
    assert prepare(Image.new("RGB", (300, 100)), EncoderInput(48, 1, (9, 9, 9))).shape == (48, 48, 3)


def test_visual_places(folder, words):
    source, spec = LlavaSource(folder[0] / "data.jsonl"), spec_of(words)
    block = LAYOUT.block
    assert block == 4 * 5 + 3
    square, wide, text, pair = (make_sample(source[k], k, spec) for k in range(4))
    assert square.visual[square.visual >= 0].tolist() == list(range(23))
    # 60 x 24 keeps 2 of 4 rows whole, newlines included; then the task tokens
    assert wide.visual[wide.visual >= 0].tolist() == [*range(5, 15), 20, 21, 22]
    assert wide.padding["a"].tolist() == [[0, 1]] and wide.padding["b"].tolist() == [[0, 2]]
    assert (text.visual == -1).all() and text.images["a"].shape == (0, 24, 24, 3)
    # 20 x 70 loses columns, but no newlines
    narrow = np.setdiff1d(np.arange(20), [c + 5 * r for r in range(4) for c in (0, 3)])
    assert pair.visual[pair.visual >= block].tolist() == [*(narrow + block), 43, 44, 45]
    assert pair.images["b"].shape == (2, 32, 32, 3) and pair.image_count == 2
    first = np.flatnonzero(pair.visual >= 0)[0]
    assert words.decode(pair.tokens[:first], skip_special=False) == "<user>"


# Targets


def test_map_targets(folder, words):
    source = LlavaSource(folder[0] / "data.jsonl")
    targets = MapTargets(grid=4, codes=20, cells=2, depth_mean=0.5, depth_std=0.25)
    sample = make_sample(source[0], 0, spec_of(words, targets=targets))
    assert sample.targets["depth"].shape == (1, 16, 4) and sample.targets["seg"].shape == (1, 16, 20)
    depth = np.asarray(Image.open(folder[0] / "depth.png")) / 65535
    for cell in range(16):
        y, x = 10 * (cell // 4), 10 * (cell % 4)
        parts = [depth[y + b : y + b + 5, x + a : x + a + 5].mean() for b in (0, 5) for a in (0, 5)]
        np.testing.assert_allclose(sample.targets["depth"][0, cell], (np.array(parts) - 0.5) / 0.25, atol=1e-5)
    seg = np.zeros((16, 20), np.float32)
    seg[[0, 4]] = noun_code("frog", 20)
    seg[15] = 0.5 * noun_code("pond", 20)
    np.testing.assert_allclose(sample.targets["seg"][0], seg, atol=1e-6)
    assert set(noun_code("frog", 20)) == {-1, 1} and (noun_code("frog", 20) != noun_code("pond", 20)).any()
    without = make_sample(source[3], 3, spec_of(words, targets=targets))
    assert without.target_mask["seg"].tolist() == [False, False] and not without.targets["seg"].any()


def test_area_means_of_a_padded_map():
    ones = area_means(np.ones((7, 30), np.float32), 4)  # a band in the middle of a 30 x 30 square
    assert np.isclose(ones.mean(), 7 / 30) and (ones[[0, 3]] == 0).all()
    assert np.allclose(area_means(np.ones((9, 9), np.float32), 4), 1)


# What is refused


def bad_records(root: Path) -> dict[str, dict]:
    """What the reason must say -> the record."""
    (root / "cut.jpg").write_bytes(jpeg(64, 64)[:800])
    (root / "text.jpg").write_text("no picture")
    (root / "Upper").mkdir()
    (root / "Upper" / "Case.JPG").write_bytes(jpeg(8, 8))
    Image.fromarray(np.full((8, 8), 3, np.uint8)).save(root / "three.png")
    ask = chat("<image> how many ?", "one")
    return {
        "missing file": {"image": "none.jpg", "conversations": ask},
        "only the case differs: ": {"image": "upper/case.jpg", "conversations": ask},
        "unreadable picture: image file is truncated": {"image": "cut.jpg", "conversations": ask},
        "unreadable picture: cannot identify": {"image": "text.jpg", "conversations": ask},
        "wrong number of <image>: 1 in the text, 0 pictures": {"conversations": ask},
        "wrong number of <image>: 1 in the text, 2 pictures": {"image": ["0.jpg"] * 2, "conversations": ask},
        "wrong number of <image>: 2 in the text, 1 pictures": {
            "image": "0.jpg", "conversations": chat("<image><image>", "one"),
        },
        "empty answer: turn 3": {"conversations": chat("a", "one", "a", " \n")},
        "do not alternate: turn 1 is from 'human'": {"conversations": chat("a")[:1] * 2},
        "do not alternate: the last turn is a question": {"conversations": chat("a", "one", "a")},
        "no conversation": {"conversations": []},
        "no conversation: a list": {"text": "a"},
        "too long: 207 tokens, and a row has 200": {"conversations": chat("a " * 203, "one")},
        "too many pictures: 5, and a row has 4": {
            "image": ["2.jpg"] * 5, "conversations": chat("<image>" * 5, "one"),
        },
        "unreadable target map: instance 3, but there are 1 objects": {
            "image": "0.jpg", "instances": "three.png", "objects": ["frog"], "conversations": ask,
        },
    }  # fmt: skip


def test_bad_samples_say_why(folder, words):
    root, _ = folder
    cases = bad_records(root)
    source = LlavaSource(write_jsonl(root / "bad.jsonl", [{"id": f"n{k}", **r} for k, r in enumerate(cases.values())]))
    spec = spec_of(words, targets=MapTargets(4))
    for k, reason in enumerate(cases):
        with pytest.raises(BadSample) as caught:
            make_sample(source[k], k, spec)
        assert reason in caught.value.reason and caught.value.id == f"n{k}" and "\n" not in str(caught.value)


def test_a_leading_answer_is_dropped(folder, words):
    record = {"conversations": [{"from": "gpt", "value": "hello"}, *chat("how many ?", "one")]}
    source = LlavaSource(write_jsonl(folder[0] / "one.jsonl", [record]))
    sample = make_sample(source[0], 0, spec_of(words))
    assert words.decode(sample.tokens, skip_special=False) == "<user> how many ?<assistant> one<end>"


def test_check_and_stats(folder, words):
    root, records = folder
    bad = [{"id": f"n{k}", "source": "worse", **r} for k, r in enumerate(bad_records(root).values())]
    source = LlavaSource(write_jsonl(root / "all.jsonl", [*records, *bad, records[0]]))
    report = check(source)
    assert report.records == 20 and report.sources == {"": 5, "worse": 15} and report.duplicates == {"square": 2}
    kinds = {kind: len(found) for kind, found in report.problems.items()}
    assert kinds == {
        "missing file": 1, "only the case differs": 1, "unreadable picture": 2, "wrong number of <image>": 3,
        "empty answer": 1, "turns do not alternate": 2, "no conversation": 2,
    }  # fmt: skip
    found = stats(source, spec_of(words))
    # Only sizes are read, so the truncated picture passes, and no target maps.
    assert (found.used, found.bad, found.images) == (7, 13, {0: 1, 1: 5, 2: 1})
    assert 0 < found.packing <= 1 and found.tokens["max"] == max(found.tokens.values())
