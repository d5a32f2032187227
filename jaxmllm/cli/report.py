"""`jaxmllm report`"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxmllm.cli import common


def add(commands) -> None:
    text = "one HTML page about a run: losses, answers, attention, speed, data, parts, config"
    parser = common.add_command(commands, "report", run, text, "jaxmllm report runs/toy --out toy.html")
    parser.add_argument("workdir")
    parser.add_argument("--out", metavar="FILE", help="HTML file to write (default: WORKDIR/report.html)")
    common.add_own_parts(parser)
    common.add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Writes the page."""
    from jaxmllm.train.cache import use_compile_cache

    use_compile_cache(f"{args.workdir}/xla_cache")
    from jaxmllm.report.run import report

    text = report(args.workdir, args.overrides, args.config)
    out = Path(args.out or f"{args.workdir}/report.html")
    out.write_text(text, encoding="utf-8")
    print(f"{out} shows the run; open it in a browser")
