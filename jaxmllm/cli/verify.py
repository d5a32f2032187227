"""`jaxmllm verify`"""

from __future__ import annotations

import argparse

from jaxmllm.cli import common


def add(commands) -> None:
    text = "say whether two models are the same: outputs, next-token distributions, parameters"
    parser = common.add_command(commands, "verify", run, text, "jaxmllm verify runs/mine transformers:exported/mine")
    where = "a workdir, a folder of `jaxmllm export`, of Hugging Face or in a released layout, or transformers:FOLDER"
    parser.add_argument("a", metavar="A", help=where)
    parser.add_argument("b", metavar="B")
    parser.add_argument("--kl", type=float, default=3e-7, help="largest KL divergence, in nats (default: 3e-7)")
    parser.add_argument("--top1", type=float, default=1.0, help="smallest share of equal top tokens (default: 1)")
    parser.add_argument("--mesh", nargs="+", default=[], metavar="AXIS=SIZE", help="mesh of our models")
    common.add_own_parts(parser)
    common.add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prints how two models differ; exit code 1 if they differ by more than the bounds."""
    import dataclasses

    from jaxmllm.eval.verify import verify
    from jaxmllm.mesh import Mesh
    from jaxmllm.recipes import override

    found = verify(args.a, args.b, mesh=override(Mesh(), args.mesh), config=args.config)
    equal = found.equal(args.kl, args.top1)
    print(found)
    print("equal" if equal else f"not equal: bounds are KL {args.kl:g} and {args.top1:.2%} of top tokens")
    if args.json:
        common.write_json(args.json, dataclasses.asdict(found) | {"equal": equal})
    return 0 if equal else 1
