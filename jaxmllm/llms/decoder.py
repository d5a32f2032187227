"""A Llama-style decoder: RMSNorm, rotary grouped-query attention, SwiGLU, tied or untied head.

With `inserts`, layers that look at the image follow some decoder layers (inserts.py).
"""

from __future__ import annotations

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm.batch import Visual
from jaxmllm.llms.inserts import VisualInserts, VisualLayers
from jaxmllm.nn.attention.layer import Attention
from jaxmllm.nn.primitives import MLP, Embed, Norm
from jaxmllm.nn.stack import Stack, empty_taps, tap_slots


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x [B, S, H]."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    eps: float
    qkv_bias: bool
    rope_scaling: Any = None
    qk_norm: bool = False

    @nn.compact
    def __call__(self, x, cache, positions, segments, cache_index):
        init = nn.initializers.lecun_normal()
        attn = Attention(
            self.heads,
            self.head_dim,
            self.kv_heads,
            causal=True,
            use_bias=self.qkv_bias,
            out_bias=False,
            rope_theta=self.rope_theta,
            rope_scaling=self.rope_scaling,
            norm_eps=self.eps if self.qk_norm else None,
            kernel_init=init,
            name="attn",
        )
        mlp = MLP(self.mlp, x.shape[-1], "silu", gated=True, use_bias=False, kernel_init=init, name="mlp")
        y, cache = attn(Norm("rms", self.eps, name="norm1")(x), positions, segments, cache, cache_index)
        x = x + y
        return x + mlp(Norm("rms", self.eps, name="norm2")(x)), cache, {}


class Decoder(nn.Module):
    """A decoder-only language model on embedded tokens.

    Taps are 1-based: tap i is the output of layer i before the final norm, but tap `layers` is the state after the
    final norm (as in Hugging Face's hidden_states and VisPer-LM).
    """

    vocab: int
    width: int
    layers: int
    heads: int
    kv_heads: int
    mlp: int
    head_dim: int | None = None  # default width / heads
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    rope_scaling: Any = None  # nn.rope.Llama3Scaling, LinearScaling
    qk_norm: bool = False  # an RMS norm of the queries and keys of each head
    inserts: VisualInserts | None = None
    remat: str = "full"
    unroll: int | bool = 1

    # Names of the auxiliary losses and metrics that the blocks hand up (nn/stack.py): a subclass whose `block` makes
    # blocks of another kind lists theirs here.
    aux: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"Decoder: heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.inserts and self.inserts.last >= self.layers:
            raise ValueError(
                f"Decoder: the last visual layer would follow layer {self.inserts.last}, and the last layer is "
                f"{self.layers - 1}; change start, stride or count of inserts"
            )

    @nn.nowrap
    def block(self) -> nn.Module:
        """A new block; all layers are copies of it."""
        head_dim = self.head_dim or self.width // self.heads
        sizes = self.heads, self.kv_heads, head_dim, self.mlp
        return DecoderBlock(*sizes, self.rope_theta, self.eps, self.qkv_bias, self.rope_scaling, self.qk_norm)

    def setup(self):
        self.embedding = Embed(self.vocab, self.width)
        self.blocks = Stack(self.block(), self.layers, self.remat, self.unroll)
        if self.inserts:
            self.visual = VisualLayers(self.inserts, self.layers, self.remat != "none")
        self.norm = Norm("rms", self.eps)
        if not self.tied:
            self.lm_head = Embed(self.vocab, self.width)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, S] -> [B, S, H]."""
        return self.embedding(tokens)

    def output_table(self) -> jax.Array:
        """The table [V, H] as it is stored: logits = hidden @ table.T."""
        return (self.embedding if self.tied else self.lm_head).kernel()

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segments: Any,
        visual: Visual | None = None,
        taps: tuple[int, ...] = (),
        cache: Any = None,
        cache_index: jax.Array | int = 0,
    ) -> tuple[jax.Array, dict[int, jax.Array], Any, dict[str, jax.Array]]:
        """Embedded tokens x [B, S, H]; positions, segments int32[B, S] -> (normed states [B, S, H], taps, cache, aux).

        aux: what the blocks hand up, each with a leading layer dimension.
        """
        wanted = tuple(t for t in taps if t != self.layers)
        slots, buffer = tap_slots(wanted, self.layers), empty_taps(x, len(wanted))
        interleave, carry = self.visual(x, visual) if self.inserts and visual is not None else (None, None)
        inputs = positions, segments, cache_index
        x, buffer, cache, aux = self.blocks(
            x, buffer, slots, cache, *inputs, interleave=interleave, interleave_carry=carry
        )
        x = self.norm(x)
        return x, {t: x if t == self.layers else buffer[wanted.index(t)] for t in taps}, cache, aux

    def empty_cache(self, batch: int, length: int, dtype: Any) -> dict:
        """An empty key-value cache of `length` slots per row; every array has a leading layer dimension."""
        dim = self.head_dim or self.width // self.heads
        lead = self.layers, batch, length
        return {
            "k": jnp.zeros((*lead, self.kv_heads, dim), dtype),
            "v": jnp.zeros((*lead, self.kv_heads, dim), dtype),
            "segments": jnp.zeros(lead, jnp.int32),
        }
