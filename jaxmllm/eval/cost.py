"""What a run has cost so far."""

from __future__ import annotations

from jaxmllm.json_lines import read_lines


def training_cost(workdir: str) -> dict[str, float]:
    """{"train_seconds", "steps"} of all stages, from the metrics of a workdir."""
    seconds, steps, last_step = 0.0, 0, {}
    for row in read_lines(f"{workdir}/metrics.jsonl"):
        if "eval" not in row:
            n = row["step"] - last_step.get(row["stage"], 0)
            seconds, steps = seconds + n * row["step_ms"] / 1e3, steps + n
            last_step[row["stage"]] = row["step"]
    return {"train_seconds": round(seconds, 1), "steps": steps}
