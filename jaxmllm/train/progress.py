"""The progress of a stage on stderr: a bar on a terminal, in a log file one line for each row of metrics."""

from __future__ import annotations

import sys
from typing import TextIO

from tqdm import tqdm

FORMAT = "{desc} {percentage:3.0f}%|{bar:20}| {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"


class Progress:
    """Shows stage, step, loss, rates and the time left, and prints other lines between.

    step: the last step that is done already. speaks: false in all processes but the first, which say nothing.
    """

    def __init__(self, stage: str, steps: int, step: int, speaks: bool = True, file: TextIO | None = None):
        self.stage, self.steps, self.speaks, self.file = stage, steps, speaks, file or sys.stderr
        self.has_bar = speaks and self.file.isatty()
        self.bar = tqdm(
            total=steps,
            initial=step,
            desc=stage,
            file=self.file,
            disable=not self.has_bar,
            dynamic_ncols=True,
            bar_format=FORMAT,
        )

    def first_step(self) -> None:
        """To be called when everything is compiled: time is measured from here on."""
        self.bar.unpause()

    def step(self) -> None:
        """To be called when a step is dispatched."""
        self.bar.update()

    def show(self, step: int, metrics: dict[str, float], speed: dict[str, float]) -> None:
        """Shows a row of metrics. speed: see Reporter.write; also samples_per_s."""
        rates = f"{speed['samples_per_s']:.1f} samples/s"
        if self.has_bar:
            self.bar.set_postfix_str(f"loss {metrics['loss']:.3f}, {rates}, {speed['step_ms']:.0f} ms/step")
            return
        parts = [f"{k} {metrics[k]:.3f}" for k in metrics if k not in ("grad_norm", "learning_rate")]
        left = round((self.steps - step) * speed["step_ms"] / 1e3)
        self.say(
            f"{self.stage} {step}/{self.steps}  {' '.join(parts)}  {rates}  {speed['step_ms']:.0f} ms/step  "
            f"{speed['tokens_per_s']:.0f} tokens/s  {speed['images_per_s']:.0f} images/s  "
            f"wait {speed['data_wait']:.0%}  {tqdm.format_interval(left)} left"
        )

    def say(self, line: str) -> None:
        """Prints a line, above the bar if there is one."""
        if self.has_bar:
            self.bar.write(line, file=self.file)
        elif self.speaks:
            print(line, file=self.file, flush=True)

    def close(self) -> None:
        """Leaves the bar as it is and ends its line."""
        self.bar.close()
