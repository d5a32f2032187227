"""`jaxmllm data make-scenes`"""

from __future__ import annotations

import argparse

from jaxmllm.cli import common

DEFAULTS = {"train": 12000, "heldout": 1500, "nouns": 16, "size": 96, "seed": 0}


def add(commands) -> None:
    parser = common.add_command(
        commands, "make-scenes", run, "write the data set of composed sprites", "jaxmllm data make-scenes data/scenes"
    )
    parser.add_argument("out")
    for name, default in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    text = (
        "kinds of scenes: count, depth, single; also relation and distance, which are harder (default: the first three)"
    )
    parser.add_argument("--kinds", nargs="+", metavar="KIND", help=text)
    text = "photographs to stand behind the sprites: FOLDER/train and FOLDER/heldout (default: plain textures)"
    parser.add_argument("--backgrounds", metavar="FOLDER", help=text)


def run(args: argparse.Namespace) -> None:
    """Writes composed scenes."""
    from jaxmllm.scenes.files import make_scenes

    names = *DEFAULTS, "backgrounds", *(["kinds"] if args.kinds else [])
    options = {name: getattr(args, name) for name in names}
    print(f"scenes are in {make_scenes(args.out, progress=common.counter('scenes'), **options)}")
