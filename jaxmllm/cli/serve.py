"""`jaxmllm serve`"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from jaxmllm.cli import common
from jaxmllm.errors import ConfigError, suggest_path

KEY = "JAXMLLM_API_KEY"  # environment variable


def add(commands) -> None:
    text = "answer requests of OpenAI's clients, and show a chat page"
    parser = common.add_command(commands, "serve", run, text, "jaxmllm serve runs/toy --port 8000")
    parser.add_argument("workdir")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free (default: 8000)")
    text = f"what requests must bring (default: the variable {KEY}, if set)"
    parser.add_argument("--api-key", metavar="KEY", help=text)
    parser.add_argument("--files", metavar="FOLDER", help="pictures that requests may name by their path")
    text = "of a reply; requests may ask for fewer (default: 1024)"
    parser.add_argument("--max-new-tokens", type=int, default=1024, metavar="N", help=text)
    parser.add_argument("--batch", type=int, default=8, metavar="N", help="replies made at the same time (default: 8)")
    text = "requests that may wait or be answered; others get status 429 (default: 64)"
    parser.add_argument("--queue", type=int, default=64, metavar="N", help=text)
    parser.add_argument("--max-body", type=int, default=32, metavar="MIB", help="of a request (default: 32)")
    parser.add_argument("--max-picture", type=int, default=16, metavar="MIB", help="of a picture's file (default: 16)")
    parser.add_argument("--max-pictures", type=int, default=16, metavar="N", help="of a request (default: 16)")
    common.add_own_parts(parser)
    common.add_overrides(parser)


def run(args: argparse.Namespace) -> None:
    """Serves until SIGTERM or Ctrl-C."""
    try:
        from jaxmllm.serve import server
        from jaxmllm.serve.app import LOOPBACK, Endpoint
    except ModuleNotFoundError as error:
        if error.name in ("starlette", "uvicorn", "anyio", "pydantic"):
            raise ConfigError(f'jaxmllm serve needs {error.name}: pip install "jaxmllm[serve]"') from None
        raise
    from jaxmllm.eval.restore import restore_answerer
    from jaxmllm.processes import say
    from jaxmllm.serve.batches import Batcher
    from jaxmllm.serve.limits import Limits
    from jaxmllm.train.cache import use_compile_cache

    for name in ("max_new_tokens", "batch", "queue", "max_body", "max_picture", "max_pictures"):
        if getattr(args, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be 1 or more, not {getattr(args, name)}")
    limits = Limits(
        requests=args.queue,
        rows=args.batch,
        body=args.max_body << 20,
        picture=args.max_picture << 20,
        pictures=args.max_pictures,
    )
    if args.files and not Path(args.files).is_dir():
        raise ConfigError(f"--files {args.files}: there is no such folder{suggest_path(args.files)}")
    key, local = args.api_key or os.environ.get(KEY), server.is_loopback(args.host)
    bound = server.bound_socket(args.host, args.port)
    use_compile_cache(f"{args.workdir}/xla_cache")
    answerer = restore_answerer(args.workdir, args.max_new_tokens, args.overrides, args.config)
    batcher, name = Batcher(answerer, limits.rows, say), Path(args.workdir).resolve().name
    endpoint = Endpoint(batcher, name, limits, key, (*LOOPBACK, args.host) if local else None, args.files, say)

    def ready() -> None:
        url = server.address_of(bound)
        if not (local or key):
            say("without a key (--api-key) whoever reaches this address may ask")
        print(f"model {name!r}: {url}/v1 for clients, {url}/ for a browser; Ctrl-C ends it", flush=True)

    server.Server(endpoint.app(), batcher, ready, say).run([bound])
    server.leave(0)  # a thread may be in the compiler
