"""The command line. Exit codes: 0 done, 1 a failed run, 2 what was asked is wrong (one line says what and how)."""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before anything imports XLA


def main(argv: list[str] | None = None) -> int:
    """Entry point of `jaxmllm`."""
    args = parser().parse_args(argv)
    keep_freed_memory()
    try:
        return args.run(args) or 0
    except (ValueError, FileNotFoundError, FileExistsError) as error:  # ConfigError is a ValueError
        return fail(error, 2)
    except (FloatingPointError, OSError, RuntimeError) as error:
        if os.environ.get("JAXMLLM_TRACEBACK"):
            raise
        return fail(error, 1)


def keep_freed_memory() -> None:
    """Tells glibc not to hand freed memory back to the system.

    XLA's CPU backend mallocs its scratch space anew in every step. By default glibc maps and unmaps it each time, and
    the page faults (90,000 in a toy step) cost a third of the step's CPU time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mmap_max, trim_threshold, arena_max = -4, -1, -8  # malloc.h
        for option, value in ((mmap_max, 0), (trim_threshold, 2**31 - 1), (arena_max, 1)):
            mallopt(option, value)


def fail(error: Exception, code: int) -> int:
    """Prints an error as one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"jaxmllm: {text}", file=sys.stderr)
    return code


def parser() -> argparse.ArgumentParser:
    """All commands and options."""
    top = argparse.ArgumentParser("jaxmllm", description="Train, ask and measure multimodal language models.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    words = {
        "nargs": "+",
        "action": "extend",
        "default": [],
        "metavar": "a.b=c",
        "help": "override fields of the config",
    }
    distributed = {"action": "store_true", "help": "join the other hosts of a pod slice"}

    def command(name, run, text, into=commands):
        sub = into.add_parser(name, help=text, description=text)
        sub.set_defaults(run=run)
        return sub

    sub = command("train", train, "train a config, or resume it: the same command again goes on where it stopped")
    sub.add_argument("config", metavar="FILE.py[:variant]")
    sub.add_argument("--set", **words)
    sub.add_argument("--workdir", help="where everything goes (default: runs/NAME)")
    sub.add_argument("--distributed", **distributed)

    sub = command("eval", evaluate, "ask a checkpoint a question set in CV-Bench's row format")
    sub.add_argument("workdir")
    sub.add_argument("--rows", required=True, help="JSONL file of rows")
    sub.add_argument("--train-rows", required=True, help="rows that the reference that does not look learns from")
    sub.add_argument("--out", help="JSON file to write (default: WORKDIR/eval.json)")
    sub.add_argument("--set", **words)
    sub.add_argument("--distributed", **distributed)

    sub = command("chat", chat, "talk to a checkpoint about a picture")
    sub.add_argument("workdir")
    sub.add_argument("--image", help="picture file")
    sub.add_argument("--prompt", help="one question; without it you are asked for them")
    sub.add_argument("--set", **words)

    sub = command("plan", plan, "compile a config for a TPU slice nobody holds: memory, cycles, traffic, predicted MFU")
    sub.add_argument("config", metavar="FILE.py[:variant]")
    sub.add_argument("--topology", required=True, metavar="CHIP:SHAPE", help="v4, v5e, v5p, v6e or tpu7x; v5p:4x4x4")
    sub.add_argument("--slices", type=int, default=1, help="slices joined by the data-centre network (mesh.slice)")
    sub.add_argument("--stage", help="plan this stage only")
    sub.add_argument("--set", **words)
    sub.add_argument("--json", metavar="FILE", help="write all figures")
    sub.add_argument("--compare", metavar="OTHER", help="another config, or the JSON of a plan, to print beside it")

    sub = command("bench", bench, "time real steps of a config on the devices there are")
    sub.add_argument("config", metavar="FILE.py[:variant]")
    sub.add_argument("--stage", help="default: the last")
    sub.add_argument("--steps", type=int, default=20)
    sub.add_argument("--real", action="store_true", help="read the config's data; else one random batch")
    sub.add_argument("--distributed", **distributed)
    sub.add_argument("--set", **words)
    sub.add_argument("--json", metavar="FILE", help="write all figures")

    data = command("data", None, "make, check and convert data sets").add_subparsers(required=True, metavar="COMMAND")
    sub = command("make-scenes", make_scenes, "write the composed-sprite data set", data)
    sub.add_argument("out")
    for name, default in (("train", 20000), ("heldout", 1500), ("nouns", 16), ("size", 96), ("seed", 0)):
        sub.add_argument(f"--{name}", type=int, default=default)
    sub = command("check", check, "read every record and picture; exit code 1 if any is unusable", data)
    sub.add_argument("source", help="LLaVA JSON(L), ArrayRecord folder, or TFDS_FOLDER:SPLIT")
    sub.add_argument("--image-root", help="folder of the pictures (default: that of the source)")
    sub = command("stats", stats, "lengths and packing of a config's data sets", data)
    sub.add_argument("config", metavar="FILE.py[:variant]")
    sub = command("convert", convert, "write ArrayRecord shards", data)
    sub.add_argument("source", help="LLaVA JSON(L) or another source")
    sub.add_argument("out")
    sub.add_argument("--image-root", help="folder of the pictures (default: that of the source)")
    sub.add_argument("--shards", type=int, default=16)
    return top


