"""Embedding regression into the language model (VisPer-LM: Jain et al. 2024, arXiv 2412.09585, section 4).

For each teacher, a few learned task tokens follow every image. At chosen layers a small Perceiver-style predictor reads
the hidden states and regresses the teacher's feature map: smooth-L1 plus a contrastive term. Formulas and constants are
those of the released code (base_ola_vlm.py, resampler.py), except that the loss is not multiplied by zero, and that an
image without this target is neither a row nor a negative.
"""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp

from jaxmllm import sharded
from jaxmllm.batch import Term, VisualLayout
from jaxmllm.fields import Natural, Positive
from jaxmllm.nn.attention.plain import MASKED
from jaxmllm.nn.primitives import MLP, LearnedArray, Linear, Norm, normal
from jaxmllm.objectives.base import ModelView, Needs, Objective
from jaxmllm.objectives.task_tokens import TaskPlaces, task_places

MAX_SCALE = 100.0  # of the cosine logits, as in CLIP


class Predictor(nn.Module):
    """The queries of each image read the hidden states of its row -> predictions [B, I, queries, out].

    Queries and states go through the same input projection. Each block attends to the states and the image's own
    queries, heads x head_dim wide, and ends in a feed-forward layer; the states stay the projected inputs. extra_heads:
    number of output MLPs on top (the reference has 3 for depth, and the loss reads the first). norm_out: a last
    LayerNorm, right for teachers that end in one, wrong for targets whose mean and length carry information. Returns
    [map_1, .., map_k, plain].
    """

    width: Positive
    out: Positive
    heads: Positive = 4
    head_dim: Positive = 32
    blocks: Natural = 1
    ff_mult: Positive = 1
    extra_heads: Natural = 0
    norm_out: bool = True

    @nn.compact
    def __call__(self, states: jax.Array, queries: jax.Array, visible: jax.Array | None = None) -> list[jax.Array]:
        """states [B, S, H], queries [B, I, queries, H], visible bool[B, I, S] (None: all) -> [B, I, queries, out]."""
        proj_in = Linear((self.width,), name="proj_in")
        x, z = proj_in(sharded.shard(states, "batch", None, None)), proj_in(queries)
        for i in range(self.blocks):
            z = z + self.attend(x, z, visible, f"block_{i}")
            y = Norm(name=f"block_{i}_ff_norm")(z)
            z = z + MLP(self.width * self.ff_mult, self.width, use_bias=False, name=f"block_{i}_ff")(y)
        plain = Linear((self.out,), name="proj_out")(z)
        if self.norm_out:
            plain = Norm(name="norm_out")(plain)
        return [MLP(self.out, self.out, "relu", name=f"map_{i + 1}")(plain) for i in range(self.extra_heads)] + [plain]

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


