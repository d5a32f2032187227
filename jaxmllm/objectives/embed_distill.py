"""Embedding regression into the language model (VisPer-LM: Jain et al. 2024, arXiv 2412.09585, section 4).

For a teacher, a few learned task tokens follow every image, and at chosen layers a small Perceiver-style predictor
reads the hidden states and regresses the teacher's feature map: smooth-L1 plus a contrastive term. Formulas and
constants follow the released code (base_ola_vlm.py, resampler.py), with two repairs: the loss is not multiplied by
zero, and an image without this target is neither a row nor a negative.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import mesh
from jaxmllm.batch import Term
from jaxmllm.nn.attention import MASKED
from jaxmllm.nn.primitives import MLP, Linear, Norm, Table, normal

MAX_SCALE = 100.0  # of the cosine logits, as in CLIP


class Predictor(nn.Module):
    """The queries of every image read the hidden states of its row -> predictions [B, I, n, out].

    Queries and states pass the same input projection; every block attends over (states + the image's own queries),
    heads x head_dim wide, then a feed-forward; the states stay the projected inputs. maps: number of output MLPs on
    top (the reference has 3 for depth; the loss reads the first). norm_out: a last LayerNorm, right for teachers that
    end in one, wrong for targets whose mean and length say something. Returns [map_1, .., map_k, plain].
    """

    width: int
    out: int
    heads: int = 4
    head_dim: int = 32
    blocks: int = 1
    ff_mult: int = 1
    maps: int = 0
    norm_out: bool = True

    @nn.compact
    def __call__(self, states: jax.Array, queries: jax.Array, visible: jax.Array | None = None) -> list[jax.Array]:
        """states [B, S, H], queries [B, I, n, H], visible bool[B, I, S] (None: all) -> arrays [B, I, n, out]."""
        proj_in = Linear((self.width,), name="proj_in")
        x, z = proj_in(mesh.shard(states, "batch", None, None)), proj_in(queries)
        for i in range(self.blocks):
            z = z + self.attend(x, z, visible, f"block_{i}")
            y = Norm(name=f"block_{i}_ff_norm")(z)
            z = z + MLP(self.width * self.ff_mult, self.width, use_bias=False, name=f"block_{i}_ff")(y)
        plain = Linear((self.out,), name="proj_out")(z)
        if self.norm_out:
            plain = Norm(name="norm_out")(plain)
        return [MLP(self.out, self.out, "relu", name=f"map_{i + 1}")(plain) for i in range(self.maps)] + [plain]

    def attend(self, x: jax.Array, z: jax.Array, visible: jax.Array | None, name: str) -> jax.Array:
        a, c = Norm(name=f"{name}_norm_x")(x), Norm(name=f"{name}_norm_z")(z)
        q, k, v = (
            Linear((self.heads, self.head_dim), out_axes=("heads", None), use_bias=False, name=f"{name}_{part}")
            for part in "qkv"
        )
        query = q(c) * self.head_dim**-0.5
        to_states = jnp.einsum("binhd,bthd->bihnt", query, k(a), preferred_element_type=jnp.float32)
        to_queries = jnp.einsum("binhd,bimhd->bihnm", query, k(c), preferred_element_type=jnp.float32)
        if visible is not None:
            to_states = jnp.where(visible[:, :, None, None], to_states, MASKED)
        weights = jax.nn.softmax(jnp.concatenate([to_states, to_queries], -1), -1).astype(z.dtype)
        y = jnp.einsum("bihnt,bthd->binhd", weights[..., : x.shape[1]], v(a))
        y = y + jnp.einsum("bihnm,bimhd->binhd", weights[..., x.shape[1] :], v(c))
        return Linear((self.width,), ("heads", None), ("embed",), use_bias=False, name=f"{name}_out")(y)


class EmbedDistill(nn.Module):
    """One teacher's task tokens, predictors and loss.

    queries: n, rows of the target. tokens: task tokens per image in the sequence (n is a multiple of it). If `pooled`
    (depth, seg), the parameter has n rows: their means in contiguous groups are the tokens, and the raw rows are the
    predictor's queries. Otherwise (gen) it has `tokens` rows, which are the tokens, and the queries come from their
    hidden states at the layer (`fit_queries`: their mean, if there is one query). layers: 1-based (Decoder.taps).
    aligned: each query also gets the hidden state of the visual token at its place (then n = L*L). VisPer-LM's queries
    must find their place by attention, which takes a model that starts from nothing thousands of steps.
    """

    queries: int
    dim: int  # d of the target
    width: int  # H
    layers: tuple[int, ...]
    tokens: int = 8
    pooled: bool = True
    aligned: bool = False
    predictor_width: int | None = None  # default d
    heads: int = 4
    head_dim: int = 32
    blocks: int = 1
    ff_mult: int = 1
    maps: int = 0
    norm_out: bool = True
    contrastive: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        if self.pooled and self.queries % self.tokens:
            raise ValueError(f"EmbedDistill: {self.queries} queries cannot be pooled into {self.tokens} task tokens")

    def setup(self):
        rows = self.queries if self.pooled else self.tokens
        self.table = Table((rows, self.width), normal(1.0))
        self.logit_scale = Table((), nn.initializers.constant(2.0))
        self.predictors = [self.predictor() for _ in self.layers]

    @nn.nowrap
    def predictor(self) -> Predictor:
        """A predictor; every layer has its own."""
        width, core = self.predictor_width or self.dim, (self.heads, self.head_dim, self.blocks, self.ff_mult)
        return Predictor(width, self.dim, *core, maps=self.maps, norm_out=self.norm_out)

    def task_tokens(self) -> jax.Array:
        """[tokens, H]."""
        table = self.table()
        return table.reshape(self.tokens, -1, self.width).mean(1) if self.pooled else table

    def predict(
        self, layer: int, states: jax.Array, visible: jax.Array, places: jax.Array, patches: jax.Array
    ) -> jax.Array:
        """Prediction [N, n, d] at layers[layer]: states [B, S, H], visible bool[B, I, S] (what each image's predictor
        may read), places int32[B, I, tokens], patches int32[B, I, L*L] (where its task tokens and patches stand, -1:
        nowhere)."""
        b, slots, _ = places.shape

        def at(index):  # [B, I, k] -> [B, I, k, H]; 0 where nothing stands
            found = mesh.take_rows(states, mesh.reshape(jnp.maximum(index, 0), b, slots * index.shape[2]))
            return mesh.reshape(found, b, slots, index.shape[2], self.width) * (index >= 0)[..., None]

        if self.pooled:
            queries = mesh.repeat_rows(self.table().astype(states.dtype), b, slots)
        else:
            queries = fit_queries(at(places), self.queries)
        if self.aligned:
            queries = queries + at(patches)
        y = self.predictors[layer](states, queries, visible)[0]
        return mesh.reshape(y, b * slots, *y.shape[2:])

    def __call__(self, predictions: list[jax.Array], target: jax.Array, mask: jax.Array) -> Term:
        """predictions [N, n, d] per layer, target [N, n, d], mask bool[N] -> per-image sum over the layers."""
        target = jax.lax.stop_gradient(target.astype(jnp.float32))
        scale = jnp.minimum(jnp.exp(self.logit_scale().astype(jnp.float32)), MAX_SCALE)
        values = 0.0
        for p in predictions:
            values = values + smooth_l1(p, target) + self.contrastive * info_nce(p, target, scale, mask)
        return Term(values, mask)


def fit_queries(x: jax.Array, n: int) -> jax.Array:
    """[B, I, m, H] -> [B, I, n, H]: repeated as a whole if n > 1 is a multiple of m, else n times their mean."""
    m = x.shape[2]
    if n == 1 or n % m:
        x, m = x.mean(2, keepdims=True), 1
    return jnp.concatenate([x] * (n // m), 2)


def smooth_l1(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """float32[N]: mean over a sample's elements of d^2/2 if |d| < 1 else |d| - 1/2."""
    d = jnp.abs(prediction.astype(jnp.float32) - target)
    return jnp.where(d < 1, 0.5 * d * d, d - 0.5).mean(tuple(range(1, d.ndim)))


def info_nce(prediction: jax.Array, target: jax.Array, scale: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """float32[N]: cross-entropy of prediction i against all targets j of the global batch, label i.

    logits = scale * cosine of the flattened tensors; only targets with mask are negatives; gradients do not flow into
    targets.
    """
    n = prediction.shape[0]
    p, t = (mesh.reshape(x.astype(jnp.float32), n, x.size // n) for x in (prediction, target))
    p, t = (x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24)) for x in (p, t))
    t = mesh.shard(jax.lax.stop_gradient(t), None, None)  # all targets on every device
    logits = scale * jnp.einsum("id,jd->ij", p, t)
    own = jnp.eye(n, dtype=bool)
    if mask is not None:
        logits = jnp.where(mesh.shard(mask, None)[None] | own, logits, MASKED)
    return jax.nn.logsumexp(logits, -1) - jnp.where(own, logits, 0).sum(-1)
