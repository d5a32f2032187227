"""Chat templates as data, and the pieces of text into which they cut a conversation.

Each piece is either trained on or not, so labels are right by construction: an answer with its end-of-turn marker is
trained, and what stands between two answers is not. At inference the prompt consists of the same pieces.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

IMAGE = "<image>"


class Piece(NamedTuple):
    """Part of a conversation as it is rendered. In a piece of a template control tokens are tokens, in one of a record
    they are text; the latter may contain IMAGE."""

    text: str
    trained: bool
    own: bool = True  # the template's


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The text around questions and answers. Control tokens must be single tokens of the tokenizer."""

    name: str
    begin: str  # the beginning-of-text token
    system: (
        str | None
    )  # before the first question, unless a record brings another text; None: there is no place for one
    user: tuple[str, str]  # around a question
    assistant: str  # before an answer
    end: str  # after an answer, trained
    between: str  # after `end`, untrained, if another question follows
    image_first: bool  # move the only IMAGE of a turn to its start, followed by a newline, as LLaVA does
    question: bool = True  # False: only the pictures of a question are kept
    around_system: tuple[str, str] = ("", "")
    system_in_question: bool = False  # the system text stands inside the first question, after user[0]
    lead: str = ""  # before an answer, trained: the blank that tokenizers join to its first word
    control: tuple[str, ...] | None = None  # the control tokens; None: whatever looks like <this> in the other fields

    def of(self, path: str) -> ChatTemplate:
        """The template for a tokenizer's folder: this one. (OwnTemplate has another for each.)"""
        return self

    def pieces(self, exchanges: Iterable[tuple[str, str | None]], system: str | None = None) -> list[Piece]:
        """(question, answer) pairs -> pieces, whose joined texts are the rendered string.

        The last answer may be None, which leaves the reply open. system: the record's own text.
        """
        (before, after), system = self.around_system, system or self.system
        around = [Piece(before, False), Piece(system, False, own=False), Piece(after, False)] if system else []
        pieces = [Piece(self.begin, False)] + ([] if self.system_in_question else around)
        for k, (question, answer) in enumerate(exchanges):
            pieces.append(Piece((self.between if k else "") + self.user[0], False))
            pieces += around if self.system_in_question and not k else []
            pieces.append(Piece(self._user_text(question), False, own=False))
            pieces.append(Piece(self.user[1] + self.assistant, False))
            if answer is not None:
                pieces += [Piece(self.lead, True), Piece(answer, True, own=False), Piece(self.end, True)]
        return [piece for piece in pieces if piece.text]

    def _user_text(self, question: str) -> str:
        if not self.question:
            return IMAGE * question.count(IMAGE)
        if self.image_first and question.count(IMAGE) == 1:
            return f"{IMAGE}\n{question.replace(IMAGE, '').strip()}".strip()
        return question

    @property
    def stop(self) -> str:
        """The token that ends an answer: the control token in `end`."""
        return next((marker for marker in self.markers() if marker in self.end), self.end)

    def markers(self) -> list[str]:
        """The control tokens of the template, which the tokenizer must have."""
        if self.control is not None:
            return list(self.control)
        around = *self.around_system, *self.user, self.assistant, self.end, self.between
        return list(dict.fromkeys(re.findall(r"<[^<>\s]+>", " ".join((self.begin, *around)))))


ASSISTANT = "You are a helpful assistant."

# LLaVA's first stage, for Llama tokenizers: the picture, then the caption.
PLAIN = ChatTemplate("plain", "<s>", None, ("", ""), "", "\n", "", image_first=True, question=False)

# LLaVA's second stage, for Llama tokenizers.
VICUNA_V1 = ChatTemplate(
    name="vicuna_v1",
    begin="<s>",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    around_system=("", " "),
    user=("USER: ", " "),
    assistant="ASSISTANT:",
    lead=" ",
    end="</s>",
    between="",
    image_first=True,
)

LLAMA3 = ChatTemplate(
    name="llama3",
    begin="<|begin_of_text|>",
    system=ASSISTANT,
    around_system=("<|start_header_id|>system<|end_header_id|>\n\n", "<|eot_id|>"),
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    between="",
    image_first=True,
)

CHATML = ChatTemplate(
    name="chatml",
    begin="",
    system=ASSISTANT,
    around_system=("<|im_start|>system\n", "<|im_end|>\n"),
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
    between="\n",
    image_first=True,
)

LLAMA2 = ChatTemplate(
    name="llama2",
    begin="<s>",
    system="",
    around_system=("<<SYS>>\n", "\n<</SYS>>\n\n"),
    system_in_question=True,
    user=("[INST] ", " [/INST]"),
    assistant="",
    lead=" ",
    end=" </s>",
    between="<s>",
    image_first=True,
    control=("<s>", "</s>"),
)

# Mistral-7B-Instruct v0.1 and v0.2
MISTRAL = ChatTemplate(
    name="mistral",
    begin="<s>",
    system="",
    around_system=("", "\n\n"),
    system_in_question=True,
    user=("[INST] ", " [/INST]"),
    assistant="",
    lead=" ",
    end="</s>",
    between="",
    image_first=True,
    control=("<s>", "</s>"),
)

# Its v0.3, whose tokenizer has [INST] and [/INST] as tokens
MISTRAL_V3 = dataclasses.replace(
    MISTRAL, name="mistral_v3", user=("[INST] ", "[/INST]"), control=("<s>", "</s>", "[INST]", "[/INST]")
)

PHI3 = ChatTemplate(
    name="phi3",
    begin="",
    system="",
    around_system=("<|system|>\n", "<|end|>\n"),
    user=("<|user|>\n", "<|end|>\n"),
    assistant="<|assistant|>\n",
    end="<|end|>",
    between="\n",
    image_first=True,
)

GEMMA = ChatTemplate(
    name="gemma",
    begin="<bos>",
    system="",
    around_system=("", "\n\n"),
    system_in_question=True,
    user=("<start_of_turn>user\n", "<end_of_turn>\n"),
    assistant="<start_of_turn>model\n",
    end="<end_of_turn>",
    between="\n",
    image_first=True,
)

# For word tokenizers (data.tokenizer.train_word_tokenizer).
TOY = ChatTemplate("toy", "", "", ("<user>", ""), "<assistant>", "<end>", "", image_first=False)
