"""`jaxmllm data convert`"""

from __future__ import annotations

import argparse
import sys
from functools import partial

from jaxmllm.cli import common


def add(commands) -> None:
    text = "write the usable records of a source as ArrayRecord shards; exit code 1 if there are none"
    example = "jaxmllm data convert data/chat.json data/shards --image-root data/images"
    parser = common.add_command(commands, "convert", run, text, example)
    parser.add_argument("source", help="LLaVA JSON(L) or another source")
    parser.add_argument("out")
    common.add_image_root(parser)
    common.add_reading(parser)
    parser.add_argument("--shards", type=int, default=16)


def run(args: argparse.Namespace) -> int:
    """Writes ArrayRecord shards; names the records that are left out, as `data check` does."""
    from jaxmllm.data.check import examine
    from jaxmllm.data.sources.array_record import convert
    from jaxmllm.data.sources.open import open_source

    source = open_source(args.source, args.image_root, args.outside_root)
    refuse = partial(examine, spec=common.spec_of_reading(args))
    bad = convert(source, args.out, args.shards, common.counter("records"), refuse)
    for sample in bad:
        print(f"left out: {sample}", file=sys.stderr)
    if len(bad) == len(source):
        print(f"jaxmllm: none of the {len(bad)} records can be used; nothing is written", file=sys.stderr)
        return 1
    print(f"shards are in {args.out}; {len(bad)} records were left out")
    return 0
