"""Which conversations are read, and which are refused by name: roles, system texts, media and broken text."""

import pytest

from jaxmllm.data.conversation import exchanges, system_text
from jaxmllm.data.sources.record import BadSample, Record
from tests.records import chat

TURNS = [("Why ?", "So .")]


def record(**data) -> Record:
    return Record("r", "d.jsonl", data, [], {})


def refusal(pictures: int = 0, **data) -> str:
    """Why a record is refused."""
    with pytest.raises(BadSample) as caught:
        exchanges(record(**data), pictures)
        system_text(record(**data))
    assert "\n" not in str(caught.value)
    str(caught.value).encode()
    return caught.value.reason


@pytest.mark.parametrize("field", ["conversations", "messages"])
@pytest.mark.parametrize("keys", [("from", "value"), ("role", "content")])
@pytest.mark.parametrize("roles", [("human", "gpt"), ("user", "assistant")])
def test_spellings_of_turns(field, keys, roles):
    turns = [dict(zip(keys, turn)) for turn in zip(roles, ("Why ?", " So .\n"))]
    assert exchanges(record(**{field: turns}), 0) == TURNS
    turns.insert(0, dict(zip(keys, ("system", "Be brief."))))
    assert exchanges(record(**{field: turns}), 0) == TURNS
    assert system_text(record(**{field: turns})) == "Be brief."


def test_system_text():
    turns = chat("Why ?", "So .")
    first = {"from": "system", "value": " Be brief. "}
    assert system_text(record(conversations=turns)) is None
    assert system_text(record(conversations=turns, system="Be brief.\n")) == "Be brief."
    assert system_text(record(conversations=turns, system=None)) is None
    assert system_text(record(conversations=[{**first, "value": " "}, *turns], system="")) is None
    assert system_text(record(conversations=[first, *turns], system="Be brief.")) == "Be brief."
    # LLaVA leaves out an answer before the first question, after a system turn too.
    assert exchanges(record(conversations=[first, {"from": "gpt", "value": "Hello"}, *turns]), 0) == TURNS
    assert refusal(conversations=[first, *turns], system="Be long.").startswith("system text: the field")
    assert refusal(conversations=turns, system=["Be brief."]) == "system text: the field `system` is list, not a text"
    assert "the system text has one" in refusal(conversations=turns, system="See <image>")
    assert "the system text has the marker <video>" in refusal(conversations=turns, system="See <video>")


@pytest.mark.parametrize("field", ["weight", "loss", "train"])
def test_turns_that_are_left_out_of_the_loss_are_refused(field):
    turns = chat("Why ?", "So .")
    for value in (None, 1, 1.0, True):
        turns[1][field] = value
        assert exchanges(record(conversations=turns), 0) == TURNS
    for value in (0, 0.5, False, "no", []):
        turns[1][field] = value
        assert refusal(conversations=turns).startswith(f"weight of a turn: turn 1 has {field} = {value!r}")


@pytest.mark.parametrize("name", ["narrator", "tool", "Human", "bot", ""])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_other_roles_are_refused(name, place):
    turns = chat("Why ?", "So .")
    turns.insert(place, {"from": name, "value": "Hm ."})
    roles = "human or user, gpt or assistant, and system for the first turn"
    assert refusal(conversations=turns) == f"unknown role: turn {place} is from {name!r}, but roles are {roles}"


def test_a_system_turn_stands_first():
    turns = [*chat("Why ?", "So ."), {"from": "system", "value": "Be brief."}]
    assert refusal(conversations=turns).startswith("unknown role: turn 2 is from 'system'")


@pytest.mark.parametrize(
    "turns",
    [None, "Why ?", {"from": "human"}, [], [None], ["Why ?"], [["human", "Why ?"]], [{"from": "human", "value": None}],
     [{"from": "human", "value": ["Why ?"]}], [{"value": "Why ?"}], [{"from": 3, "value": "Why ?"}]],
)  # fmt: skip
def test_what_is_no_conversation(turns):
    assert refusal(conversations=turns).startswith("no conversation")


def test_two_conversations_are_refused():
    assert "both" in refusal(conversations=chat("a", "b"), messages=chat("a", "c"))


@pytest.mark.parametrize(
    "name", ["video", "videos", "audio", "Audio", "speech", "video_path", "point_cloud", "images", "img", "image_path"]
)
def test_media_in_other_fields_is_refused(name):
    for value in ("a.mp4", ["a.jpg"], {"path": "a.wav"}):
        assert f"`{name}`" in refusal(conversations=chat("a", "b"), **{name: value})
    for value in (None, "", [], "nan"):
        assert exchanges(record(conversations=chat("a", "b"), **{name: value}), 0)


def test_pictures_may_be_named_twice():
    turns = chat("<image> a", "b")
    assert exchanges(record(conversations=turns, image="a.jpg", image_path="/full/a.jpg"), 1)
    assert "`video`" in refusal(1, conversations=turns, image="a.jpg", video="a.mp4")
    assert exchanges(record(conversations=chat("a", "b"), image_id=3, video_id="x"), 0)


@pytest.mark.parametrize(
    "marker",
    ["<video>", "<audio>", "<Image>", "<IMAGE>", "<image_1>", "<image-2>", "<image 1>", "<|image|>", "<|image_1|>",
     "<|image_pad|>", "<|vision_start|>", "<ImageHere>", "<img>", "<image/>", "<speech>", "[IMG]", "<images>"],
)  # fmt: skip
def test_markers_of_other_media_are_refused(marker):
    for turns in (chat(f"See {marker} ?", "So ."), chat("Why ?", f"So {marker} .")):
        assert f"has the marker {marker};" in refusal(conversations=turns)
    # What a model has written in its earlier answers is no fault of the question.
    turns = chat("Why ?", f"So {marker} .", "Why ?")
    assert exchanges(record(conversations=turns), 0, reply_open=True)[-1] == ("Why ?", None)


@pytest.mark.parametrize(
    "text", ["<imagine>", "<image of a dog>", '<img src="a">', "</video>", "[image]", "a < image >"]
)
def test_other_text_in_brackets_is_text(text):
    assert exchanges(record(conversations=chat(text, text)), 0) == [(text, text)]


@pytest.mark.parametrize("broken", ["\ud83d", "\udc00", "\ufdd0", "\ufdef"])
def test_what_is_no_text_is_refused(broken):
    says = f"holds U+{ord(broken):04X}, which is no character of a text"
    for place in (0, 1):
        turns = chat(*(f"a {broken} b" if k == place else "a" for k in (0, 1)))
        assert refusal(conversations=turns) == f"broken text: turn {place} {says}"
    assert says in refusal(conversations=chat("a", "b"), system=broken)


def test_an_open_reply_may_follow_empty_ones():
    assert exchanges(record(conversations=chat("a", "", "b")), 0, reply_open=True) == [("a", ""), ("b", None)]
    assert refusal(conversations=chat("a", "", "b", "c")) == "empty answer: turn 1"
