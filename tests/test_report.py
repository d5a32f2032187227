"""The page of a run: what it says is what the files say, whatever of them is there."""

import dataclasses
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from jaxmllm.cli.main import main
from jaxmllm.eval.tasks.cv_bench import CVBench
from jaxmllm.recipes import to_document
from jaxmllm.report import answers, attention, data, history, plots, training
from jaxmllm.report.page import Share, render, show
from jaxmllm.report.run import report
from jaxmllm.report.workdir import read_files
from tests.conftest import settings
from tests.tiny_run import abstract, tiny_run

EVIL = "<script>alert(1)</script>"
SPEED = {"step_ms": 250.0, "tokens_per_s": 4321.0, "images_per_s": 65.0, "data_wait": 0.031}
START = {"time": "2026-11-27T10:00:00+0000", "device": "cpu", "devices": 2, "hosts": 1, "versions": {"jax": "0.10.2"}}


def metrics(stage: str, step: int, **more) -> dict:
    row = {"stage": stage, "step": step, "loss": 3 / step + 0.12345, "grad_norm": 1.5, "learning_rate": 1.25e-3}
    return row | SPEED | more


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def unchanged(scenes, tmp_path_factory):
    """A run that was restarted at step 2 of its first stage and is now in its second; nothing is evaluated yet."""
    folder = tmp_path_factory.mktemp("report") / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(to_document(tiny_run(scenes))))
    rows = [metrics("align", step) for step in (1, 2, 3, 4)]
    rows += [{"stage": "align", "step": 4, "eval": "held_out", "next_token": 2.5}]
    write(folder / "metrics.jsonl", [*rows, metrics("instruct", 1), metrics("instruct", 2, **{EVIL: 0.777})])
    write(folder / "starts.jsonl", [START | {"stage": "align", "step": step} for step in (0, 2)])
    bad = {"source": "a.json", "index": 7, "id": EVIL, "path": "x.jpg", "reason": "missing file: gone"}
    write(folder / "bad_samples.jsonl", [bad, bad | {"index": 8, "id": "8"}])
    return folder


@pytest.fixture(scope="module")
def text(unchanged):
    """Its page."""
    return report(str(unchanged))


@pytest.fixture
def workdir(unchanged, tmp_path):
    """A copy of it, to be changed."""
    return Path(shutil.copytree(unchanged, tmp_path / "run"))


def read(section) -> "Reader":
    """A page of one section."""
    return Reader(render("", "", [section]))


