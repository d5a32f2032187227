"""Samples: labels, the places of visual tokens, targets, and which records are refused and why."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout
from jaxmllm.data.check import check, stats
from jaxmllm.data.images import View
from jaxmllm.data.samples import SampleSpec, make_sample
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.sources.record import BadSample
from jaxmllm.data.targets import MapTargets, area_means, noun_code
from jaxmllm.data.templates import CHATML, LLAMA3, PLAIN, TOY, VICUNA_V1
from jaxmllm.data.tokenizer import train_word_tokenizer
from tests.records import WORDS, chat, write_bad_records, write_good_records, write_jsonl

LAYOUT = VisualLayout(
    {"a": EncoderInput(24, 4, (122, 116, 104)), "b": EncoderInput(32, 8, (0, 0, 0))},
    TokenLayout(grid=4, newline=True, unpad=True), task_tokens=3,
)  # fmt: skip


@pytest.fixture
def source(tmp_path):
    write_good_records(tmp_path)
    return LlavaSource(tmp_path / "data.jsonl")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train_word_tokenizer([WORDS], tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="module")
def tokenizer_for_all(tmp_path_factory):
    """A word tokenizer with the special tokens of all templates."""
    tokenizer = train_word_tokenizer([WORDS, LLAMA3.system, VICUNA_V1.system], tmp_path_factory.mktemp("all"))
    markers = [m for t in (PLAIN, VICUNA_V1, LLAMA3, CHATML) for m in t.markers()]
    tokenizer.backend.add_special_tokens(markers)
    return tokenizer


def spec_of(tokenizer, template=TOY, **changes) -> SampleSpec:
    return SampleSpec(tokenizer, template, LAYOUT, **{"seq_len": 200, "image_slots": 4, **changes})


@pytest.mark.parametrize("template", [PLAIN, VICUNA_V1, LLAMA3, CHATML, TOY], ids=lambda t: t.name)
def test_labels_are_the_answers_and_their_ends(source, tokenizer_for_all, template):
    spec = spec_of(tokenizer_for_all, template)
    for k in range(len(source)):
        record = source[k]
        sample = make_sample(record, k, spec)
        tokens, labels = sample.tokens, sample.labels
        trained = np.flatnonzero(labels >= 0)
        assert (labels[trained] == tokens[trained + 1]).all()
        answers = [turn["value"] for turn in record.data["conversations"][1::2]]
        expected = [token for answer in answers for token in tokenizer_for_all.encode(answer + template.end)]
        assert labels[trained].tolist() == expected
        # The first answer follows exactly the tokens that inference would see.
        question = dataclasses.replace(record, data={"conversations": record.data["conversations"][:1]}, maps={})
        prompt = make_sample(question, 0, spec, reply_open=True)
        length = len(prompt.tokens)
        assert (prompt.tokens == tokens[:length]).all() and trained[0] == length - 1
        assert (prompt.labels == -100).all()


def test_a_tokenizer_without_the_templates_tokens_is_refused(tokenizer):
    with pytest.raises(ValueError, match=r"template llama3 needs the token <\|begin_of_text\|>"):
        spec_of(tokenizer, LLAMA3)


def test_visual_indices(source, tokenizer):
    spec = spec_of(tokenizer)
    block = LAYOUT.block
    assert block == 4 * 5 + 3
    square, wide, text, pair = (make_sample(source[k], k, spec) for k in range(4))
    assert square.visual_index[square.visual_index >= 0].tolist() == list(range(23))
    # 60 x 24 keeps 2 of 4 rows whole, newlines included; then come the task tokens.
    assert wide.visual_index[wide.visual_index >= 0].tolist() == [*range(5, 15), 20, 21, 22]
    assert wide.padding["a"].tolist() == [[0, 1]] and wide.padding["b"].tolist() == [[0, 2]]
    assert (text.visual_index == -1).all() and text.images["a"].shape == (0, 24, 24, 3)
    # 20 x 70 loses columns, but no newlines.
    narrow = np.setdiff1d(np.arange(20), [c + 5 * r for r in range(4) for c in (0, 3)])
    assert pair.visual_index[pair.visual_index >= block].tolist() == [*(narrow + block), 43, 44, 45]
    assert pair.images["b"].shape == (2, 32, 32, 3) and pair.image_count == 2
    first = np.flatnonzero(pair.visual_index >= 0)[0]
    assert tokenizer.decode(pair.tokens[:first], skip_special=False) == "<user>"


def test_map_targets(source, tokenizer, tmp_path):
    targets = MapTargets(grid=4, codes=20, cells=2, depth_mean=0.5, depth_std=0.25)
    sample = make_sample(source[0], 0, spec_of(tokenizer, targets=targets))
    assert sample.targets["depth"].shape == (1, 16, 4) and sample.targets["seg"].shape == (1, 16, 20)
    depth = np.asarray(Image.open(tmp_path / "depth.png")) / 65535
    for cell in range(16):
        y, x = 10 * (cell // 4), 10 * (cell % 4)
        parts = [depth[y + b : y + b + 5, x + a : x + a + 5].mean() for b in (0, 5) for a in (0, 5)]
        np.testing.assert_allclose(sample.targets["depth"][0, cell], (np.array(parts) - 0.5) / 0.25, atol=1e-5)
    seg = np.zeros((16, 20), np.float32)
    seg[[0, 4]] = noun_code("frog", 20)
    seg[15] = 0.5 * noun_code("pond", 20)
    np.testing.assert_allclose(sample.targets["seg"][0], seg, atol=1e-6)
    assert set(noun_code("frog", 20)) == {-1, 1} and (noun_code("frog", 20) != noun_code("pond", 20)).any()
    without = make_sample(source[3], 3, spec_of(tokenizer, targets=targets))
    assert without.target_mask["seg"].tolist() == [False, False] and not without.targets["seg"].any()


def test_area_means_of_a_padded_map():
    view = View((60, 14), LAYOUT.encoders["a"])
    ones = area_means(np.ones((7, 30), np.float32), 4, view.square(30, 7))  # a band in the middle of a square
    assert np.isclose(ones.mean(), 7 / 30) and (ones[[0, 3]] == 0).all()
    assert np.allclose(area_means(np.ones((9, 9), np.float32), 4, (0, 0, 9, 9)), 1)


def test_bad_samples_say_why(source, tokenizer, tmp_path):
    cases = write_bad_records(tmp_path)
    records = [{"id": f"n{k}", **record} for k, record in enumerate(cases.values())]
    source = LlavaSource(write_jsonl(tmp_path / "bad.jsonl", records))
    spec = spec_of(tokenizer, targets=MapTargets(4))
    for k, reason in enumerate(cases):
        with pytest.raises(BadSample) as caught:
            make_sample(source[k], k, spec)
        assert reason in caught.value.reason and caught.value.id == f"n{k}" and "\n" not in str(caught.value)


def test_a_leading_answer_is_dropped(tokenizer, tmp_path):
    record = {"conversations": [{"from": "gpt", "value": "hello"}, *chat("how many ?", "one")]}
    source = LlavaSource(write_jsonl(tmp_path / "one.jsonl", [record]))
    sample = make_sample(source[0], 0, spec_of(tokenizer))
    assert tokenizer.decode(sample.tokens, skip_special=False) == "<user> how many ?<assistant> one<end>"


def test_a_template_without_a_place_refuses_a_system_text(tokenizer_for_all, tmp_path):
    record = {"id": "s", "system": "a pond .", "conversations": chat("how many ?", "one")}
    source = LlavaSource(write_jsonl(tmp_path / "one.jsonl", [record]))
    with pytest.raises(BadSample, match="system text: the template plain has no place for one"):
        make_sample(source[0], 0, spec_of(tokenizer_for_all, PLAIN))
    sample = make_sample(source[0], 0, spec_of(tokenizer_for_all))
    assert tokenizer_for_all.decode(sample.tokens, skip_special=False).startswith("a pond .<user> how many ?")


def test_check_and_stats(tokenizer, tmp_path):
    good = write_good_records(tmp_path)
    bad = [{"id": f"n{k}", "source": "worse", **r} for k, r in enumerate(write_bad_records(tmp_path).values())]
    source = LlavaSource(write_jsonl(tmp_path / "all.jsonl", [*good, *bad, good[0]]))
    report = check(source)
    assert report.records == 25 and report.sources == {"": 5, "worse": 20} and report.duplicates == {"square": 2}
    assert report.kinds == {
        "missing file": 1, "only the case differs": 1, "unreadable picture": 2, "wrong number of <image>": 3,
        "empty answer": 1, "turns do not alternate": 2, "no conversation": 2, "media that is not read": 2,
        "unknown role": 1, "system text": 1, "broken text": 1, "unreadable target map": 1,
    }  # fmt: skip
    assert [problem.index for problem in check(source, spec_of(tokenizer, targets=MapTargets(4))).problems] == [
        *range(4, 24)
    ]
    measured = stats(source, spec_of(tokenizer))
    # Only sizes are read, so the truncated picture passes; target maps are not read at all.
    assert (measured.used, measured.bad, measured.images) == (7, 18, {0: 1, 1: 5, 2: 1})
    assert 0 < measured.packing <= 1 and measured.tokens["max"] == max(measured.tokens.values())
