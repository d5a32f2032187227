"""A Llama-style decoder: RMSNorm, rotary grouped-query attention, SwiGLU, tied or untied head.

With `inserts`, a layer that looks at the image runs after decoder layers start, start + stride, ... (0-based), on the
patch tokens only (Cambrian-1's in-LLM SVA). Layers then lie in three parts, so that everything is scanned:

    head     layers 0 .. start
    groups   insert, then `stride` layers, as often as that goes      parameters have leading [groups, ...]
    tail     the insert that may be left, then the layers that are left

Without inserts there is only the head. `layer_path` says where layer i is stored.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.batch import Visual
from jaxmllm.nn.attention import Attention
from jaxmllm.nn.primitives import MLP, Embed, Norm
from jaxmllm.nn.stack import Stack, empty_taps, tap_slots


@dataclasses.dataclass(frozen=True)
class Inserts:
    """After which decoder layers the visual layer runs: start + stride * j for j < count."""

    start: int
    stride: int
    count: int


class DecoderBlock(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)). x [B, S, H]."""

    heads: int
    kv_heads: int
    head_dim: int
    mlp: int
    rope_theta: float
    eps: float
    qkv_bias: bool

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
            kernel_init=init,
            name="attn",
        )
        mlp = MLP(self.mlp, x.shape[-1], "silu", gated=True, use_bias=False, kernel_init=init, name="mlp")
        y, cache = attn(Norm("rms", self.eps, name="norm1")(x), positions, segments, cache, cache_index)
        x = x + y
        return x + mlp(Norm("rms", self.eps, name="norm2")(x)), cache


class PatchUpdate(nn.Module):
    """Runs `insert` on the patch tokens of x [B, S, H] and puts them back; no other token changes."""

    insert: nn.Module

    @nn.compact
    def __call__(self, x: jax.Array, visual: Visual) -> jax.Array:
        b, slots, block = visual.positions.shape
        h, grid, columns = x.shape[-1], visual.grid, visual.columns
        places = jnp.maximum(mesh.reshape(visual.positions, b, slots * block), 0)
        tokens = mesh.reshape(mesh.take_rows(x, places), b * slots, block, h)
        patches = mesh.reshape(tokens[:, : grid * columns], b * slots, grid, columns, h)
        updated = self.insert.copy(name="layer")(patches[:, :, :grid], visual.memory)
        patches = jnp.concatenate([updated, patches[:, :, grid:]], 2)
        patches = mesh.reshape(patches, b * slots, grid * columns, h)
        tokens = jnp.concatenate([patches, tokens[:, grid * columns :]], 1)
        return place_visual(x, mesh.reshape(tokens, b, slots * block, h), visual.index)


def place_visual(x: jax.Array, tokens: jax.Array, index: jax.Array) -> jax.Array:
    """Replaces x[b, s] by tokens[b, index[b, s]] wherever index >= 0. x [B, S, H], tokens [B, I*T, H]."""
    placed = mesh.take_rows(tokens.astype(x.dtype), jnp.maximum(index, 0))
    placed = mesh.shard(placed, *mesh.batch_names(3, length=True))
    return jnp.where(index[..., None] >= 0, placed, x)


class VisualGroup(nn.Module):
    """The visual layer on the patch tokens (skipped without `visual`), then a stack of decoder blocks."""

    insert: nn.Module
    block: nn.Module
    length: int
    remat: str
    unroll: int | bool

    @nn.compact
    def __call__(self, carry, layer, visual, broadcast):
        (x, taps), (slots, cache) = carry, layer
        if visual is not None:
            update = PatchUpdate if self.remat == "none" else nn.remat(PatchUpdate, prevent_cse=False)
            x = update(self.insert, name="insert")(x, visual)
        stack = Stack(self.block, self.length, self.remat, self.unroll, name="blocks")
        x, taps, cache = stack(x, taps, slots, cache, *broadcast)
        return (x, taps), cache