def train(args: argparse.Namespace) -> None:
    """Trains a config; resumes if the workdir has a checkpoint."""
    from jaxmllm import config as configs
    from jaxmllm.train.cache import use_compile_cache

    run = configs.override(configs.load(args.config), args.set)
    workdir = args.workdir or f"runs/{run.name}"
    use_compile_cache(f"{workdir}/xla_cache")
    from jaxmllm.data.build import check_data, make_loader
    from jaxmllm.train import loop, stop

    join_processes(args)
    check_data(run)
    try:
        loop.run(run, workdir, lambda stage: make_loader(run, stage, workdir))
    except stop.Stopped as stopped:
        print(stopped, file=sys.stderr)


def join_processes(args: argparse.Namespace) -> None:
    """Waits for the other processes, if the command is to run in several."""
    if args.distributed or "JAX_COORDINATOR_ADDRESS" in os.environ:
        from jaxmllm import mesh

        mesh.start_processes()


def plan(args: argparse.Namespace) -> int:
    """Prints what a config needs on a TPU slice and how fast it would be; exit code 1 if it does not fit."""
    from jaxmllm.plan.compile import prepare

    prepare()
    from jaxmllm import config as configs
    from jaxmllm.plan import report
    from jaxmllm.plan.chips import topology

    slice_ = topology(args.topology, args.slices)
    words = [f"mesh.slice={args.slices}"] * (args.slices > 1) + args.set

    def of(target: str) -> dict:
        if target.endswith(".json"):
            return json.loads(Path(target).read_text())
        run = configs.override(configs.load(target), words)
        return report.plan(run, slice_, args.stage, lambda text: print(text, file=sys.stderr))

    other = of(args.compare) if args.compare else None
    result = of(args.config)
    if args.json:
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    print(report.compare(other, result) if other else report.show(result))
    return 0 if all(stage["fits"] for stage in result["stages"].values()) else 1


def bench(args: argparse.Namespace) -> None:
    """Prints how fast real steps are."""
    from jaxmllm import bench as benching
    from jaxmllm import config as configs
    from jaxmllm.data.build import make_loader

    run = configs.override(configs.load(args.config), args.set)
    stages = {stage.name: stage for stage in run.stages}
    if args.stage and args.stage not in stages:
        raise configs.ConfigError(f"--stage {args.stage}: {run.name} has the stages {', '.join(stages)}")
    stage = stages[args.stage or run.stages[-1].name]
    join_processes(args)
    import jax

    with contextlib.ExitStack() as stack:
        batches = None
        if args.real:
            loader = make_loader(run, stage, stack.enter_context(tempfile.TemporaryDirectory()))
            stack.callback(loader.close)
            batches = (rows for rows, _ in loader)
        found = benching.bench(run, stage, args.steps, batches)
    if jax.process_index() > 0:
        return
    if args.json:
        Path(args.json).write_text(json.dumps(found, indent=1) + "\n")
    for name, value in found.items():
        parts = value.items() if isinstance(value, dict) else ()
        print(f"{name:<32}" + (f"{value:,.6g}" if isinstance(value, float) else "" if parts else str(value)))
        for part, share in parts:
            print(f"  {part:<30}{share:,.4g}")


def evaluate(args: argparse.Namespace) -> None:
    """Prints a table by question kind; writes a JSON file and a sheet of scenes."""
    from jaxmllm.train.cache import use_compile_cache

    use_compile_cache(f"{args.workdir}/xla_cache")
    join_processes(args)
    import jax

    from jaxmllm.eval import benchmark
    from jaxmllm.eval.model import Model
    from jaxmllm.eval.sheet import draw_sheet

    rows, train_rows = benchmark.read_rows(args.rows), benchmark.read_rows(args.train_rows)
    result = benchmark.evaluate(Model(args.workdir, 16, args.set).ask, rows, train_rows)
    replies = result.pop("replies")
    if jax.process_index() > 0:
        return
    out = Path(args.out or f"{args.workdir}/eval.json")
    out.write_text(json.dumps(result | training_cost(args.workdir), indent=1) + "\n")
    draw_sheet(rows, replies, str(out.with_suffix(".png")))
    held, columns = result["heldout"], [result[k] for k in ("heldout", "blind", "shuffled")]
    print(f"{'kind':<10} {'n':>5} {'model':>7} {'blind':>7} {'shuffled':>9}")
    lines = [(kind, n, *(c["by_kind"][kind] for c in columns)) for kind, n in sorted(held["n"].items())]
    for name, n, model, blind, shuffled in [*lines, ("all", len(rows), *(c["overall"] for c in columns))]:
        print(f"{name:<10} {n:>5} {model:>7.1f} {blind:>7.1f} {shuffled:>9.1f}")
    print(f"{out} and {out.with_suffix('.png')} hold the details")


