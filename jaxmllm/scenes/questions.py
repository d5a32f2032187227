"""Questions with exact answers about composed scenes.

Kinds and wording follow common spatial benchmarks, in as few words as possible:

    Count     How many ducks are there?                              2
    Relation  Is the duck left or right of the dog?                  left
    Depth     Which is closer, the duck or the dog?                  dog
    Distance  Which is closer to the duck, the dog or the crab?      crab
    Name      What is this?                                          duck
    Exist     Is there a duck?                                       yes
    Caption   Describe the image.                                    2 ducks, 1 crab and 1 dog.

A caption counts every noun: the most numerous first, equal counts in alphabetical order.
"""

from collections import Counter
from collections.abc import Sequence
from itertools import combinations, permutations
from typing import NamedTuple

import numpy as np

from jaxmllm.scenes.compose import Scene, Thing, apart, nearer_of, plurals

# The question that a scene of each kind is composed for.
TASK_OF = {
    "count": "Count",
    "relation": "Relation",
    "depth": "Depth",
    "distance": "Distance",
    "single": "Name",
}


class Question(NamedTuple):
    """One question: its task, its text, its exact answer, the possible choices, and the nouns it names."""

    task: str
    text: str
    answer: str
    choices: tuple[str, ...]
    nouns: tuple[str, ...]


def caption(scene: Scene) -> Question:
    """What the image shows, in one sentence."""
    counts = Counter(thing.noun for thing in scene.objects)
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    parts = [f"{count} {noun if count == 1 else plurals()[noun]}" for noun, count in ordered]
    sentence = ", ".join(parts[:-1]) + " and " + parts[-1] if len(parts) > 1 else parts[0]
    return Question("Caption", "Describe the image.", sentence + ".", (), tuple(counts))


def exist(noun: str, present: bool) -> Question:
    """A question whether there is an object of a noun."""
    answer = "yes" if present else "no"
    return Question("Exist", f"Is there {_with_article(noun)}?", answer, ("yes", "no"), (noun,))


def main_questions(rng: np.random.Generator, scene: Scene, nouns: Sequence[str]) -> list[Question]:
    """The questions that a scene was composed for, in random order, at least one of them of the scene's own kind.

    A distance scene also gets a relation question; no answer follows from another. Wrong choices come from `nouns`.
    """
    things = [scene.objects[i] for i in rng.permutation(len(scene.objects))]
    match scene.kind:
        case "single":
            return [_name(rng, things[0].noun, nouns)]
        case "count":
            # There are one to four objects of each of the first two nouns; the third noun is a distractor.
            counts = Counter(thing.noun for thing in scene.objects)
            asked = [_how_many(noun, counts[noun]) for noun in list(counts)[:2]]
        case "relation":
            asked = _relations(things[:2])
        case "depth":
            asked = [_which_is_closer(*things[:2])]
        case "distance":
            anchor, first, second = next(order for order in permutations(things) if nearer_of(*order))
            relations = [q for pair in combinations(things, 2) for q in _relations(pair)]
            asked = [_which_is_nearer(anchor, first, second), relations[rng.integers(len(relations))]]
    return [asked[i] for i in rng.permutation(len(asked))]


def conversation(rng: np.random.Generator, scene: Scene, nouns: Sequence[str]) -> list[Question]:
    """One to four questions for one training example; no earlier question or answer gives a later answer away.

    Whether an object exists is asked with "yes" and "no" equally likely: either twice, independently, before the
    questions that name the scene's objects, or once, at any place among them, about an object that none of them names.
    The only exception is an image of a single object: once its name has been asked, it is clear what exists.
    """
    present = sorted({thing.noun for thing in scene.objects})
    absent = [noun for noun in nouns if noun not in present]
    asked = main_questions(rng, scene, nouns)
    if scene.kind == "single":
        yes, no = exist(present[0], True), exist(_one_of(rng, absent), False)
        if rng.integers(2):
            return [*asked, *((yes, no) if rng.integers(2) else (no, yes))]
        return [yes] if rng.integers(2) else [no, *asked]

    unnamed = [noun for noun in present if all(noun not in question.nouns for question in asked)]
    if (unnamed or len(asked) > 1) and rng.integers(2):
        if unnamed:
            asked.insert(int(rng.integers(len(asked) + 1)), _exist_or_not(rng, unnamed, absent))
        return asked
    first = _exist_or_not(rng, present, absent)
    second = _exist_or_not(rng, *([noun for noun in side if noun not in first.nouns] for side in (present, absent)))
    return [first, second, *asked]


def heldout_questions(
    rng: np.random.Generator, turn: int, offset: int, scene: Scene, nouns: Sequence[str]
) -> list[Question]:
    """One question of the scene's own kind; every third time also an `Exist` question and the caption.

    turn: how often the kinds of scenes have been repeated before this scene; offset: the place of its kind among them.
    Both kinds of "exist" answers are equally frequent among the scenes of each kind.
    """
    questions = [next(q for q in main_questions(rng, scene, nouns) if q.task == TASK_OF[scene.kind])]
    if turn % 3 == 0:
        present = sorted({thing.noun for thing in scene.objects})
        answer = (turn // 3 + offset) % 2 == 0
        noun = _one_of(rng, present if answer else [noun for noun in nouns if noun not in present])
        questions += [exist(noun, answer), caption(scene)]
    return questions


def _exist_or_not(rng: np.random.Generator, present: Sequence[str], absent: Sequence[str]) -> Question:
    answer = bool(rng.integers(2))
    return exist(_one_of(rng, present if answer else absent), answer)


def _name(rng: np.random.Generator, noun: str, nouns: Sequence[str]) -> Question:
    others = [other for other in nouns if other != noun]
    wrong = [others[i] for i in rng.choice(len(others), 3, replace=False)]
    return Question("Name", "What is this?", noun, (noun, *wrong), (noun,))


def _how_many(noun: str, count: int) -> Question:
    # The choices are always the whole range, so that they reveal nothing about the answer.
    return Question("Count", f"How many {plurals()[noun]} are there?", str(count), tuple("1234"), (noun,))


def _relations(pair: Sequence[Thing]) -> list[Question]:
    """A question for each axis (0 across, 1 down) along which the boxes of the two objects do not overlap."""
    a, b = pair
    words = (("left", "right", "left or right of"), ("above", "below", "above or below"))
    questions = []
    for axis in (0, 1):
        if apart(a.box, b.box, axis):
            before, after, wording = words[axis]
            answer = before if a.box[axis] < b.box[axis] else after
            text = f"Is the {a.noun} {wording} the {b.noun}?"
            questions.append(Question("Relation", text, answer, (before, after), (a.noun, b.noun)))
    return questions


def _which_is_closer(a: Thing, b: Thing) -> Question:
    text = f"Which is closer, the {a.noun} or the {b.noun}?"
    return Question("Depth", text, (a if a.depth > b.depth else b).noun, (a.noun, b.noun), (a.noun, b.noun))


def _which_is_nearer(anchor: Thing, a: Thing, b: Thing) -> Question:
    text = f"Which is closer to the {anchor.noun}, the {a.noun} or the {b.noun}?"
    nouns = (anchor.noun, a.noun, b.noun)
    return Question("Distance", text, nearer_of(anchor, a, b).noun, (a.noun, b.noun), nouns)


def _one_of(rng: np.random.Generator, items: Sequence[str]) -> str:
    return items[int(rng.integers(len(items)))]


def _with_article(noun: str) -> str:
    vowel = noun[0].lower() in "aeiou" and noun not in ("UFO", "unicorn") or noun == "hourglass"
    return f"{'an' if vowel else 'a'} {noun}"
