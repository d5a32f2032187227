"""Chat templates: those that jaxmllm has give what the published Jinja templates give, and those of a tokenizer's
folder are read from it. Labels are exact on random conversations."""

from __future__ import annotations

import dataclasses
import json
import random

import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, trainers

from jaxmllm.batch import IGNORE_LABEL, TokenLayout, VisualLayout
from jaxmllm.data import templates
from jaxmllm.data.own_template import OwnTemplate
from jaxmllm.data.samples import SampleSpec, make_tokens
from jaxmllm.data.sources.record import Record
from jaxmllm.data.tokenizer import load_tokenizer

SPECIAL = [
    "<s>", "</s>", "<bos>", "<eos>", "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>", "<|assistant|>", "<|system|>", "<|end|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
]  # fmt: skip
# The essence of the published templates; {S} is the system text.
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\n" + templates.ASSISTANT + "<|im_end|>\n' }}"
    "{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% set loop_messages = messages %}{% for m in loop_messages %}{% set content = '<|start_header_id|>' + m['role']"
    " + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' %}{% if loop.index0 == 0 %}"
    "{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
LLAMA2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for m in loop_messages %}"
    "{% if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('roles must alternate') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\n' + system_message + '\n<</SYS>>\n\n' + m['content'] %}"
    "{% else %}{% set content = m['content'] %}{% endif %}"
    "{% if m['role'] == 'user' %}{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}"
    "{% elif m['role'] == 'assistant' %}{{ ' ' + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set sys = messages[0]['content'] %}{% set rest = messages[1:] %}"
    "{% else %}{% set rest = messages %}{% endif %}{{ bos_token }}{% for m in rest %}"
    "{% if m['role'] == 'user' %}{% if loop.first and sys is defined %}{{ '[INST] ' + sys + '\n\n' + m['content'] +"
    " ' [/INST]' }}{% else %}{{ '[INST] ' + m['content'] + ' [/INST]' }}{% endif %}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ '<|system|>\n' + m['content'] + '<|end|>\n' }}"
    "{% elif m['role'] == 'user' %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}"
    "{% elif m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for m in messages %}{% if m['role'] == 'assistant' %}{% set role = 'model' %}"
    "{% else %}{% set role = m['role'] %}{% endif %}"
    "{{ '<start_of_turn>' + role + '\n' + m['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PUBLISHED = {  # name -> (Jinja, begin token, end token)
    "CHATML": (CHATML, None, "<|im_end|>"),
    "LLAMA3": (LLAMA3, "<|begin_of_text|>", "<|eot_id|>"),
    "LLAMA2": (LLAMA2, "<s>", "</s>"),
    "MISTRAL": (MISTRAL, "<s>", "</s>"),
    "PHI3": (PHI3, "<s>", "<|endoftext|>"),
    "GEMMA": (GEMMA, "<bos>", "<eos>"),
}
ALL = [*PUBLISHED, "PLAIN", "VICUNA_V1", "MISTRAL_V3"]


def write(folder, jinja: str | None = None, begin: str | None = None, end: str | None = None) -> str:
    """A byte-level tokenizer with the control tokens of all templates, and a chat template."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    backend.train_from_iterator(
        ["what swims here how many ducks are there"] * 3,
        trainers.BpeTrainer(vocab_size=320, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False),
    )
    folder.mkdir(exist_ok=True, parents=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": begin, "eos_token": end}
    if jinja:
        config["chat_template"] = jinja
    (folder / "tokenizer_config.json").write_text(json.dumps({k: v for k, v in config.items() if v}))
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Name -> a tokenizer's folder with that published template."""
    root = tmp_path_factory.mktemp("tokenizers")
    return {name: write(root / name, *published) for name, published in PUBLISHED.items()}


def spec_of(template, folder: str) -> SampleSpec:
    return SampleSpec(load_tokenizer(folder), template, VisualLayout({}, TokenLayout(), 0), 10**6, 0)


