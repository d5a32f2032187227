"""Generation of a tiny random model with pictures: batches, sampling, stop texts, lengths, and conversations."""

from __future__ import annotations

import dataclasses
import queue
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxmllm.aggregators.mlp import MLPProjector
from jaxmllm.data.sources.record import BadSample
from jaxmllm.data.templates import TOY
from jaxmllm.data.tokenizer import train_word_tokenizer
from jaxmllm.encoders.vit import ViT
from jaxmllm.eval.answer import Answerer, Question, Reply
from jaxmllm.eval.conversation import Conversation, without_open_end
from jaxmllm.eval.sampling import Sampling, Settings, next_token, sample
from jaxmllm.fusers.single import Single
from jaxmllm.llms.decoder import Decoder
from jaxmllm.mllm import MLLM
from jaxmllm.nn import compiler
from jaxmllm.objectives.next_token import NextToken
from jaxmllm.serve import batches
from jaxmllm.serve.batches import Batcher, Job
from tests.run_case import random_of, run_of

WORDS = "what swims here how many ducks are there one two three a red blue boat and the pond says hello again"
HOT = Sampling(temperature=2.0, top_k=9, top_p=0.9, seed=7)


@pytest.fixture(scope="module")
def answerer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    vocab = train_word_tokenizer([WORDS], str(folder)).size + 6  # the table is padded
    clip = ViT(42, 14, 16, 2, 2, 24, taps=(2,))
    decoder = Decoder(vocab, 16, 3, 4, 2, 24, window=20, windowed=(True, False), logit_cap=30.0)
    model = MLLM({"clip": clip}, {"clip": Single()}, MLPProjector(clip.grid), decoder, {"next_token": NextToken()})
    run = run_of(model, folder)
    run = dataclasses.replace(run, data=dataclasses.replace(run.data, template=TOY))
    params = random_of(run, 0.4)
    params["llm/lm_head/embedding"][TOY_END] *= 0.5  # replies of some length
    return Answerer(run, {path: jnp.asarray(x) for path, x in params.items()}, max_new_tokens=12)


TOY_END = 5


