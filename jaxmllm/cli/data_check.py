"""`jaxmllm data check`"""

from __future__ import annotations

import argparse
import re
from pathlib import Path
from typing import Any

from jaxmllm.cli import common


def add(commands) -> None:
    text = "examine every record of a source, or of all sources of a config; exit code 1 if training would drop any"
    example = "jaxmllm data check data/chat.json --image-root data/images"
    parser = common.add_command(commands, "check", run, text, example)
    parser.add_argument("source", help="LLaVA JSON(L), ArrayRecord folder, TFDS_FOLDER:SPLIT, or FILE.py[:variant]")
    common.add_image_root(parser)
    common.add_reading(parser)
    common.add_json(parser)
    text = "write the usable records as JSONL: a file, or for a config a folder with a file for each source"
    parser.add_argument("--fix", metavar="OUT", help=text)


def run(args: argparse.Namespace) -> int:
    """Prints what is wrong with the records; with --json and --fix, writes files."""
    from jaxmllm.data.build import weighted_sources
    from jaxmllm.data.check import check, check_run, show_report, write_usable
    from jaxmllm.data.sources.open import open_source
    from jaxmllm.errors import ConfigError

    is_config = re.search(r"\.py(:\w+)?$", args.source)
    if is_config and (args.config or args.image_root or args.outside_root):
        raise ConfigError("--config, --image-root and --outside-root are for a source; a config names its own")
    if is_config:
        args.config = args.source
        config, stages = common.load_stages(args)
        sources = [source for stage in stages for source, _ in weighted_sources(stage)]
        outs = [Path(args.fix or "", f"{s.name}-{k}.jsonl") for s in stages for k in range(len(s.sources))]
    else:
        sources, outs = [open_source(args.source, args.image_root, args.outside_root)], [Path(args.fix or "")]
    if args.fix:
        check_fix(sources, outs)
    if is_config:
        found = check_run(config, stages, common.counter("records"))
    else:
        found = [("", check(sources[0], common.spec_of_reading(args), common.counter("records")))]
    for name, report in found:
        print(f"{name}: {report.path}\n" * bool(name) + show_report(report))
    bad = {(report.path, problem.index) for _, report in found for problem in report.problems}
    if is_config and len(bad) > config.data.max_bad:
        print(f"training stops after {config.data.max_bad} unusable records (data.max_bad), and there are {len(bad)}")
    if args.json:
        common.write_json(args.json, document(found))
    if args.fix:
        for source, (_, report), out in zip(sources, found, outs):
            write_usable(source, report, out)
            print(f"{out}: {len(report.usable())} usable records; their pictures are in --image-root {source.root}")
    return 1 if bad else 0


def check_fix(sources: list[Any], outs: list[Path]) -> None:
    """Raises before the long part what --fix cannot write."""
    from jaxmllm.data.sources.llava import LlavaSource
    from jaxmllm.errors import ConfigError

    for source, out in zip(sources, outs):
        if not isinstance(source, LlavaSource):
            raise ConfigError(f"--fix: {source.path} is no JSON file; `jaxmllm data convert` writes its usable records")
        if out.suffix != ".jsonl":
            raise ConfigError(f"--fix {out}: the name must end in .jsonl")
        if out.exists():
            raise ConfigError(f"--fix: {out} exists; remove it or choose another name")


def document(found: list[tuple[str, Any]]) -> dict[str, Any]:
    """Reports of sources, each with the name of its stage, as JSON data, with totals."""
    kinds: dict[str, int] = {}
    for _, report in found:
        for kind, count in report.kinds.items():
            kinds[kind] = kinds.get(kind, 0) + count
    totals = {"records": sum(r.records for _, r in found), "bad": sum(r.bad for _, r in found), "kinds": kinds}
    return {**totals, "sources": [{"stage": name or None, **report.document()} for name, report in found]}
