"""60 faults among 500 good records: checking, converting and training name the same ones; the command's options."""

import collections
import json
from functools import partial

import pytest

from jaxmllm.batch import EncoderInput, TokenLayout, VisualLayout
from jaxmllm.cli.main import main
from jaxmllm.config import Source
from jaxmllm.data.check import check, examine, show_report, write_usable
from jaxmllm.data.ledger import Ledger
from jaxmllm.data.loader import Loader
from jaxmllm.data.samples import SampleSpec
from jaxmllm.data.sources.array_record import ArrayRecordSource, convert
from jaxmllm.data.sources.llava import LlavaSource
from jaxmllm.data.targets import MapTargets
from jaxmllm.data.templates import TOY
from jaxmllm.data.tokenizer import train_word_tokenizer
from jaxmllm.errors import ConfigError
from tests.conftest import settings
from tests.loader_case import ids_of
from tests.planted import BAD, GOOD, faults, write_planted
from tests.records import WORDS, chat, write_jsonl

NEEDS_CONFIG = {"too long", "too many pictures"}  # these depend on the lengths of a row


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    """A source, and index -> kind of its bad records."""
    path, kinds = write_planted(tmp_path_factory.mktemp("planted"))
    assert len(kinds) == BAD and {kind for kind, _ in faults()} == set(kinds.values())
    return LlavaSource(path), kinds


@pytest.fixture(scope="module")
def spec(tmp_path_factory):
    layout = VisualLayout({"a": EncoderInput(16, 4, (0, 0, 0))}, TokenLayout(grid=4), 0)
    tokenizer = train_word_tokenizer([WORDS], tmp_path_factory.mktemp("words"))
    return SampleSpec(tokenizer, TOY, layout, seq_len=64, image_slots=2, targets=MapTargets(4))


@pytest.fixture(scope="module")
def report(planted, spec):
    return check(planted[0], spec)


