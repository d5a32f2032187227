"""`jaxmllm plan`"""

from __future__ import annotations

import argparse
import sys

from jaxmllm.cli import common


def add(commands) -> None:
    text = "compile a config for a TPU slice, without one at hand: memory, cycles, traffic, predicted MFU"
    parser = common.add_command(commands, "plan", run, text, "jaxmllm plan configs/llama3_8b.py --topology v5p:4x4x4")
    common.add_config(parser)
    parser.add_argument(
        "--topology", required=True, metavar="CHIP:SHAPE", help="v4, v5e, v5p, v6e or tpu7x and a shape: v5p:4x4x4"
    )
    parser.add_argument("--slices", type=int, default=1, help="slices joined by the data-centre network (mesh.slice)")
    parser.add_argument("--stage", help="plan this stage only")
    common.add_overrides(parser)
    common.add_json(parser)
    parser.add_argument("--compare", metavar="OTHER", help="another config, or a plan's JSON file, to compare with")


def run(args: argparse.Namespace) -> int:
    """Prints what a config needs on a TPU slice and how fast it would be; exit code 1 if it does not fit."""
    from jaxmllm.plan.compile import prepare

    prepare()
    from jaxmllm.plan import report
    from jaxmllm.plan.chips import topology

    options = args.overrides, topology(args.topology, args.slices), args.stage, say
    other = report.load_or_plan(args.compare, *options) if args.compare else None
    result = report.load_or_plan(args.config, *options)
    if args.json:
        common.write_json(args.json, result)
    print(report.compare(other, result) if other else report.show(result))
    return 0 if all(stage["fits"] for stage in result["stages"].values()) else 1


def say(text: str) -> None:
    """Prints progress to stderr, so that stdout holds the plan only."""
    print(text, file=sys.stderr)
