"""Model FLOPs of a training step, read from the jaxpr of the loss: what the model needs, not what the program does.

Counted are matrix products and convolutions, 2 m n k each: once for the forward pass, once more for each operand that
depends on trained weights (its gradient is one more product of the same size). So frozen parts count once, layers below
which nothing is trained need no gradient of their input, and rematerialisation adds nothing. In a scope "causal" half
is counted (the triangle); in a scope "gather" nothing (a product that stands for a look-up). Kernels written by hand
must have a plain form that is traced here: a Pallas call raises ValueError.
"""

from __future__ import annotations

import math
from collections import Counter

import jax
from jax.extend import core
from jax.sharding import AbstractMesh, AxisType

from jaxmllm.config import Run, Stage
from jaxmllm.mesh import AXES
from jaxmllm.plan.hlo import share
from jaxmllm.plan.timeline import stage as stage_of
from jaxmllm.train.setup import abstract_batch, stage_program
from jaxmllm.train.state import match_rules, unflatten


def model_flops(run: Run, stage: Stage) -> dict[str, float]:
    """Stage of the model -> FLOPs of one step of the whole batch, every row and image slot taken as full."""
    # Of no platform: what a platform has forms of its own for is traced in its plain one.
    mesh = AbstractMesh((1,) * len(AXES), AXES, axis_types=(AxisType.Explicit,) * len(AXES))
    with jax.sharding.use_abstract_mesh(mesh):
        params, *_ = stage_program(run, stage, mesh)
        table = match_rules(stage.rules, list(params))

        def losses(params, batch):
            terms, _ = run.model.apply({"params": unflatten(params)}, batch, tuple(stage.losses))
            return [term.values for term in terms.values()]

        closed = jax.make_jaxpr(losses)(params, abstract_batch(run, stage, mesh))
    trained = [table[path].lr is not None for path in sorted(params)]
    flags = trained + [False] * (len(closed.jaxpr.invars) - len(trained))
    found: Counter = Counter()
    count(closed.jaxpr, flags, 1, "jit(losses)", found)
    return dict(found)


def count(jaxpr: core.Jaxpr, flags: list[bool], times: float, path: str, found: Counter) -> list[bool]:
    """Adds the FLOPs of a jaxpr that runs `times` times; flags: which inputs depend on trained weights, and the same
    for its outputs."""
    depends = dict(zip(jaxpr.invars, flags)) | dict.fromkeys(jaxpr.constvars, False)

    def of(atom) -> bool:
        return not isinstance(atom, core.Literal) and depends.get(atom, False)

    for eqn in jaxpr.eqns:
        inputs = [of(atom) for atom in eqn.invars]
        name, here = eqn.primitive.name, f"{path}/{eqn.source_info.name_stack}"
        outputs = [any(inputs)] * len(eqn.outvars)
        if name == "pallas_call":
            raise ValueError(f"cannot count the FLOPs of a Pallas kernel in {here}")
        if name in ("dot_general", "conv_general_dilated"):
            parts = here.split("/")
            factor = 0.0 if "gather" in parts else 0.5 if "causal" in parts else 1.0
            found[stage_of(f"{here}/{name}")] += factor * (1 + sum(inputs[:2])) * times * product_flops(eqn)
        elif name == "scan":
            inner, carry = eqn.params["jaxpr"].jaxpr, eqn.params["num_carry"]
            first = eqn.params["num_consts"]
            while True:  # a carry may become dependent in the first turn
                outputs = count(inner, inputs, 0, here, Counter())
                joined = [a or b for a, b in zip(inputs[first : first + carry], outputs)]
                if joined == inputs[first : first + carry]:
                    break
                inputs[first : first + carry] = joined
            count(inner, inputs, times * eqn.params["length"], here, found)
        elif name == "cond":
            branches, runs = [], times * share(here)
            for branch in eqn.params["branches"]:
                part: Counter = Counter()
                outputs = [a or b for a, b in zip(outputs, count(branch.jaxpr, inputs[1:], runs, here, part))]
                branches.append(part)
            found.update(max(branches, key=lambda part: sum(part.values())))
        elif inner := inner_jaxpr(eqn):
            outputs = count(inner, inputs, times, here, found)
        depends.update(zip(eqn.outvars, outputs))
    return [of(atom) for atom in jaxpr.outvars]


def inner_jaxpr(eqn) -> core.Jaxpr | None:
    """The jaxpr that a call (jit, remat, custom_jvp, ...) runs on the same inputs."""
    for value in eqn.params.values():
        inner = getattr(value, "jaxpr", value)
        if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
            return inner
    return None


def product_flops(eqn) -> float:
    """2 m n k of a dot_general or a convolution."""
    out, (left, right) = eqn.outvars[0].aval, (atom.aval for atom in eqn.invars[:2])
    if eqn.primitive.name == "dot_general":
        contracted = math.prod(left.shape[d] for d in eqn.params["dimension_numbers"][0][0])
        return 2.0 * math.prod(out.shape) * contracted
    channels = right.shape[eqn.params["dimension_numbers"].rhs_spec[0]]
    return 2.0 * math.prod(out.shape) * math.prod(right.shape) / channels
