"""`jaxmllm data show`"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from jaxmllm.cli import common

STYLES = {"trained": "bold green", "untrained": "bright_black", "picture": "bold blue"}


def add(commands) -> None:
    text = "what the model will see of a record: text, token ids, pictures, targets, or why it is refused"
    example = "jaxmllm data show configs/toy.py --index 3 --out shown"
    parser = common.add_command(commands, "show", run, text, example)
    common.add_config(parser)
    parser.add_argument("--stage", help="the stage that reads the record (default: the first)")
    parser.add_argument("--index", type=int, required=True, help="counts from 0 over the stage's sources, in order")
    parser.add_argument("--json", action="store_true", help="print JSON")
    parser.add_argument("--out", metavar="FOLDER", help="write what each encoder sees, and target maps, as PNG files")
    parser.add_argument("--html", metavar="FILE", help="also write a page")
    common.add_overrides(parser)


def run(args: argparse.Namespace) -> int:
    """Prints what becomes of a record; exit code 1 if it is refused."""
    from jaxmllm.data.build import sample_spec, weighted_sources
    from jaxmllm.data.show import show_record, to_document
    from jaxmllm.report.record import page

    config = common.load_run(args)
    stage = config.stage(args.stage) if args.stage else config.stages[0]
    found = show_record([source for source, _ in weighted_sources(stage)], args.index, sample_spec(config, stage))
    document = to_document(found, args.out)
    if args.html:
        Path(args.html).write_text(page(args.config, found), encoding="utf-8")
    if args.json:
        print(json.dumps(document))
    else:
        print_record(document)
        for path in filter(None, (args.out, args.html)):
            print(f"{path} shows it")
    return 1 if found.error else 0


def print_record(document: dict[str, Any]) -> None:
    """Prints a record; in colour on a terminal."""
    from rich.console import Console
    from rich.text import Text

    from jaxmllm.errors import shown

    console = Console(highlight=False, soft_wrap=True)
    console.print(Text(f"record {document['record']} of {document['source']}: {shown(document['id'])}"))
    if document["error"]:
        console.print(Text(f"refused: {document['error']}", "bold red"))
    for piece in document["pieces"]:
        ids, is_picture = piece["ids"], piece["image"] is not None
        kind = "picture" if is_picture else "trained" if piece["trained"] else "untrained"
        told = f"{len(ids)} tokens of picture {piece['image']}" if is_picture else " ".join(map(str, ids))
        text = shown(json.dumps(piece["text"], ensure_ascii=False), limit=1_000_000)
        console.print(Text(f"{kind:<10} ").append(text, STYLES[kind]).append(f"  {told}"))
    trained = sum(len(piece["ids"]) for piece in document["pieces"] if piece["trained"])
    console.print(Text(f"{sum(len(piece['ids']) for piece in document['pieces'])} tokens, {trained} of them trained"))
    for name, image in document["images"].items():
        for number, slot in enumerate(image["slots"]):
            (width, height), (columns, rows) = slot["size"], slot["padding"]
            text = f"encoder {name}, slot {number}: {width} x {height} pixels"
            text += f", padding {columns} columns and {rows} rows"
            console.print(Text(text + (f", in {slot['file']}" if slot["file"] else "")))
    for name, maps in document["targets"].items():
        for found in maps:
            text = f"target {name}, slot {found['slot']}: {found['shape'][0]} queries of {found['shape'][1]}"
            text += f", {found['min']:.3g} to {found['max']:.3g}"
            console.print(Text(text + (f", in {found['file']}" if found["file"] else "")))
