"""A plan: what a recipe needs and how fast it would be, as one dict, as a table, and beside another."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable
from typing import Any

from jaxmllm.config import ConfigError, Run, Stage, override
from jaxmllm.mesh import AXES
from jaxmllm.plan.chips import GIB, Topology
from jaxmllm.plan.compile import Program, compile_stage
from jaxmllm.plan.flops import model_flops
from jaxmllm.plan.hlo import parse
from jaxmllm.plan.price import MODELS
from jaxmllm.plan.timeline import Timeline, phase, saved_bytes, stage
from jaxmllm.plan.traffic import Network


def plan(run: Run, topology: Topology, only: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Plans every stage of a recipe, or `only` one. The figures of the last stage planned stand at the top level.

    Raises ConfigError for an unknown stage and whatever is wrong with the recipe.
    """
    names = [each.name for each in run.stages]
    if only and only not in names:
        raise ConfigError(f"--stage {only}: {run.name} has the stages {', '.join(names)}")
    found = {}
    for each in run.stages:
        if only in (None, each.name):
            say(f"compiling the step of stage {each.name} for {topology.chips} chips of {topology.name} ...")
            found[each.name] = plan_stage(run, each, topology, say)
    seconds = {
        each.name: (each.steps, found[each.name]["predicted_step_seconds"]) for each in run.stages if each.name in found
    }
    hours = {
        name: steps * step * topology.chips / 3600 if step is not None else None
        for name, (steps, step) in seconds.items()
    }
    return {
        "config": run.name,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        **list(found.values())[-1],
        "chip_hours": hours,
        "stages": found,
    }


def plan_stage(run: Run, each: Stage, topology: Topology, say: Callable[[str], None]) -> dict[str, Any]:
    """The figures of one stage. Bytes, cycles, FLOPs and seconds are of one step and one device unless named
    otherwise; model_flops are of the whole batch."""
    program = compile_stage(run, each, topology, say)
    flops = model_flops(run, each)
    memory = dataclasses.asdict(program.memory)
    if program.text:
        activations = min(saved_bytes(parse(program.text)), memory["scratch"])
        memory |= {"activations": activations, "temporaries": memory.pop("scratch") - activations}
    result = {
        "stage": each.name,
        "fits": program.fits,
        "hbm_bytes": memory.pop("total"),
        "hbm_limit_bytes": memory.pop("limit"),
        "hbm_bytes_by_part": memory,
        "model_flops": sum(flops.values()),
        "model_flops_by_stage": flops,
        "rows": each.rows,
        "compile_seconds": program.seconds,
    }
    timing = time_program(run, each, topology, program, sum(flops.values()))
    if not program.fits:
        result["nearest_that_fits"] = nearest(run, each, topology, program, say)
    return result | timing


SHOWN = 0.0005  # share of the step below which the text names no part; the JSON has all
TIMING = (
    "cycles", "cycles_by_stage", "cycles_by_phase", "cycles_by_kind", "cycles_estimated", "unpriced",
    "collective_bytes", "collective_seconds", "exposed_collective_seconds", "exposed_seconds_by_stage",
    "predicted_step_seconds", "predicted_mfu", "tokens_per_second_per_chip", "images_per_second_per_chip",
)  # fmt: skip


