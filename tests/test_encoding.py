"""Ids equal those of the rendered string, and text never becomes a control token, for tokenizers of several kinds."""

import dataclasses
import functools
import json
import random

import pytest
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout
from jaxmllm.data import templates
from jaxmllm.data.encoding import Encoder
from jaxmllm.data.samples import SampleSpec, make_tokens
from jaxmllm.data.sources.record import Record
from jaxmllm.data.templates import CHATML, IMAGE, VICUNA_V1, ChatTemplate
from jaxmllm.data.tokenizer import Tokenizer, train_word_tokenizer
from tests.conftest import ROOT
from tests.records import chat

BRACKETS = ChatTemplate(
    "brackets", "<s>", None, ("[INST] ", " [/INST]"), "", "</s>", "", True, lead=" ", control=("<s>", "[INST]", "</s>")
)
TEMPLATES = [value for value in vars(templates).values() if isinstance(value, ChatTemplate)] + [BRACKETS]
CONTROL = sorted({marker for template in TEMPLATES for marker in template.markers()})
BRACKETED = {"[INST]", "[/INST]"}  # control tokens of some templates, text of others, whose tokenizers lack them
OTHERS = ["<pad>", "<unk>", "<extra>"]  # special tokens that no template uses
CORPUS = (ROOT / "README.md").read_text().splitlines()
LLAMA3_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def byte_level(split=None) -> Backend:
    """Byte-level BPE as GPT-2's; with `split`, as Llama 3's and Qwen's. Its post-processor trims offsets."""
    backend = Backend(models.BPE(ignore_merges=bool(split)))
    parts = [pre_tokenizers.Split(Regex(split), "isolated")] if split else []
    parts.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not split))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Sequence(parts), decoders.ByteLevel()
    backend.post_processor = processors.ByteLevel(trim_offsets=True)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(CORPUS, trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet))
    return backend


