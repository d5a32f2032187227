"""`jaxmllm train`"""

from __future__ import annotations

import argparse
import sys

from jaxmllm.cli import common


def add(commands) -> None:
    text = "train a config; the same command again resumes where it stopped"
    parser = common.add_command(commands, "train", run, text)
    common.add_config(parser)
    common.add_overrides(parser)
    parser.add_argument("--workdir", help="folder for all output (default: runs/NAME)")
    parser.add_argument(
        "--accept-changed-data", action="store_true", help="resume although a data set has changed since the last save"
    )
    common.add_distributed(parser)


def run(args: argparse.Namespace) -> None:
    """Trains a config; resumes if the workdir has a checkpoint."""
    from jaxmllm.train.cache import use_compile_cache

    config = common.load_run(args)
    workdir = args.workdir or f"runs/{config.name}"
    use_compile_cache(f"{workdir}/xla_cache")
    from jaxmllm import processes
    from jaxmllm.data.build import check_data, make_loader, resolve
    from jaxmllm.train import loop, stop

    processes.join_processes(args.distributed)
    check_data(config)
    config = resolve(config, workdir, args.accept_changed_data)
    try:
        loop.run(config, workdir, lambda stage: make_loader(config, stage, workdir, args.accept_changed_data))
    except stop.Stopped as stopped:
        print(stopped, file=sys.stderr)
