"""The progress of a stage: a bar on a terminal, plain lines elsewhere."""

import io

import pytest

from jaxmllm.train.progress import Progress

METRICS = {"loss": 3.25, "next_token": 3.0, "grad_norm": 1.0, "learning_rate": 1e-3}
SPEED = {"samples_per_s": 93.8, "step_ms": 128.0, "tokens_per_s": 4500.0, "images_per_s": 90.0, "data_wait": 0.015}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(file, **changes) -> str:
    """What a stage of 1,000 steps that goes on from step 400 prints."""
    progress = Progress("align", 1000, 400, file=file, **changes)
    progress.first_step()
    for _ in range(10):
        progress.step()
    progress.show(410, METRICS, SPEED)
    progress.say("held_out  loss 2.5")
    progress.close()
    return file.getvalue()


def test_a_log_file_gets_whole_lines():
    assert shown(io.StringIO()) == (
        "align 410/1000  loss 3.250 next_token 3.000  93.8 samples/s  128 ms/step  4500 tokens/s  90 images/s  "
        "wait 2%  01:16 left\nheld_out  loss 2.5\n"
    )


def test_a_terminal_gets_a_bar():
    text = shown(Terminal())
    bars = [part for part in text.replace("\n", "\r").split("\r") if "|" in part]
    assert bars[0].startswith("align  40%|########  ") and " 400/1000 [" in bars[0]
    assert bars[-1].startswith("align  41%|") and " 410/1000 [" in bars[-1]
    assert bars[-1].rstrip().endswith(", loss 3.250, 93.8 samples/s, 128 ms/step]")
    assert "<" in bars[-1] and "\rheld_out  loss 2.5\n" in text and text.endswith("\n")


@pytest.mark.parametrize("file", [io.StringIO(), Terminal()])
def test_other_processes_say_nothing(file):
    assert shown(file, speaks=False) == ""
