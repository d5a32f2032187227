"""`jaxmllm chat`"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxmllm.cli import common
from jaxmllm.errors import suggest_path


def add(commands) -> None:
    parser = common.add_command(
        commands, "chat", run, "talk to a checkpoint about a picture", "jaxmllm chat runs/toy --image photo.jpg"
    )
    parser.add_argument("workdir")
    parser.add_argument("--image", help="picture file")
    parser.add_argument("--prompt", help="the only question (default: read questions until end of input)")
    common.add_own_parts(parser)
    common.add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Answers one question, or holds a conversation until end of input."""
    from jaxmllm.train.cache import use_compile_cache

    use_compile_cache(f"{args.workdir}/xla_cache")
    from jaxmllm.data.sources.record import BadSample
    from jaxmllm.eval.answer import Conversation
    from jaxmllm.eval.restore import restore_answerer

    if args.image and not Path(args.image).is_file():
        raise FileNotFoundError(f"no picture {args.image!r}{suggest_path(args.image)}")
    conversation = Conversation(
        restore_answerer(args.workdir, overrides=args.overrides, config=args.config), args.image
    )
    while True:
        try:
            prompt = args.prompt or input("you: ")
            if prompt.strip():
                print(f"model: {conversation.reply(prompt)}")
        except EOFError:
            print()
            return
        except BadSample as bad:
            if args.prompt:
                raise
            print(f"not asked: {bad.reason} ({bad.path})")
        if args.prompt:
            return
