"""Parameters in, replies out: an Answerer made of a config and parameters, without a workdir."""

import copy
import dataclasses
import json

import jax
import pytest
from tokenizers import Tokenizer as Backend

from jaxmllm.data.sources.record import Blob
from jaxmllm.errors import ConfigError
from jaxmllm.eval.answer import Answerer, Question, Reply
from jaxmllm.eval.periodic import cast
from jaxmllm.eval.sampling import Sampling
from jaxmllm.mesh import Mesh
from tests.tiny_run import random_params, tiny_run


@pytest.fixture(scope="module")
def answerer(scenes):
    """Of random weights that are large enough for the replies to differ."""
    run = tiny_run(scenes)
    return Answerer(run, {path: 4 * x for path, x in random_params(run).items()}, max_new_tokens=5)


@pytest.fixture(scope="module")
def questions(scenes):
    rows = [json.loads(line) for line in open(scenes / "heldout.jsonl")][:7]
    return [Question(row["prompt"], (str(scenes / row["image"]),), place=str(i)) for i, row in enumerate(rows)]


def test_replies_come_in_order_whatever_the_batch(answerer, questions):
    together = list(answerer.ask(questions, batch=3))
    assert len(together) == 7 and len(set(together)) > 1
    assert list(answerer.ask(questions[::-1], batch=8)) == together[::-1]


def test_replies_come_as_they_are_made(answerer, questions):
    broken = Question("what?", ("gone.jpg",), place="rows.jsonl:9")
    replies = answerer.ask([*questions[:2], broken], batch=2)
    assert [next(replies), next(replies)] == list(answerer.ask(questions[:2], batch=2))
    with pytest.raises(ValueError, match="gone.jpg"):
        next(replies)


def test_it_works_under_the_transfer_guard(answerer, questions):
    with jax.transfer_guard("disallow"):
        under = list(answerer.ask(questions, batch=3))
    assert under == list(answerer.ask(questions, batch=3))


def test_other_parameters_need_no_other_program(answerer, questions):
    other = answerer.holding({path: -x for path, x in answerer.params.items()})
    before = list(answerer.ask(questions, batch=3))
    compiled = answerer.generator.compiled_decode._cache_size()
    assert list(other.ask(questions, batch=3)) != before
    assert other.generator.compiled_decode._cache_size() == compiled
    assert list(answerer.ask(questions, batch=3)) == before


def test_casting_copies_nothing_that_has_the_dtype(answerer):
    same = cast(answerer.params, jax.numpy.dtype("float32"))
    assert all(same[path].unsafe_buffer_pointer() == x.unsafe_buffer_pointer() for path, x in answerer.params.items())
    with jax.transfer_guard("disallow"):
        half = cast(answerer.params, jax.numpy.dtype("bfloat16"))
    assert {x.dtype.name for x in half.values()} == {"bfloat16"}
    assert all(half[path].sharding == x.sharding for path, x in answerer.params.items())


def test_pictures_may_be_bytes_and_stand_where_the_prompt_says(answerer, questions):
    path = questions[0].images[0]
    blob = Blob("a picture", lambda: open(path, "rb").read())
    same = Question(f"<image>\n{questions[0].prompt}", (blob,))
    assert list(answerer.ask([same, questions[0]], batch=2)) == [*answerer.ask(questions[:1], batch=2)] * 2


def test_all_bad_questions_are_named_before_any_is_asked(answerer, questions, tmp_path):
    cut = tmp_path / "cut.jpg"
    cut.write_bytes(open(questions[0].images[0], "rb").read()[:500])
    bad = [
        Question("?", ("gone.jpg",), place="rows.jsonl:3"),
        Question("?", (str(cut),), place="rows.jsonl:8"),
        Question("why " * 500, place="rows.jsonl:9"),
    ]
    found = answerer.complaints([*questions, *bad])
    assert found[:7] == [None] * 7 and found[7] == "rows.jsonl:3: missing file (gone.jpg)"
    assert found[8].startswith("rows.jsonl:8: ") and "cut.jpg" in found[8]
    assert found[9].startswith("rows.jsonl:9: too long")


def test_replies_end_at_a_stop_token_that_is_not_special(answerer, questions):
    backend = Backend.from_str(answerer.tokenizer.backend.to_str())
    stop = backend.token_to_id("<end>")
    marks = json.loads(backend.to_str())
    for token in marks["added_tokens"]:
        token["special"] = token["special"] and token["id"] != stop
    plain = copy.copy(answerer)
    plain.tokenizer = dataclasses.replace(answerer.tokenizer, backend=Backend.from_str(json.dumps(marks)))
    word = next(i for i in range(stop + 1, 99) if answerer.tokenizer.decode([i]).strip())
    assert plain.tokenizer.decode([word, stop]) != answerer.tokenizer.decode([word, stop])
    word_said = Reply(answerer.tokenizer.decode([word]), 2, "stop")
    assert plain.so_far([word, stop, stop], Sampling()) == answerer.so_far([word, stop], Sampling()) == word_said
    assert plain.so_far([stop] * 3, Sampling()) == Reply("", 1, "stop")


def test_a_mesh_that_splits_sequences_is_refused(scenes):
    run = dataclasses.replace(tiny_run(scenes), mesh=Mesh(context=2))
    with pytest.raises(ConfigError, match="mesh.context=2: .* --set mesh.context=1"):
        Answerer(run, {})
