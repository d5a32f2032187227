"""Updates the table of plans in docs/performance.md with the TPU compiler. Needs libtpu and minutes per row.

    python benchmarks/plans.py [--only TEXT]     only rows whose name contains TEXT; the others keep their figures

The figures are kept in docs/plans.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, KEPT = ROOT / "docs" / "performance.md", ROOT / "docs" / "plans.json"

# Arguments of `jaxmllm plan`, one list per row of the table.
ROWS = [
    ["configs/llama3_8b.py", "--topology", "v5p:4x4x4"],
    ["configs/llama3_8b.py", "--topology", "v6e:8x8"],
    ["configs/llama3_8b.py:long", "--topology", "v5p:4x4x4"],
    ["configs/llama3_8b.py:long", "--topology", "v6e:8x8"],
    ["configs/cambrian_8b.py", "--topology", "v5p:4x4x4", "--stage", "instruct"],
    ["configs/cambrian_8b.py", "--topology", "v6e:8x8", "--stage", "instruct"],
    ["configs/cambrian_8b.py:published", "--topology", "v5p:4x4x4", "--stage", "instruct"],
    # Four chips, with adapters
    ["configs/cambrian_8b.py:lora", "--topology", "v6e:2x2", "--stage", "instruct"],
    # The same number of rows per chip on 16 and 256 chips, and on two slices.
    ["configs/llama3_8b.py", "--topology", "v5p:2x2x4", "--set", "stages.0.rows=64"],
    ["configs/llama3_8b.py", "--topology", "v5p:4x8x8", "--set", "stages.0.rows=1024"],
    ["configs/llama3_8b.py", "--topology", "v5p:4x4x4", "--slices", "2", "--set", "stages.0.rows=512"],
]
HEAD = """| plan | memory of a chip | cycles | exposed time | step time | MFU | tokens/s per chip | compile time |
|---|---|---|---|---|---|---|---|
"""


def measure(args: list[str]) -> dict:
    """The figures of one plan, also of one that does not fit."""
    out = ROOT / "runs" / "plan.json"
    out.parent.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "jaxmllm", "plan", *args, "--json", out], cwd=ROOT)
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    figures = json.loads(out.read_text())
    return {k: v for k, v in figures.items() if k != "stages"}


def table_row(name: str, figures: dict) -> str:
    """One row of the table."""
    memory = f"{figures['hbm_bytes'] / 2**30:.1f} of {figures['hbm_limit_bytes'] / 2**30:.1f} GiB"
    if figures["cycles"] is None:
        return f"| `{name}` | {memory}: does not fit | | | | | | {figures['compile_seconds']:.0f} s |\n"
    return (
        f"| `{name}` | {memory} | {figures['cycles']:.2e} | {figures['exposed_collective_seconds'] * 1e3:.0f} ms | "
        f"{figures['predicted_step_seconds'] * 1e3:.0f} ms | {figures['predicted_mfu']:.1%} | "
        f"{figures['tokens_per_second_per_chip']:,.0f} | {figures['compile_seconds']:.0f} s |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="TEXT", help="rows whose name contains TEXT")
    only = parser.parse_args().only
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for args in ROWS:
        name = " ".join(args).replace("configs/", "").replace("--topology ", "")
        if only in name:
            kept[name] = measure(args)
            write(kept)
    write(kept)


def write(kept: dict[str, dict]) -> None:
    """Saves the figures and writes the table of the page from them."""
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    table = HEAD + "".join(table_row(name, figures) for name, figures in kept.items())
    before, _, rest = PAGE.read_text().partition("<!-- plans -->\n")
    after = rest.partition("<!-- end of plans -->")[2]
    PAGE.write_text(f"{before}<!-- plans -->\n{table}<!-- end of plans -->{after}")


if __name__ == "__main__":
    main()
