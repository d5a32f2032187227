"""Scoring: how replies are read, what counts as right, and the references that do not see the picture."""

import json

import pytest

from jaxmllm.eval.tasks import choices
from jaxmllm.eval.tasks.cv_bench import CVBench, load, scores
from jaxmllm.eval.tasks.reply_parser import parse


def row(task="Depth", choices=("duck", "dog"), answer="(A)", question="Which is closer, the duck or the dog?", **more):
    return {"task": task, "choices": list(choices), "answer": answer, "question": question, "source": "Composed"} | more


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("(B)", "(B)"),
        ("(b)", "(B)"),
        ("b", "(B)"),
        ("A", "(A)"),
        ("B.", "(B)"),
        ("B) dog", "(B)"),
        ("B. dog\nBecause A is far away", "(B)"),
        ("**B**", "(B)"),
        ("<answer>B</answer>", "(B)"),
        ("$\\boxed{B}$", "(B)"),
        ("\u201cB\u201d", "(B)"),
        ("The answer is (A).", "(A)"),
        ("The answer is B", "(B)"),
        ("Answer: b", "(B)"),
        ("The correct answer is:\nB", "(B)"),
        ("I think it's B", "(B)"),
        ("A, because it is near", "(A)"),
        ("Not (A), it is (B).", "(B)"),
        ("The answer is not A, it is B", "(B)"),
        ("(A) is wrong, so it must be (B)", "(B)"),
        ("Dog.", "(B)"),
        ("duck", "(A)"),
        ("the dog", "(B)"),
        ("A dog is closer.", "(B)"),
        ("The answer is a dog.", "(B)"),
        ("I see the dog", "(B)"),
        ("It isn't the duck, it's the dog", "(B)"),
        ("C", None),
        ("(C)", None),
        ("A or B", None),
        ("A and B", None),
        ("(A) or (B)", None),
        ("The answer is A or B", None),
        ("The answer is not (A)", None),
        ("Ducks swim", None),
        ("Neither", None),
        ("", None),
        ("a duck and a dog", None),
    ],
)
def test_parse(reply, letter):
    assert parse(reply, ["duck", "dog"]) == letter


@pytest.mark.parametrize(
    ("reply", "texts", "letter"),
    [
        ("A", ["B", "A"], "(B)"),  # the text of choice B
        ("A red car", ["blue bus", "red car"], "(B)"),
        ("the red cup", ["cup", "red cup"], "(B)"),
        ("There are 2.", ["1", "2", "12"], "(B)"),
        ("No, there is not", ["yes", "no"], "(B)"),
        ("same", ["same", "same"], None),
        ("I see the cup", ["cup"] + list("pqrstuvwx"), "(A)"),
        ("What?", [], None),
    ],
)
def test_parse_texts(reply, texts, letter):
    assert parse(reply, texts) == letter


def test_unparsed_replies_are_counted_beside_the_score(tmp_path):
    rows = [row(), row(), row("Name", (), "dog")]
    found = scores(rows, ["(A)", "who knows", "cat"])
    assert (found["overall"], found["unparsed"], found["unparsed_by_kind"]) == (
        33.33,
        50.0,
        {"depth": 50.0, "name": None},
    )


def test_captions_are_compared_as_text():
    caption = row("Caption", (), "2 ducks and 1 sled.")
    assert choices.is_right(caption, "2 ducks and 1 sled .")
    assert not choices.is_right(caption, "1 sled and 2 ducks.")


def test_cv_bench_score_is_the_mean_over_sources():
    rows = [row(source=s) for s in ("ADE20K", "ADE20K", "ADE20K", "COCO", "Omni3D", "Omni3D")]
    found = scores(rows, ["(A)", "(A)", "(A)", "(B)", "(A)", "(B)"])
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
    asked = task.asked(task.rows())
    pictures = [r["images"][0] for r in asked]
    assert len(asked) == 80 and sorted(pictures[:40]) == sorted(pictures[40:]) and pictures[:40] != pictures[40:]
    result = task.score(asked, ["duck"] * 80)
    assert result.details["heldout"] == result.details["shuffled"] and result.numbers["accuracy"] == 50.0
    assert result.table.split()[:7] == ["kind", "n", "model", "unparsed", "blind", "shuffled", "unparsed"]
    seeing = task.score(asked, [r["answer"] for r in asked[:40]] + ["(A)"] * 40)
    assert (seeing.numbers["accuracy"], seeing.numbers["shuffled"], seeing.numbers["accuracy/depth"]) == (100, 50, 100)


def test_references_are_left_out_on_demand(tmp_path):
    """CV-Bench has no training rows, and its column of the picture is "filename"."""
    rows = [row(filename=f"img/{i}.jpg", prompt="?") for i in range(3)]
    task = CVBench(write(tmp_path / "rows.jsonl", rows), shuffled=False)
    asked = task.asked(task.rows())
    assert [r["images"] for r in asked] == [[str(tmp_path / f"img/{i}.jpg")] for i in range(3)]
    result = task.score(asked, ["(A)", "(A)", "(B)"])
    assert result.table.splitlines()[0].split() == ["kind", "n", "model", "unparsed"]
    assert set(result.details) == {"heldout", "parser"}


def test_a_kind_that_the_training_rows_lack_has_no_blind_score(tmp_path):
    rows = [row(image="a.jpg", prompt="?"), row("Name", image="a.jpg", prompt="?")]
    task = CVBench(write(tmp_path / "rows.jsonl", rows), write(tmp_path / "train.jsonl", rows[:1]), shuffled=False)
    result = task.score(task.rows(), ["duck", "dog"])
    assert result.details["blind"]["n"] == {"depth": 1}
    assert result.table.splitlines()[2].split() == ["name", "1", "0.0", "0.0", "-"]


