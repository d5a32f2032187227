"""A Llama-style decoder: RMSNorm, rotary grouped-query attention, SwiGLU, tied or untied head.

Its relatives are fields: Qwen's biases and norms of queries and keys, windows (Mistral, Phi-3), Gemma's norms, caps and
alternating windows, SmolLM3's layers without positions. All layers stay one scan; what differs from layer to layer is
data of the scan. With `inserts`, layers that look at the image follow some decoder layers (inserts.py).
"""

from __future__ import annotations

import contextlib
import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import Visual
from jaxmllm.fields import Positive
from jaxmllm.llms.inserts import VisualInserts, VisualLayers
from jaxmllm.nn.attention.layer import Attention
from jaxmllm.nn.primitives import MLP, Embed, Norm
from jaxmllm.nn.stack import Stack, empty_taps, tap_slots


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x [B, S, H]; kind: see nn.attention.layer.Attention.

    The last fields are those of Decoder and Attention with the same names; post_norms: both results pass a norm too
    before they are added.
    """

    heads: Positive
    kv_heads: Positive
    head_dim: Positive
    mlp: Positive
    rope_theta: float | None
    eps: float
    qkv_bias: bool
    rope_scaling: Any = None
    qk_norm: bool = False
    activation: str = "silu"
    zero_centred: bool = False
    post_norms: bool = False
    rotary_dim: Positive | None = None
    window: Positive | None = None
    local_theta: float | None = None
    query_scale: float | None = None
    attention_cap: float | None = None

    @nn.compact
    def __call__(self, x, cache, positions, segments, cache_index, kind=None):
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
            zero_centred=self.zero_centred,
            rotary_dim=self.rotary_dim,
            window=self.window,
            local_theta=self.local_theta,
            query_scale=self.query_scale,
            cap=self.attention_cap,
            kernel_init=init,
            name="attn",
        )
        mlp = MLP(self.mlp, x.shape[-1], self.activation, gated=True, use_bias=False, kernel_init=init, name="mlp")
        y, cache = attn(self.norm("norm1")(x), positions, segments, cache, cache_index, kind=kind)
        x = x + (self.norm("post_norm1")(y) if self.post_norms else y)
        y = mlp(self.norm("norm2")(x))
        return x + (self.norm("post_norm2")(y) if self.post_norms else y), cache, {}

    @nn.nowrap
    def norm(self, name: str) -> nn.Module:
        """A norm of the block."""
        return Norm("rms", self.eps, self.zero_centred, name=name)


class Decoder(nn.Module):
    """A decoder-only language model on embedded tokens.

    Taps are 1-based: tap i is the output of layer i before the final norm, but tap `layers` is the state after the
    final norm (as in Hugging Face's hidden_states and VisPer-LM).

    windowed and rotary are patterns that repeat over the layers: (True, False) is every other layer, from the first.

    The tables of tokens have `vocab` rows, and with table_multiple a few more, up to a multiple of it, so that they
    divide over the mesh. Those are padding: no token looks them up, they are never predicted, and no export has them.
    """

    vocab: Positive
    width: Positive
    layers: Positive
    heads: Positive
    kv_heads: Positive
    mlp: Positive
    head_dim: Positive | None = None  # default width / heads
    rope_theta: float = 10000.0
    eps: float = 1e-5
    tied: bool = False
    qkv_bias: bool = False
    rope_scaling: Any = None  # nn.rope.Llama3Scaling, LinearScaling, LongRope
    qk_norm: bool = False  # an RMS norm of the queries and keys of each head
    activation: str = "silu"  # of the gated MLP; a name in nn.primitives.ACTIVATIONS
    window: Positive | None = None  # a query of a windowed layer sees the last `window` tokens, its own included
    windowed: tuple[bool, ...] = (True,)  # which layers have the window
    local_theta: float | None = None  # rotary base of windowed layers, not scaled; None: rope_theta
    rotary: tuple[bool, ...] = (True,)  # which layers rotate queries and keys by position
    rotary_dim: Positive | None = None  # entries of a head that are rotated; None: all
    query_scale: float | None = None  # of the products of queries and keys; None: 1 / sqrt(head_dim)
    attention_cap: float | None = None  # soft cap of these products (nn.primitives.soft_cap)
    logit_cap: float | None = None  # soft cap of the logits
    embed_scale: float | None = None  # embedded tokens are multiplied by it
    zero_centred: bool = False  # norms scale by 1 + their parameter
    post_norms: bool = False  # norms after attention and MLP too
    table_multiple: Positive = 1  # of the rows of the tables of tokens
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
        if self.head_dim is None and self.width % self.heads:
            raise ValueError(f"Decoder: width {self.width} is no multiple of heads {self.heads}; give head_dim")
        if self.inserts and self.inserts.last >= self.layers:
            raise ValueError(
                f"Decoder: the last visual layer would follow layer {self.inserts.last}, and the last layer is "
                f"{self.layers - 1}; change start, stride or count of inserts"
            )
        if not self.windowed or not self.rotary:
            raise ValueError(
                "Decoder: windowed and rotary need an entry, for all layers; without a window: window=None"
            )

    @nn.nowrap
    def block(self) -> nn.Module:
        """A new block; all layers are copies of it."""
        head_dim = self.head_dim or self.width // self.heads
        sizes = self.heads, self.kv_heads, head_dim, self.mlp
        alike = "qkv_bias", "activation", "zero_centred", "post_norms", "rotary_dim", "query_scale", "attention_cap"
        some_windowed, some_rotate = self.window and any(self.layer_kinds("windowed")), any(self.layer_kinds("rotary"))
        return DecoderBlock(
            *sizes,
            self.rope_theta if some_rotate else None,
            self.eps,
            rope_scaling=self.rope_scaling,
            qk_norm=self.qk_norm,
            window=self.window if some_windowed else None,
            local_theta=self.local_theta if some_windowed else None,
            **{name: getattr(self, name) for name in alike},
        )

    @nn.nowrap
    def layer_kinds(self, pattern: str) -> tuple[bool, ...]:
        """ "windowed" or "rotary" of each layer."""
        values = getattr(self, pattern)
        return tuple(values[i % len(values)] for i in range(self.layers))

    @nn.nowrap
    def different_kinds(self) -> dict[str, jax.Array] | None:
        """bool[layers] of each pattern that is true of some layers only; None if all layers are alike."""
        patterns = [*(["windowed"] if self.window else []), "rotary"]
        kinds = {name: self.layer_kinds(name) for name in patterns}
        return {name: jnp.array(values) for name, values in kinds.items() if len(set(values)) > 1} or None

    def setup(self):
        rows = math.ceil(self.vocab / self.table_multiple) * self.table_multiple
        self.embedding = Embed(rows, self.width)
        self.blocks = Stack(self.block(), self.layers, self.remat, self.unroll)
        if self.inserts:
            self.visual = VisualLayers(self.inserts, self.layers, self.remat != "none")
        self.norm = Norm("rms", self.eps, self.zero_centred)
        if not self.tied:
            self.lm_head = Embed(rows, self.width)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, S] -> [B, S, H]."""
        x = self.embedding(tokens)
        return x if self.embed_scale is None else x * jnp.asarray(self.embed_scale, x.dtype)

    def as_words(self, x: jax.Array) -> jax.Array:
        """Vectors [N, P, H] as means of the embeddings of all tokens, weighted by softmax(x @ output table.T).

        What the language model reads is then between its own words (AlignVLM, arXiv 2502.01341). The logits
        [N, P, V] exist at once.
        """
        tables = self.output_table(), self.embedding.kernel()
        to, back = (sharded.shard(table, None, None)[: self.vocab].astype(x.dtype) for table in tables)
        share = jax.nn.softmax(sharded.einsum("nph,vh->npv", x, to, "batch", None, None).astype(jnp.float32))
        mean = sharded.einsum("npv,vh->nph", share.astype(x.dtype), back, "batch", None, None)
        return mean if self.embed_scale is None else mean * jnp.asarray(self.embed_scale, x.dtype)

    def output_table(self) -> jax.Array:
        """The table as it is stored, [V and padding, H]: logits = soft_cap(hidden @ table.T, logit_cap)[.., :vocab]."""
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
        inputs, own = (positions, segments, cache_index), self.different_kinds()
        more = dict(own=own, interleave=interleave, interleave_carry=carry)
        # A plan reads from this scope how many layers have the window (plan/hlo.py, plan/flops.py).
        share = f"windowed_{sum(self.layer_kinds('windowed'))}_of_{self.layers}"
        with jax.named_scope(share) if own and "windowed" in own else contextlib.nullcontext():
            x, buffer, cache, aux = self.blocks(x, buffer, slots, cache, *inputs, **more)
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
