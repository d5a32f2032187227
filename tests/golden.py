"""Checks golden files in tests/goldens, which hold numbers computed by the reference implementations.

    python -m tests.golden FILE.npz ...

A file holds the weights, inputs, outputs and gradients of one piece of a reference. The project's key maps load the
weights into its modules and map the gradients of its parameters back. Prints one JSON line per file: {"file", "kind",
"outputs": {name: max_abs_err}, "grads": {name: max_rel_err}, "ok"}, with null where we have no such array, and "error"
if something failed. Exit code: 0 all ok, 1 some number is wrong, 2 a file cannot be read or its kind is unknown.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from pathlib import Path

import jax
import numpy as np

from jaxmllm.weights.convert import export_weights, import_weights
from tests import golden_cambrian, golden_kinds, golden_visper, golden_visual
from tests.golden_case import Arrays, Case, Check, Unreadable, load

# Tolerances in float32. They must never be loosened.
OUTPUT, SCALAR, GRADIENT = 1e-5, 1e-4, 1e-4
# Zero gradients: what float64 leaves of one in the file, and float32 here, relative to the largest gradient.
STORED_ZERO, ZERO = 1e-12, 1e-6

KINDS = {
    "deformable_attention": golden_kinds.deformable_attention,
    "mmfuser": golden_kinds.mmfuser,
    "sva_connector": golden_kinds.sva,
    "sva_in_llm": golden_kinds.sva,
    "cambrian_masks": golden_kinds.cambrian_masks,
    "cambrian_full": golden_cambrian.cambrian_full,
    "visper_depth_head": golden_visper.visper_head,
    "visper_seg_head": golden_visper.visper_head,
    "visper_gen_head": golden_visper.visper_head,
    "visper_loss": golden_visper.visper_loss,
    "visper_full": golden_visper.visper_full,
    "dense_connector_sti": golden_visual.dense_connector,
    "dense_connector_sci": golden_visual.dense_connector,
    "dense_connector_dci": golden_visual.dense_connector,
    "mof_interleaved": golden_visual.mof_interleaved,
}


def evaluate(case: Case, check: Check) -> tuple[Arrays, Arrays]:
    """(outputs, gradients) of our modules, under the file's names."""
    params = import_weights(check.key_map, case.weights, check.shapes)
    scalars = check.scalars if case.grads else {}
    names = {name.removeprefix(f"{prefix}inputs/") for prefix in scalars for name in case.grads}
    differentiated = {name: case.inputs[name] for name in sorted(names & set(case.inputs))}

    def run(params, differentiated):
        def forward(params, differentiated, scalar):
            outputs = check.forward(params, {**case.inputs, **differentiated})
            return outputs[scalar], outputs

        if not scalars:
            return check.forward(params, case.inputs), {}
        grads = {}
        for prefix, scalar in scalars.items():
            grads[prefix], outputs = jax.grad(forward, (0, 1), has_aux=True)(params, differentiated, scalar)
        return outputs, grads

    with jax.default_matmul_precision("highest"):
        outputs, grads = jax.device_get(jax.jit(run)(params, differentiated))
    named = {}
    for prefix, (weights, inputs) in grads.items():
        named |= {f"{prefix}inputs/{name}": g for name, g in inputs.items()}
        named |= {f"{prefix}weights/{name}": g for name, g in export_weights(check.key_map, weights).items()}
    return outputs | (check.from_grads(named) if named else {}), named


def judge(case: Case, check: Check, outputs: Arrays, grads: Arrays) -> tuple[dict, dict, bool]:
    """({output: max abs error}, {gradient: max relative error}, whether all are ok); None for arrays that we lack."""
    errors, relative, ok = {}, {}, True
    for name, stored in case.outputs.items():
        ours = outputs.get(name)
        if ours is None or np.shape(ours) != stored.shape:
            errors[name], ok = None, False
            continue
        mask = np.broadcast_to(check.compare.get(name, True), stored.shape)
        error = np.abs(np.asarray(ours, np.float64) - stored.astype(np.float64))[mask].max(initial=0.0)
        size = np.abs(stored[mask]).max(initial=0.0)
        if np.issubdtype(stored.dtype, np.floating):
            limit = (SCALAR if name == "scalar" else OUTPUT) * max(1.0, size)
        else:
            limit = 0.0
        errors[name], ok = float(error), ok and bool(error <= limit)
    largest = max((np.abs(g).max(initial=0.0) for g in case.grads.values()), default=0.0)
    for name, stored in case.grads.items():
        ours = grads.get(name)
        if ours is None or ours.shape != stored.shape:
            relative[name], ok = None, False
            continue
        error, size = (
            np.abs(ours.astype(np.float64) - stored).max(initial=0.0),
            np.abs(stored).max(initial=0.0),
        )
        zero = size <= STORED_ZERO * largest
        relative[name] = float(error / ((largest or 1.0) if zero else size))
        ok = ok and bool(relative[name] <= (ZERO if zero else GRADIENT))
    return errors, relative, ok


def check_file(path: str | Path) -> tuple[dict, int]:
    """(the JSON line, the exit code for this file alone)."""
    line = {"file": str(path), "kind": None, "outputs": {}, "grads": {}, "ok": False}
    try:
        case = load(path)
    except Unreadable as error:
        return line | {"error": str(error)}, 2
    line["kind"] = case.kind
    if case.kind not in KINDS:
        return line | {"error": f"unknown kind; known: {', '.join(KINDS)}"}, 2
    try:
        check = KINDS[case.kind](case)
        outputs, grads = evaluate(case, check)
    except Exception as error:  # one bad file must not hide the results of the others
        traceback.print_exc()
        return line | {"error": f"{type(error).__name__}: {error}"}, 1
    errors, relative, ok = judge(case, check, outputs, grads)
    return line | {"outputs": errors, "grads": relative, "ok": ok}, 0 if ok else 1


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.golden", description="Checks golden files.")
    parser.add_argument("files", nargs="+", metavar="FILE.npz")
    codes = set()
    for path in parser.parse_args(arguments).files:
        line, code = check_file(path)
        print(json.dumps(line), flush=True)
        codes.add(code)
    return max(codes)


if __name__ == "__main__":
    sys.exit(main())
