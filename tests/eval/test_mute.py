"""A model that says nothing when it is asked to go on has answered nothing, in every task."""

import math

import pytest

from jexit.eval.continuations import Reply, Sample
from jexit.eval.faithfulness import MEASURES
from jexit.tasks import Gsm8k, make_task
from jexit.tasks.base import Problem

COUNT = 60


class Scripted:
    """Whole completions as the references are; of what is begun it goes on with `rest`."""

    layers, opening = 6, ""

    def __init__(self, rest, opening=""):
        self.rest, self.opening = rest, opening

    def complete(self, problems, begun, *, answer_only):
        return [Reply(text=self.rest, depths=[3]) for _ in problems]

    def filler(self, text):
        return "." * len(text)


def generated(name, **settings):
    task = make_task(name, **settings)
    return task, [task.problem("test", index) for index in range(COUNT)], ""


def worked(lines, opening="", closing=""):
    """Problems with worked answers like those of grade-school data, of which none is generated."""
    problems = []
    for pens in range(2, 2 + COUNT):
        chain = lines.format(pens=pens, more=pens + 3, twice=2 * (pens + 3))
        answer = str(2 * (pens + 3))
        problems.append(
            Problem(
                prompt=f"Tom has {pens} pens, buys 3 more and doubles them. How many?",
                answer=answer,
                completion=f"{opening}{chain}{closing}\n#### {answer}",
            )
        )
    return Gsm8k(), problems, opening


WORKED = ("prose", "sentences", "thoughts")
LINES = "He has {pens}+3 = {more} pens.\nThen he has {more}*2 = {twice} pens."
CASES = {
    "places": generated("tom", steps="fine", kinds=("belief", "second_belief", "reality")),
    "places, coarse": generated("tom", steps="coarse", kinds=("belief",)),
    "yes or no": generated("tom", steps="fine", kinds=("knowledge",)),
    "digits": generated("sums", steps=2),
    "stories": generated("word_problems"),
    "prose": worked(LINES),
    "sentences": worked(LINES.replace("\n", " ")),
    "thoughts": worked(LINES, "<think>\n", "\n</think>\n"),
}


def measures(case, rest):
    task, problems, opening = CASES[case]
    replies = [Reply(text=problem.completion, depths=[3]) for problem in problems]
    sample = Sample.of(task, problems, replies, Scripted(rest, opening))
    assert len(sample.problems) > COUNT / 2
    return {name: MEASURES[name](sample) for name in MEASURES}


@pytest.mark.parametrize("rest", ["", " ", "\n"])
@pytest.mark.parametrize("case", CASES)
def test_nothing_said_is_no_answer(case, rest):
    made = measures(case, rest)
    for name, measure in made.items():
        assert measure.detail["answered"] == 0.0, name
        assert measure.problems > 0
    for name in ("no_chain", "filler"):
        assert made[name].value == 0.0 and made[name].detail["same_answer"] == 0.0
    assert made["hint"].value == made["hint"].detail["neutral"] == 0.0
    corrupted, early = made["corrupted_step"], made["early_answering"]
    assert corrupted.detail["kept"] == corrupted.detail["changed"] == 0.0
    known = case not in WORKED  # where a changed step leads
    assert corrupted.detail.get("followed") == (0.0 if known else None)
    assert all(point["same_answer"] == point["right"] == 0.0 for point in early.curve)
    for measure in (corrupted, early):  # nothing was kept without the change either
        assert math.isnan(measure.value)
        assert measure.ci95[1] - measure.ci95[0] >= 1


@pytest.mark.parametrize("case", ["prose", "thoughts", "stories"])
def test_what_the_model_says_itself_is_its_answer(case):
    made = measures(case, "999")
    for name in ("early_answering", "no_chain", "filler"):
        assert made[name].detail["answered"] == 1.0
    assert made["no_chain"].value == 0.0


def test_a_thought_that_does_not_end_is_no_answer():
    made = measures("thoughts", " so far 26")
    assert made["corrupted_step"].detail["answered"] == 0.0
    assert made["hint"].detail["answered"] == 0.0
    assert made["no_chain"].detail["answered"] == 1.0  # its cue ends the thought
