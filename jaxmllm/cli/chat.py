"""`jaxmllm chat`"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from jaxmllm.cli import common
from jaxmllm.errors import suggest_path

if TYPE_CHECKING:
    from jaxmllm.eval.conversation import Conversation


def add(commands) -> None:
    parser = common.add_command(
        commands, "chat", run, "talk to a checkpoint about a picture", "jaxmllm chat runs/toy --image photo.jpg"
    )
    parser.add_argument("workdir")
    parser.add_argument(
        "--image", action="append", default=[], metavar="FILE", help="picture file; several stand in the order given"
    )
    parser.add_argument("--prompt", help="the only question (default: read questions until end of input)")
    parser.add_argument("--max-new-tokens", type=int, default=256, metavar="N", help="of a reply (default: 256)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0, the default, takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, metavar="K", help="only the K likeliest tokens (0: all)")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="only tokens that together reach P")
    parser.add_argument("--repetition-penalty", type=float, default=1.0, metavar="X", help="of tokens said before")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same replies")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="a text before which replies end")
    common.add_own_parts(parser)
    common.add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Answers one question, or holds a conversation until end of input."""
    from jaxmllm.train.cache import use_compile_cache

    use_compile_cache(f"{args.workdir}/xla_cache")
    from jaxmllm.data.sources.record import BadSample
    from jaxmllm.eval.conversation import Conversation
    from jaxmllm.eval.restore import restore_answerer
    from jaxmllm.eval.sampling import Sampling

    for image in args.image:
        if not Path(image).is_file():
            raise FileNotFoundError(f"no picture {image!r}{suggest_path(image)}")
    names = "temperature", "top_k", "top_p", "repetition_penalty", "seed", "max_new_tokens"
    sampling = Sampling(**{name: getattr(args, name) for name in names}, stop=tuple(args.stop))
    answerer = restore_answerer(args.workdir, args.max_new_tokens, args.overrides, args.config)
    conversation = Conversation(answerer, args.image, sampling)
    while True:
        try:
            prompt = args.prompt or input("you: ")
            if prompt.strip():
                answer(conversation, prompt)
        except EOFError:
            print()
            return
        except BadSample as bad:
            if args.prompt:
                raise
            print(f"not asked: {bad.reason} ({bad.path})")
        if args.prompt:
            return


def answer(conversation: Conversation, prompt: str) -> None:
    """Prints the reply to a prompt as it is made."""
    pieces = conversation.stream(prompt)
    first = next(pieces, "")  # a prompt that cannot be asked raises here, before anything is printed
    print(f"model: {first}", end="", flush=True)
    for piece in pieces:
        print(piece, end="", flush=True)
    print()
