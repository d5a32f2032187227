"""`jaxmllm eval`"""

from __future__ import annotations

import argparse
from pathlib import Path

from jaxmllm.cli import common


def add(commands) -> None:
    text = "ask a checkpoint the questions of a set in CV-Bench's row format"
    parser = common.add_command(commands, "eval", run, text)
    parser.add_argument("workdir")
    parser.add_argument("--rows", required=True, help="JSONL file of rows")
    parser.add_argument(
        "--train-rows", required=True, help="rows from which the reference that sees no picture learns its rules"
    )
    parser.add_argument("--out", help="JSON file to write (default: WORKDIR/eval.json)")
    common.add_overrides(parser)
    common.add_distributed(parser)


def run(args: argparse.Namespace) -> None:
    """Prints a table by question kind; writes a JSON file and a sheet of scenes."""
    from jaxmllm.train.cache import use_compile_cache

    use_compile_cache(f"{args.workdir}/xla_cache")
    from jaxmllm import processes

    processes.join_processes(args.distributed)
    import jax

    from jaxmllm.eval import benchmark
    from jaxmllm.eval.model import Model
    from jaxmllm.eval.sheet import draw_sheet

    rows, train_rows = benchmark.read_rows(args.rows), benchmark.read_rows(args.train_rows)
    model = Model(args.workdir, max_new_tokens=16, overrides=args.overrides)
    result = benchmark.evaluate(model.ask, rows, train_rows)
    replies = result.pop("replies")
    if jax.process_index() > 0:
        return
    out = Path(args.out or f"{args.workdir}/eval.json")
    sheet = out.with_suffix(".png")
    common.write_json(out, result | benchmark.training_cost(args.workdir))
    draw_sheet(rows, replies, str(sheet))
    print(benchmark.table(result))
    print(f"{out} and {sheet} hold the details")
