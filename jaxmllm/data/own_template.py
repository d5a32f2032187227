"""The chat template that a tokenizer's folder brings, as a ChatTemplate.

transformers renders the folder's `chat_template` (Jinja) for conversations of stand-ins; the texts between these are
the fields. A template that is more than such texts, so that some conversation comes out otherwise, is refused.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import re
from typing import Any

from jaxmllm.data.templates import ChatTemplate
from jaxmllm.hf_library import transformers

STAND_INS = ("Qsystem", "Qone", "Qtwo", "Qthree", "Qfour")  # what a template could trim, translate or split has none


@dataclasses.dataclass(frozen=True)
class OwnTemplate:
    """Stands in a recipe for the template of the tokenizer's folder. image_first: as ChatTemplate's."""

    image_first: bool = True

    def of(self, path: str) -> ChatTemplate:
        """The template of a tokenizer's folder. Raises ValueError, in one line, if it has none that can be used."""
        tokenizer = transformers().AutoTokenizer.from_pretrained(path, local_files_only=True)
        if not tokenizer.chat_template:
            raise ValueError(f"the tokenizer {path} has no chat_template; name a template of jaxmllm.data.templates")
        try:
            template = _fields(tokenizer, self.image_first)
            _check(tokenizer, template)
        except ValueError as error:
            raise ValueError(f"the chat_template of {path} cannot be used: {error}") from None
        return template


def _render(tokenizer: Any, system: str | None, turns: tuple[str, ...]) -> str | None:
    """A conversation as text, with its reply open if the last turn is a question; None if the template refuses it."""
    from jinja2 import TemplateError

    messages = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]
    messages = [{"role": "system", "content": system}, *messages] if system else messages
    try:
        is_open = len(turns) % 2 == 1
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=is_open)
    except (TemplateError, TypeError, KeyError):
        return None


def _split(text: str | None, stand_ins: tuple[str, ...]) -> list[str]:
    """The texts around stand-ins. Raises ValueError if these are not all there, once and in order."""
    parts = re.split("|".join(stand_ins), text or "")
    if len(parts) != len(stand_ins) + 1 or "".join(itertools.chain(*zip(parts, (*stand_ins, "")))) != text:
        raise ValueError("it does not show each turn once, as it is")
    return parts


def _fields(tokenizer: Any, image_first: bool) -> ChatTemplate:
    mark, one, two, three, four = STAND_INS
    head, opened = _split(_render(tokenizer, None, (one,)), (one,))
    first, answered, again, _, tail = _split(_render(tokenizer, None, (one, two, three, four)), (one, two, three, four))
    if head != first or not answered.startswith(opened):
        raise ValueError("what stands before an answer differs from what opens a reply")
    special = [token for token in _special_tokens(tokenizer) if token in tail]
    end = tail[: min(tail.index(token) + len(token) for token in special)] if special else tail
    if not end or not again.startswith(end):
        raise ValueError("the end of an answer is not the same in all turns")
    again = again.removeprefix(end)
    before = os.path.commonprefix([head[::-1], again[::-1]])[::-1]  # of a question
    begin, between = head.removesuffix(before), again.removesuffix(before)
    common = dict(
        name="own", user=(before, opened), assistant="", lead=answered.removeprefix(opened), end=end, between=between,
        image_first=image_first,
    )  # fmt: skip
    template = ChatTemplate(begin=begin, system=None, **common)
    rendered = _render(tokenizer, mark, (one,))
    if rendered and mark in rendered:
        start, middle, _ = _split(rendered, (mark, one))
        template = dataclasses.replace(template, **_system_fields(start, middle, head, begin, before))
    around = (template.begin, *template.around_system, *template.user, template.end, template.between)
    control = tuple(token for token in _special_tokens(tokenizer) if token in "".join(around))
    return dataclasses.replace(template, control=control)


def _system_fields(start: str, middle: str, head: str, begin: str, before: str) -> dict[str, Any]:
    """start, middle: the texts before and after a system text. head: before the first question without one."""
    if start.startswith(head):
        around = start.removeprefix(head), middle
        return dict(system="", around_system=around, system_in_question=True)
    if not middle.endswith(before):
        raise ValueError("a question after a system text looks different from others")
    after = middle.removesuffix(before)
    if begin.startswith(start) and begin.endswith(after) and len(begin) > len(start) + len(after):
        own = begin[len(start) : len(begin) - len(after)]  # a system text that stands there if none is given
        return dict(begin="", system=own, around_system=(start, after))
    if not start.startswith(begin):
        raise ValueError("a conversation with a system text begins differently from others")
    return dict(system="", around_system=(start.removeprefix(begin), after))


def _special_tokens(tokenizer: Any) -> list[str]:
    return [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]


def _check(tokenizer: Any, template: ChatTemplate) -> None:
    """Raises ValueError unless the fields give what the template gives, for up to three exchanges."""
    mark, *turns = STAND_INS
    turns = (*turns, "Qfive", "Qsix")
    for system in (None, mark) if template.system is not None else (None,):
        for count in range(1, 7):
            pairs = list(itertools.zip_longest(turns[:count:2], turns[1:count:2]))
            ours = "".join(piece.text for piece in template.pieces(pairs, system))
            theirs = _render(tokenizer, system, turns[:count])
            # After the last answer, templates may write what stands before the next question.
            rest = (theirs or "").removeprefix(ours)
            fits = theirs is not None and theirs.startswith(ours)
            if not fits or not ((template.between + template.user[0]).startswith(rest) if count % 2 == 0 else not rest):
                raise ValueError("its turns depend on more than their texts")
