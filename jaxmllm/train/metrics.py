"""What a run reports: its progress, and rows of metrics for the loggers of the config (train/loggers.py)."""

from __future__ import annotations

import time
from typing import Any

import jax

from jaxmllm.config import Run, Stage
from jaxmllm.plan.chips import peak_of
from jaxmllm.plan.flops import model_flops
from jaxmllm.train.cache import from_cache
from jaxmllm.train.checkpoint import StageCheckpoints
from jaxmllm.train.finite import check_metrics
from jaxmllm.train.optim import rate, unreached
from jaxmllm.train.progress import Progress
from jaxmllm.train.state import TrainState

STARTED = time.perf_counter()  # about when the process started
ENOUGH = 10  # steps: gradients get past gates that start at zero only after some of them


class Reporter:
    """Reports the steps of one stage, from `step` on. Only process 0 writes. parts: the rows of a batch are read in
    that many parts, one of them by this process.

    Speed: milliseconds per step; samples, tokens and images per second, of the whole run; the share of the time spent
    waiting for data; where the peak of a device is known, MFU, the share of the peak of all devices that the model's
    FLOPs are, with every row filled as in `jaxmllm bench`.
    """

    def __init__(self, run: Run, stage: Stage, workdir: str, step: int, parts: int):
        self.run, self.stage, self.parts = run, stage, parts
        self.rate = rate(stage.optim, stage.steps)
        self.active = jax.process_index() == 0
        self.progress = Progress(stage.name, stage.steps, step, self.active)
        self.last = step  # the last step that was written
        self.with_images = 0  # steps in which this process had pictures
        self.searched = False
        self.least_seconds: float | None = None  # of a step, at the peak of all devices
        self.window_start = time.perf_counter()
        self.window = dict.fromkeys(("steps", "samples", "tokens", "images", "wait"), 0.0)
        self.loggers = [each.open(workdir, run, stage, step) for each in run.loggers] if self.active else []

    def first_step(self) -> None:
        """To be called when the first step is dispatched: all is compiled, and speed is measured from here on."""
        if self.active and (peak := peak_of(jax.devices()[0].device_kind)):
            try:
                self.least_seconds = sum(model_flops(self.run, self.stage).values()) / peak / jax.device_count()
            except ValueError as error:  # a part of the user's own with a kernel whose work is unknown
                self.say(f"no MFU in the metrics: {error}")
        self.window_start = time.perf_counter()
        self.progress.first_step()
        cached = from_cache()
        self.say(f"first step after {self.window_start - STARTED:.1f} s" + f" ({cached})" * bool(cached))

    def count(self, info: dict[str, Any], wait: float) -> None:
        """Counts a dispatched step: what the loader says about this process's rows, and the seconds waited for them."""
        counted = {
            "steps": 1,
            "samples": self.parts * int((info["sample_ids"] >= 0).sum()),
            "tokens": self.parts * info["tokens"],
            "images": self.parts * info["images"],
            "wait": wait,
        }
        self.with_images += info["images"] > 0
        for key, value in counted.items():
            self.window[key] += value
        self.progress.step()

    def is_due(self, step: int) -> bool:
        """Whether the metrics of a step are still to be written. It depends on nothing but the config and the step."""
        run, last = self.run, self.stage.steps
        return step > self.last and (step in (1, last) or not step % run.log_every or not step % run.save_every)

    def look_for_unreached(self, step: int, state: TrainState) -> None:
        """Names trained parameters that no gradient of the stage has reached.

        Once: at the end of the first log interval, or of the stage, by which ENOUGH steps had pictures.
        """
        interval_ends = step % self.run.log_every == 0 or step == self.stage.steps
        if self.searched or not self.active or not interval_ends or self.with_images < ENOUGH:
            return
        self.searched, paths = True, unreached(state)
        if paths:
            more = f" and {len(paths) - 5} more" if len(paths) > 5 else ""
            self.say(
                f"no gradient has reached: {', '.join(paths[:5])}{more} ({len(paths)} of {len(state.trainable)} "
                "parameters); is the loss that needs them in `losses`? Rule(.., lr=None) freezes them"
            )

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
        if self.least_seconds:
            speed["mfu"] = self.least_seconds * n / seconds
        samples_per_s = self.window["samples"] / seconds
        self.last = step
        self.window_start, self.window = now, dict.fromkeys(self.window, 0.0)
        self.log({**metrics, **speed}, step)
        self.progress.show(step, metrics, {**speed, "samples_per_s": samples_per_s})

    def log(self, row: dict[str, float | None], step: int, task: str | None = None) -> None:
        """Gives all loggers a row: metrics of a training step, or the result of a task."""
        for logger in self.loggers:
            logger.write(row, step, task)

    def say(self, line: str) -> None:
        """Prints a line to stderr, from the first process only."""
        self.progress.say(line)

    def close(self) -> None:
        """Ends the progress and closes the loggers."""
        self.progress.close()
        for logger in self.loggers:
            logger.close()


def report(reporter: Reporter, step: int, metrics: dict[str, jax.Array], checkpoints: StageCheckpoints) -> None:
    """Fetches the metrics of a step (counted from 1) and writes them with the rate that the step used, if it is due.

    Raises FloatingPointError if the loss or the norm of the gradient is not finite.
    """
    values = {k: float(v) for k, v in jax.device_get(metrics).items()}
    check_metrics(values, step, checkpoints)
    if reporter.is_due(step):
        with jax.transfer_guard("allow"):
            values["learning_rate"] = float(reporter.rate(step - 1))
        reporter.write(step, values)
