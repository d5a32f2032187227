"""Tokenizers: Hugging Face folders, and a word tokenizer for small vocabularies.

The module imports only the `tokenizers` library (0.05 s); `transformers` (over 1 s) is imported only for a folder
without tokenizer.json.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from jaxmllm.errors import suggest_path
from jaxmllm.hf_library import transformers

SPECIAL = ("<pad>", "<unk>", "<image>", "<user>", "<assistant>", "<end>")


@dataclasses.dataclass(frozen=True)
class Tokenizer:
    """Text <-> ids. Nothing is added to a text: the chat template writes the begin and end tokens."""

    path: str
    backend: Backend

    def encode(self, text: str) -> list[int]:
        """The ids of a rendered string: special tokens written in it become their ids. (encoding.py: those of a
        conversation, in which only the template's do.)"""
        return self.backend.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Iterable[int], skip_special: bool = True) -> str:
        """The text of ids, without special tokens unless skip_special is False."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special)

    def id(self, token: str) -> int:
        """The id of one token. Raises ValueError if there is no such token."""
        id = self.backend.token_to_id(token)
        if id is None:
            raise ValueError(f"the tokenizer {self.path} has no token {token!r}")
        return id

    @property
    def size(self) -> int:
        """V: rows that an embedding needs, added tokens included."""
        return max(self.backend.get_vocab(with_added_tokens=True).values()) + 1


def load_tokenizer(path: str, added: Sequence[str] = ()) -> Tokenizer:
    """The tokenizer of a Hugging Face folder; nothing is downloaded. added: special tokens that it gets if it lacks
    them. Raises ValueError if there is none at `path`."""
    file = Path(path) / "tokenizer.json"
    if file.is_file():
        backend = Backend.from_file(str(file))
    elif (Path(path) / "tokenizer_config.json").is_file():  # a SentencePiece model; transformers converts it
        backend = transformers().AutoTokenizer.from_pretrained(path, local_files_only=True).backend_tokenizer
    else:
        need = "it must be a folder with tokenizer.json or tokenizer_config.json"
        raise ValueError(f"no tokenizer at {path}{suggest_path(path)}: {need}")
    backend.no_truncation()
    backend.no_padding()
    tokenizer = Tokenizer(str(path), backend)
    add_tokens(tokenizer, added)
    return tokenizer


def add_tokens(tokenizer: Tokenizer, tokens: Iterable[str]) -> None:
    """Adds special tokens, those that are not there yet, with the next ids. Raises ValueError if ids have gaps."""
    for token in tokens:
        if tokenizer.backend.token_to_id(token) is None:
            expected = tokenizer.size
            tokenizer.backend.add_special_tokens([AddedToken(token, special=True, normalized=False)])
            if tokenizer.id(token) != expected:
                raise ValueError(
                    f"the ids of {tokenizer.path} have gaps: {token} would not get {expected}; add it to the tokenizer"
                )


def train_word_tokenizer(texts: Iterable[str], out_dir: str) -> Tokenizer:
    """Writes a tokenizer of whole words and single punctuation marks, which transformers can open too.

    `decode(encode(text))` returns the text with each run of white space replaced by one blank. The ids of words depend
    only on the set of words.
    """
    backend = Backend(models.WordLevel({}, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(r"\s+"), " "), normalizers.Strip(), normalizers.Prepend(" ")]
    )
    # A blank belongs to the word after it, so that decoding knows where blanks were; the first word gets one too.
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r" ?\w+|[^\w\s]| "), "isolated")
    backend.decoder = decoders.Sequence([decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    words = set()
    for text in texts:
        for part in text.split("<image>"):
            pieces = backend.pre_tokenizer.pre_tokenize_str(backend.normalizer.normalize_str(part))
            words.update(word for word, _ in pieces)
    backend.model = models.WordLevel({word: i for i, word in enumerate((*SPECIAL, *sorted(words)))}, unk_token="<unk>")
    backend.add_special_tokens(list(SPECIAL))
    folder = Path(out_dir)
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "pad_token": "<pad>",
        "unk_token": "<unk>",
        "eos_token": "<end>",
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=1) + "\n")
    return load_tokenizer(out_dir)
