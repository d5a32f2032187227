"""Folders on the Hugging Face hub: hf:org/name@revision."""

from __future__ import annotations

import re
from pathlib import Path

PATTERN = re.compile(r"hf:(?P<name>[^/@\s]+/[^/@\s]+)@(?P<revision>\S+)")
# Files with which a folder can be used; other formats and copies of the weights are not downloaded.
FILES = (
    "config.json", "generation_config.json", "preprocessor_config.json", "processor_config.json",
    "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json",
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "chat_template*", "vocab.*", "merges.txt",
)  # fmt: skip


def download(source: str) -> tuple[str, Path]:
    """Downloads what is not in the cache yet -> (source with the commit in place of the revision, folder).

    huggingface_hub does it, with its token, cache and offline mode (HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT).
    Every process calls this: each host fills a cache of its own, and processes of one host, or with a shared cache,
    wait for each other, since huggingface_hub locks each file. Raises ValueError, in one line.
    """
    match = PATTERN.fullmatch(source)
    if not match:
        raise ValueError(f"{source}: write it as hf:org/name@revision, where revision is a commit, tag or branch")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        path = snapshot_download(match["name"], revision=match["revision"], allow_patterns=list(FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"cannot download {source}: {type(error).__name__}: {reason}") from None
    return f"hf:{match['name']}@{Path(path).name}", Path(path)
