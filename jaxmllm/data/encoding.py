"""From the pieces of a conversation to token ids: control tokens come from the template, all else is text.

A conversation is tokenised whole, so that its ids are those of the rendered string. First, each control token of the
template, and each picture, is replaced by a stand-in: a character that Unicode reserves for programs, which a copy of
the tokenizer knows as an added token with the same flags. What the copy finds besides is text, even if it spells a
control token:

    template and record     <user>what is <end> ?<assistant>a word<end>
    what is tokenised       U+FDD0 what is <end> ? U+FDD1 a word U+FDD2
    ids                     <user>  what  is  <  end  >  ?  <assistant>  a  word  <end>
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from jaxmllm.data.templates import IMAGE, Piece
from jaxmllm.data.tokenizer import Tokenizer

BREAK, PICTURE, *CONTROL = [chr(code) for code in range(0xFDD0, 0xFDF0)]  # stand-ins
PICTURES = re.compile(re.escape(IMAGE))


class Part(NamedTuple):
    """Text, or what a stand-in stands for; BREAK stands for nothing and keeps the texts beside it apart."""

    text: str
    trained: bool
    stand_in: str = ""


class Encoded(NamedTuple):
    """A piece of a conversation with its token ids: a control token, a picture, or text."""

    text: str
    ids: list[int]  # empty for a picture; a token belongs to the piece in which it ends
    trained: bool
    image: bool = False


class Encoder:
    """Tokenises conversations for a template with these control tokens. Several threads may use it.

    Raises ValueError for a control token that the tokenizer lacks, and for more of them than there are stand-ins.
    """

    def __init__(self, tokenizer: Tokenizer, control: Sequence[str]):
        if len(control) > len(CONTROL):
            raise ValueError(f"a template can have {len(CONTROL)} control tokens, not {len(control)}")
        backend, ids = tokenizer.backend, {token: tokenizer.id(token) for token in control}
        flags = {token.content: token for token in backend.get_added_tokens_decoder().values()}
        special = {backend.token_to_id(text): text for text, token in flags.items() if token.special}
        self.spelled = special | {id: token for token, id in ids.items()}  # id -> what text must not become
        self.copy = Backend.from_str(backend.to_str())
        self.copy.post_processor = None  # it would only trim the blanks off offsets
        self.copy.add_special_tokens([AddedToken(token, normalized=False) for token in control])
        self.copy.encode_special_tokens = True  # special tokens that stand in a text are text
        self.spelled_ids = np.array([*self.spelled])
        self.stand_ins = dict(zip(control, CONTROL))
        self.meant = {PICTURE: [], BREAK: []}  # stand-in -> the ids that it stands for
        self.meant |= {stand_in: [ids[token]] for token, stand_in in self.stand_ins.items()}
        for token, stand_in in {**self.stand_ins, IMAGE: PICTURE, "": BREAK}.items():
            like = flags.get(token, AddedToken(""))
            same = {"lstrip": like.lstrip, "rstrip": like.rstrip}
            # Not normalized, whatever its token is: a normalizer that writes a blank first would hide it.
            self.copy.add_tokens([AddedToken(stand_in, special=False, normalized=False, **same)])
        self.stand_in_ids = np.array([self.copy.token_to_id(stand_in) for stand_in in self.meant])
        self.cut = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))) or "(?!)")

    def __call__(self, pieces: Iterable[Piece]) -> list[Encoded]:
        """The pieces, cut further at control tokens and pictures, each with its ids."""
        parts = [part for piece in pieces for part in self._parts(piece)]
        while (found := self._encode(parts)) is None:  # a text became a control token: `parts` has a BREAK inside it
            pass
        return found

    def _parts(self, piece: Piece) -> Iterator[Part]:
        """A piece cut at control tokens, if the template wrote it, or else at pictures."""
        at = 0
        for match in (self.cut if piece.own else PICTURES).finditer(piece.text):
            yield Part(piece.text[at : match.start()], piece.trained)
            yield Part(match[0], piece.trained, self.stand_ins[match[0]] if piece.own else PICTURE)
            at = match.end()
        yield Part(piece.text[at:], piece.trained)

    def _encode(self, parts: list[Part]) -> list[Encoded] | None:
        """The parts with their ids; None, and one more BREAK in `parts`, if a text came out as a control token."""
        texts = [stand_in or text for text, _, stand_in in parts]
        ends, whole = np.cumsum([0, *map(len, texts)])[1:], "".join(texts)
        encoding = self.copy.encode(whole, add_special_tokens=False)
        tokens, spans = np.array(encoding.ids, np.int64), np.array(encoding.offsets, np.int64).reshape(-1, 2)
        for token in np.flatnonzero(np.isin(tokens, self.spelled_ids)):
            id, (start, end) = int(tokens[token]), spans[token]
            if self.spelled[id] in whole[start:end]:
                at = whole.index(self.spelled[id], start) + 1
                k = int(np.searchsorted(ends, at, "right"))
                (text, trained, _), inside = parts[k], at - int(ends[k]) + len(texts[k])
                parts[k : k + 1] = [
                    Part(text[:inside], trained),
                    Part("", trained, BREAK),
                    Part(text[inside:], trained),
                ]
                return None
        owners = np.searchsorted(ends, np.maximum(spans[:, 1] - 1, spans[:, 0]), "right").clip(max=len(parts) - 1)
        stands = np.isin(tokens, self.stand_in_ids)  # their offsets may include blanks beside them
        owners[stands] = [k for k, part in enumerate(parts) if part.stand_in]
        order = np.argsort(owners, kind="stable")
        groups = np.split(tokens[order], np.searchsorted(owners[order], np.arange(1, len(parts))))
        ids = [self.meant[part.stand_in] if part.stand_in else group.tolist() for part, group in zip(parts, groups)]
        return [
            Encoded(text, found, trained, stand_in == PICTURE)
            for (text, trained, stand_in), found in zip(parts, ids)
            if text
        ]
