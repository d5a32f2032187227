"""Which choice a free reply names. The rules are versioned: scores are comparable if their VERSION is the same.

The first rule that finds anything decides; if it finds several choices, the reply is unparsed.
1. The whole reply is the text of a choice, or its letter: "cup", "The cup.", "B", "b)", "**B**".
2. A letter after a word that announces it: "The answer is B", "Answer: (b)", "Option B is right", "I choose B".
3. Letters in parentheses: "(B) because it is near".
4. A letter at the start: "B. cup", "B) cup", "B, because ..". "A" and "I" are words if another word follows.
5. Texts of choices that stand in the reply as whole words: "I see the cup". Of texts inside longer ones, the longer.
What follows a negation is not named: "Not (A), it is (B)"; nor is a list, "A or B", in rules 2 and 4. Letters beyond
the choices are nothing. Case counts only in rules 2 and 4, for letters that a word follows. Marks of Markdown, tags,
and TeX's \\boxed{..} are left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

VERSION = 2

_VERBS = r"is|it's|would be|should be|must be|choose|pick|select|but"
_ANNOUNCED = rf"(?i:\b(?:(?:answer|choice|option|letter)(?:\s+(?:{_VERBS}))?|{_VERBS})(?:\s*[:=]\s*|\s+))"
_NO_LIST = r"(?!\)?\s*(?:,?\s*(?:or|and)\s|[,/&])\s*\(?[A-Z]\b)"  # "A or B" names neither
_BARE = rf"([A-Za-z]){_NO_LIST}(?=\s*(?:[.,:;)!?]|$)|\s+(?:because|since|as)\b)|([B-HJ-Z]){_NO_LIST}(?=\s)"
_NEGATION = re.compile(
    r"(?i)(?:\b(?:not|never|neither|nor)|n't)(?:\s+(?:be|option|choice|answer|letter|the|an?))*\s*[\"']?$"
)


def letter(i: int) -> str:
    """0 -> "(A)"."""
    return f"({chr(ord('A') + i)})"


def normalize(text: str) -> str:
    """Lower case, single spaces, no space before punctuation, no full stop at the end."""
    return re.sub(r"\s+([.,?!])", r"\1", " ".join(text.lower().split())).rstrip(".")


def parse(reply: str, choices: Sequence[str]) -> str | None:
    """The letter "(X)" of the choice that a reply names, or None if it names none or several."""
    reply = _plain(reply)
    texts = [_without_article(normalize(choice)) for choice in choices]
    whole = _without_article(normalize(reply).strip(" !?,;:"))
    for found in (
        {i for i, text in enumerate(texts) if text == whole},
        _letters(r"^\s*\(?([A-Za-z])\s*[).:]*\s*$", reply),
        _letters(rf"{_ANNOUNCED}(?:\(([A-Za-z]){_NO_LIST}\)|{_BARE})", reply),
        _letters(r"\(([A-Za-z])\)", reply),
        _letters(rf"^\s*(?:{_BARE})", reply),
        _named_texts(texts, normalize(reply)),
    ):
        if found := {i for i in found if i < len(choices)}:
            return letter(found.pop()) if len(found) == 1 else None
    return None


def _plain(reply: str) -> str:
    reply = re.sub(r"\\(?:boxed|text|mathrm|textbf)\s*\{([^{}]*)\}", r"\1", reply)
    reply = re.sub(r"\\text\s*\{|\\boxed\s*\{|[*`$}]|</?\w+>|(?<!\w)_+|_+(?!\w)", "", reply)
    return re.sub(r"[\u2018\u2019]", "'", re.sub(r"[\u201c\u201d]", '"', reply)).strip(" \t\r\n\"'")


def _without_article(text: str) -> str:
    return re.sub(r"^(?:the|an?) (?=\S)", "", text)


def _affirmed(found: Iterable[re.Match], text: str) -> list[re.Match]:
    """The matches that no negation stands before."""
    return [match for match in found if not _NEGATION.search(text[: match.start(match.lastindex or 0)].rstrip(" ("))]


def _letters(pattern: str, reply: str) -> set[int]:
    """The letters that the groups of a pattern match, as numbers of choices."""
    found = _affirmed(re.finditer(pattern, reply, re.MULTILINE), reply)
    return {ord(match[match.lastindex].upper()) - ord("A") for match in found}


def _named_texts(texts: Sequence[str], reply: str) -> set[int]:
    """The choices whose text stands in the reply as whole words, and not only inside the text of another."""
    spans = [
        (*match.span(), i)
        for i, text in enumerate(texts)
        if text
        for match in _affirmed(re.finditer(rf"(?<!\w){re.escape(text)}(?!\w)", reply), reply)
    ]
    return {
        i for start, stop, i in spans if not any(a <= start and stop <= b and b - a > stop - start for a, b, _ in spans)
    }
