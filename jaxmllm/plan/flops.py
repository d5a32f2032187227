"""Model FLOPs of a training step, read from the jaxpr of the loss: what the model needs, not what the program does.

Matrix products and convolutions count, 2 m n k each: once for the forward pass, and once more for each operand that
depends on trained weights (its gradient is one more product of the same size). So frozen parts count once, layers below
all trained weights need no gradient of their input, and rematerialisation adds nothing. In a scope "causal" half is
counted (the triangle), with a window less; in a scope "gather" nothing (the product stands for a look-up). A
hand-written kernel must have a plain form that is traced here: a Pallas call raises ValueError.
"""

from __future__ import annotations

import math
import re
from collections import Counter

import jax
from jax.sharding import AbstractMesh, AxisType

from jaxmllm import jax_internals
from jaxmllm.config import Run, Stage
from jaxmllm.mesh import AXES
from jaxmllm.plan.hlo import run_share, windowed_shares
from jaxmllm.plan.timeline import component
from jaxmllm.train.setup import abstract_batch, stage_program
from jaxmllm.train.state import match_rules, unflatten


def model_flops(run: Run, stage: Stage) -> dict[str, float]:
    """Component -> FLOPs of one step of the whole batch, with every row and image slot filled."""
    # The mesh has no platform, so that functions with a form for one platform are traced in their plain form.
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        params, *_ = stage_program(run, stage, mesh)
        table = match_rules(stage.rules, list(params))

        def losses(params, batch):
            terms, _ = run.model.apply({"params": unflatten(params)}, batch, tuple(stage.losses))
            return [term.values for term in terms.values()]

        jaxpr = jax_internals.trace(losses, params, abstract_batch(run, stage, mesh))
    trained = [table[path].lr is not None for path in sorted(params)]
    flags = trained + [False] * (len(jaxpr.invars) - len(trained))
    flops: Counter = Counter()
    count(jaxpr, flags, 1, "jit(losses)", flops)
    return dict(flops)


def count(jaxpr: jax_internals.Jaxpr, flags: list[bool], times: float, path: str, flops: Counter) -> list[bool]:
    """Adds the FLOPs of a jaxpr that runs `times` times to `flops`.

    flags: for each input, whether it depends on trained weights. Returns the same for the outputs.
    """
    depends = dict(zip(jaxpr.invars, flags)) | dict.fromkeys(jaxpr.constvars, False)

    def is_trained(atom) -> bool:
        return not jax_internals.is_literal(atom) and depends.get(atom, False)

    for eqn in jaxpr.eqns:
        inputs = [is_trained(atom) for atom in eqn.invars]
        name, here = eqn.primitive.name, f"{path}/{jax_internals.scopes(eqn)}"
        outputs = [any(inputs)] * len(eqn.outvars)
        if name == "pallas_call":
            raise ValueError(f"cannot count the FLOPs of a Pallas kernel in {here}")
        if name in ("dot_general", "conv_general_dilated"):
            needed = counted_share(here) * product_flops(eqn)
            flops[component(f"{here}/{name}")] += (1 + sum(inputs[:2])) * times * needed
        elif name == "scan":
            loop = jax_internals.scan(eqn)
            carries = slice(loop.constants, loop.constants + loop.carries)
            while True:  # a turn may make carries of the next one dependent
                outputs = count(loop.body, inputs, 0, here, Counter())
                joined = [a or b for a, b in zip(inputs[carries], outputs)]
                if joined == inputs[carries]:
                    break
                inputs[carries] = joined
            count(loop.body, inputs, times * loop.length, here, flops)
        elif name == "cond":
            by_branch, branches = [], jax_internals.branches(eqn)
            near = [any("window_" in jax_internals.scopes(inner) for inner in branch.eqns) for branch in branches]
            shares = windowed_shares(here, near)
            for branch, share in zip(branches, shares or [run_share(here)] * len(branches)):
                of_branch: Counter = Counter()
                outputs = [a or b for a, b in zip(outputs, count(branch, inputs[1:], times * share, here, of_branch))]
                by_branch.append(of_branch)
            longest = max(by_branch, key=lambda of_branch: sum(of_branch.values()))
            flops.update(sum(by_branch, Counter()) if shares else longest)
        elif inner := jax_internals.called(eqn):
            outputs = count(inner, inputs, times, here, flops)
        depends.update(zip(eqn.outvars, outputs))
    return [is_trained(atom) for atom in jaxpr.outvars]


def counted_share(path: str) -> float:
    """The share of a product's elements that the model needs, by the scopes around it."""
    names = path.split("/")
    if "gather" in names:
        return 0.0
    if "causal" not in names:
        return 1.0
    match = re.search(r"\bwindow_(\d+)_of_(\d+)\b", path)
    window = min(1.0, int(match[1]) / int(match[2])) if match else 1.0
    return window * (1 - window / 2)  # of each query the last keys of the triangle


def product_flops(eqn: jax_internals.JaxprEqn) -> float:
    """2 m n k of a dot_general or a convolution."""
    return 2.0 * math.prod(eqn.outvars[0].aval.shape) * jax_internals.products_per_element(eqn)