class Decoder(nn.Module):
    """Decoder-only language model on embedded tokens.

    taps are 1-based: tap i = output of layer i before the final norm, except that `layers` itself means the state after
    the final norm (as in Hugging Face's hidden_states and VisPer-LM).
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
    inserts: Inserts | None = None
    insert: nn.Module | None = None  # the visual layer; mllm.py puts it here
    remat: str = "full"
    unroll: int | bool = 1

    def __post_init__(self):
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ValueError(f"Decoder: heads {self.heads} must be a multiple of kv_heads {self.kv_heads}")
        if self.inserts and self.inserts.start + self.inserts.stride * (self.inserts.count - 1) >= self.layers:
            raise ValueError(f"Decoder: {self.inserts} reaches past the last of {self.layers} layers")

    @property
    def parts(self) -> tuple[int, int, int, int]:
        """Layers in the head, number of groups, layers per group, layers in the tail."""
        if not self.inserts:
            return self.layers, 0, 0, 0
        head, stride = self.inserts.start + 1, self.inserts.stride
        groups = min(self.inserts.count, (self.layers - head) // stride)
        return head, groups, stride, self.layers - head - groups * stride

    def layer_path(self, i: int) -> tuple[str, tuple[int, ...]]:
        """Where decoder layer i (0-based) is stored: path of the stacked parameters, index into them."""
        head, groups, stride, _ = self.parts
        if i < head:
            return "head/layers/block", (i,)
        if i < head + groups * stride:
            return "groups/blocks/layers/block", divmod(i - head, stride)
        return "tail/blocks/layers/block", (i - head - groups * stride,)

    def setup(self):
        block = DecoderBlock(
            self.heads,
            self.kv_heads,
            self.head_dim or self.width // self.heads,
            self.mlp,
            self.rope_theta,
            self.eps,
            self.qkv_bias,
        )
        head, groups, stride, tail = self.parts
        self.embedding = Embed(self.vocab, self.width)
        self.head = Stack(block, head, self.remat, self.unroll)
        if groups:
            self.groups = nn.scan(
                VisualGroup,
                variable_axes={"params": 0},
                split_rngs={"params": True},
                in_axes=(0, nn.broadcast, nn.broadcast),
                length=groups,
            )(self.insert, block, stride, self.remat, self.unroll)
        if self.inserts:
            self.tail = VisualGroup(self.insert, block, tail, self.remat, self.unroll)
        self.norm = Norm("rms", self.eps)
        if not self.tied:
            self.lm_head = Embed(self.vocab, self.width)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """int32[B, S] -> [B, S, H]."""
        return self.embedding(tokens)

    def output_table(self) -> jax.Array:
        """[V, H] as it is stored: logits = hidden @ table.T."""
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
    ) -> tuple[jax.Array, dict[int, jax.Array], Any]:
        """x [B, S, H] embedded; positions, segments int32[B, S] -> (normed states [B, S, H], taps, cache)."""
        head, groups, stride, tail = self.parts
        wanted = tuple(t for t in taps if t != self.layers)
        buffer, broadcast = empty_taps(x, len(wanted)), (positions, segments, cache_index)
        new = {}
        caches = cache or dict.fromkeys(("head", "groups", "tail"))
        x, buffer, new["head"] = self.head(x, buffer, tap_slots(wanted, 1, head), caches["head"], *broadcast)
        carry = (x, buffer)
        if groups:
            slots = tap_slots(wanted, 1 + head, groups * stride).reshape(groups, stride)
            carry, new["groups"] = self.groups(carry, (jnp.asarray(slots), caches["groups"]), visual, broadcast)
        if self.inserts:
            slots = tap_slots(wanted, 1 + head + groups * stride, tail)
            left = visual if groups < self.inserts.count else None
            carry, new["tail"] = self.tail(carry, (slots, caches["tail"]), left, broadcast)
        x, buffer = carry
        x = self.norm(x)
        out = {t: x if t == self.layers else buffer[wanted.index(t)] for t in taps}
        return x, out, new if cache else None

    def empty_cache(self, batch: int, length: int, dtype: Any) -> dict:
        """A key-value cache of `length` slots per row, all empty."""
        head, groups, stride, tail = self.parts
        dim = self.head_dim or self.width // self.heads

        def part(*lead):
            kv = (*lead, batch, length, self.kv_heads, dim)
            return {
                "k": jnp.zeros(kv, dtype),
                "v": jnp.zeros(kv, dtype),
                "segments": jnp.zeros((*lead, batch, length), jnp.int32),
            }

        cache = {"head": part(head)}
        if groups:
            cache["groups"] = part(groups, stride)
        if self.inserts:
            cache["tail"] = part(tail)
        return cache
