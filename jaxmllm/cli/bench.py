"""`jaxmllm bench`"""

from __future__ import annotations

import argparse

from jaxmllm.cli import common


def add(commands) -> None:
    text = "time real training steps of a config on the devices of this machine"
    parser = common.add_command(commands, "bench", run, text, "jaxmllm bench configs/toy.py --steps 20")
    common.add_config(parser)
    parser.add_argument("--stage", help="stage to time (default: the last)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--real", action="store_true", help="read the config's data (default: one random batch)")
    common.add_distributed(parser)
    common.add_overrides(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> None:
    """Prints how fast real steps are."""
    from jaxmllm import bench, processes

    config = common.load_run(args)
    stage = bench.choose_stage(config, args.stage)
    processes.join_processes(args.distributed)
    import jax

    found = bench.measure(config, stage, args.steps, args.real)
    if jax.process_index() > 0:
        return
    if args.json:
        common.write_json(args.json, found)
    print(bench.show(found))
