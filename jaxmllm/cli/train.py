"""`jaxmllm train`"""

from __future__ import annotations

import argparse
import dataclasses

from jaxmllm.cli import common
from jaxmllm.train.stop import Stopped, StopSignal
from jaxmllm.watched import watch


def add(commands) -> None:
    text = "train a config; the same command again resumes where it stopped"
    parser = common.add_command(
        commands, "train", run, text, "jaxmllm train configs/toy.py --workdir runs/mine --set stages.align.steps=500"
    )
    common.add_config(parser)
    common.add_overrides(parser)
    parser.add_argument("--workdir", help="folder for all output (default: runs/NAME)")
    parser.add_argument("--profile", metavar="FROM:TO", help="trace these steps with jax.profiler, in WORKDIR/profile")
    parser.add_argument(
        "--accept-changed-data", action="store_true", help="resume although a data set has changed since the last save"
    )
    text = "print what would happen, with the time of a few measured steps, and write nothing"
    parser.add_argument("--dry-run", action="store_true", help=text)
    common.add_distributed(parser)


def run(args: argparse.Namespace) -> int | None:
    """Trains a config, in a child process; resumes if the workdir has a checkpoint. A signal stops it."""
    code = watch()
    if code is not None:
        return code
    stop = StopSignal()
    try:
        with stop:
            train(args, stop)
    except Stopped:
        if not stop.ended:
            stop.end("stopped before it trained; the same command starts it again")


def train(args: argparse.Namespace, stop: StopSignal) -> None:
    """Checks everything, then trains. Raises Stopped."""
    from jaxmllm.train.cache import use_compile_cache

    config = common.load_run(args)
    workdir = args.workdir or f"runs/{config.name}"
    if not args.dry_run:
        use_compile_cache(f"{workdir}/xla_cache")
    from jaxmllm import dry_run, processes
    from jaxmllm.data.build import check_data, make_loader, resolve
    from jaxmllm.eval.periodic import StageEvals
    from jaxmllm.train import loop
    from jaxmllm.train.profile import parse_steps
    from jaxmllm.train.session import Hooks
    from jaxmllm.weights.parts import load_parts

    profile = parse_steps(args.profile) if args.profile else None
    processes.join_processes(args.distributed)
    stop.joined()
    check_data(config)
    config = resolve(config, workdir, args.accept_changed_data)
    evals = {stage.name: StageEvals(config, stage, workdir) for stage in config.stages}
    if args.dry_run:
        return dry_run.show(config, workdir)

    def make(stage):
        return make_loader(config, stage, workdir, args.accept_changed_data)

    def load(config, abstract, rates):
        """Loads the parts that have a source, and says for each part what it starts from."""
        longest = max(config.data_of(stage).seq_len for stage in config.stages)
        arrays, reports = load_parts(config.model, config.init.sources(), abstract, rates=rates, length=longest)
        common.say(*reports)
        return arrays, [dataclasses.asdict(report) for report in reports]

    loop.run(config, workdir, Hooks(make, load, evals, profile, stop))
