"""What a run reports: a progress line, WORKDIR/metrics.jsonl and TensorBoard."""

from __future__ import annotations

import json
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

from jaxmllm.train.cache import from_cache

STARTED = time.perf_counter()  # about when the process started


class Reporter:
    """Reports the steps of one stage. Only the `active` process writes. parts: the rows of a batch are read in that
    many parts, one of them by this process.

    The line of a step: losses, milliseconds per step, tokens and images per second (of the whole run), share of the
    time spent waiting for data, time left.
    """

    def __init__(self, workdir: str, stage: str, steps: int, active: bool, parts: int):
        self.stage, self.steps, self.active, self.parts = stage, steps, active, parts
        self.terminal = sys.stderr.isatty()
        self.last: int | None = None  # the last step that was written
        self.window_start = time.perf_counter()
        self.window = dict.fromkeys(("steps", "tokens", "images", "wait"), 0.0)
        if active:
            self.file = open(Path(workdir) / "metrics.jsonl", "a")
            self.board = SummaryWriter(str(Path(workdir) / "tensorboard" / stage), flush_secs=10)

    def first_step(self) -> None:
        """To be called when the first step is dispatched: all is compiled, and speed is measured from here on."""
        self.window_start = time.perf_counter()
        cached = from_cache()
        self.say(f"first step after {self.window_start - STARTED:.1f} s" + f" ({cached})" * bool(cached))

    def count(self, info: dict[str, Any], wait: float) -> None:
        """Counts a dispatched step: what the loader says about this process's rows, and the seconds waited for them."""
        counted = {
            "steps": 1,
            "tokens": self.parts * info["tokens"],
            "images": self.parts * info["images"],
            "wait": wait,
        }
        for key, value in counted.items():
            self.window[key] += value

    def write(self, step: int, metrics: dict[str, float]) -> None:
        """Writes the metrics of `step` and the speed since the last call."""
        now = time.perf_counter()
        seconds, n = max(now - self.window_start, 1e-9), max(self.window["steps"], 1)
        speed = {
            "step_ms": 1e3 * seconds / n,
            "tokens_per_s": self.window["tokens"] / seconds,
            "images_per_s": self.window["images"] / seconds,
            "data_wait": self.window["wait"] / seconds,
        }
        self.last = step
        self.window_start, self.window = now, dict.fromkeys(self.window, 0.0)
        if not self.active:
            return
        row = {"stage": self.stage, "step": step, **metrics, **speed}
        self.file.write(json.dumps(row) + "\n")
        self.file.flush()
        for key, value in {**metrics, **speed}.items():
            self.board.add_scalar(key, value, step)
        left = (self.steps - step) * speed["step_ms"] / 1e3
        bar = "#" * round(20 * step / self.steps)
        parts = [f"{k} {metrics[k]:.3f}" for k in metrics if k not in ("grad_norm", "learning_rate")]
        self.say(
            f"{self.stage} [{bar:<20}] {step}/{self.steps}  {' '.join(parts)}  {speed['step_ms']:.0f} ms/step  "
            f"{speed['tokens_per_s']:.0f} tok/s  {speed['images_per_s']:.0f} img/s  wait {speed['data_wait']:.0%}  "
            f"eta {int(left) // 60}:{int(left) % 60:02d}",
            replace=True,
        )

    def say(self, line: str, replace: bool = False) -> None:
        """Prints a line to stderr; with `replace`, on a terminal, the next line overwrites it."""
        if self.active:
            end = "\r" if replace and self.terminal else "\n"
            if self.terminal:
                line = "\x1b[2K" + line[: shutil.get_terminal_size().columns - 1]
            print(line, end=end, file=sys.stderr, flush=True)

    def close(self) -> None:
        """Ends the progress line and closes the files."""
        if self.active:
            if self.terminal:
                print(file=sys.stderr)
            self.file.close()
            self.board.close()