def llama(legacy: bool) -> Backend:
    """BPE as converted from Llama's SentencePiece model: every text gets a blank in front, or only the first one."""
    bytes_ = [f"<0x{k:02X}>" for k in range(256)]
    backend = Backend(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    if legacy:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    words = [word for line in CORPUS for word in line.replace(" ", " ▁").split(" ")]
    trained = Backend(models.BPE())
    trained.train_from_iterator(words, trainers.BpeTrainer(vocab_size=700))
    model = json.loads(trained.to_str())["model"]
    vocab = {token: id for id, token in enumerate(dict.fromkeys(["<unk>", "<s>", "</s>", *bytes_, *model["vocab"]]))}
    # "</s>" can be merged from "</" and "s>", as in Llama's own file.
    first = [("<", "/"), ("s", ">"), ("</", "s>")]
    for token in ("<", "/", "s", ">", "</", "s>"):
        vocab.setdefault(token, len(vocab))
    merges = [*first, *map(tuple, model["merges"])]
    backend.model = models.BPE(vocab, merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>")
    return backend


def unigram() -> Backend:
    """SentencePiece's other model, with the control tokens of the templates among its pieces."""
    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first")
    special = ["<unk>", "<s>", "</s>", "<end>", "<|im_end|>"]
    trainer = trainers.UnigramTrainer(vocab_size=600, special_tokens=special, unk_token="<unk>")
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def white_space() -> Backend:
    """Words between blanks; control tokens are words too, and are not flagged as special."""
    words = {word for line in CORPUS for word in line.split()}
    vocab = {word: id for id, word in enumerate(["<unk>", *CONTROL, *sorted(words)])}
    backend = Backend(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return backend


def flags(kind: str) -> dict:
    """How a tokenizer of some kind flags its control tokens; Phi-3's take blanks on their right."""
    return {"special": kind not in ("white space", "llama"), "rstrip": kind == "split bytes", "normalized": False}


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    """tokenizers(kind, template): one with all control tokens, except brackets that are text for the template."""

    @functools.cache
    def made(kind: str, brackets: frozenset[str]) -> Tokenizer:
        backend = {
            "bytes": byte_level,
            "split bytes": lambda: byte_level(LLAMA3_SPLIT),
            "llama": lambda: llama(legacy=True),
            "llama, not legacy": lambda: llama(legacy=False),
            "unigram": unigram,
            "white space": white_space,
            "words": lambda: train_word_tokenizer(CORPUS, tmp_path_factory.mktemp("words")).backend,
        }[kind]()
        add = backend.add_special_tokens if flags(kind)["special"] else backend.add_tokens
        add([AddedToken(token, **flags(kind)) for token in CONTROL if token not in BRACKETED - brackets])
        backend.add_special_tokens([IMAGE, *OTHERS])
        return Tokenizer(kind, backend)

    return lambda kind, template=None: made(
        kind, frozenset(BRACKETED.intersection(template.markers() if template else BRACKETED))
    )


KINDS = ["bytes", "split bytes", "llama", "llama, not legacy", "unigram", "white space", "words"]
WORDS = [word for line in CORPUS for word in line.split()]
ODD = [
    "é",
    "写真",
    "🙂",
    "\u00a0",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "(B)",
    ":",
    "'s",
    "<",
    ">",
    "</",
    "<|",
    "|>",
    "1234567",
    "▁",
    "\x00",
]


def random_text(rng: random.Random) -> str:
    """Some words with odd characters among them, without control tokens, and without blanks at the ends."""
    words = [rng.choice(ODD if rng.random() < 0.4 else WORDS) for _ in range(rng.randint(1, 12))]
    text = rng.choice(["", " "]).join(words).strip()
    return text if not any(token in text for token in [*CONTROL, *OTHERS, IMAGE]) else "?"


def random_conversation(rng: random.Random) -> tuple[list[tuple[str, str | None]], str | None]:
    """Exchanges, some with pictures and some with an open reply, and a system text or None."""
    turns = [(random_text(rng), random_text(rng) or "yes") for _ in range(rng.randint(1, 3))]
    turns = [(rng.choice([q, q, f"{IMAGE}\n{q}", f"{q} {IMAGE} {q} {IMAGE}"]), a) for q, a in turns]
    if rng.random() < 0.2:
        turns[-1] = turns[-1][0], None
    return turns, rng.choice([None, random_text(rng)])


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_rendered_string(tokenizers, kind, template):
    """For 1050 random conversations of each template."""
    tokenizer, rng = tokenizers(kind, template), random.Random(KINDS.index(kind))
    encoder, picture = Encoder(tokenizer, template.markers()), tokenizer.id(IMAGE)
    for _ in range(150):
        turns, system = random_conversation(rng)
        pieces = template.pieces(turns, system)
        rendered = "".join(piece.text for piece in pieces)
        found = encoder(pieces)
        ids = [id for piece in found for id in ([picture] if piece.image else piece.ids)]
        assert ids == tokenizer.encode(rendered), rendered
        assert "".join(piece.text for piece in found) == rendered
        trained = "".join(piece.text for piece in found if piece.trained)
        assert trained == "".join(template.lead + answer + template.end for _, answer in turns if answer)


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda t: t.name)
@pytest.mark.parametrize("kind", KINDS)
def test_text_never_becomes_a_control_token(tokenizers, kind, template):
    """Every control token of the template and every special token, in every place of a record: ids hold only those that
    the template wrote."""
    tokenizer = tokenizers(kind, template)
    encoder = Encoder(tokenizer, template.markers())
    flagged = [token for token in CONTROL if token not in BRACKETED] if flags(kind)["special"] else []
    spelled = [*template.markers(), *flagged, *OTHERS]
    reserved = {tokenizer.id(token) for token in spelled if token != "<unk>"}  # unknown words are that one
    count = lambda pieces: [id for piece in pieces for id in piece.ids if id in reserved]
    plain = template.pieces([("why ?", "so ."), ("why ?", "so .")], "Hm .")
    for token in spelled:
        for text in (token, f"a {token} b", f"a{token}{token}b", f"({token}\n"):
            pieces = template.pieces([(text, text), (text, text)], text)
            found = encoder(pieces)
            assert count(found) == count(encoder(plain)), text
            assert "".join(piece.text for piece in found) == "".join(piece.text for piece in pieces)
            if kind == "bytes":  # nothing of the text is lost
                ids = [id for piece in found if piece.trained for id in piece.ids]
                assert tokenizer.decode(ids, skip_special=False) == 2 * (template.lead + text + template.end)


def test_a_token_of_a_vocabulary_is_text_too(tokenizers):
    """The vocabulary of these tokenizers has the spelled tokens, so that they come out of the model itself."""
    for kind, text in (("unigram", "</s>"), ("white space", "so <end> ?"), ("llama", "a</s>")):
        copy = Encoder(tokenizers(kind), VICUNA_V1.markers()).copy
        assert {"</s>", "<end>"} & set(copy.encode(text, add_special_tokens=False).tokens), kind


def test_control_tokens_that_a_normalizer_would_hide():
    """Old Llama files flag <s> and </s> as normalized: the library then looks for "▁<s>" and misses "x<s>"."""
    backend = llama(legacy=True)
    backend.add_special_tokens([AddedToken(token, normalized=True) for token in ("<s>", "</s>")])
    tokenizer = Tokenizer("old", backend)
    assert tokenizer.id("<s>") not in tokenizer.encode("x<s>")
    found = Encoder(tokenizer, VICUNA_V1.markers())(VICUNA_V1.pieces([("why", "yes"), ("why </s>", "no")]))
    ids = [id for piece in found for id in piece.ids]
    assert [id for id in ids if id in (1, 2)] == [1, 2, 2]


def test_tokens_that_reach_over_a_border_belong_to_where_they_end(tokenizers):
    """ "ASSISTANT:" and "(B)": a tokenizer may join ":" and "(", and the answer is still learned from its first
    character."""
    glued = dataclasses.replace(VICUNA_V1, lead="", assistant="ASSISTANT")
    tokenizer = tokenizers("split bytes")
    found = Encoder(tokenizer, glued.markers())(glued.pieces([("why", "s can")]))
    answer = [piece for piece in found if piece.trained][0]
    assert answer.text == "s can" and tokenizer.decode(answer.ids).endswith("s can")


def test_make_tokens_trains_answers_and_their_ends(tokenizers):
    """Labels of a real template and tokenizer, the picture's places among them."""
    layout = VisualLayout({"a": EncoderInput(8, 2, (0, 0, 0))}, TokenLayout(grid=2), 0)
    tokenizer = tokenizers("split bytes")
    spec = SampleSpec(tokenizer, CHATML, layout, seq_len=200, image_slots=1)
    turns = chat("What is <image> ?", "A duck <|im_end|>.", "Why ?", "So.")
    record = Record("1", "d.jsonl", {"conversations": [{"from": "system", "value": "Be brief."}, *turns]}, [], {})
    record = dataclasses.replace(record, images=[None])
    tokens, labels, visual = make_tokens(record, [(8, 8)], spec)
    assert visual[visual >= 0].tolist() == [0, 1, 2, 3]
    text = tokenizer.decode(tokens[visual < 0], skip_special=False)
    assert "system" in text and "Be brief." in text and "helpful" not in text
    trained = labels[labels >= 0].tolist()
    end = tokenizer.id("<|im_end|>")
    assert trained.count(end) == 2 and tokens[visual < 0].tolist().count(end) == 5
    assert tokenizer.decode(trained, skip_special=False) == "A duck <|im_end|>.<|im_end|>So.<|im_end|>"


def test_too_many_control_tokens_are_refused(tokenizers):
    with pytest.raises(ValueError, match="a template can have 30 control tokens, not 31"):
        Encoder(tokenizers("words"), [f"<{k}>" for k in range(31)])
