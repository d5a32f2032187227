"""`jaxmllm data stats`"""

from __future__ import annotations

import argparse

from jaxmllm.cli import common


def add(commands) -> None:
    parser = common.add_command(
        commands, "stats", run, "lengths and packing of a config's data sets", "jaxmllm data stats configs/toy.py"
    )
    common.add_config(parser)


def run(args: argparse.Namespace) -> None:
    """Prints lengths and packing of every source of a config."""
    from jaxmllm import recipes
    from jaxmllm.data.build import sample_spec
    from jaxmllm.data.check import show_stats, stats
    from jaxmllm.data.sources.open import open_source

    recipe = recipes.load(args.config)
    for stage in recipe.stages:
        for source in stage.sources:
            records = open_source(source.path, source.image_root, source.outside_root)
            spec = sample_spec(recipe, stage)
            found = stats(records, spec, progress=common.counter("records"))
            print(f"{stage.name}: {source.path}: {show_stats(found)}")
