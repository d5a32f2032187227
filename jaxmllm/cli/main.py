"""Entry point of the command line.

Exit codes: 0 success, 1 a failed run, 2 a request that cannot be met; one line says what is wrong and how to mend it.
130 after Ctrl-C; `train` saves and returns 0 (docs/stopping.md).
"""

from __future__ import annotations

import argparse
import os
import signal
import sys

from jaxmllm.cli import (
    bench,
    chat,
    common,
    data_check,
    data_convert,
    data_make_scenes,
    data_show,
    data_stats,
    eval,
    export,
    plan,
    report,
    serve,
    train,
    verify,
)
from jaxmllm.errors import check_local
from jaxmllm.processes import keep_freed_memory

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # before anything imports XLA; the commands import it when they run

COMMANDS = (
    train,
    eval,
    chat,
    serve,
    report,
    export,
    verify,
    plan,
    bench,
)
DATA_COMMANDS = (data_make_scenes, data_check, data_show, data_stats, data_convert)


def main(argv: list[str] | None = None) -> int:
    """Runs one command (by default that of sys.argv) and returns the exit code."""
    try:
        args = parser().parse_args(argv)
        keep_freed_memory()
        for name, value in vars(args).items():
            if isinstance(value, str):
                check_local(f"--{name}", value)
        return args.run(args) or 0
    except (ValueError, FileNotFoundError, FileExistsError) as error:  # ConfigError is a ValueError
        return fail(error, 2)
    except (FloatingPointError, OSError, RuntimeError) as error:
        if os.environ.get("JAXMLLM_TRACEBACK"):
            raise
        return fail(error, 1)
    except KeyboardInterrupt:
        return fail(InterruptedError("interrupted"), 128 + signal.SIGINT)


def parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    top = common.Parser("jaxmllm", description="Train, query and measure multimodal language models.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")
    for module in COMMANDS:
        module.add(commands)
    text = "make, check and convert data sets"
    data = commands.add_parser("data", help=text, description=text)
    data_commands = data.add_subparsers(required=True, metavar="COMMAND")
    for module in DATA_COMMANDS:
        module.add(data_commands)
    return top


def fail(error: Exception, code: int) -> int:
    """Prints an error as one line and returns `code`."""
    lines = (" ".join(line.split()) for line in str(error).splitlines())
    text = "; ".join(filter(None, lines)) or type(error).__name__
    print(f"jaxmllm: {text}", file=sys.stderr)
    return code
