"""`jaxmllm data stats`"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxmllm.cli import common


def add(commands) -> None:
    parser = common.add_command(
        commands, "stats", run, "lengths and packing of a config's data sets", "jaxmllm data stats configs/toy.py"
    )
    common.add_config(parser)
    parser.add_argument("--stage", help="this stage only (default: all)")
    parser.add_argument("--html", metavar="FILE", help="also write a page with plots")
    common.add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Prints lengths and packing of every source of a config."""
    from jaxmllm.data.check import show_stats
    from jaxmllm.data.sizes import MEASURED
    from jaxmllm.report import data
    from jaxmllm.report.page import Section, render

    config = common.load_run(args)
    stages, sources = (config.stage(args.stage),) if args.stage else config.stages, []
    for each in data.measured(config, stages, MEASURED, common.counter("records")):
        sources.append(each)
        print(f"{each.stage.name}: {each.source.path}: {show_stats(each.stats)}")
    if args.html:
        page = render(
            f"{config.name}: data", f"The data of {args.config}.", [Section("Data", data.source_blocks(sources))]
        )
        Path(args.html).write_text(page, encoding="utf-8")
        print(f"{args.html} shows them; open it in a browser")
