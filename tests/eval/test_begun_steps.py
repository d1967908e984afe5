"""Results of begun steps, of models whose arithmetic is written down here."""

import re

import pytest

from jexit.eval.begun_steps import begun_steps
from jexit.eval.continuations import Reply
from jexit.tasks import make_task
from jexit.tasks.gsm8k import Gsm8k
from jexit.tasks.sums import Sums, digit_sum


class Scripted:
    """Writes what `rule(digits, size)` says after the plus signs that were begun."""

    layers, opening = 8, ""

    def __init__(self, rule):
        self.rule = rule

    def complete(self, problems, begun, *, answer_only):
        assert answer_only
        digits = [re.search(r"\d+\Z", problem.prompt).group() for problem in problems]
        texts = [self.rule(d, len(b) + 1) for d, b in zip(digits, begun, strict=True)]
        return [None if t is None else Reply(text=t, depths=[len(t), 9]) for t in texts]


@pytest.fixture
def problems():
    task = Sums(operands=(3, 6))
    return [task.problem("test", index) for index in range(60)]


def tried(problems, rule):
    return {step.size: step for step in begun_steps(Sums(), problems, Scripted(rule))}


def test_every_problem_with_the_operands_is_tried(problems):
    by_size = tried(problems, lambda digits, size: digit_sum(digits[:size]) + digits[size:])
    assert list(by_size) == [2, 3, 4, 5]
    for size, step in by_size.items():
        fitting = [n for n, p in enumerate(problems) if len(p.fields["operands"]) >= size]
        assert list(step.numbers) == fitting and all(step.right) and all(step.taken)
        record = step.record(None)
        assert record["problems"] == len(fitting) and record["granularity"] == str(size)
        assert record["accuracy"] == record["obeyed"] == 1 and "less_full" not in record
        lengths = [len(problems[n].fields["operands"]) - size + 1 for n in fitting]
        assert record["depth_fraction"] == pytest.approx(sum(lengths) / len(lengths) / 8)


def test_only_the_result_counts_and_only_of_a_step_of_that_size(problems):
    forgets_the_rest = tried(problems, lambda digits, size: digit_sum(digits[:size]))
    assert all(all(step.right) for step in forgets_the_rest.values())
    one_less = tried(problems, lambda digits, size: digit_sum(digits[: size - 1]))
    wrong = [digits != "0" for digits in (p.fields["operands"][1] for p in problems)]
    assert list(one_less[2].right) == [not w for w in wrong]  # right where the operand is 0
    adds_a_sign = tried(problems, lambda digits, size: "+" + digit_sum(digits[: size + 1]))
    nothing = tried(problems, lambda digits, size: "####" + digit_sum(digits))
    for step in (*adds_a_sign.values(), *nothing.values()):
        assert not any(step.taken) and not any(step.right) and step.record(None)["obeyed"] == 0


def test_the_interval_is_of_the_right_ones(problems):
    one_off = tried(
        problems, lambda digits, size: str((int(digit_sum(digits[:size])) + (size > 2)) % 10)
    )
    records = {size: step.record(None) for size, step in one_off.items()}
    assert all(record["obeyed"] == 1 for record in records.values())
    assert records[2]["accuracy_ci95"][0] > 0.9 and records[3]["accuracy_ci95"][1] < 0.1


def test_what_is_begun_comes_after_what_every_completion_begins_with(problems):
    class Thinks(Scripted):
        opening = "<think>\n"

        def complete(self, problems, begun, *, answer_only):
            assert all(text.startswith(self.opening + "+") for text in begun)
            cut = [text.removeprefix(self.opening) for text in begun]
            return super().complete(problems, cut, answer_only=answer_only)

    completer = Thinks(lambda digits, size: digit_sum(digits[:size]))
    assert all(all(step.right) for step in begun_steps(Sums(), problems, completer))


def test_problems_without_room_are_counted(problems):
    by_size = tried(problems, lambda digits, size: None if digits[0] in "12345" else "0")
    for size, step in by_size.items():
        assert step.left_out + len(step.numbers) == sum(
            len(p.fields["operands"]) >= size for p in problems
        )
        assert step.record(None)["left_out"] == step.left_out > 0


def test_the_difference_from_full_depth_is_over_the_same_problems(problems):
    right = tried(problems, lambda digits, size: digit_sum(digits[:size]))
    small = tried(problems, lambda digits, size: digit_sum(digits[:size]) if size < 4 else "")
    short = tried(problems, lambda digits, size: None if len(digits) > 4 else digit_sum(digits))
    record = small[4].record(right[4])
    assert record["less_full"] == -1 and record["less_full_ci95"][1] < 0
    assert small[3].record(right[3])["less_full"] == 0
    assert 5 not in short and short[4].record(right[4])["less_full"] == 0  # of four operands


def test_a_task_whose_steps_announce_nothing_has_none(problems):
    assert Gsm8k.begun_sizes == () and make_task("tom").begun_sizes == ()
    assert begun_steps(make_task("tom"), [], Scripted(None)) == []
    assert make_task("tom").begun_step(problems[0], 2) is None
    assert make_task("tom").first_result(problems[0], "+3") == (0, False)
