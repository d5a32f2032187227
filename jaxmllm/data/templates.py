"""Chat templates as data, and the pieces of text into which they cut a conversation.

Each piece is tokenised alone and is either trained on or not, so labels are right by construction: an answer with its
end-of-turn marker is one trained piece, and everything between two answers is one untrained piece. At inference the
prompt consists of the same untrained pieces.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from typing import NamedTuple

IMAGE = "<image>"


class Piece(NamedTuple):
    """Text that is tokenised alone; untrained pieces may contain IMAGE."""

    text: str
    trained: bool


@dataclasses.dataclass(frozen=True)
class ChatTemplate:
    """The text around questions and answers. Whatever looks like <this> must be a single token of the tokenizer."""

    name: str
    begin: str  # tokenised alone: the beginning-of-text token
    system: str  # with its markup, before the first question
    user: tuple[str, str]  # around a question
    assistant: str  # before an answer
    end: str  # after an answer, trained
    between: str  # after `end`, untrained, if another question follows
    image_first: bool  # move IMAGE to the start of its turn, followed by a newline, as LLaVA does
    question: bool = True  # False: only the pictures of a question are kept

    def pieces(self, exchanges: Iterable[tuple[str, str | None]]) -> list[Piece]:
        """(question, answer) pairs -> pieces. The last answer may be None, which leaves the reply open."""
        pieces = [Piece(self.begin, False)] if self.begin else []
        before = self.system
        for question, answer in exchanges:
            question = self._user_text(question)
            pieces.append(Piece(before + self.user[0] + question + self.user[1] + self.assistant, False))
            if answer is not None:
                pieces.append(Piece(answer + self.end, True))
            before = self.between
        return pieces

    def _user_text(self, question: str) -> str:
        images = IMAGE * question.count(IMAGE)
        if not self.question:
            return images
        if self.image_first and images:
            return images + "\n" + question.replace(IMAGE, "").strip()
        return question

    def markers(self) -> list[str]:
        """The special tokens that the template uses."""
        texts = (self.begin, self.system, *self.user, self.assistant, self.end, self.between)
        return list(dict.fromkeys(re.findall(r"<[^<>\s]+>", "".join(texts))))


ASSISTANT = "You are a helpful assistant."

# LLaVA's first stage, for Llama tokenizers: the picture, then the caption.
PLAIN = ChatTemplate("plain", "<s>", "", ("", ""), "", "\n", "", image_first=True, question=False)

# LLaVA's second stage, for Llama tokenizers, which add the space before an answer themselves.
VICUNA_V1 = ChatTemplate(
    name="vicuna_v1",
    begin="<s>",
    system="A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions. ",
    user=("USER: ", " "),
    assistant="ASSISTANT:",
    end="</s>",
    between="",
    image_first=True,
)

LLAMA3 = ChatTemplate(
    name="llama3",
    begin="<|begin_of_text|>",
    system=f"<|start_header_id|>system<|end_header_id|>\n\n{ASSISTANT}<|eot_id|>",
    user=("<|start_header_id|>user<|end_header_id|>\n\n", "<|eot_id|>"),
    assistant="<|start_header_id|>assistant<|end_header_id|>\n\n",
    end="<|eot_id|>",
    between="",
    image_first=True,
)

CHATML = ChatTemplate(
    name="chatml",
    begin="",
    system=f"<|im_start|>system\n{ASSISTANT}<|im_end|>\n",
    user=("<|im_start|>user\n", "<|im_end|>\n"),
    assistant="<|im_start|>assistant\n",
    end="<|im_end|>",
    between="\n",
    image_first=True,
)

# For word tokenizers (data.tokenizer.train_word_tokenizer).
TOY = ChatTemplate("toy", "", "", ("<user>", ""), "<assistant>", "<end>", "", image_first=False)
