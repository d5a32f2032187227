"""A part that stands where another kind belongs is named, before anything asks it for what it lacks."""

import pytest

from jaxmllm.objectives.next_token import NextToken
from jaxmllm.recipes import load


@pytest.mark.parametrize(
    "field, says",
    [
        ("encoders", "encoders.clip: NextToken cannot stand here, for it has no input"),
        ("fusers", "fusers.clip: NextToken cannot stand here, for it has no output"),
        ("aggregator", "aggregator: NextToken cannot stand here, for it has no layout"),
        ("llm", "llm: NextToken cannot stand here, for it has no embed"),
        ("objectives", "objectives.clip: MMFuser cannot stand here, for it has no needs"),
    ],
)
def test_a_part_of_the_wrong_kind(field, says):
    model = load("configs/toy.py:tiny").model
    wrong = model.fusers["clip"] if field == "objectives" else NextToken()
    value = getattr(model, field)
    with pytest.raises(ValueError) as error:
        model.clone(**{field: {**value, "clip": wrong} if isinstance(value, dict) else wrong})
    assert str(error.value) == says
