"""`jaxmllm data check`"""

from __future__ import annotations

import argparse

from jaxmllm.cli import common


def add(commands) -> None:
    text = "read every record and picture; exit code 1 if any is unusable"
    parser = common.add_command(
        commands, "check", run, text, "jaxmllm data check data/chat.json --image-root data/images"
    )
    parser.add_argument("source", help="LLaVA JSON(L), ArrayRecord folder, or TFDS_FOLDER:SPLIT")
    common.add_image_root(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what is wrong with a data set."""
    from jaxmllm.data.check import check, show_report
    from jaxmllm.data.sources.open import open_source

    report = check(open_source(args.source, args.image_root, args.outside_root), common.counter("records"))
    print(show_report(report))
    return 1 if report.bad else 0
