"""Scoring: how replies are read, what counts as right, and the references that do not see the picture."""

import pytest

from jaxmllm.eval import benchmark


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
    assert benchmark.parse(reply, ["duck", "dog"]) == letter


def test_captions_are_compared_as_text():
    caption = row("Caption", (), "2 ducks and 1 sled.")
    assert benchmark.is_right(caption, "2 ducks and 1 sled .")
    assert not benchmark.is_right(caption, "1 sled and 2 ducks.")


def test_cv_bench_score_is_the_mean_over_sources():
    rows = [row(source=s) for s in ("ADE20K", "ADE20K", "ADE20K", "COCO", "Omni3D", "Omni3D")]
    found = benchmark.score(rows, [True, True, True, False, True, False])
    assert found["cv_bench"] == 50.0  # 2D: mean of 100 and 0; 3D: 50
    assert found["overall"] == pytest.approx(66.67)


def test_blind_rule_is_learned_from_training_rows_only():
    train = [row(answer="(A)", question="the duck or the dog?"), row(answer="(B)", question="the dog or the duck?")]
    rule = benchmark.blind_rules(train)["Depth"]
    assert rule(row(choices=("cat", "cow"), question="the cow or the cat?")) == "cow"  # the choice that is named first
    names = [row("Name", ("bus", "dog"), answer, "What is it?") for answer in ("(B)", "(B)", "(B)", "(A)")]
    assert benchmark.blind_rules(names)["Name"](row("Name")) in ("dog", "(B)")


def test_a_model_that_does_not_look_is_no_better_shuffled():
    rows = [row(answer=f"({'AB'[i % 2]})", image=str(i), prompt="?") for i in range(40)]
    result = benchmark.evaluate(lambda images, prompts: ["duck"] * len(prompts), rows, rows)
    assert result["heldout"] == result["shuffled"] and result["heldout"]["overall"] == 50.0


def test_bad_row_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"image": "a.jpg"}\n{broken\n')
    with pytest.raises(ValueError, match="rows.jsonl:2"):
        benchmark.read_rows(str(tmp_path / "rows.jsonl"))
