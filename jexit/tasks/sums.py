"""The task `sums`: sums of digits modulo 10, which show how much reasoning a model writes out.

A completion replaces the first k operands of the list by the last digit of their sum, again and
again, and prints each new list. With small steps, most of the additions are written out. With large
steps, the model performs more of the additions in its hidden layers:

    sum 37295184   ->  +0295184++15184+6184+784++9####9

A step that adds k operands starts with k − 1 plus signs. The new list follows, and its first digit
is the result of the step. When one digit is left, `####` and this digit follow. The prompt `sum by
3 ...` prescribes k = 3, and `sum at once ...` requests the answer without a chain of steps.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence

from jexit.tasks.base import Attempt, Draw, Problem, Rewards, Split, Verdict
from jexit.tasks.chains import ChainTask, Corruption
from jexit.tasks.options import MIXTURE, check_range, check_steps
from jexit.tasks.streams import ProblemStream

MIN_STEP, MAX_STEP = 2, 5
STEP_MODES = ("free", "at_once", "mixed", *range(MIN_STEP, MAX_STEP + 1))

_STRICT = re.compile(r"####([0-9])\Z")
_LENIENT = re.compile(r"(?<![0-9])([0-9])[\s.]*\Z")
_STEP = re.compile(r"(\++)([0-9]*)")
_PIECE = re.compile(r"\+*[^+]+|\++")
_DIGITS = "0123456789"


class Sums(ChainTask):
    """A task of summing single digits modulo 10, in steps that the model writes out.

    `steps` is `free` (the model chooses the steps), 2 to 5 (the prescribed number of operands per
    step), `at_once` (the answer without steps), or `mixed` (each problem draws free, prescribed or
    no steps, with the probabilities in `MIXTURE`). The reference completion of a free problem draws
    a largest size g from 2 to 5, and then the size of each step from 2 to g. A problem has
    `operands_min` to `operands_max` operands. The operands alone decide its split, whatever the
    `seed`.
    """

    name = "sums"
    cue = "####"
    begun_sizes = tuple(range(MIN_STEP, MAX_STEP + 1))
    granularities = tuple(map(str, begun_sizes))

    def __init__(
        self,
        *,
        steps: str | int = "free",
        operands_min: int = 3,
        operands_max: int = 8,
        seed: int = 0,
        rewards: Rewards | None = None,
    ) -> None:
        super().__init__(rewards=rewards)
        if isinstance(steps, str) and steps.isdecimal():  # "3" from a command line
            steps = int(steps)
        check_steps(self.name, steps, STEP_MODES)
        self.mode = steps
        self.operands = check_range(self.name, "operands", operands_min, operands_max, 2, 100)
        self.seed = seed
        self._digits = _digits(seed, self.operands)

    def problem(self, split: Split, index: int) -> Problem:
        digits = self._digits.at(split, index)
        draw = Draw("sums steps", self.seed, split, index)
        mode, step = draw.weighted(MIXTURE) if self.mode == "mixed" else self.mode, None
        if mode == "at_once":
            words, steps = "sum at once", []
        elif mode == "free":
            largest = draw.integer(MIN_STEP, MAX_STEP)
            words = "sum"
            steps = _reducing(len(digits), lambda left: draw.integer(MIN_STEP, min(largest, left)))
        else:
            step = draw.integer(MIN_STEP, MAX_STEP) if mode == "prescribed" else int(mode)
            mode, words = "prescribed", f"sum by {step}"
            steps = prescribed_steps(len(digits), step)
        chain, answer = reduce_by(digits, steps)
        return Problem(
            prompt=f"{words} {digits}",
            answer=answer,
            completion=f"{chain}####{answer}",
            fields={"operands": digits, "mode": mode, "step": step},
        )

    def text_totals(
        self, problems: Sequence[Problem], attempts: Sequence[Attempt]
    ) -> dict[str, tuple[float, int]]:
        """Returns (sum, count) for each of four metrics of the steps in the completions.

        `written_out` is the fraction of additions that are written out, Σ written_reductions / Σ
        (operands − 1). `step_size` is the mean number of operands that a step reduces. The jump
        from a list to the answer counts as a step, but a repetition of the list does not.
        `steps_correct` is the fraction of steps whose result follows from the list before them.
        `as_announced` is the fraction of written steps whose plus signs agree with their size.
        """
        written_out = additions = 0
        steps = []
        for problem, attempt in zip(problems, attempts, strict=True):
            operands = problem.fields["operands"]
            read = chain_steps(operands, attempt.text)
            written_out += written_reductions(operands, read)
            additions += len(operands) - 1
            steps += read
        sizes = [step.size for step in steps if step.size >= MIN_STEP]
        written = [step for step in steps if step.announced is not None]
        return {
            "step_size": (sum(sizes), len(sizes)),
            "steps_correct": (sum(step.correct for step in steps), len(steps)),
            "written_out": (written_out, additions),
            "as_announced": (sum(s.announced == s.size for s in written), len(written)),
        }

    def verify(self, problem: Problem, completion: str) -> Verdict:
        found = self.final_answer(completion)
        if found is None:
            return self.verdict("none")
        if found != problem.answer:
            return self.verdict("wrong")
        return self.verdict("strict" if _STRICT.search(completion) else "lenient")

    def steps(self, completion: str) -> list[str]:
        return _PIECE.findall(completion.partition(self.cue)[0])

    def obeys(self, problem: Problem, completion: str) -> bool:
        """Returns whether all steps have the prescribed sizes, or True if none are prescribed."""
        operands, mode = problem.fields["operands"], problem.fields["mode"]
        if mode == "free":
            return True
        sizes = [len(operands)]  # at once
        if mode == "prescribed":
            sizes = prescribed_steps(len(operands), problem.fields["step"])
        return step_sizes(operands, completion) == sizes

    def begun_step(self, problem: Problem, size: int) -> str | None:
        return "+" * (size - 1) if size <= len(problem.fields["operands"]) else None

    def first_result(self, problem: Problem, completion: str) -> tuple[int, bool]:
        match = _STEP.match(completion)
        if match is None or not match[2]:
            return 0, False
        size, operands = len(match[1]) + 1, problem.fields["operands"]
        return size, size <= len(operands) and match[2][0] == digit_sum(operands[:size])

    def answer_follows(self, completion: str) -> bool:
        """Returns whether each step after the first is correct and the last step gives the answer.

        The first step is not checked, because that would require the operands of the problem.
        """
        steps = chain_steps("", completion)
        if not steps or steps[0].announced is None:  # no list was written
            return False
        rest, answer = steps[1:], self.final_answer(completion)
        return (rest or steps)[-1].wrote == answer and all(step.correct for step in rest)

    def final_answer(self, completion: str) -> str | None:
        return _given_answer(completion)

    def corrupted(self, problem: Problem, completion: str, draw: Draw) -> Corruption | None:
        """Returns `completion` up to a random step whose result (a list's first digit) is changed.

        Returns None if no result can be changed.
        """
        steps, given = self.steps(completion), self.final_answer(completion)
        places = [n for n, step in enumerate(steps) if _STEP.fullmatch(step) and step[-1] != "+"]
        if not places:
            return None
        place = draw.choice(places)
        signs, wrote = _STEP.findall(steps[place])[0]
        # Neither the step's own digit, nor one that leads to the completion's answer.
        others = [digit + wrote[1:] for digit in _DIGITS if digit != wrote[0]]
        changed = draw.choice([other for other in others if digit_sum(other) != given])
        prefix = "".join(steps[:place]) + signs + changed
        return Corruption(prefix=prefix, answer=digit_sum(changed), step=place)

    def wrong_answer(self, problem: Problem, draw: Draw) -> str:
        return draw.choice([digit for digit in _DIGITS if digit != problem.answer])


task = Sums


@functools.lru_cache(maxsize=8)  # shared by tasks that differ in `steps` only
def _digits(seed: int, operands: tuple[int, int]) -> ProblemStream[str]:
    def draw_digits(draw: Draw) -> str:
        return "".join(str(draw.integer(0, 9)) for _ in range(draw.integer(*operands)))

    return ProblemStream("sums", seed, draw_digits, str)


def prescribed_steps(count: int, step: int) -> list[int]:
    """Returns step sizes that reduce `count` operands to one.

    Each size is `step`, or the number of operands left if it is smaller.
    """
    return _reducing(count, lambda left: min(step, left))


def _reducing(count: int, size: Callable[[int], int]) -> list[int]:
    steps = []
    while count > 1:
        steps.append(size(count))
        count -= steps[-1] - 1
    return steps


def digit_sum(digits: str) -> str:
    return str(sum(map(int, digits)) % 10)


def reduce_by(digits: str, steps: Sequence[int]) -> tuple[str, str]:
    """Returns (chain, answer), where the chain reduces `digits` by steps of the given sizes.

    >>> reduce_by("372", [2, 2])
    ('+02+2', '2')
    """
    chain, current = [], digits
    for step in steps:
        current = digit_sum(current[:step]) + current[step:]
        chain.append("+" * (step - 1) + current)
    return "".join(chain), digit_sum(current)


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainStep:
    """One step of a completion, from the list of digits `given` to the list `wrote`.

    `given` is the list as the completion wrote it, correct or not. `announced` is the size that the
    plus signs state. In a jump from a list to the answer, `wrote` is the answer and `announced` is
    None. `size` is the number of operands reduced; below 2, the step reduces nothing.
    """

    given: str
    wrote: str
    announced: int | None

    @property
    def size(self) -> int:
        return len(self.given) - len(self.wrote) + 1

    @property
    def correct(self) -> bool:
        if not self.wrote or self.size < MIN_STEP:
            return False
        return self.wrote == digit_sum(self.given[: self.size]) + self.given[self.size :]


def step_sizes(operands: str, completion: str) -> list[int]:
    """Returns the number of operands that each step of `completion` reduces.

    The jump from a list to the answer counts as a step. `operands` is the problem's list of digits.

    >>> step_sizes("37295184", "+0295184++15184+++1####1")
    [2, 3, 5]
    >>> step_sizes("37295", "+0295####6")
    [2, 4]
    """
    return [step.size for step in chain_steps(operands, completion)]


def chain_steps(operands: str, completion: str) -> list[ChainStep]:
    """Returns the steps of a completion, each together with the list written just before it.

    `operands` is the list before the first step. A mistake makes only one step wrong, because each
    later step is judged by the list that the completion wrote. Plus signs without a list are not a
    step. If the completion answers while the list has several digits, this jump is the last step.
    """
    steps, given = [], operands
    for signs, wrote in _STEP.findall(completion.partition("####")[0]):
        if wrote:
            steps.append(ChainStep(given=given, wrote=wrote, announced=len(signs) + 1))
            given = wrote
    answer = _given_answer(completion)
    if answer is not None and len(given) > 1:
        steps.append(ChainStep(given=given, wrote=answer, announced=None))
    return steps


def written_reductions(operands: str, steps: Sequence[ChainStep]) -> int:
    """Returns the number of additions whose results `steps` write out, at most operands − 1.

    A step counts as one addition if its result is correct and its list is shorter than all earlier
    ones, so that repeated lists do not count. Counting stops at the first step that changes an
    operand after its first `size` operands.
    """
    count, shortest = 0, len(operands)
    for step in itertools.takewhile(lambda step: step.wrote[1:] == step.given[step.size :], steps):
        shorter = len(step.wrote) < shortest
        count += step.announced is not None and step.correct and shorter
        shortest = min(shortest, len(step.wrote))
    return count


def _given_answer(completion: str) -> str | None:
    found = _STRICT.search(completion) or _LENIENT.search(completion)
    return found.group(1) if found else None