GOOD = row(image="a.jpg", prompt="?")


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{broken", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "not a JSON object"),
        (json.dumps(GOOD | {"image": ""}), "no path in 'image' or 'filename'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "image"}), "no path in 'image' or 'filename'"),
        (json.dumps(GOOD | {"image": ["a.jpg", 3]}), "no path in 'image' or 'filename'"),
        (json.dumps(GOOD | {"image": 3}), "no path in 'image' or 'filename'"),
        (json.dumps(GOOD | {"image": "a\0.jpg"}), "no path in 'image' or 'filename'"),
        (json.dumps(GOOD | {"image": "../a.jpg"}), "outside the image root"),
        (json.dumps(GOOD | {"image": ["a.jpg", "/etc/hostname"]}), "leads to /etc/hostname, outside the image root"),
        (json.dumps(GOOD | {"question": "\ud800"}), "half a surrogate pair"),
        (json.dumps(GOOD | {"task": 3}), "no text in 'task'"),
        (json.dumps(GOOD | {"answer": "(C)"}), "'(C)' is none of the letters (A) to (B)"),
        (json.dumps(GOOD | {"answer": 1}), "1 is none of the letters (A) to (B)"),
        (json.dumps(GOOD | {"choices": "duck"}), "no list of texts or numbers"),
        (json.dumps(GOOD | {"choices": [], "answer": True}), "no text or number in 'answer'"),
    ],
)
def test_bad_row_is_named(tmp_path, line, says):
    (tmp_path / "rows.jsonl").write_text(f"\ufeff{json.dumps(GOOD)}\n\n{line}\n \n")
    good, bad = load(str(tmp_path / "rows.jsonl"))
    assert good["answer"] == "(A)"
    assert says in bad["bad"] and bad["place"].endswith("rows.jsonl:3")


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"question": "a\u2028b"}, {"question": "a\u2028b"}),
        ({"image": None}, {"images": []}),
        ({"choices": [], "answer": 3}, {"answer": "3"}),
        ({"choices": [1, 2]}, {"choices": ["1", "2"]}),
    ],
)
def test_unusual_rows_are_good(tmp_path, change, found):
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(GOOD | change, ensure_ascii=False) + "\n")
    assert {k: load(str(path))[0][k] for k in found} == found


def test_pictures_outside_the_folder_need_the_option(tmp_path):
    (tmp_path / "rows").mkdir()
    path = write(tmp_path / "rows" / "rows.jsonl", [GOOD | {"image": "../a.jpg"}])
    assert "outside_root=True" in CVBench(path).rows()[0]["bad"]
    assert CVBench(path, outside_root=True).rows()[0]["images"] == [f"{tmp_path}/rows/../a.jpg"]
    inside = write(tmp_path / "rows.jsonl", [GOOD])
    assert CVBench(inside, image_root=f"{tmp_path}/rows").rows()[0]["images"] == [f"{tmp_path}/rows/a.jpg"]


def test_several_pictures(tmp_path):
    path = write(tmp_path / "rows.jsonl", [GOOD | {"image": ["a.jpg", "b/c.jpg"]}])
    task = CVBench(path)
    question = task.question(task.rows()[0])
    assert question.images == (str(tmp_path / "a.jpg"), str(tmp_path / "b" / "c.jpg"))


def test_rows_without_pictures_are_not_shuffled(tmp_path):
    rows = [GOOD | {"image": None if i % 2 else f"{i}.jpg"} for i in range(10)]
    task = CVBench(write(tmp_path / "rows.jsonl", rows))
    asked = task.asked(task.rows())
    assert [bool(r["images"]) for r in asked[:10]] == [bool(r["images"]) for r in asked[10:]]


class AskedRun:
    """An Answerer that asks no model: a picture whose name has "cut" in it is broken."""

    def __init__(self, run, params, max_new_tokens):
        self.asked = []

    def complaints(self, questions):
        return [f"{q.place}: broken" if any("cut" in name for name in q.images) else None for q in questions]

    def holding(self, params):
        return self

    def ask(self, questions, batch):
        for question in questions:
            self.asked.append(question)
            yield "(A)"


def test_bad_rows_are_left_out_named_and_counted(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("jaxmllm.eval.tasks.base.Answerer", AskedRun)
    rows = [GOOD | {"image": "a.jpg"}, GOOD | {"image": "cut.jpg"}, {"image": "b.jpg"}, GOOD | {"image": "c.jpg"}]
    task, notes = CVBench(write(tmp_path / "rows.jsonl", rows)), []
    measure = task.prepare(None, None, str(tmp_path))
    says = "2 of 4 rows cannot be used: "
    assert says in capsys.readouterr().err
    result = measure({}, notes.append)
    assert (
        result.numbers["bad"] == 2
        and result.numbers["accuracy"] == 100.0
        and sum(result.details["heldout"]["n"].values()) == 2
    )
    assert result.table.splitlines()[-1].startswith(says) and len(result.details["bad_rows"]) == 2
    assert [note["row"].rpartition(":")[2] for note in notes] == ["1", "4", "1 shuffled", "4 shuffled"]


def test_files_without_a_usable_row_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("jaxmllm.eval.tasks.base.Answerer", AskedRun)
    path = write(tmp_path / "bad.jsonl", [{"image": "a.jpg"}] * 9)
    with pytest.raises(ValueError, match=r"9 of 9 rows .*bad.jsonl:1: .*bad.jsonl:3: .*\(and 6 more\)"):
        CVBench(path).prepare(None, None, str(tmp_path))
    with pytest.raises(ValueError, match="no file of rows"):
        CVBench(str(tmp_path / "gone.jsonl")).rows()
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(ValueError, match="has no rows"):
        CVBench(str(tmp_path / "empty.jsonl")).rows()
