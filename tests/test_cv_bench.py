"""Scoring: how replies are read, what counts as right, and the references that do not see the picture."""

import json
import re

import pytest

from jaxmllm.eval.tasks import choices
from jaxmllm.eval.tasks.cv_bench import CVBench, scores


def row(task="Depth", choices=("duck", "dog"), answer="(A)", question="Which is closer, the duck or the dog?", **more):
    return {"task": task, "choices": list(choices), "answer": answer, "question": question, "source": "Composed"} | more


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("(B)", "(B)"),
        ("The answer is (A).", "(A)"),
        ("Dog.", "(B)"),
        ("duck", "(A)"),
        ("B", "(B)"),
        ("B.", "(B)"),
        ("Ducks swim", None),
        ("", None),
        ("a duck and a dog", None),
    ],
)
def test_parse(reply, letter):
    assert choices.parse(reply, ["duck", "dog"]) == letter


def test_captions_are_compared_as_text():
    caption = row("Caption", (), "2 ducks and 1 sled.")
    assert choices.is_right(caption, "2 ducks and 1 sled .")
    assert not choices.is_right(caption, "1 sled and 2 ducks.")


def test_cv_bench_score_is_the_mean_over_sources():
    rows = [row(source=s) for s in ("ADE20K", "ADE20K", "ADE20K", "COCO", "Omni3D", "Omni3D")]
    found = scores(rows, [True, True, True, False, True, False])
    assert found["cv_bench"] == 50.0  # 2D: mean of 100 and 0; 3D: 50
    assert found["overall"] == pytest.approx(66.67)


def test_blind_rule_is_learned_from_training_rows_only():
    train = [row(answer="(A)", question="the duck or the dog?"), row(answer="(B)", question="the dog or the duck?")]
    rule = choices.blind_rules(train)["Depth"]
    assert rule(row(choices=("cat", "cow"), question="the cow or the cat?")) == "cow"  # the choice that is named first
    names = [row("Name", ("bus", "dog"), answer, "What is it?") for answer in ("(B)", "(B)", "(B)", "(A)")]
    assert choices.blind_rules(names)["Name"](row("Name")) in ("dog", "(B)")


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_a_model_that_does_not_look_is_no_better_shuffled(tmp_path):
    rows = [row(answer=f"({'AB'[i % 2]})", image=f"{i}.jpg", prompt="?") for i in range(40)]
    task = CVBench(write(tmp_path / "rows.jsonl", rows), write(tmp_path / "train.jsonl", rows))
    asked = task.rows()
    assert len(asked) == 80 and {r["image"] for r in asked[:40]} == {r["image"] for r in asked[40:]}
    assert [r["image"] for r in asked[:40]] != [r["image"] for r in asked[40:]]
    result = task.score(asked, ["duck"] * 80)
    assert result.details["heldout"] == result.details["shuffled"] and result.numbers["accuracy"] == 50.0
    assert result.table.split()[:5] == ["kind", "n", "model", "blind", "shuffled"]
    seeing = task.score(asked, [r["answer"] for r in asked[:40]] + ["(A)"] * 40)
    assert (seeing.numbers["accuracy"], seeing.numbers["shuffled"], seeing.numbers["accuracy/depth"]) == (100, 50, 100)


def test_references_are_left_out_on_demand(tmp_path):
    """CV-Bench has no training rows, and its column of the picture is "filename"."""
    rows = [row(filename=f"img/{i}.jpg", prompt="?") for i in range(3)]
    task = CVBench(write(tmp_path / "rows.jsonl", rows), shuffled=False)
    asked = task.rows()
    assert [r["image"] for r in asked] == [str(tmp_path / f"img/{i}.jpg") for i in range(3)]
    result = task.score(asked, ["(A)", "(A)", "(B)"])
    assert result.table.splitlines()[0].split() == ["kind", "n", "model"] and set(result.details) == {"heldout"}


GOOD = row(image="a.jpg", prompt="?")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps(GOOD | {"image": None}), "no path in 'image' or 'filename'"),
        (json.dumps(GOOD | {"task": 3}), "no text in 'task'"),
        (json.dumps(GOOD | {"answer": "(C)"}), "'(C)' is none of the letters (A) to (B)"),
        (json.dumps(GOOD | {"choices": "duck"}), "no list of texts"),
    ],
)
def test_bad_row_is_named(tmp_path, line, says):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(GOOD)}\n\n{line}\n")
    with pytest.raises(ValueError, match=re.escape(says)) as error:
        CVBench(str(tmp_path / "rows.jsonl")).rows()
    assert "1 of 2 rows cannot be used: " in str(error.value) and "rows.jsonl:3: " in str(error.value)


def test_many_bad_rows_are_counted_and_missing_training_rows_named(tmp_path):
    path = write(tmp_path / "bad.jsonl", [{"image": "a.jpg"}] * 9)
    with pytest.raises(ValueError, match=r"9 of 9 rows .*bad.jsonl:1: .*bad.jsonl:3: .*\(and 6 more\)"):
        CVBench(path).rows()
    rows = write(tmp_path / "rows.jsonl", [GOOD])
    with pytest.raises(ValueError, match="other.jsonl has no row of the task 'Depth'"):
        CVBench(rows, write(tmp_path / "other.jsonl", [GOOD | {"task": "Count"}])).rows()
    with pytest.raises(ValueError, match="no file of rows"):
        CVBench(str(tmp_path / "gone.jsonl")).rows()
