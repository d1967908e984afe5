"""The base class of tasks with numeric answers, which splits and edits chains of thought."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Iterator, Sequence

from jexit.errors import UserError
from jexit.tasks import answers
from jexit.tasks.base import Draw, Problem, Verdict
from jexit.tasks.chains import ChainTask, Corruption

# The end is before the line break, which then belongs to the next step. Any prefix of steps can
# therefore continue with the cue, which starts with its own line break.
_LINE_END = re.compile(r"(?<=\S)(?=[ \t]*\n)")
_SENTENCE_END = re.compile(r"(?<=[.!?])(?=\s+\S)")

# Short enough for whole numbers to be exact and quick.
_DIGITS = r"[0-9]{1,15}(?:,[0-9]{3}){0,5}(?:\.[0-9]{1,15})?"
_LITERAL = re.compile(_DIGITS)
# The number after an equals sign is a result, unless an operator and another operand follow.
_RESULT = re.compile(rf"= ?\$?-?({_DIGITS})(?![0-9/]|[.,][0-9])(?! ?[-+*/×÷=] ?[$(0-9])")

# Two numbers with a sign between them are a whole side of an equation if no sign is before them
# and, for a result, none is after it.
_FIRST = r"(?<![-+*/×÷x()=%0-9.,$])(?<![-+*/×÷x()=%] )"
_LAST = r"(?![0-9/]|[.,][0-9])(?! ?[-+*/×÷x=%] ?[$(0-9])"
_COMMUTES = re.compile(rf"{_FIRST}({_DIGITS})( ?[+*×] ?)({_DIGITS})(?= ?=)")
_EQUATION = re.compile(rf"{_FIRST}({_DIGITS}) ?([-+*/×÷x]) ?({_DIGITS}) ?= ?({_DIGITS}){_LAST}")
_OPERATIONS = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "×": operator.mul,
    "x": operator.mul, "/": operator.truediv, "÷": operator.truediv,
}  # fmt: skip

_OFFSETS = (-10, -3, -2, -1, 1, 2, 3, 10)


class NumberChain(ChainTask):
    """A task with numeric answers; its steps are lines, or sentences if there is only one line."""

    cue = "\n#### "

    def verify(self, problem: Problem, completion: str) -> Verdict:
        return self.verdict(answers.judge(completion, problem.answer))

    def steps(self, completion: str) -> list[str]:
        chain = answers.chain_of_thought(completion)
        if not chain:
            return []
        steps = answers.with_think_start(_LINE_END.split(chain))
        return _SENTENCE_END.split(chain) if len(steps) == 1 else steps

    def final_answer(self, completion: str) -> str | None:
        number = answers.final_number(completion)
        return None if number is None else str(number)

    def answer_mark(self, text: str) -> tuple[int, int] | None:
        return answers.answer_mark(text)

    def corrupted(self, problem: Problem, completion: str, draw: Draw) -> Corruption | None:
        """Returns `completion` up to a random step whose result is replaced by a nearby number.

        Returns None if no result can be replaced.
        """
        steps, given = self.steps(completion), self.final_answer(completion)
        places = [place for place, step in enumerate(steps) if result_of(step) is not None]
        while places:
            place = places.pop(draw.integer(0, len(places) - 1))
            before, literal = "".join(steps[:place]), result_of(steps[place])
            assert literal is not None
            for number in nearby_numbers(literal, draw):
                possible, answer = self.follow(problem, steps[: place + 1], number)
                if possible and (answer is None or answer != given):
                    return Corruption(
                        prefix=before + with_result(steps[place], number),
                        answer=answer,
                        step=place,
                    )
        return None

    def follow(
        self, problem: Problem, steps: Sequence[str], number: str
    ) -> tuple[bool, str | None]:
        """Returns (whether the chain can continue, answer) for a chain with one changed result.

        `number` replaces the result of the last of `steps`. The answer is that of a correct
        continuation, or None if the task cannot compute it. By default, returns (True, None).
        """
        return True, None

    def reworded(self, completion: str) -> str | None:
        """Returns the chain with the operands of sums and products exchanged; None if unchanged."""
        chain = "".join(self.steps(completion))
        changed = _COMMUTES.sub(r"\3\2\1", chain)
        return changed if changed != chain else None

    def answer_follows(self, completion: str) -> bool:
        """Returns whether the last step has a result, which is the answer, and all equations hold.

        Only equations of two operands count, such as 3+4=7. Results may be off by 0.01, or by 0.5
        after a division.
        """
        steps = self.steps(completion)
        result = result_of(steps[-1]) if steps else None
        if result is None or self.final_answer(self.cue + result) != self.final_answer(completion):
            return False
        return all(map(_holds, _EQUATION.findall("\n".join(steps))))

    def wrong_answer(self, problem: Problem, draw: Draw) -> str:
        match = _LITERAL.search(problem.answer)
        if match is None:
            raise UserError(
                f"the answer {problem.answer!r} does not contain a number that could be changed; "
                "give problems whose answers are numbers"
            )
        before, after = problem.answer[: match.start()], problem.answer[match.end() :]
        others = (before + number + after for number in nearby_numbers(match.group(), draw))
        # Some are not answers, such as 2/2 near the fraction 1/2.
        return next((other for other in others if answers.parse_number(other) is not None), "0")


def result_of(step: str) -> str | None:
    """Returns the last result in `step`, as it is written but without a sign.

    A result is a number after `=`, unless an operator and another operand follow. Returns None if
    there is none.

    >>> result_of("He has 3+4 = 7 pens.")
    '7'
    """
    found = _RESULT.findall(step)
    return found[-1] if found else None


def with_result(step: str, number: str) -> str:
    """Returns `step` with its result, and later repetitions of the result, replaced by `number`.

    `step` must have a result (see `result_of`).

    >>> with_result("3+4 = 7, so 7 pens.", "8")
    '3+4 = 8, so 8 pens.'
    """
    match = list(_RESULT.finditer(step))[-1]
    same = rf"(?<![0-9.,]){re.escape(match.group(1))}(?![0-9]|[.,][0-9])"
    return step[: match.start(1)] + re.sub(same, number, step[match.start(1) :])


def _holds(equation: tuple[str, str, str, str]) -> bool:
    left, sign, right, result = equation
    a, b, c = (float(number.replace(",", "")) for number in (left, right, result))
    divides = sign in "/÷"
    if divides and b == 0:
        return False
    return math.isclose(_OPERATIONS[sign](a, b), c, abs_tol=0.5 if divides else 0.01)


def nearby_numbers(literal: str, draw: Draw) -> Iterator[str]:
    """Yields the non-negative numbers that differ from `literal` by 1, 2, 3 or 10.

    The numbers have the format of `literal` and come in random order.
    """
    whole, point, decimals = literal.partition(".")
    value, separator = int(whole.replace(",", "")), "," if "," in whole else ""
    for offset in draw.sample(_OFFSETS, len(_OFFSETS)):
        if value + offset >= 0:
            yield f"{value + offset:{separator}}{point}{decimals}"
