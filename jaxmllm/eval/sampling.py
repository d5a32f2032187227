"""How the next token is chosen from logits: greedily or at random, row by row as each request says."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxmllm.nn.primitives import soft_cap


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How one reply is generated. The default is greedy.

    temperature: divides the logits; 0 takes the most likely token. top_k: only the k most likely tokens (0: all).
    top_p: only the most likely tokens whose probabilities together reach p. repetition_penalty: of tokens that stand in
    the prompt or the reply; their logits are divided by it if positive, else multiplied (Keskar et al. 2019). seed: the
    same request with the same seed has the same reply, whatever stands beside it in the batch. max_new_tokens: None for
    as many as the answerer allows. stop: texts before which a reply ends.

    Raises ValueError for values outside their ranges.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    stop: tuple[str, ...] = ()

    def __post_init__(self):
        ranges = {
            "temperature": (self.temperature >= 0, "0 or more"),
            "top_k": (self.top_k >= 0, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "repetition_penalty": (self.repetition_penalty > 0, "above 0"),
            "seed": (0 <= self.seed < 2**32, "from 0 to 2^32 - 1"),
            "max_new_tokens": (self.max_new_tokens is None or self.max_new_tokens >= 1, "1 or more"),
            "stop": (not isinstance(self.stop, str) and all(self.stop), "a list of texts that are not empty"),
        }
        for name, (fits, what) in ranges.items():
            if not fits:
                raise ValueError(f"{name} must be {what}, not {getattr(self, name)!r}")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Settings:
    """The settings of a batch. Those that are None serve no row, so that greedy decoding sorts nothing."""

    limit: jax.Array  # int32[B]; tokens of the reply
    temperature: jax.Array | None = None  # float32[B]; 0: greedy; with it:
    top_k: jax.Array | None = None  # int32[B]
    top_p: jax.Array | None = None  # float32[B]
    seed: jax.Array | None = None  # uint32[B]
    penalty: jax.Array | None = None  # float32[B]; with it:
    seen: jax.Array | None = None  # bool[B, V]; the tokens of prompt and reply

    @classmethod
    def of(cls, requests: Sequence[Sampling], most: int, prompts: Sequence[np.ndarray], vocab: int) -> Settings:
        """The settings (numpy) of a batch. most: the longest reply. prompts: int32[tokens] of text, one for each
        request."""

        def column(name: str, dtype: type) -> np.ndarray:
            return np.array([getattr(each, name) for each in requests], dtype)

        settings = cls(np.array([min(each.max_new_tokens or most, most) for each in requests], np.int32))
        if any(each.temperature for each in requests):
            kinds = {"temperature": np.float32, "top_k": np.int32, "top_p": np.float32, "seed": np.uint32}
            settings = dataclasses.replace(settings, **{name: column(name, dtype) for name, dtype in kinds.items()})
        if any(each.repetition_penalty != 1 for each in requests):
            seen = np.zeros((len(requests), vocab), bool)
            for row, prompt in zip(seen, prompts):
                row[prompt[prompt < vocab]] = True
            settings = dataclasses.replace(settings, penalty=column("repetition_penalty", np.float32), seen=seen)
        return settings


def next_token(
    logits: jax.Array, cap: float | None, settings: Settings, count: jax.Array
) -> tuple[jax.Array, Settings]:
    """float32[B, V] logits before their soft cap -> (int32[B], the settings with these tokens among those seen).

    count: tokens of the replies so far, from which the random numbers of this one are made.
    """
    logits = soft_cap(logits, cap)
    if settings.penalty is not None:
        penalty = settings.penalty[:, None]
        logits = jnp.where(settings.seen, jnp.where(logits < 0, logits * penalty, logits / penalty), logits)
    token = logits.argmax(-1).astype(jnp.int32)
    if settings.temperature is not None:
        token = jnp.where(settings.temperature > 0, sample(logits, settings, count), token)
    if settings.penalty is not None:
        seen = settings.seen | (token[:, None] == jnp.arange(logits.shape[1]))
        settings = dataclasses.replace(settings, seen=seen)
    return token, settings


def sample(logits: jax.Array, settings: Settings, count: jax.Array) -> jax.Array:
    """int32[B]: drawn from the softmax over the tokens that top_k, and then top_p, leave."""
    vocab = logits.shape[1]
    logits = logits / jnp.maximum(settings.temperature, 1e-6)[:, None]
    ordered = jnp.sort(logits, -1, descending=True)
    kept = jnp.arange(vocab) < jnp.where(settings.top_k > 0, settings.top_k, vocab)[:, None]
    probability = jax.nn.softmax(jnp.where(kept, ordered, -jnp.inf), -1)
    before = jnp.cumsum(probability, -1) - probability
    kept &= (before < settings.top_p[:, None]) | (jnp.arange(vocab) == 0)
    least = jnp.where(kept, ordered, jnp.inf).min(-1, keepdims=True)
    noise = jax.vmap(lambda seed: jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), count), (vocab,)))
    return jnp.where(logits >= least, logits + noise(settings.seed), -jnp.inf).argmax(-1).astype(jnp.int32)