def time_program(run: Run, each: Stage, topology: Topology, program: Program, flops: float) -> dict[str, Any]:
    """Cycles, traffic and rates; all None for a program that was not made."""
    if not program.text:
        return dict.fromkeys(TIMING)
    chip = topology.chip
    line = Timeline(parse(program.text), chip, Network(topology, AXES, program.devices))
    charges = line.charges
    moved, waits = [c for c in charges if c.transfer], [c for c in charges if c.exposed]
    per_chip = chip.per_chip / line.seconds / (topology.chips * chip.per_chip)
    unpriced = Counter()
    for c in charges:
        if c.model:
            unpriced[c.model, stage(c.path)] += c.cycles
    return {
        "cycles": sum(c.cycles for c in charges),
        "cycles_estimated": sum(c.cycles for c in charges if not c.model),
        "cycles_by_stage": total(charges, lambda c: stage(c.path), lambda c: c.cycles),
        "cycles_by_phase": total(charges, lambda c: phase(c.path), lambda c: c.cycles),
        "cycles_by_kind": total([c for c in charges if c.cycles], lambda c: c.kind, lambda c: c.cycles),
        "unpriced": [
            {"model": model, "rule": MODELS[model], "stage": where, "cycles": cycles}
            for (model, where), cycles in unpriced.most_common()
        ],
        "collective_bytes": total(moved, lambda c: c.transfer.axes, lambda c: c.times * c.transfer.bytes),
        "collective_seconds": sum(c.times * c.transfer.seconds for c in moved),
        "exposed_collective_seconds": sum(c.exposed for c in waits),
        "exposed_seconds_by_stage": total(waits, lambda c: stage(c.path), lambda c: c.exposed),
        "predicted_step_seconds": line.seconds,
        "predicted_mfu": flops / (line.seconds * chip.flops * chip.per_chip * topology.chips),
        "tokens_per_second_per_chip": each.rows * run.data.seq_len * per_chip,
        "images_per_second_per_chip": each.rows * run.data.image_slots * per_chip,
    }


def total(charges, key: Callable, value: Callable) -> dict[str, float]:
    """Sums by key, the largest first."""
    found = Counter()
    for c in charges:
        found[key(c)] += value(c)
    return dict(found.most_common())


def nearest(run: Run, each: Stage, topology: Topology, program: Program, say: Callable[[str], None]) -> str | None:
    """The least change that makes a stage fit, as --set words: full remat, then smaller micro-batches, then a split
    over `tensor`. Each is tried with the compiler; None if none of them is enough."""
    place = f"stages.{each.name}.accumulate"
    model = run.model
    remat = [
        f"model.{path}.remat=full"
        for path, part in [("llm", model.llm), *((f"encoders.{k}", v) for k, v in model.encoders.items())]
        if part.remat != "full"
    ]
    shards = topology.chips * topology.chip.per_chip
    tries = [remat] if remat else []
    state = program.memory.total - program.memory.scratch
    for tensor in (1, 2, 4, 8):
        split = [f"mesh.tensor={tensor}"] if tensor > 1 else []
        most = each.rows * tensor // shards  # rows of a micro-batch are at least one a shard
        factors = [2**i for i in range(0 if split else 1, 12) if 2**i <= most]
        # The scratch shrinks with the micro-batch at best; skip what cannot be enough.
        good = [f for f in factors if state + program.memory.scratch / f / tensor < program.memory.limit]
        tries += [[*remat, *split, f"{place}={each.accumulate * f}"] for f in good[:2]]
    for words in tries:
        changed, memory = override(run, words), program.memory
        used = f"{memory.total / GIB:.1f} of {memory.limit / GIB:.1f} GiB"
        say(f"  does not fit ({used}); trying --set {' '.join(words)}")
        stage_now = next(s for s in changed.stages if s.name == each.name)
        program = compile_stage(changed, stage_now, topology, say)
        if program.fits:
            return " ".join(words)
    return None


def show(result: dict[str, Any]) -> str:
    """A plan as text."""
    lines = [f"{result['config']} on {result['chips']} chips ({result['slices']} x {result['topology']})"]
    for name, found in result["stages"].items():
        lines += ["", f"stage {name}: {found['rows']} rows a step, compiled in {found['compile_seconds']:.0f} s"]
        lines += show_stage(found)
        hours = result["chip_hours"][name]
        if hours is not None:
            lines.append(f"  chip-hours of the stage           {hours:,.0f}")
    return "\n".join(lines)


