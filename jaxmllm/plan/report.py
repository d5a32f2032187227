"""A plan: what a recipe needs and how fast it would be, as one dict, as text, and compared with another plan."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from jaxmllm.config import Run, Stage
from jaxmllm.data.build import check_rows
from jaxmllm.errors import ConfigError
from jaxmllm.mesh import AXES
from jaxmllm.plan.chips import GIB, Topology
from jaxmllm.plan.compile import Program, compile_stage, devices_of
from jaxmllm.plan.flops import model_flops
from jaxmllm.plan.hlo import parse
from jaxmllm.plan.plain import plain_attention
from jaxmllm.plan.price import MODELS
from jaxmllm.plan.timeline import Timeline, component, phase, saved_bytes
from jaxmllm.plan.traffic import Network
from jaxmllm.recipes import load, override


def load_or_plan(
    target: str, overrides: list[str], topology: Topology, only: str | None, say: Callable[[str], None]
) -> dict[str, Any]:
    """Reads an earlier plan from a JSON file, or plans a config ("FILE.py:variant") with these overrides.

    Raises ConfigError if the file is not a plan.
    """
    if target.endswith(".json"):
        earlier = json.loads(Path(target).read_text())
        if not isinstance(earlier, dict) or "cycles_by_component" not in earlier:
            raise ConfigError(f"{target} is not a plan of this version of jaxmllm; make it anew with --json")
        return earlier
    slices = [f"mesh.slice={topology.slices}"] if topology.slices > 1 else []
    return plan(override(load(target), [*slices, *overrides]), topology, only, say)


def plan(run: Run, topology: Topology, only: str | None = None, say: Callable[[str], None] = print) -> dict[str, Any]:
    """Plans every stage of a recipe, or `only` one. The figures of the last planned stage are also at the top level.

    Raises ConfigError for an unknown stage and for whatever is wrong with the recipe.
    """
    planned = (run.stage(only),) if only else run.stages
    devices = run.mesh.build(devices_of(topology))
    for stage in planned:
        check_rows(run, stage, devices)
    stages, hours = {}, {}
    for stage in planned:
        say(f"compiling the step of stage {stage.name} for {topology.chips} chips of {topology.name} ...")
        # How many steps an epoch takes depends on the data, which need not be here; a step costs the same.
        stages[stage.name] = plan_stage(run, fixed_steps(stage), topology, say)
        seconds = stages[stage.name]["predicted_step_seconds"]
        unknown = seconds is None or stage.steps is None
        hours[stage.name] = None if unknown else stage.steps * seconds * topology.chips / 3600
    return {
        "config": run.name,
        "topology": topology.name,
        "slices": topology.slices,
        "chips": topology.chips,
        **list(stages.values())[-1],
        "chip_hours": hours,
        "stages": stages,
    }


def fixed_steps(stage: Stage) -> Stage:
    """The stage, with some number of steps if it is given in epochs: the program of a step does not depend on it."""
    return stage if stage.steps else dataclasses.replace(stage, steps=1, epochs=None)


def plan_stage(run: Run, stage: Stage, topology: Topology, say: Callable[[str], None]) -> dict[str, Any]:
    """The figures of one stage.

    Bytes, cycles and seconds are per step and per device unless their names say otherwise; model_flops are per step of
    the whole batch.
    """
    program = compile_stage(run, stage, topology, say)
    flops = model_flops(run, stage)
    memory = dataclasses.asdict(program.memory)
    if program.text:
        activations = min(saved_bytes(parse(program.text)), memory["scratch"])
        memory |= {"activations": activations, "temporaries": memory.pop("scratch") - activations}
    result = {
        "stage": stage.name,
        "fits": program.fits,
        "hbm_bytes": memory.pop("total"),
        "hbm_limit_bytes": memory.pop("limit"),
        "hbm_bytes_by_part": memory,
        "model_flops": sum(flops.values()),
        "model_flops_by_component": flops,
        "rows": stage.rows,
        "compile_seconds": program.seconds,
        "plain_attention": plain_attention(program.text),
    }
    timing = time_program(run, stage, topology, program, sum(flops.values()))
    if not program.fits:
        result["nearest_that_fits"] = nearest_that_fits(run, stage, topology, program, say)
    return result | timing


SHOWN = 0.0005  # the text leaves out parts with a smaller share of the step; the JSON has them all
TIMING = (
    "cycles", "cycles_by_component", "cycles_by_phase", "cycles_by_kind", "cycles_estimated", "unpriced",
    "collective_bytes", "collective_seconds", "exposed_collective_seconds", "exposed_seconds_by_component",
    "predicted_step_seconds", "predicted_mfu", "tokens_per_second_per_chip", "images_per_second_per_chip",
)  # fmt: skip


def time_program(run: Run, stage: Stage, topology: Topology, program: Program, flops: float) -> dict[str, Any]:
    """Cycles, traffic and rates; all None if there is no program because it does not fit."""
    if not program.text:
        return dict.fromkeys(TIMING)
    chip = topology.chip
    timeline = Timeline(parse(program.text), chip, Network(topology, AXES, program.devices))
    charges = timeline.charges
    moved, waits = [c for c in charges if c.transfer], [c for c in charges if c.exposed]
    per_chip = chip.devices_per_chip / timeline.seconds / (topology.chips * chip.devices_per_chip)
    unpriced = Counter()
    for c in charges:
        if c.model:
            unpriced[c.model, component(c.path)] += c.cycles
    return {
        "cycles": sum(c.cycles for c in charges),
        "cycles_estimated": sum(c.cycles for c in charges if not c.model),
        "cycles_by_component": sum_by(charges, lambda c: component(c.path), lambda c: c.cycles),
        "cycles_by_phase": sum_by(charges, lambda c: phase(c.path), lambda c: c.cycles),
        "cycles_by_kind": sum_by([c for c in charges if c.cycles], lambda c: c.kind, lambda c: c.cycles),
        "unpriced": [
            {"model": model, "rule": MODELS[model], "component": where, "cycles": cycles}
            for (model, where), cycles in unpriced.most_common()
        ],
        "collective_bytes": sum_by(moved, lambda c: c.transfer.axes, lambda c: c.times * c.transfer.bytes),
        "collective_seconds": sum(c.times * c.transfer.seconds for c in moved),
        "exposed_collective_seconds": sum(c.exposed for c in waits),
        "exposed_seconds_by_component": sum_by(waits, lambda c: component(c.path), lambda c: c.exposed),
        "predicted_step_seconds": timeline.seconds,
        "predicted_mfu": flops / (timeline.seconds * chip.flops * chip.devices_per_chip * topology.chips),
        "tokens_per_second_per_chip": stage.rows * run.data_of(stage).seq_len * per_chip,
        "images_per_second_per_chip": stage.rows * run.data_of(stage).image_slots * per_chip,
    }


def sum_by(items: Iterable, key: Callable, value: Callable) -> dict[str, float]:
    """Sums of the values of items with the same key, the largest first."""
    sums = Counter()
    for item in items:
        sums[key(item)] += value(item)
    return dict(sums.most_common())


def nearest_that_fits(
    run: Run, stage: Stage, topology: Topology, program: Program, say: Callable[[str], None]
) -> str | None:
    """The smallest change that makes a stage fit, as overrides for --set; None if nothing that is tried fits.

    Tries full remat, then smaller micro-batches, then a split over `tensor`, each with the compiler.
    """
    accumulate = f"stages.{stage.name}.accumulate"
    model = run.model
    remat = [
        f"model.{path}.remat=full"
        for path, part in [("llm", model.llm), *((f"encoders.{k}", v) for k, v in model.encoders.items())]
        if part.remat != "full"
    ]
    devices = topology.chips * topology.chip.devices_per_chip
    tries = [remat] if remat else []
    state = program.memory.total - program.memory.scratch
    for tensor in (1, 2, 4, 8):
        split = [f"mesh.tensor={tensor}"] if tensor > 1 else []
        most = stage.rows * tensor // devices  # a micro-batch has at least one row per data shard
        factors = [2**i for i in range(0 if split else 1, 12) if 2**i <= most]
        # The scratch shrinks at best as much as the micro-batch; skip what cannot be enough.
        good = [f for f in factors if state + program.memory.scratch / f / tensor < program.memory.limit]
        tries += [[*remat, *split, f"{accumulate}={stage.accumulate * f}"] for f in good[:2]]
    for overrides in tries:
        changed, memory = override(run, overrides), program.memory
        used = f"{memory.total / GIB:.1f} of {memory.limit / GIB:.1f} GiB"
        say(f"  does not fit ({used}); trying --set {' '.join(overrides)}")
        changed_stage = next(s for s in changed.stages if s.name == stage.name)
        program = compile_stage(changed, changed_stage, topology, say)
        if program.fits:
            return " ".join(overrides)
    return None


def show(result: dict[str, Any]) -> str:
    """A plan as text."""
    lines = [f"{result['config']} on {result['chips']} chips ({result['slices']} x {result['topology']})"]
    for name, figures in result["stages"].items():
        lines += ["", f"stage {name}: {figures['rows']} rows a step, compiled in {figures['compile_seconds']:.0f} s"]
        lines += show_stage(figures)
        hours = result["chip_hours"][name]
        if hours is not None:
            lines.append(f"  chip-hours of the stage           {hours:,.0f}")
    return "\n".join(lines)


def show_stage(figures: dict[str, Any]) -> list[str]:
    """Lines of one stage."""
    used, limit = figures["hbm_bytes"] / GIB, figures["hbm_limit_bytes"] / GIB
    verdict = "fits" if figures["fits"] else "DOES NOT FIT"
    lines = [f"  memory                            {verdict}: {used:.1f} of {limit:.1f} GiB a device"]
    lines += [f"    {part:<32}{size / GIB:8.2f} GiB" for part, size in figures["hbm_bytes_by_part"].items()]
    if not figures["fits"]:
        nearest = figures["nearest_that_fits"]
        setting = f"--set {nearest}" if nearest else "none of those tried; use more chips"
        lines.append(f"  nearest setting that fits         {setting}")
    for part, why in figures["plain_attention"].items():
        lines.append(f"  attention without a kernel        {part}: {why}")
    if figures["cycles"] is None:
        return lines
    cycles, estimated = figures["cycles"], figures["cycles_estimated"]
    lines.append(f"  cycles                            {cycles:.3e}, {estimated:.3e} of them estimated by the compiler")
    for group in ("component", "phase", "kind"):
        parts = {k: v / cycles for k, v in figures[f"cycles_by_{group}"].items()}
        lines.append(f"    by {group:<10}" + ", ".join(f"{k} {v:.1%}" for k, v in parts.items() if v >= SHOWN))
    lines.append("  not estimated by the compiler, priced by a stated model:")
    for model, priced in sum_by(figures["unpriced"], lambda u: u["model"], lambda u: u["cycles"]).items():
        most = [u for u in figures["unpriced"] if u["model"] == model and u["cycles"] >= SHOWN * cycles]
        where = ", ".join(f"{u['component']} {u['cycles']:.2e}" for u in most) or "little in any component"
        lines.append(f"    {priced:.2e} cycles  {model}: {where} ({MODELS[model]})")
    lines.append(
        f"  collectives                       {figures['collective_seconds'] * 1e3:.1f} ms at link rate, exposed "
        f"{figures['exposed_collective_seconds'] * 1e3:.1f} ms"
    )
    lines += [f"    {axes:<32}{size / GIB:8.2f} GiB a device" for axes, size in figures["collective_bytes"].items()]
    waits, least = figures["exposed_seconds_by_component"], SHOWN * figures["predicted_step_seconds"]
    if shown := [f"{k} {v * 1e3:.1f} ms" for k, v in waits.items() if v >= least]:
        lines.append(f"    exposed     {', '.join(shown)}")
    lines += [
        f"  step                              {figures['predicted_step_seconds'] * 1e3:.1f} ms",
        f"  model FLOPs                       {figures['model_flops']:.3e}, MFU {figures['predicted_mfu']:.1%}",
        f"  rate                              {figures['tokens_per_second_per_chip']:,.0f} tokens/s/chip, "
        f"{figures['images_per_second_per_chip']:.2f} images/s/chip",
    ]
    return lines


def compare(one: dict[str, Any], other: dict[str, Any]) -> str:
    """Two plans side by side: the figures of the last stage of each, and the change from the first to the second."""
    rows = [("", f"{one['config']} {one['topology']}", f"{other['config']} {other['topology']}", "change")]

    def add(name, a, b, scale=1.0, unit=""):
        if a is None and b is None:
            return
        texts = [f"{v / scale:,.4g}{unit}" if v is not None else "-" for v in (a, b)]
        rows.append((name, *texts, f"{b / a - 1:+.1%}" if a and b else ""))

    add("HBM", one["hbm_bytes"], other["hbm_bytes"], GIB, " GiB")
    add("model FLOPs", one["model_flops"], other["model_flops"])
    add("cycles", one["cycles"], other["cycles"])
    for group in ("component", "phase", "kind"):
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
