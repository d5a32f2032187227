"""The library transformers, for its configs and tokenizers."""

from __future__ import annotations

import os
from types import ModuleType


def transformers() -> ModuleType:
    """transformers, imported where it is needed, since that takes over a second.

    Without PyTorch it would say that its models are missing, which are not used.
    """
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    import transformers

    return transformers