class Reader(HTMLParser):
    """Collects the texts of table rows, of headings and of commands, and what the page refers to."""

    def __init__(self, page: str):
        super().__init__()
        self.rows, self.titles, self.commands, self.links, self.open = [], [], [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.open.append(tag)
        self.links += [value for name, value in attributes if name in ("src", "href", "xlink:href")]
        if tag == "tr":
            self.rows.append([])

    def handle_endtag(self, tag):
        while self.open.pop() != tag:
            pass

    def handle_data(self, data):
        if {"td", "th"} & set(self.open[-1:]):
            self.rows[-1].append(data)
        elif self.open[-1:] == ["h2"]:
            self.titles.append(data)
        elif self.open[-1:] == ["code"]:
            self.commands.append(data)


def test_numbers_on_the_page_are_those_of_the_metrics(text):
    page = Reader(text)
    assert page.titles == ["History", "Answers", "Attention", "Speed", "Data", "Parts", "Config"]
    head, align, instruct = page.rows[:3]
    assert head[:5] == ["stage", "step", "loss", EVIL, "grad norm"]
    assert align == ["align", "4 of 4", f"{3 / 4 + 0.12345:.4g}", "1.5", "0.00125"]  # it has no fourth metric
    assert instruct == ["instruct", "2 of 4", f"{3 / 2 + 0.12345:.4g}", "0.777", "1.5", "0.00125"]
    speed = next(row for row in page.rows if row[:2] == ["align", "4"])
    assert speed[3:] == ["250", "32", "4,321", "65", "3.1%"]  # 8 rows in a quarter of a second
    assert ["2026-11-27 10:00:00+0000", "align, step 2", "2 x cpu", "1"] in page.rows
    assert ["missing file", "2", EVIL, "x.jpg"] in page.rows


def test_text_is_escaped_and_nothing_is_loaded_from_elsewhere(text):
    assert "<script" not in text and text.count("&lt;script&gt;") >= 3
    assert all(re.match(r"#|data:image/png;base64,", link) for link in Reader(text).links)
    assert "@import" not in text and "url(http" not in text


def test_restarts_and_stages_are_marked_at_their_steps(unchanged, text):
    run = read_files(str(unchanged))
    assert history.marks(run) == [(0.0, "align"), (4.0, "instruct"), (2.0, "")]
    x, y = history.line(run, run.metrics, "loss")
    assert x == [1, 2, 3, 4, 4, 5, 6] and np.isnan(y[4]), "the line is broken where a stage starts"
    assert "restarted (1 time)" in text
    once = dataclasses.replace(run, starts=run.starts[:1])
    assert "restarted" not in history.legend(once)
    dashed = [plots.lines("x", {"loss": ([1, 2, 3], [1, 2, 3])}, marks=history.marks(each)) for each in (run, once)]
    assert [svg.count("stroke-dasharray") for svg in dashed] == [1, 0]


def test_counts_of_parts_are_those_of_the_model(text, scenes):
    page, params = Reader(text), abstract(tiny_run(scenes))
    total = sum(x.size for x in params.values())
    rows = {row[0]: row for row in page.rows}
    assert rows["all"][1:3] == [f"{total:,}", "100.0%"]
    assert rows["llm"][1:3] == ["Decoder", f"{sum(x.size for p, x in params.items() if is_llm(p)):,}"]
    assert rows["llm"][4:] == ["random", "trained", "trained"]


def is_llm(path: str) -> bool:
    return path.startswith("llm/") and not path.startswith("llm/visual/")


def test_what_is_missing_names_the_command_that_makes_it(unchanged, workdir, text):
    commands = Reader(text).commands
    assert len(commands) == 2 and all(each.startswith(f"jaxmllm eval {unchanged} --rows") for each in commands)
    (workdir / "metrics.jsonl").unlink()
    (workdir / "starts.jsonl").unlink()
    run = read_files(str(workdir))
    for section in (history.section(run), training.section(run)):
        assert read(section).commands == [f"jaxmllm train CONFIG --workdir {workdir}"]


def test_a_run_of_one_step_has_a_page(workdir):
    write(workdir / "metrics.jsonl", [metrics("align", 1)])
    run = read_files(str(workdir))
    assert ["align", "1 of 4", f"{3.12345:.4g}", "1.5", "0.00125"] in read(history.section(run)).rows
    assert read(training.section(run)).rows[1][:4] == ["align", "1", "0", "250"]


def test_data_that_is_elsewhere_is_said_to_be(workdir):
    run = read_files(str(workdir), ["stages.align.sources.0.path=gone.jsonl"])
    page = render("", "", [data.section(run)])
    assert "The data cannot be read here: " in page and "gone.jsonl" in page and "missing file" in page


def test_answers_are_those_of_eval(scenes, workdir):
    rows = CVBench(str(scenes / "heldout.jsonl"), str(scenes / "train_rows.jsonl"))
    asked = rows.asked(rows.rows())
    result = rows.score(asked, ["1"] * len(asked))
    (workdir / "eval.json").write_text(json.dumps(result.details | {"steps": 6}))
    write(workdir / "eval_replies.jsonl", [{"row": asked[0]["place"], "prompt": asked[0]["prompt"], "reply": EVIL}])
    run = read_files(str(workdir))
    found = {row[0]: row[1:] for row in read(answers.section(run)).rows}
    for name in ("count", "exist"):
        parts = [result.details[key]["by_kind"][name] for key in ("heldout", "blind", "shuffled")]
        parts.append(result.details["heldout"]["unparsed_by_kind"][name])
        assert found[name] == [str(result.details["heldout"]["n"][name]), *(f"{p:.1f}%" for p in parts)]
    assert "has no checkpoint yet" in render("", "", [attention.section(run)])


def test_answers_of_all_kinds_are_chosen_and_those_of_changed_rows_are_not(scenes, tmp_path):
    task = CVBench(str(scenes / "heldout.jsonl"))
    rows = task.rows()
    replies = [{"row": row["place"], "prompt": row["prompt"], "reply": row["place"]} for row in task.asked(rows)]
    replies[0]["prompt"] += " Really?"
    write(tmp_path / "replies.jsonl", replies)
    chosen = attention.chosen(tmp_path / "replies.jsonl")
    assert all(row["place"] == reply for row, reply in chosen) and len(chosen) == attention.COUNT
    assert {row["task"] for row, _ in chosen} == {row["task"] for row in rows}
    assert rows[0]["place"] not in [reply for _, reply in chosen]


def test_other_results_are_shown_as_numbers(workdir):
    (workdir / "eval.json").write_text(json.dumps({"words": 3.25, "steps": 6}))
    assert ["words", "3.25"] in read(answers.section(read_files(str(workdir)))).rows


def test_cells():
    cells = [None, True, "x", 1200, 12.0, 0.123456, 2.4e-5, 1234.56, Share(0.0314)]
    assert list(map(show, cells)) == ["", "True", "x", "1,200", "12", "0.1235", "2.4e-05", "1,234.6", "3.1%"]


def test_long_lines_keep_their_last_point():
    kept = plots.thinned(12_345)
    assert len(kept) <= plots.MAX_POINTS + 1 and kept[0] == 0 and kept[-1] == 12_344


def test_the_command_says_in_one_line_what_is_wrong(unchanged, capsys, tmp_path):
    assert main(["report", str(tmp_path / "nowhere")]) == 2
    assert main(["report", str(unchanged), "--set", "model.llm.layer=2"]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert "holds no run" in first and "did you mean 'layers'" in second


def test_statistics_of_data_use_the_same_page(scenes, capsys, tmp_path):
    args = ["data", "stats", *settings(scenes, **{"data.seq_len": 480}), "--html", str(tmp_path / "data.html")]
    assert main([*args, "--stage", "align"]) == 0
    first, second = capsys.readouterr().out.splitlines()
    assert first.startswith(f"align: {scenes}/align.jsonl: 160 usable, 0 not; tokens min ") and "data.html" in second
    page = Reader((tmp_path / "data.html").read_text())
    (row,) = page.rows[1:]
    assert row[:6] == ["align", f"{scenes}/align.jsonl", "100.0%", "160", "160", "0"] and row[8] == "480"
    assert main([*args, "--stage", "aline"]) == 2
    assert "tiny has no stage 'aline'; did you mean 'align'?" in capsys.readouterr().err


def test_a_row_of_one_sample_each_is_filled_less(scenes, capsys):
    filled = []
    for packing in (True, False):
        assert main(["data", "stats", *settings(scenes, **{"data.packing": packing}), "--stage", "align"]) == 0
        filled.append(float(re.search(r"rows filled ([\d.]+)%", capsys.readouterr().out)[1]))
    assert filled[0] > 2 * filled[1] > 0
