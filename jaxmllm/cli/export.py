"""`jaxmllm export`"""

from __future__ import annotations

import argparse

from jaxmllm.cli import common


def add(commands) -> None:
    text = "write a run's weights as a folder that transformers opens, or that a run starts from"
    parser = common.add_command(
        commands, "export", run, text, "jaxmllm export runs/mine exported/mine --dtype bfloat16"
    )
    parser.add_argument("workdir", metavar="WORKDIR[/stage[/step]]")
    parser.add_argument("folder", metavar="DIR", help="a new folder")
    parser.add_argument("--part", metavar="llm", help="the language model alone")
    parser.add_argument("--dtype", help="float32, bfloat16 or float16 (default: nothing is rounded)")
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapters alone, for PEFT (default: merged)")
    common.add_own_parts(parser)


def run(args: argparse.Namespace) -> None:
    """Exports a checkpoint and says what was written."""
    from jaxmllm.errors import ConfigError
    from jaxmllm.weights.export import export
    from jaxmllm.weights.peft import export_adapter

    if args.adapter and args.dtype:
        raise ConfigError("--adapter: adapters are written in float32; leave out --dtype")
    if args.adapter:
        print(export_adapter(args.workdir, args.folder, part=args.part, config=args.config))
    else:
        print(export(args.workdir, args.folder, part=args.part, dtype=args.dtype, config=args.config))
