"""`jaxmllm eval`"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from jaxmllm.cli import common


def add(commands) -> None:
    text = "measure a checkpoint: by default, with questions in CV-Bench's row format"
    parser = common.add_command(commands, "eval", run, text, "jaxmllm eval runs/toy --rows data/scenes/heldout.jsonl")
    parser.add_argument("workdir")
    parser.add_argument("--rows", help="JSONL file of rows")
    parser.add_argument(
        "--train-rows", help="rows from which the reference that sees no picture learns its rules (default: none)"
    )
    common.add_image_root(parser)
    parser.add_argument(
        "--task",
        metavar="FILE.py:name",
        help="a task that a file defines, or the name of one that the run's config has",
    )
    parser.add_argument("--out", help="JSON file to write (default: WORKDIR/eval.json)")
    common.add_own_parts(parser)
    common.add_overrides(parser)
    common.add_distributed(parser)


def run(args: argparse.Namespace) -> None:
    """Prints a table; writes a JSON file, the replies as they come, and for CV-Bench's rows a sheet of scenes."""
    from jaxmllm.train.cache import use_compile_cache

    use_compile_cache(f"{args.workdir}/xla_cache")
    from jaxmllm import processes

    processes.join_processes(args.distributed)
    import jax

    from jaxmllm.eval.cost import training_cost
    from jaxmllm.eval.restore import newest_checkpoint
    from jaxmllm.json_lines import append_line

    found = newest_checkpoint(args.workdir, args.overrides, args.config)
    task = chosen_task(args, found.config)
    measure = task.prepare(found.config, found.stage, args.workdir)
    active = jax.process_index() == 0
    out = Path(args.out or f"{args.workdir}/eval.json")
    replies = out.with_name(f"{out.stem}_replies.jsonl")
    if active:
        replies.unlink(missing_ok=True)
    with jax.set_mesh(found.config.mesh.build()):
        result = measure(found.params(), partial(append_line, replies) if active else lambda row: None)
    if not active:
        return
    common.write_json(out, (result.details or result.numbers) | training_cost(args.workdir))
    written = [out, *([replies] if replies.exists() else [])]
    if result.draw:
        written.append(out.with_suffix(".png"))
        result.draw(str(written[-1]))
    print(result.table)
    print(f"details: {', '.join(map(str, written))}")


def chosen_task(args: argparse.Namespace, config: Any) -> Any:
    """The task that the arguments name. Raises ConfigError if they name none."""
    from jaxmllm.errors import ConfigError, suggest
    from jaxmllm.eval.tasks.cv_bench import CVBench
    from jaxmllm.recipes import namespace

    if bool(args.rows) == bool(args.task):
        raise ConfigError("say what to measure, either --rows FILE.jsonl or --task FILE.py:name")
    if args.rows:
        return CVBench(args.rows, args.train_rows, image_root=args.image_root, outside_root=args.outside_root)
    if args.image_root or args.outside_root:
        raise ConfigError("--image-root and --outside-root are for --rows; a task names its own")
    path, in_file, name = args.task.rpartition(":")
    known = namespace(path) if in_file else {e.name: e.task for stage in config.stages for e in stage.evals}
    tasks = {key: value for key, value in known.items() if hasattr(value, "prepare") and not isinstance(value, type)}
    if name not in tasks:
        raise ConfigError(f"{path or 'the config'} has no task {name!r}{suggest(name, tasks)}")
    return tasks[name]