@pytest.fixture(scope="module")
def picture(tmp_path_factory):
    path = tmp_path_factory.mktemp("pictures") / "a.png"
    pixels = np.random.default_rng(0).integers(0, 256, (42, 42, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


@pytest.fixture(scope="module")
def questions(picture):
    """Prompts of several lengths, with and without picture and history, greedy and not."""
    said = (("how many ducks", "two red ducks"), ("and the boat", ""))
    return [
        Question("what swims here", (picture,)),
        Question("hello"),
        Question("the <image> pond", (picture,), said, sampling=HOT),
        Question("one two", history=said, sampling=Sampling(repetition_penalty=1.5)),
    ]


@pytest.fixture(scope="module")
def replies(answerer, questions):
    return list(answerer.ask(questions, batch=4))


def test_a_batch_gives_the_replies_of_single_questions(answerer, questions, replies):
    assert len(set(replies)) == 4 and any(len(reply.split()) > 6 for reply in replies)
    assert [next(answerer.ask([question], batch=1)) for question in questions] == replies
    assert list(answerer.ask(questions[::-1], batch=4)) == replies[::-1]


def test_greedy_equals_a_forward_pass_for_every_token(answerer, questions, replies):
    """No cache: the whole prompt and reply are read again for every token."""
    model, tokenizer = answerer.config.model, answerer.tokenizer
    params = {"params": {"llm": nested(answerer.params, "llm/")}}
    text = MLLM({}, {}, None, model.llm, {"next_token": NextToken()})
    ids = answerer.sample(questions[1]).tokens.tolist()
    start = len(ids)

    def logits(llm, x):
        ones = jnp.ones_like(x)
        states = llm(llm.embed(x), jnp.arange(x.shape[1])[None], ones)[0]
        return states @ llm.output_table().T

    run = jax.jit(lambda x: text.apply(params, x, method=lambda m, x: logits(m.llm, x)))
    for _ in range(12):
        row = np.zeros((1, 32), np.int32)
        row[0, : len(ids)] = ids  # what follows is hidden by causality
        ids.append(int(run(row)[0, len(ids) - 1, : tokenizer.size].argmax()))
        if ids[-1] == answerer.stop:
            break
    assert answerer.so_far(ids[start:], Sampling()).text.strip() == replies[1]


def test_layers_apart_are_the_layers_of_the_loop(answerer, questions, replies, monkeypatch):
    """On a CPU the decoder's layers are taken apart for the steps after the prefill; elsewhere they are a loop."""
    assert answerer.generator._apart[1].keys() == {"layer_0", "layer_1", "layer_2"}
    monkeypatch.setattr(compiler, "loops_copy_weights", lambda: False)
    looped = answerer.up_to(12)
    assert list(looped.ask(questions, batch=4)) == replies and looped.generator._apart == (None, None)


def nested(params: dict, prefix: str) -> dict:
    from jaxmllm.train.state import unflatten

    return unflatten({path.removeprefix(prefix): x for path, x in params.items() if path.startswith(prefix)})


def test_lengths_stops_and_seeds_of_single_requests(answerer, questions, replies):
    """In batches with all kinds of settings, as the one of `replies`."""

    def changed(i: int, **fields) -> Question:
        return dataclasses.replace(questions[i], sampling=dataclasses.replace(questions[i].sampling, **fields))

    long = max((0, 1, 3), key=lambda i: len(replies[i].split()))
    words = replies[long].split()
    asked = [changed(long, max_new_tokens=3), changed(long, stop=(f" {words[3]}", "no such text")), *questions[2:]]
    short, stopped, *same = answerer.ask(asked, batch=4)
    assert same == replies[2:] and 1 <= len(short.split()) <= 3 and words[: len(short.split())] == short.split()
    assert stopped == " ".join(words[: words.index(words[3])])
    found = list(answerer.ask([*(changed(2, seed=seed) for seed in (7, 8, 9)), questions[3]], batch=4))
    assert found[0] == replies[2] and len(set(found[:3])) == 3
    narrow = [changed(0, temperature=3.0, top_k=1), changed(0, temperature=3.0, top_p=1e-6)]
    assert list(answerer.ask([*narrow, *questions[2:]], batch=4))[:2] == replies[:1] * 2


def test_entries_that_the_tokenizer_lacks_are_never_chosen(answerer):
    assert answerer.config.model.llm.vocab > answerer.tokenizer.size == answerer.generator.vocab


@pytest.mark.parametrize(
    "sampling, kept",
    [
        (Sampling(temperature=1.0), [0, 1, 2, 3]),
        (Sampling(temperature=0.5), [0, 1, 2, 3]),
        (Sampling(temperature=1.0, top_k=2), [1, 3]),
        (Sampling(temperature=1.0, top_p=0.75), [1, 2, 3]),  # 0.5 + 0.2 are not enough
        (Sampling(temperature=1.0, top_p=0.7), [1, 3]),
        (Sampling(temperature=1.0, top_k=3, top_p=0.6), [1, 3]),
    ],
)
def test_samples_follow_the_distribution(sampling, kept):
    probability, count = np.array([0.1, 0.5, 0.2 - 1e-4, 0.2 + 1e-4]), 6000
    requests = [dataclasses.replace(sampling, seed=i) for i in range(count)]
    settings = Settings.of(requests, 5, [], 4)
    logits = jnp.broadcast_to(jnp.log(probability), (count, 4))
    found = np.bincount(jax.jit(sample)(logits, settings, 3), minlength=4) / count
    wanted = np.where(np.isin(range(4), kept), probability ** (1 / sampling.temperature), 0)
    np.testing.assert_allclose(found, wanted / wanted.sum(), atol=0.025)


def test_a_penalty_touches_what_was_seen():
    requests = [Sampling(repetition_penalty=2.0), Sampling()]
    settings = Settings.of(requests, 5, [np.array([1, 2]), np.array([1])], 4)
    logits = jnp.array([[0.5, 0.9, -0.1, 0.3]] * 2)
    token, settings = next_token(logits, None, settings, 0)
    assert token.tolist() == [0, 1] and settings.seen.tolist() == [
        [True, True, True, False],
        [False, True] + [False] * 2,
    ]


def served(batcher: Batcher, answerer: Answerer, questions: list[Question], streams: bool = False) -> list[list[Reply]]:
    """What a batcher tells of each question, if all are asked at once."""
    told, ended = [[] for _ in questions], queue.Queue()

    def tell(row: int, reply: Reply) -> None:
        told[row].append(reply)
        if isinstance(reply, Exception) or reply.ended:
            ended.put(row)

    batcher.submit([Job(answerer.sample(q), q.sampling, streams, partial(tell, i)) for i, q in enumerate(questions)])
    for _ in questions:
        ended.get(timeout=300)
    return told


def test_what_is_served_together_is_what_is_served_alone(answerer, questions, replies, monkeypatch):
    """In a real server prompts have room for more tokens; here they have the lengths that are compiled already."""
    monkeypatch.setattr(batches, "LEAST", 32)
    lines = []
    batcher = Batcher(answerer, 4, lines.append)
    together = served(batcher, answerer, questions)
    assert [len(told) for told in together] == [1] * 4 and len(lines) == 1
    assert [told[0].text.strip() for told in together] == replies
    assert {told[0].ended for told in together} <= {"stop", "length"}
    for question, (told,) in zip(questions, together):
        assert served(batcher, answerer, [question]) == [[told]]
    streamed = served(batcher, answerer, questions, streams=True)
    assert [told[-1] for told in streamed] == [told[0] for told in together]
    assert [[reply.tokens for reply in told] for told in streamed] == [
        [*range(1, told[-1].tokens + 1)] for told in streamed
    ]
    batcher.stop(0)


def test_counts_of_tokens_do_not_depend_on_when_a_stop_text_is_seen(answerer, replies):
    ids = answerer.tokenizer.backend.encode(replies[3], add_special_tokens=False).ids
    word = replies[3].split()[2]
    seen_late = answerer.so_far(ids, Sampling(stop=(f" {word}",)))
    count = next(n for n in range(1, len(ids) + 1) if answerer.so_far(ids[:n], Sampling(stop=(f" {word}",))).ended)
    assert seen_late == answerer.so_far(ids[:count], Sampling(stop=(f" {word}",))) and seen_late.tokens == count < len(
        ids
    )
    assert answerer.so_far(ids, Sampling(max_new_tokens=2))[1:] == (2, "length")


@pytest.mark.parametrize(
    "fields, says",
    [
        ({"temperature": -1.0}, "temperature must be 0 or more"),
        ({"top_p": 0.0}, "top_p must be above 0"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"seed": -1}, "seed must be from 0"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more"),
        ({"stop": "x"}, "stop must be a list of texts"),
        ({"stop": ("",)}, "stop must be a list of texts"),
    ],
)
def test_impossible_settings_are_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        Sampling(**fields)


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(),
        pytest.param(HOT, marks=pytest.mark.long),
        pytest.param(Sampling(stop=(" duck", " pond says", " red blue")), marks=pytest.mark.long),
    ],
)
def test_a_conversation_keeps_its_cache(answerer, picture, sampling, monkeypatch):
    """Each turn gives the reply that a question with the whole history gets, and only the first turn is a prefill."""
    conversation, begun, start = Conversation(answerer, [picture], sampling), [], answerer.start
    with monkeypatch.context() as patched:
        patched.setattr(answerer, "start", lambda *args: begun.append(args) or start(*args))
        for prompt in ("what swims here", "how many ducks"):
            conversation.reply(prompt)
    assert len(begun) == 1
    for turn, (prompt, reply) in enumerate(conversation.history):
        assert reply == next(
            answerer.ask([Question(prompt, (picture,), conversation.history[:turn], sampling=sampling)], 1)
        )
    assert sum(len(reply.split()) for _, reply in conversation.history) > 6


def test_replies_come_word_by_word(answerer, picture, replies):
    pieces = list(Conversation(answerer, [picture]).stream("what swims here"))
    assert "".join(pieces) == replies[0] and len(pieces) == len(replies[0].split())


def test_a_conversation_goes_on(answerer, picture):
    """After an empty reply, a marker that the model wrote, and prompts that cannot be asked."""
    conversation = Conversation(answerer, [picture])
    conversation.history = (("<image>\nwhat", ""), ("and", "an <image>"))
    before = conversation.history
    for typed in ("what is the <image> tag", "<image>" * 5, "why " * 500):
        with pytest.raises(BadSample):
            conversation.reply(typed)
    assert conversation.history == before
    reply = conversation.reply("hello")
    assert len(conversation.history) == 3
    assert reply == next(answerer.ask([Question("hello", (picture,), before)], 1))


def test_open_ends_wait():
    assert without_open_end("a du\ufffd", ()) == "a du"
    assert without_open_end("one #", ("###",)) == "one " and without_open_end("one #2", ("###",)) == "one #2"