def one_epoch(source, spec, ledger: Ledger, shards: int = 1) -> list[int]:
    """The ids of the samples of an epoch's batches."""
    rows = 5
    with Loader([(source, 1.0)], spec, ledger, rows=rows, num_shards=shards, packing=False) as loader:
        batches = [next(loader) for _ in range(GOOD // rows)]
        next(loader)  # of the next epoch, so that the bad records at the end of the first have been met
    return ids_of(batches)


def test_checking_converting_and_training_name_the_same_records(planted, spec, report, tmp_path):
    source, kinds = planted
    assert {problem.index: problem.bad.kind for problem in report.problems} == kinds
    checked = [(problem.index, problem.bad.id, problem.bad.path, problem.bad.reason) for problem in report.problems]
    ledger = Ledger(tmp_path / "bad.jsonl")
    good = [index for index in range(GOOD + BAD) if index not in kinds]
    assert report.usable() == good
    assert sorted(one_epoch(source, spec, ledger)) == good  # each exactly once
    lines = [json.loads(line) for line in open(ledger.path)]
    assert sorted((line["index"], line["id"], line["path"], line["reason"]) for line in lines) == checked
    left_out = convert(source, str(tmp_path / "shards"), 3, examine=partial(examine, spec=spec))
    assert [(bad.id, bad.path, bad.reason) for bad in left_out] == [row[1:] for row in checked]
    shards = ArrayRecordSource(tmp_path / "shards")
    assert len(shards) == GOOD and not check(shards, spec).problems
    assert sorted(one_epoch(shards, spec, Ledger(tmp_path / "none.jsonl"))) == [*range(GOOD)]
    assert not (tmp_path / "none.jsonl").exists()


def test_a_source_without_a_config(planted, report, tmp_path):
    """What depends on no lengths is found with the same words, by the two commands."""
    source, kinds = planted
    alone = check(source)
    expected = [problem for problem in report.problems if problem.bad.kind not in NEEDS_CONFIG]
    words = lambda problems: [(problem.index, str(problem.bad)) for problem in problems]
    assert words(alone.problems) == words(expected)
    left_out = convert(source, str(tmp_path / "shards"), 3, examine=examine)
    assert [str(bad) for bad in left_out] == [str(problem.bad) for problem in expected]


def test_answers_before_the_first_question_are_counted(tmp_path):
    opening = [{"from": "gpt", "value": "Hello"}]
    turns = [chat("Why ?", "So ."), [*opening, *chat("Why ?", "So .")], [*opening, *chat("Why ?", "")]]
    path = write_jsonl(tmp_path / "chats.jsonl", [{"id": str(i), "conversations": t} for i, t in enumerate(turns)])
    found = check(LlavaSource(path))
    assert (found.bad, found.opening_answers, found.document()["opening_answers"]) == (1, 1, 1)
    assert "1 begin with an answer, which is left out" in show_report(found)


def test_the_usable_records(planted, report, spec, tmp_path):
    source, _ = planted
    write_usable(source, report, tmp_path / "ok.jsonl")
    fixed = LlavaSource(tmp_path / "ok.jsonl", source.root)
    assert [fixed[k].data for k in range(len(fixed))] == [source[k].data for k in report.usable()]
    # Without bad records an epoch trains each once, in several virtual shards too; `check` would find none.
    assert sorted(one_epoch(fixed, spec, Ledger(tmp_path / "none.jsonl"), shards=5)) == [*range(GOOD)]
    assert not (tmp_path / "none.jsonl").exists()
    with pytest.raises(FileExistsError, match="ok.jsonl exists"):
        write_usable(source, report, tmp_path / "ok.jsonl")


def test_totals_by_source_and_kind(report):
    document = json.loads(json.dumps(report.document()))
    assert document["records"] == GOOD + BAD and document["bad"] == BAD
    kinds = collections.Counter(problem["kind"] for problem in document["problems"])
    assert document["kinds"] == kinds
    totals = collections.Counter()
    for entry in document["by_source"].values():
        totals.update(entry["kinds"])
    assert totals == kinds and sum(entry["records"] for entry in document["by_source"].values()) == GOOD + BAD
    assert set(document["by_source"]) == {"a", "b", ""}  # a line that is not JSON has no source


def test_an_error_of_the_program_names_the_record(planted, monkeypatch):
    source, kinds = planted
    index = next(k for k in range(len(source)) if k not in kinds)
    monkeypatch.setattr("jaxmllm.data.check.exchanges", lambda *_: 1 / 0)
    with pytest.raises(RuntimeError, match=f"examining record {index} of .* failed: ZeroDivisionError"):
        check(source)


def run(capsys, *args) -> tuple[int, str, str]:
    code = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return code, out, err


def test_the_command_checks_a_source(planted, report, tmp_path, capsys):
    source, kinds = planted
    code, out, _ = run(
        capsys, "data", "check", source.path, "--json", tmp_path / "r.json", "--fix", tmp_path / "ok.jsonl"
    )
    assert code == 1
    few = sum(kind in NEEDS_CONFIG for kind in kinds.values())
    assert out.startswith(f"{GOOD + BAD} records, ") and f"{BAD - few} records unusable" in out
    assert f"ok.jsonl: {GOOD + few} usable records; their pictures are in --image-root {source.root}" in out
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["bad"] == BAD - few and document["sources"][0]["path"] == source.path
    code, out, _ = run(capsys, "data", "check", tmp_path / "ok.jsonl", "--image-root", source.root)
    assert code == 0 and ", 0 records unusable" in out


def test_the_command_checks_a_config(scenes, tmp_path, capsys):
    """Every source of every stage, as it is trained; one stage; one other source as a stage reads it."""
    paths = {}
    for name in ("align", "instruct"):
        records = [json.loads(line) for line in (scenes / f"{name}.jsonl").read_text().splitlines()[:8]]
        for record in records:
            record |= {key: str(scenes / record[key]) for key in ("image", "depth", "instances")}
        if name == "align":
            records[3]["conversations"] = chat("<image> " + "how many ? " * 200, "one")
        paths[name] = write_jsonl(tmp_path / f"{name}.jsonl", records)
    values = {}
    for source, name in (("align.sources.0", "align"), ("instruct.sources.0", "instruct")):
        values |= {f"stages.{source}.path": paths[name], f"stages.{source}.outside_root": True}
    values |= {"stages.instruct.sources.1.path": paths["instruct"], "stages.instruct.sources.1.outside_root": True}
    config, *options = settings(scenes, **values)
    code, out, _ = run(
        capsys, "data", "check", config, *options, "--json", tmp_path / "r.json", "--fix", tmp_path / "ok"
    )
    assert code == 1
    document = json.loads((tmp_path / "r.json").read_text())
    assert [(s["stage"], s["bad"]) for s in document["sources"]] == [("align", 1), ("instruct", 0), ("instruct", 0)]
    assert (
        document["kinds"] == {"too long": 1}
        and "align: " in out
        and "1 too long; the first: sample train-000003" in out
    )
    assert len((tmp_path / "ok" / "align-0.jsonl").read_text().splitlines()) == 7
    assert run(capsys, "data", "check", config, "--stage", "instruct", *options)[0] == 0
    arguments = ["--config", config, "--stage", "align", *options, "stages.align.data.seq_len=2000"]
    assert run(capsys, "data", "check", paths["align"], "--outside-root", *arguments)[0] == 0
    code, _, err = run(
        capsys, "data", "convert", paths["align"], tmp_path / "s", "--shards", 2, "--outside-root", *arguments[:-1]
    )
    assert code == 0 and "left out: sample train-000003" in err and "too long" in err
    code, out, _ = run(capsys, "data", "check", config, *options, "data.max_bad=0")
    assert "training stops after 0 unusable records (data.max_bad), and there are 1" in out


@pytest.mark.parametrize(
    "arguments, says",
    [(["x.jsonl", "--stage", "align"], "--stage and --set need a config"),
     (["configs/toy.py:tiny", "--image-root", "x"], "are for a source; a config names its own"),
     (["x.jsonl", "--fix", "ok.json"], "must end in .jsonl"),
     (["x.jsonl", "--fix", "x.jsonl"], "x.jsonl exists"),
     (["configs/toy.py:tiny", "--stage", "alin"], "did you mean 'align'")],
)  # fmt: skip
def test_wrong_options_of_check(tmp_path, capsys, monkeypatch, arguments, says):
    write_jsonl(tmp_path / "x.jsonl", [{"conversations": chat("a", "one")}])
    arguments = [str(tmp_path / name) if name.endswith((".json", ".jsonl")) else name for name in arguments]
    code, _, err = run(capsys, "data", "check", *arguments)
    assert code == 2 and says in err and err.count("\n") == 1


def test_convert_of_nothing_fails(tmp_path, capsys):
    path = write_jsonl(
        tmp_path / "x.jsonl", [{"image": f"{k}.png", "conversations": chat("<image> a", "b")} for k in (1, 2)]
    )
    code, _, err = run(capsys, "data", "convert", path, tmp_path / "out", "--shards", 1)
    assert code == 1 and "jaxmllm: none of the 2 records can be used; nothing is written" in err
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("weight", ["0", "-1.5"])
def test_weights_are_checked_in_the_config(scenes, capsys, weight):
    code, _, err = run(capsys, "data", "check", *settings(scenes), f"stages.instruct.sources.1.weight={weight}")
    assert code == 2 and f"is {float(weight)}; it must be positive and finite" in err and err.count("\n") == 1


@pytest.mark.parametrize("weight", [0.0, -1, float("nan"), float("inf")])
def test_a_source_with_another_weight_is_refused(weight):
    with pytest.raises(ConfigError, match=f"the weight of x.jsonl is {weight}; it must be positive and finite"):
        Source("x.jsonl", weight=weight)
