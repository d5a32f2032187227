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
    text = "in the layout of LLaVA's, MMFuser's, Cambrian-1's or VisPer-LM's authors, without encoders"
    parser.add_argument("--authors", action="store_true", help=text)
    parser.add_argument("--adapter", action="store_true", help="the LoRA adapters alone, for PEFT (default: merged)")
    common.add_own_parts(parser)


def run(args: argparse.Namespace) -> None:
    """Exports a checkpoint and says what was written."""
    from jaxmllm.errors import ConfigError
    from jaxmllm.weights.export import export
    from jaxmllm.weights.peft import export_adapter

    if args.adapter and (args.dtype or args.authors):
        raise ConfigError("--adapter: adapters are written in float32 for PEFT; leave out --dtype and --authors")
    if args.authors and args.part:
        raise ConfigError("--authors: the layouts of the authors hold whole models; leave out --part")
    if args.adapter:
        print(export_adapter(args.workdir, args.folder, part=args.part, config=args.config))
    else:
        options = dict(part=args.part, authors=args.authors, dtype=args.dtype, config=args.config)
        print(export(args.workdir, args.folder, **options))
