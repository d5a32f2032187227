"""What jaxmllm reads of jaxprs, JAX's own form of traced programs.

JAX promises nothing about the parameters of a jaxpr's equations, and they differ between the versions that jaxmllm
supports. Only this module reads them. It tells their forms by what an equation holds, not by JAX's version. Checked
with jax 0.10.2, 0.11.2 and 0.12.0.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
from jax.extend.core import Jaxpr, JaxprEqn, Literal, Var


@dataclasses.dataclass(frozen=True)
class Scan:
    """A loop that runs `length` times. Inputs of `body`: constants, carries, slices; its outputs: carries, slices."""

    body: Jaxpr
    length: int
    constants: int
    carries: int


def trace(function: Callable, *arguments: Any) -> Jaxpr:
    """The jaxpr of a function of these (abstract) arguments."""
    return without_constants(jax.make_jaxpr(function)(*arguments))


def without_constants(jaxpr: Any) -> Any:
    """The jaxpr in a ClosedJaxpr, which held the values of constants beside it until jax 0.10; else the argument."""
    return getattr(jaxpr, "jaxpr", jaxpr)


def is_literal(atom: Var | Literal) -> bool:
    """Whether an input of an equation is a number written into the program."""
    return isinstance(atom, Literal)


def scopes(eqn: JaxprEqn) -> str:
    """Named scopes and transformations around an equation within its jaxpr, joined by "/"."""
    return str(eqn.source_info.name_stack)


def scan(eqn: JaxprEqn) -> Scan:
    """The loop of an equation `scan`."""
    params = eqn.params
    if "ft_in" in params:  # since jax 0.11: a tree (constants, carries, slices)
        constants, carries, _ = (len(part) for part in params["ft_in"].unpack())
    else:
        constants, carries = params["num_consts"], params["num_carry"]
    return Scan(without_constants(params["jaxpr"]), params["length"], constants, carries)


def branches(eqn: JaxprEqn) -> list[Jaxpr]:
    """The branches of an equation `cond`. They get its inputs except the first, which chooses the branch."""
    return [without_constants(branch) for branch in eqn.params["branches"]]


def called(eqn: JaxprEqn) -> Jaxpr | None:
    """The jaxpr that a call (jit, remat, custom_jvp, custom_vjp, shard_map, ...) runs on its inputs, if it is one."""
    for value in eqn.params.values():
        inner = without_constants(value)
        if hasattr(inner, "eqns") and len(inner.invars) == len(eqn.invars):
            return inner
    return None


def products_per_element(eqn: JaxprEqn) -> int:
    """How many products a dot_general or conv_general_dilated sums for one element of its result."""
    left, right = (atom.aval.shape for atom in eqn.invars[:2])
    dims = eqn.params["dimension_numbers"]
    if eqn.primitive.name == "dot_general":
        (contracted, _), _ = dims
        return math.prod(left[d] for d in contracted)
    outputs, *_ = dims.rhs_spec
    return math.prod(right) // right[outputs]
