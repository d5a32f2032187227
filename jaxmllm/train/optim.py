"""AdamW over the trainable parameters, with the rates and decay of the config's rules."""

from __future__ import annotations

import optax

from jaxmllm.config import Optim, Rule


def schedule(optim: Optim, steps: int) -> optax.Schedule:
    """Linear warm-up, then cosine decay to `final` times the peak."""
    warmup = max(1, round(optim.warmup * steps))
    return optax.warmup_cosine_decay_schedule(0.0, optim.lr, warmup, max(steps, warmup + 1), optim.lr * optim.final)


def optimizer(optim: Optim, steps: int, table: dict[str, Rule]) -> optax.GradientTransformation:
    """Clip by global norm -> Adam -> decay -> factor of the rule -> schedule. Its state mirrors the flat parameters."""
    factors = {path: rule.lr for path, rule in table.items() if rule.lr is not None}
    decay = {path: table[path].decay for path in factors}
    scale = optax.stateless(lambda updates, _: {k: u * factors[k] for k, u in updates.items()})
    return optax.chain(
        optax.clip_by_global_norm(optim.clip) if optim.clip else optax.identity(),
        optax.scale_by_adam(optim.b1, optim.b2, optim.eps),
        optax.add_decayed_weights(optim.weight_decay, decay) if optim.weight_decay else optax.identity(),
        scale,
        optax.scale_by_learning_rate(schedule(optim, steps)),
    )
