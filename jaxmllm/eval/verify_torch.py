"""transformers' own forward, for verify.py: the only file of the package that needs torch."""

from __future__ import annotations

import numpy as np

from jaxmllm.errors import ConfigError

IMAGE_TOKEN = -1  # in tokens: where a token of a picture stands


def transformers_forward(
    folder: str, tokens: np.ndarray, pixels: np.ndarray | None
) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """-> (outputs of "aggregator" and "llm", logits [B, S, V]) of a folder in float32.

    tokens int32[B, S]; pixels float32[B, 3, h, w], normalised; None for a language model. Raises ConfigError if torch
    is not installed or transformers cannot open the folder.
    """
    try:
        import torch
    except ImportError:
        raise ConfigError(f"transformers:{folder} needs torch, which is not installed: pip install torch") from None
    import transformers

    kind = transformers.AutoModelForCausalLM if pixels is None else transformers.LlavaForConditionalGeneration
    try:
        model = kind.from_pretrained(folder, dtype=torch.float32, local_files_only=True).eval()
    except (ValueError, OSError, RuntimeError) as error:
        raise ConfigError(f"transformers cannot open {folder}: {' '.join(str(error).split())}") from None
    fields = {}
    if pixels is not None:
        tokens = np.where(tokens == IMAGE_TOKEN, model.config.image_token_index, tokens)
        fields["pixel_values"] = torch.tensor(pixels, dtype=torch.float32)
    with torch.no_grad():
        ids = torch.tensor(tokens, dtype=torch.long)
        found = model(input_ids=ids, output_hidden_states=True, use_cache=False, **fields)
    parts = {"llm": found.hidden_states[-1].numpy()}
    if pixels is not None:
        pictures = found.image_hidden_states
        parts["aggregator"] = torch.stack(list(pictures)).numpy()
    return parts, found.logits.numpy()
