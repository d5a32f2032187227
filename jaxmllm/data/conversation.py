"""The conversation of a record: system text, questions and answers, and what in it cannot be trained on.

Read are LLaVA's `conversations` of {"from", "value"} and `messages` of {"role", "content"}; the two spellings of fields
and roles may be mixed. A system text is the first turn or the field `system`; a blank one counts as none.
"""

from __future__ import annotations

import re
from typing import Any, NamedTuple

from jaxmllm.data.sources.record import NO_IMAGE, Record
from jaxmllm.data.templates import IMAGE

ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
TURNS = 'a list of {"from", "value"} or {"role", "content"}'
LEFT_OUT = ("weight", "loss", "train")  # fields by which other programs leave a turn out of the loss

# Fields that name media: other spellings of `image`, and what no encoder reads.
PICTURE_FIELD = re.compile(r"(images|imgs?|pictures?|photos?|image[-_]?(paths?|files?|filename|urls?))", re.IGNORECASE)
OTHER_FIELD = re.compile(
    r"(videos?|audios?|speech|sounds?|point[-_]?clouds?)([-_]?(paths?|files?|filename|urls?))?", re.IGNORECASE
)
# Markers of other programs that stand for media, such as <video>, <Image>, <image_1>, <|image_pad|>, [IMG].
MARKER = re.compile(
    r"<\|?(?:image|img|video|audio|speech|sound|vision)s?"
    r"(?:[-_ ]?(?:\d+|pad|start|end|here|token|placeholder))?\|?\s?/?>"
    r"|(?-i:\[(?:IMG|IMAGE|VIDEO|AUDIO)\])",
    re.IGNORECASE,
)
# Half a surrogate pair is no text; Unicode reserves U+FDD0 to U+FDEF for programs, and encoding.py uses them.
NO_TEXT = re.compile("[\ud800-\udfff\ufdd0-\ufdef]")


class Turn(NamedTuple):
    """One turn of a conversation."""

    index: int
    role: str  # "system", "user" or "assistant"
    name: str  # of the role, as the record spells it
    text: str  # without blanks around it


def exchanges(record: Record, pictures: int, reply_open: bool = False) -> list[tuple[str, str | None]]:
    """The (question, answer) pairs of a conversation about a number of pictures. Raises BadSample.

    reply_open: the last answer is None, and earlier ones, which a model wrote, may be empty or hold markers. An answer
    before the first question is left out, as LLaVA does; see `opens_with_answer`.
    """
    check_media_fields(record, pictures)
    turns = [turn for turn in turns_of(record) if turn.role != "system"]
    turns = turns[opens_with_answer(record) :]
    if not turns:
        raise record.bad("no conversation", "it has no question")
    for place, turn in enumerate(turns):
        is_answer, where = place % 2 == 1, f"turn {turn.index}"
        if turn.role != ("user", "assistant")[is_answer]:
            raise record.bad("turns do not alternate", f"{where} is from {turn.name!r}")
        if is_answer and not turn.text and not reply_open:
            raise record.bad("empty answer", where)
        if is_answer and IMAGE in turn.text:
            raise record.bad("wrong number of <image>", f"{where}, an answer, has one")
        if not (is_answer and reply_open):
            check_markers(record, where, turn.text)
    if len(turns) % 2 != reply_open:
        last = "an answer" if reply_open else "a question"
        raise record.bad("turns do not alternate", f"the last turn is {last}")
    texts = [turn.text for turn in turns]
    count = sum(text.count(IMAGE) for text in texts)
    if count != pictures:
        raise record.bad("wrong number of <image>", f"{count} in the text, {pictures} pictures")
    return list(zip(texts[::2], [*texts[1::2], None]))


def opens_with_answer(record: Record) -> bool:
    """Whether an answer stands before the first question; no template has a place for it. Raises BadSample."""
    roles = [turn.role for turn in turns_of(record) if turn.role != "system"]
    return roles[:1] == ["assistant"]


def system_text(record: Record) -> str | None:
    """The system text that a record brings, None if it brings none. Raises BadSample."""
    field = record.data.get("system")
    if field is not None and not isinstance(field, str):
        raise record.bad("system text", f"the field `system` is {type(field).__name__}, not a text")
    check_text(record, "the field `system`", field or "")
    found = [(field or "").strip(), *(turn.text for turn in turns_of(record) if turn.role == "system")]
    found = list(dict.fromkeys(filter(None, found)))
    if len(found) > 1:
        raise record.bad("system text", "the field `system` and the system turn differ")
    if found and IMAGE in found[0]:
        raise record.bad("wrong number of <image>", "the system text has one")
    if found:
        check_markers(record, "the system text", found[0])
    return found[0] if found else None


def turns_of(record: Record) -> list[Turn]:
    """All turns of a conversation; only the first can be the system's. Raises BadSample."""
    fields = [name for name in ("conversations", "messages") if record.data.get(name) is not None]
    if len(fields) > 1:
        raise record.bad("no conversation", "it has both `conversations` and `messages`; one of them is needed")
    turns = record.data[fields[0]] if fields else None
    if not isinstance(turns, list):
        raise record.bad("no conversation", f"{TURNS} is needed in `conversations` or `messages`")
    return [turn_of(record, k, turn) for k, turn in enumerate(turns)]


def turn_of(record: Record, k: int, turn: Any) -> Turn:
    """Turn k of a record. Raises BadSample."""
    turn = turn if isinstance(turn, dict) else {}
    name, text = turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))
    if not isinstance(name, str) or not isinstance(text, str):
        raise record.bad("no conversation", f"turn {k} has no role or no text; {TURNS} is needed")
    role = ROLES.get(name)
    if role is None or (role == "system" and k):
        allowed = "human or user, gpt or assistant, and system for the first turn"
        raise record.bad("unknown role", f"turn {k} is from {name!r}, but roles are {allowed}")
    for field in LEFT_OUT:
        if turn.get(field) not in (None, 1):  # True is 1
            detail = f"turn {k} has {field} = {turn[field]!r}, but the loss counts every answer alike"
            raise record.bad("weight of a turn", detail)
    check_text(record, f"turn {k}", text)
    return Turn(k, role, name, text.strip())


def check_text(record: Record, where: str, text: str) -> None:
    """Raises BadSample for characters that are no text."""
    if found := NO_TEXT.search(text):
        raise record.bad("broken text", f"{where} holds U+{ord(found[0]):04X}, which is no character of a text")


def check_markers(record: Record, where: str, text: str) -> None:
    """Raises BadSample for a marker of media other than IMAGE, unless the record says that these are text."""
    for found in [] if record.markers_are_text else MARKER.finditer(text):
        if found[0] != IMAGE:
            detail = f"{where} has the marker {found[0]}; only {IMAGE}, one for each picture of `image`, is read"
            raise record.bad("media that is not read", detail)


def check_media_fields(record: Record, pictures: int) -> None:
    """Raises BadSample for a field that names media that would be left out: any but pictures, and pictures under
    another name if `image` has none."""
    for name, value in record.data.items():
        named = OTHER_FIELD.fullmatch(name) or (not pictures and PICTURE_FIELD.fullmatch(name))
        if named and value and not (isinstance(value, str) and value in NO_IMAGE):
            raise record.bad(
                "media that is not read", f"the field `{name}`; only pictures in the field `image` are read"
            )
