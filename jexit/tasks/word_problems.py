"""The task `word_problems`: generated arithmetic stories with answers in the format of GSM8K.

A story and its reference completion:

    Tom has 3 apples. Mia gives Tom 4 more. How many apples does Tom have now?
    3+4=7
    #### 7
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from jexit.tasks.base import Draw, Problem, Rewards, Split
from jexit.tasks.number_chain import NumberChain
from jexit.tasks.streams import ProblemStream

NAMES = ("Tom", "Mia", "Sam", "Lea", "Ben", "Ada", "Max", "Eva")
OBJECTS = ("apples", "books", "coins", "pens", "cards", "shells", "stamps", "balls", "eggs", "cups")
BOXES = ("bags", "boxes", "packs", "rows")

_OPERATIONS = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Template:
    """The text of a story with placeholders for names and numbers, and the steps that solve it.

    `ranges` maps the name of each number to its smallest and largest value. In a step such as
    "a+_", an operand is the name of a number, or `_` for the result of the previous step. Results
    are never negative.
    """

    text: str
    ranges: dict[str, tuple[int, int]]
    steps: tuple[str, ...]


TEMPLATES = (
    Template(
        text="{n} has {a} {o}. {m} gives {n} {b} more. How many {o} does {n} have now?",
        ranges={"a": (2, 20), "b": (2, 20)},
        steps=("a+b",),
    ),
    Template(
        text="{n} had {a} {o} and lost {b}. How many {o} are left?",
        ranges={"a": (10, 30), "b": (2, 10)},
        steps=("a-b",),
    ),
    Template(
        text="There are {a} {x} with {b} {o} each. How many {o} are there?",
        ranges={"a": (2, 9), "b": (2, 9)},
        steps=("a*b",),
    ),
    Template(
        text="One of the {o} costs {a} dollars. How much do {b} {o} cost?",
        ranges={"a": (2, 9), "b": (2, 9)},
        steps=("a*b",),
    ),
    Template(
        text="{n} is {a} years old. {m} is {b} years older. How old is {m}?",
        ranges={"a": (3, 30), "b": (2, 15)},
        steps=("a+b",),
    ),
    Template(
        text="{n} has {a} {o}. {m} has {b} fewer. How many {o} do they have together?",
        ranges={"a": (10, 20), "b": (2, 9)},
        steps=("a-b", "a+_"),
    ),
    Template(
        text="{n} has {a} {o} and {m} has {b} times as many. How many do they have together?",
        ranges={"a": (2, 9), "b": (2, 6)},
        steps=("a*b", "a+_"),
    ),
    Template(
        text="{n} buys {a} {x} of {b} {o} and gives away {c}. How many {o} are left?",
        ranges={"a": (3, 9), "b": (3, 9), "c": (2, 8)},
        steps=("a*b", "_-c"),
    ),
    Template(
        text="{n} finds {a} {o} on Monday and {b} on Friday, then sells {c}. How many are left?",
        ranges={"a": (5, 15), "b": (5, 15), "c": (2, 9)},
        steps=("a+b", "_-c"),
    ),
    Template(
        text="{n} has {a} dollars and buys {b} {o} for {c} dollars each. How much is left?",
        ranges={"a": (40, 60), "b": (2, 6), "c": (2, 6)},
        steps=("b*c", "a-_"),
    ),
    Template(
        text="{n} reads {a} pages a day for {b} days and then {c} more. How many pages is that?",
        ranges={"a": (2, 9), "b": (2, 7), "c": (2, 9)},
        steps=("a*b", "_+c"),
    ),
    Template(
        text="{n} had {a} {o}, found {b} and lost {c}. How many now?",
        ranges={"a": (5, 20), "b": (2, 12), "c": (2, 6)},
        steps=("a+b", "_-c"),
    ),
    Template(
        text="{n} buys {a} {x} of {b} {o}, finds {c} and sells {d}. How many now?",
        ranges={"a": (3, 6), "b": (3, 6), "c": (2, 9), "d": (2, 7)},
        steps=("a*b", "_+c", "_-d"),
    ),
    Template(
        text="{n} makes {a} {o} a day for {b} days, {m} makes {c}. How many more than {m}?",
        ranges={"a": (4, 9), "b": (3, 7), "c": (2, 9)},
        steps=("a*b", "_-c"),
    ),
)


class WordProblems(NumberChain):
    """Generated arithmetic stories with one to three operations.

    A completion is in the required format if its last line is `#### n`, where n is a number. The
    template and the numbers of a story decide the split, whatever the names, objects and `seed`.
    """

    name = "word_problems"

    def __init__(self, *, seed: int = 0, rewards: Rewards | None = None) -> None:
        super().__init__(rewards=rewards)
        self._problems = _problems(seed)

    def problem(self, split: Split, index: int) -> Problem:
        return self._problems.at(split, index)

    def follow(
        self, problem: Problem, steps: Sequence[str], number: str
    ) -> tuple[bool, str | None]:
        """Returns (whether the solution can continue, answer) after a change of one result.

        `number` replaces the result of the last of `steps`. The solution cannot continue if a
        result would then be negative. The answer is None if `steps` are not the first steps of the
        reference solution.
        """
        program, numbers = problem.fields["program"], problem.fields["numbers"]
        place = len(steps) - 1
        own, _ = worked(program, numbers)
        if [step.strip() for step in steps] != own[: place + 1]:
            return True, None
        _, results = worked(program, numbers, {place: int(number)})
        return min(results) >= 0, str(results[-1])


task = WordProblems


def worked(
    program: Sequence[str], numbers: Mapping[str, int], given: Mapping[int, int] | None = None
) -> tuple[list[str], list[int]]:
    """Returns (lines, results): each step of a solution as a line such as "3+4=7", and its result.

    `program` contains the steps, such as "a+b", and `numbers` the value of each name in them.
    `given` maps indices of steps to results that replace the computed ones.
    """
    lines, results = [], [0]
    for place, (left, operator, right) in enumerate(program):
        x, y = (results[-1] if side == "_" else numbers[side] for side in (left, right))
        result = (given or {}).get(place, _OPERATIONS[operator](x, y))
        lines.append(f"{x}{operator}{y}={result}")
        results.append(result)
    return lines, results[1:]


@functools.lru_cache(maxsize=8)
def _problems(seed: int) -> ProblemStream[Problem]:
    return ProblemStream("word_problems", seed, _draw_problem, substance)


def substance(problem: Problem) -> str:
    return f"{problem.fields['template']} {problem.fields['numbers']}"


def _draw_problem(draw: Draw) -> Problem:
    template = draw.choice(TEMPLATES)
    first = draw.integer(0, len(NAMES) - 1)
    second = (first + draw.integer(1, len(NAMES) - 1)) % len(NAMES)
    numbers = {name: draw.integer(*limits) for name, limits in template.ranges.items()}
    words = {"n": NAMES[first], "m": NAMES[second]}
    words |= {"o": draw.choice(OBJECTS), "x": draw.choice(BOXES)}
    lines, results = worked(template.steps, numbers)
    return Problem(
        prompt=template.text.format(**words, **numbers),
        answer=str(results[-1]),
        completion="\n".join([*lines, f"#### {results[-1]}"]),
        fields={"template": template.text, "numbers": numbers, "program": template.steps},
    )
