"""Where a step's attention is left to the compiler, and why: nn/attention/choose.py says it in named scopes."""

from __future__ import annotations

import re

from jaxmllm.plan.timeline import component

# The reasons in the scopes, without their numbers -> what a plan says
REASONS = {
    "heads_of": "the kernels take no heads of",
    "rows_of": "its rows are short for a kernel:",
    "split_rows": "the mesh splits its rows into parts that are not whole blocks",
    "soft_cap": "the kernel has no soft cap",
    "decoding": "it reads a cache",
}


def plain_attention(text: str) -> dict[str, str]:
    """A compiled program -> component of the model: why a kernel does not serve its attention, so that arrays of all
    scores [S, T] are made; {} if kernels serve all of it."""
    found = {}
    for name, why in re.findall(r'op_name="([^"]*/plain_(\w+)/[^"]*)"', text):
        reason, number = re.fullmatch(r"(.*?)(?:_(\d+))?", why).groups()
        said = REASONS.get(reason, f"the kernels take no {reason}")
        found[component(name)] = f"{said} {number}" if number else said
    return dict(sorted(found.items()))