class EmbedDistill(Objective):
    """One teacher's task tokens, predictors and loss.

    queries: rows of the target. tokens: task tokens per image in the sequence. If `pooled` (depth, seg), the learned
    array has `queries` rows, a multiple of `tokens`: the means of contiguous groups are the task tokens, the rows
    themselves are the predictor's queries. Otherwise (gen) it has `tokens` rows, which are the task tokens, and the
    queries come from their hidden states at the layer (`fit_queries`; one query is their mean). layers: 1-based, as
    Decoder's taps; without any, there are task tokens and nothing more, as in VisPer-LM's last stage. aligned: each
    query also gets the hidden state of the visual token at its cell (then queries = L*L). VisPer-LM's queries must find
    their place by attention, which takes a model that starts from nothing thousands of steps.
    """

    queries: Positive
    dim: Positive  # columns of the target
    layers: tuple[int, ...]
    tokens: Natural = 8
    pooled: bool = True
    aligned: bool = False
    predictor_width: Positive | None = None  # default dim
    heads: Positive = 4
    head_dim: Positive = 32
    blocks: Natural = 1
    ff_mult: Positive = 1
    extra_heads: Natural = 0
    norm_out: bool = True
    contrastive: float = 0.3

    def __post_init__(self):
        super().__post_init__()
        if self.pooled and self.queries % self.tokens:
            raise ValueError(f"EmbedDistill: {self.queries} queries cannot be pooled into {self.tokens} task tokens")

    @property
    def needs(self) -> Needs:
        return Needs(self.layers, self.tokens, (self.queries, self.dim) if self.layers else None)

    @property
    def has_loss(self) -> bool:
        """Whether there is a predictor."""
        return bool(self.layers)

    def check(self, name: str, layout: VisualLayout) -> None:
        """Raises ValueError if aligned queries and cells differ in number."""
        cells = layout.tokens.grid**2
        if self.aligned and self.queries != cells:
            text = f"its {self.queries} queries need a cell each, and the aggregator has {cells} cells"
            raise ValueError(f"objective {name!r} is aligned: {text}; change one, or set aligned=False")

    def setup(self):
        self.table = LearnedArray(normal(1.0))
        self.logit_scale = LearnedArray(nn.initializers.constant(2.0))
        self.predictors = [self.predictor() for _ in self.layers]

    @nn.nowrap
    def predictor(self) -> Predictor:
        """A new predictor; each layer has its own."""
        width, core = self.predictor_width or self.dim, (self.heads, self.head_dim, self.blocks, self.ff_mult)
        return Predictor(width, self.dim, *core, extra_heads=self.extra_heads, norm_out=self.norm_out)

    def task_tokens(self, width: int) -> jax.Array:
        """[tokens, H]; width: H."""
        table = self.table((self.queries if self.pooled else self.tokens, width))
        return table.reshape(self.tokens, -1, width).mean(1) if self.pooled else table

    def predict(self, layer: int, states: jax.Array, places: TaskPlaces) -> jax.Array:
        """The prediction [N, queries, dim] at layers[layer] from its states [B, S, H]."""
        (b, slots, _), width = places.tokens.shape, states.shape[-1]

        def states_at(index):  # [B, I, M] -> [B, I, M, H]; 0 where nothing stands
            taken = sharded.take_rows(states, sharded.reshape(jnp.maximum(index, 0), b, slots * index.shape[2]))
            return sharded.reshape(taken, b, slots, index.shape[2], width) * (index >= 0)[..., None]

        if self.pooled:
            queries = sharded.repeat_rows(self.table((self.queries, width)).astype(states.dtype), b, slots)
        else:
            queries = fit_queries(states_at(places.tokens), self.queries)
        if self.aligned:
            queries = queries + states_at(places.cells)
        y = self.predictors[layer](states, queries, places.visible)[0]
        return sharded.reshape(y, b * slots, *y.shape[2:])

    def __call__(self, view: ModelView) -> tuple[Term, dict[str, Term]]:
        if not self.layers:
            return Term(jnp.zeros(0), jnp.zeros(0, bool)), {}
        batch, target = view.batch, view.batch.targets[view.name]
        places = task_places(batch, view.layout, view.first_task_token, self.tokens)
        predictions = [self.predict(i, view.tapped[layer], places) for i, layer in enumerate(self.layers)]
        n = predictions[0].shape[0]
        mask = sharded.reshape(batch.target_mask[view.name], n)
        return self.loss(predictions, sharded.reshape(target, n, *target.shape[2:]), mask), {}

    def loss(self, predictions: list[jax.Array], target: jax.Array, mask: jax.Array) -> Term:
        """predictions [N, queries, dim], one per layer; target [N, queries, dim], mask bool[N] -> sums over layers
        [N]."""
        target = jax.lax.stop_gradient(target.astype(jnp.float32))
        scale = jnp.minimum(jnp.exp(self.logit_scale(()).astype(jnp.float32)), MAX_SCALE)
        values = 0.0
        for p in predictions:
            values = values + smooth_l1(p, target) + self.contrastive * info_nce(p, target, scale, mask)
        return Term(values, mask)


def fit_queries(x: jax.Array, n: int) -> jax.Array:
    """[B, I, m, H] -> [B, I, n, H]: repeated as a whole if n > 1 is a multiple of m, else n copies of the mean."""
    m = x.shape[2]
    if n == 1 or n % m:
        x, m = x.mean(2, keepdims=True), 1
    return jnp.concatenate([x] * (n // m), 2)


def smooth_l1(prediction: jax.Array, target: jax.Array) -> jax.Array:
    """float32[N]: the mean over an image's elements of d^2/2 if |d| < 1 else |d| - 1/2."""
    d = jnp.abs(prediction.astype(jnp.float32) - target)
    return jnp.where(d < 1, 0.5 * d * d, d - 0.5).mean(tuple(range(1, d.ndim)))


def info_nce(prediction: jax.Array, target: jax.Array, scale: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """float32[N]: cross-entropy of prediction i against all targets of the global batch, with label i.

    logits = scale * cosine of the flattened tensors. Only targets with mask are negatives, and they get no gradient.
    """
    n = prediction.shape[0]
    p, t = (sharded.reshape(x.astype(jnp.float32), n, x.size // n) for x in (prediction, target))
    p, t = (x * jax.lax.rsqrt(jnp.maximum((x * x).sum(-1, keepdims=True), 1e-24)) for x in (p, t))
    t = sharded.shard(jax.lax.stop_gradient(t), None, None)  # all targets on every device
    logits = scale * jnp.einsum("id,jd->ij", p, t)
    own = jnp.eye(n, dtype=bool)
    if mask is not None:
        logits = jnp.where(sharded.shard(mask, None)[None] | own, logits, MASKED)
    return jax.nn.logsumexp(logits, -1) - jnp.where(own, logits, 0).sum(-1)
