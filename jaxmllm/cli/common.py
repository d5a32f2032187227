"""What several commands share: arguments, the config that they name, JSON files, and the progress of a long job."""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from jaxmllm.errors import suggest

if TYPE_CHECKING:
    from jaxmllm.config import Run, Stage
    from jaxmllm.data.samples import SampleSpec


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, with the nearest name that there is."""

    def parse_args(self, args=None, namespace=None) -> argparse.Namespace:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            known = set(re.findall(r"--[\w-]+", found.parser.format_help()))
            found.parser.error(f"it takes no {unknown[0]!r}{suggest(unknown[0], known)}")
        return found

    def error(self, message: str) -> NoReturn:
        wrong = re.search(r"argument COMMAND: invalid choice: '(.*)' \(choose from (.*)\)", message)
        if wrong:
            message = f"there is no command {wrong[1]!r}{suggest(wrong[1], re.findall(r'[a-z-]+', wrong[2]))}"
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help shows how it is used)\n")


def add_command(commands, name: str, run: Callable[[argparse.Namespace], int | None], text: str, example: str):
    """Adds a command to the subparsers `commands`; returns its parser. run(args) returns the exit code; None is 0."""
    parser = commands.add_parser(name, help=text, description=text, epilog=f"example: {example}")
    parser.set_defaults(run=run, parser=parser)
    return parser


def add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", metavar="FILE.py[:variant]")


def add_own_parts(parser: argparse.ArgumentParser) -> None:
    text = "the recipe that the run was trained with, if it has parts that are not jaxmllm's"
    parser.add_argument("--config", metavar="FILE.py[:variant]", help=text)


def add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        dest="overrides",
        nargs="+",
        action="extend",
        default=[],
        metavar="a.b=c",
        help="override fields of the config",
    )


def add_distributed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--distributed", action="store_true", help="join the other hosts of a pod slice")


def add_json(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="FILE", help="write all figures to this file")


def add_image_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--image-root", help="folder of the pictures (default: that of the file)")
    text = "let records name files outside that folder, also through links"
    parser.add_argument("--outside-root", action="store_true", help=text)


def add_reading(parser: argparse.ArgumentParser) -> None:
    """Options that say how a config reads records; see `load_stages` and `spec_of_reading`."""
    text = "a config: refuse what its training would, for its template, lengths, pictures and targets"
    parser.add_argument("--config", metavar="FILE.py[:variant]", help=text)
    parser.add_argument("--stage", help="a stage of the config (default: for a source the first, for a config all)")
    add_overrides(parser)


def load_stages(args: argparse.Namespace) -> tuple[Run, tuple[Stage, ...]]:
    """The config that --config names, and its stages, or the one that --stage names."""
    run = load_run(args)
    return run, (run.stage(args.stage),) if args.stage else run.stages


def spec_of_reading(args: argparse.Namespace) -> SampleSpec | None:
    """How the first stage of `load_stages` makes samples; None without --config."""
    from jaxmllm.data.build import sample_spec
    from jaxmllm.errors import ConfigError

    if args.config:
        run, stages = load_stages(args)
        return sample_spec(run, stages[0])
    if args.stage or args.overrides:
        raise ConfigError("--stage and --set need a config; give one with --config")
    return None


def load_run(args: argparse.Namespace) -> Run:
    """The config that the arguments name, with their overrides."""
    from jaxmllm import recipes

    return recipes.override(recipes.load(args.config), args.overrides)


def write_json(path: str | Path, figures: dict[str, Any]) -> None:
    """Writes figures as indented JSON."""
    Path(path).write_text(json.dumps(figures, indent=1) + "\n")


def say(*lines: Any) -> None:
    """Prints lines to stderr, from the first process only."""
    import jax

    if jax.process_index() == 0:
        print(*lines, sep="\n", file=sys.stderr, flush=True)


def counter(what: str) -> Callable[[int, int], None] | None:
    """progress(done, total) that shows a long job as one line that counts; None if stdout is not a terminal."""

    def show(done: int, total: int) -> None:
        print(f"\r{done}/{total} {what}", end="\n" if done == total else "", flush=True)

    return show if sys.stdout.isatty() else None