def conversation(rng: random.Random, system: bool) -> tuple[str | None, list[str]]:
    """A random conversation, whose texts hold anything: blanks, lines, letters beyond ASCII, spelled control tokens."""
    bits = ["duck", "two ", " \n", "ß", "鴨", "🦆", "'", "{{ x }}", "USER:", "[INST]", "</s>", "<|im_end|>", "\t", "."]

    def text(empty=False):
        return "".join(rng.choices(bits, k=rng.randint(0 if empty else 1, 6))).strip() or ("" if empty else "a")

    turns = [text(empty=i % 2 == 0) for i in range(2 * rng.randint(1, 4))]
    return (text() if system and rng.random() < 0.5 else None), turns


def record(system: str | None, turns: list[str]) -> Record:
    said = [{"from": ("human", "gpt")[i % 2], "value": text} for i, text in enumerate(turns)]
    return Record("a", "a", {"conversations": said} | ({"system": system} if system else {}), [], {})


def check_labels(template, folder: str, count: int) -> None:
    """The trained ids are those of every answer with its end, and of nothing else."""
    rng, spec = random.Random(0), spec_of(template, folder)
    ids_of_end = spec.tokenizer.encode(template.end)
    for _ in range(count):
        system, turns = conversation(rng, template.system is not None)
        turns = turns if template.question else turns[:2]  # without questions nothing stands between answers
        tokens, labels, _ = make_tokens(record(system, turns), [], spec)
        spans, at = [], None  # of trained tokens
        trained = [False, *(labels[:-1] != IGNORE_LABEL).tolist(), False]
        for i, flag in enumerate(trained):
            if flag and at is None:
                at = i
            if not flag and at is not None:
                spans, at = [*spans, (at, i)], None
        assert len(spans) == len(turns) // 2
        assert labels[-1] == IGNORE_LABEL
        for (start, stop), answer in zip(spans, turns[1::2]):
            own = tokens[start:stop].tolist()
            assert own[-len(ids_of_end) :] == ids_of_end
            said = spec.tokenizer.decode(own[: -len(ids_of_end)], skip_special=False)
            assert said == template.lead + answer
            assert labels[start - 1 : stop - 1].tolist() == own


@pytest.mark.parametrize("name", ALL)
def test_labels_are_exact(name, folders):
    check_labels(getattr(templates, name), folders["CHATML"], 1000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_tokenizers_own_template(name, folders):
    """It is found in the folder, gives the text of the template of that name, and its labels are exact."""
    own, named = OwnTemplate().of(folders[name]), getattr(templates, name)
    if name == "LLAMA3":  # the published one has no system text of its own
        named = dataclasses.replace(named, system="")
    rng = random.Random(1)
    for _ in range(200):
        system, turns = conversation(rng, own.system is not None)
        pairs = list(zip(turns[::2], turns[1::2]))
        text = ["".join(piece.text for piece in each.pieces(pairs, system)) for each in (own, named)]
        assert text[0] == text[1]
        trained = ["".join(piece.text for piece in each.pieces(pairs) if piece.trained) for each in (own, named)]
        assert trained[0] == trained[1]
    assert own.stop == named.stop and set(own.markers()) >= set(named.markers())
    check_labels(own, folders[name], 1000)


@pytest.mark.parametrize(
    "jinja, says",
    [
        (None, "has no chat_template; name a template of jaxmllm.data.templates"),
        ("{% for m in messages %}{{ m['content'] | upper }}<|im_end|>{% endfor %}", "does not show each turn once"),
        ("{{ messages[-1]['content'] }}<|im_end|>", "does not show each turn once"),
        (
            "{% for m in messages %}{{ '[' ~ loop.index ~ ']' + m['content'] + '<|im_end|>' }}{% endfor %}",
            "cannot be used",
        ),
        (
            CHATML.replace("{{ '<|im_start|>assistant\n' }}", "{{ '<|im_start|>assistant\n<think>\n' }}"),
            "what stands before an answer differs from what opens a reply",
        ),
    ],
)
def test_templates_that_are_more_than_texts_are_refused(jinja, says, tmp_path):
    with pytest.raises(ValueError, match=says) as error:
        OwnTemplate().of(write(tmp_path / "own", jinja))
    assert "\n" not in str(error.value)


def test_system_texts_of_templates_without_a_place(folders):
    assert OwnTemplate().of(folders["GEMMA"]).system is None
    assert dataclasses.replace(templates.GEMMA, system=None) != templates.GEMMA
