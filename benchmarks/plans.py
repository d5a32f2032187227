"""Remakes the table of plans in docs/performance.md: recipes through the TPU compiler. Needs libtpu, minutes a row.

python benchmarks/plans.py [--only WORD]     only rows whose name holds WORD; the others keep their figures
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE, KEPT = ROOT / "docs" / "performance.md", ROOT / "docs" / "plans.json"

# Words of `jaxmllm plan`; each makes one row.
ROWS = [
    ["configs/llama3_8b.py", "--topology", "v5p:4x4x4"],
    ["configs/llama3_8b.py", "--topology", "v6e:8x8"],
    ["configs/llama3_8b.py:long", "--topology", "v5p:4x4x4"],
    ["configs/llama3_8b.py:long", "--topology", "v6e:8x8"],
    ["configs/cambrian_8b.py", "--topology", "v5p:4x4x4", "--stage", "instruct"],
    ["configs/cambrian_8b.py", "--topology", "v6e:8x8", "--stage", "instruct"],
    ["configs/cambrian_8b.py:published", "--topology", "v5p:4x4x4", "--stage", "instruct"],
    # As many rows a chip on 16 and 256 chips, and on two slices.
    ["configs/llama3_8b.py", "--topology", "v5p:2x2x4", "--set", "stages.0.rows=64"],
    ["configs/llama3_8b.py", "--topology", "v5p:4x8x8", "--set", "stages.0.rows=1024"],
    ["configs/llama3_8b.py", "--topology", "v5p:4x4x4", "--slices", "2", "--set", "stages.0.rows=512"],
]
HEAD = """| plan | memory | cycles | exposed | step | MFU | tokens/s/chip | compile |
|---|---|---|---|---|---|---|---|
"""


def measure(words: list[str]) -> dict:
    """The figures of one plan; a setting that does not fit is a result too."""
    out = ROOT / "runs" / "plan.json"
    out.parent.mkdir(exist_ok=True)
    done = subprocess.run([sys.executable, "-m", "jaxmllm.main", "plan", *words, "--json", out], cwd=ROOT)
    if done.returncode not in (0, 1):
        raise SystemExit(done.returncode)
    found = json.loads(out.read_text())
    return {k: v for k, v in found.items() if k != "stages"}


def line(name: str, found: dict) -> str:
    """One row of the table."""
    memory = f"{found['hbm_bytes'] / 2**30:.1f} of {found['hbm_limit_bytes'] / 2**30:.1f} GiB"
    if found["cycles"] is None:
        return f"| `{name}` | {memory}: does not fit | | | | | | {found['compile_seconds']:.0f} s |\n"
    return (
        f"| `{name}` | {memory} | {found['cycles']:.2e} | {found['exposed_collective_seconds'] * 1e3:.0f} ms | "
        f"{found['predicted_step_seconds'] * 1e3:.0f} ms | {found['predicted_mfu']:.1%} | "
        f"{found['tokens_per_second_per_chip']:,.0f} | {found['compile_seconds']:.0f} s |\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", metavar="WORD")
    only = parser.parse_args().only
    kept = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    for words in ROWS:
        name = " ".join(words).replace("configs/", "").replace("--topology ", "")
        if only in name:
            kept[name] = measure(words)
            write(kept)
    write(kept)


def write(kept: dict[str, dict]) -> None:
    """Keeps the figures and makes the page's table of them."""
    KEPT.write_text(json.dumps(kept, indent=1) + "\n")
    table = HEAD + "".join(line(name, found) for name, found in kept.items())
    before, _, rest = PAGE.read_text().partition("<!-- plans -->\n")
    after = rest.partition("<!-- end of plans -->")[2]
    PAGE.write_text(f"{before}<!-- plans -->\n{table}<!-- end of plans -->{after}")


if __name__ == "__main__":
    main()