def training_cost(workdir: str) -> dict[str, float]:
    """{"train_seconds", "steps"} from the metrics of a workdir."""
    seconds, steps = 0.0, 0
    file, last = Path(workdir) / "metrics.jsonl", {}
    for line in file.read_text().splitlines() if file.exists() else []:
        row = json.loads(line)
        n = row["step"] - last.get(row["stage"], 0)
        seconds, steps = seconds + n * row["step_ms"] / 1e3, steps + n
        last[row["stage"]] = row["step"]
    return {"train_seconds": round(seconds, 1), "steps": steps}


def chat(args: argparse.Namespace) -> None:
    """One question, or a conversation until end of input."""
    from jaxmllm.train.cache import use_compile_cache

    use_compile_cache(f"{args.workdir}/xla_cache")
    from jaxmllm.data.templates import IMAGE
    from jaxmllm.eval.model import Model

    if args.image and not Path(args.image).is_file():
        raise FileNotFoundError(f"no picture {args.image!r}")
    model, turns = Model(args.workdir, words=args.set), []
    lead = f"{IMAGE}\n" if args.image else ""
    while True:
        try:
            prompt = args.prompt or input("you: ")
        except EOFError:
            print()
            return
        turns.append({"from": "human", "value": lead * (not turns) + prompt})
        reply = model.reply([(args.image, turns)])[0]
        turns.append({"from": "gpt", "value": reply})
        print(f"model: {reply}")
        if args.prompt:
            return


def make_scenes(args: argparse.Namespace) -> None:
    """Writes composed scenes."""
    from jaxmllm.data.scene_files import make_scenes as make

    keys = ("train", "heldout", "nouns", "size", "seed")
    print(f"scenes are in {make(args.out, progress=counter('scenes'), **{k: getattr(args, k) for k in keys})}")


def counter(what: str):
    """Progress of a long job as one line that counts, on a terminal only."""

    def show(done: int, total: int) -> None:
        print(f"\r{done}/{total} {what}", end="\n" if done == total else "", flush=True)

    return show if sys.stdout.isatty() else None


def check(args: argparse.Namespace) -> int:
    """Prints what is wrong with a data set."""
    from jaxmllm.data.check import check as read_all
    from jaxmllm.data.sources import open_source

    report = read_all(open_source(args.source, args.image_root), counter("records"))
    print(f"{report.records} records, {report.images} pictures, {report.bad} records unusable")
    for source, count in sorted(report.sources.items(), key=lambda item: -item[1]):
        print(f"{count:>9} {source or '(no source named)'}")
    for kind, samples in report.problems.items():
        print(f"{len(samples):>9} {kind}; the first: {samples[0]}")
    if report.duplicates:
        print(f"{len(report.duplicates):>9} ids occur more than once; the first: {next(iter(report.duplicates))}")
    return 1 if report.bad else 0


def stats(args: argparse.Namespace) -> None:
    """Prints lengths and packing of every source of a config."""
    from jaxmllm import config as configs
    from jaxmllm.data.build import sample_spec
    from jaxmllm.data.check import stats as measure
    from jaxmllm.data.sources import open_source

    run = configs.load(args.config)
    for source in {source.path: source for stage in run.stages for source in stage.sources}.values():
        found = measure(open_source(source.path, source.image_root), sample_spec(run), progress=counter("records"))
        tokens = ", ".join(f"{name} {value:.0f}" for name, value in found.tokens.items())
        print(f"{source.path}: {found.used} usable, {found.bad} not; tokens {tokens}; rows filled {found.packing:.1%}")


def convert(args: argparse.Namespace) -> None:
    """Writes ArrayRecord shards; names records left out."""
    from jaxmllm.data.sources import convert as write
    from jaxmllm.data.sources import open_source

    bad = write(open_source(args.source, args.image_root), args.out, args.shards, counter("records"))
    for sample in bad:
        print(f"left out: {sample}", file=sys.stderr)
    print(f"shards are in {args.out}; {len(bad)} records were left out")


if __name__ == "__main__":
    sys.exit(main())
