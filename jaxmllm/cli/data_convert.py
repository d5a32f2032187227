"""`jaxmllm data convert`"""

from __future__ import annotations

import argparse
import sys

from jaxmllm.cli import common


def add(commands) -> None:
    parser = common.add_command(
        commands,
        "convert",
        run,
        "write ArrayRecord shards",
        "jaxmllm data convert data/chat.json data/shards --image-root data/images",
    )
    parser.add_argument("source", help="LLaVA JSON(L) or another source")
    parser.add_argument("out")
    common.add_image_root(parser)
    parser.add_argument("--shards", type=int, default=16)


def run(args: argparse.Namespace) -> None:
    """Writes ArrayRecord shards; names the records that were left out."""
    from jaxmllm.data.sources.array_record import convert
    from jaxmllm.data.sources.open import open_source

    bad = convert(
        open_source(args.source, args.image_root, args.outside_root), args.out, args.shards, common.counter("records")
    )
    for sample in bad:
        print(f"left out: {sample}", file=sys.stderr)
    print(f"shards are in {args.out}; {len(bad)} records were left out")