def show_stage(found: dict[str, Any]) -> list[str]:
    """Lines of one stage."""
    used, limit = found["hbm_bytes"] / GIB, found["hbm_limit_bytes"] / GIB
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    lines = [f"  memory                            {verdict}: {used:.1f} of {limit:.1f} GiB a device"]
    lines += [f"    {part:<32}{size / GIB:8.2f} GiB" for part, size in found["hbm_bytes_by_part"].items()]
    if not found["fits"]:
        words = found["nearest_that_fits"]
        lines.append(
            f"  nearest setting that fits         {'--set ' + words if words else 'none tried; use more chips'}"
        )
    if found["cycles"] is None:
        return lines
    cycles, own = found["cycles"], found["cycles_estimated"]
    lines.append(f"  cycles                            {cycles:.3e}, of them {own:.3e} estimated by the compiler")
    for group in ("stage", "phase", "kind"):
        parts = {k: v / cycles for k, v in found[f"cycles_by_{group}"].items()}
        lines.append(f"    by {group:<8}" + ", ".join(f"{k} {v:.1%}" for k, v in parts.items() if v >= SHOWN))
    lines.append("  not estimated by the compiler, priced by a stated model:")
    for model, priced in total(found["unpriced"], lambda u: u["model"], lambda u: u["cycles"]).items():
        most = [u for u in found["unpriced"] if u["model"] == model and u["cycles"] >= SHOWN * cycles]
        where = ", ".join(f"{u['stage']} {u['cycles']:.2e}" for u in most) or "little anywhere"
        lines.append(f"    {priced:.2e} cycles  {model}: {where} ({MODELS[model]})")
    lines.append(
        f"  collectives                       {found['collective_seconds'] * 1e3:.1f} ms at link rate, exposed "
        f"{found['exposed_collective_seconds'] * 1e3:.1f} ms"
    )
    lines += [f"    {axes:<32}{size / GIB:8.2f} GiB a device" for axes, size in found["collective_bytes"].items()]
    waits, least = found["exposed_seconds_by_stage"], SHOWN * found["predicted_step_seconds"]
    if shown := [f"{k} {v * 1e3:.1f} ms" for k, v in waits.items() if v >= least]:
        lines.append(f"    exposed     {', '.join(shown)}")
    lines += [
        f"  step                              {found['predicted_step_seconds'] * 1e3:.1f} ms",
        f"  model FLOPs                       {found['model_flops']:.3e}, MFU {found['predicted_mfu']:.1%}",
        f"  rate                              {found['tokens_per_second_per_chip']:,.0f} tokens/s/chip, "
        f"{found['images_per_second_per_chip']:.2f} images/s/chip",
    ]
    return lines


def compare(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Two plans side by side: figures of the last stage of each, and the change from the first to the second."""
    rows = [("", f"{one['config']} {one['topology']}", f"{other['config']} {other['topology']}", "change")]

    def add(name, a, b, scale=1.0, unit=""):
        if a is None and b is None:
            return
        texts = [f"{v / scale:,.4g}{unit}" if v is not None else "-" for v in (a, b)]
        rows.append((name, *texts, f"{b / a - 1:+.1%}" if a and b else ""))

    add("HBM", one["hbm_bytes"], other["hbm_bytes"], GIB, " GiB")
    add("model FLOPs", one["model_flops"], other["model_flops"])
    add("cycles", one["cycles"], other["cycles"])
    for group in ("stage", "phase", "kind"):
        a, b = (x[f"cycles_by_{group}"] or {} for x in (one, other))
        for name in {**a, **b}:
            add(f"  {group} {name}", a.get(name), b.get(name))
    add("collectives at link rate", one["collective_seconds"], other["collective_seconds"], 1e-3, " ms")
    add("exposed", one["exposed_collective_seconds"], other["exposed_collective_seconds"], 1e-3, " ms")
    add("step", one["predicted_step_seconds"], other["predicted_step_seconds"], 1e-3, " ms")
    add("MFU", one["predicted_mfu"], other["predicted_mfu"], 0.01, " %")
    add("tokens/s/chip", one["tokens_per_second_per_chip"], other["tokens_per_second_per_chip"])
    widths = [max(len(row[i]) for row in rows) for i in range(4)]
    return "\n".join(
        f"{row[0]:<{widths[0]}}  " + "  ".join(f"{text:>{w}}" for text, w in zip(row[1:], widths[1:])) for row in rows
    )
