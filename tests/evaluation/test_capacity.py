"""Capacity of models whose arithmetic is written down here."""

import dataclasses
import re

import pytest

from jexit.config import TINY_CALIBRATED_PATH
from jexit.data.tokenizer import Tokenizer
from jexit.evaluation.accuracy import Examination
from jexit.evaluation.capacity import begun_steps, less_full
from jexit.evaluation.decoder import Attempt
from jexit.evaluation.measures import Measurer
from jexit.loops.setup import load_task
from jexit.tasks import make_task
from jexit.tasks.gsm8k import Gsm8k
from jexit.tasks.sums import Sums, digit_sum, prescribed_steps, reduce_by
from small_runs import make_config


class Scripted:
    """Writes what `rule(digits, size)` says after the plus signs of a forced prefix."""

    layers = 8

    def __init__(self, rule, opening=""):
        self.rule, self.opening = rule, opening

    def complete(self, problems, prefixes, *, answer_only):
        assert answer_only and all(text.startswith(self.opening + "+") for text in prefixes)
        digits = [re.search(r"\d+\Z", problem.prompt).group() for problem in problems]
        sizes = [len(text.removeprefix(self.opening)) + 1 for text in prefixes]
        texts = map(self.rule, digits, sizes)
        return [None if t is None else Attempt(text=t, depths=[len(t), 9]) for t in texts]


PROBLEMS = [Sums(operands_max=6).problem("test", index) for index in range(60)]
OPERANDS = [problem.fields["operands"] for problem in PROBLEMS]


def tried(rule, **options):
    found = begun_steps("sample", Sums(), PROBLEMS, Scripted(rule, **options))
    return {int(entry.granularity): (entry, scores) for entry, scores in found}


def exact(digits, size):
    return digit_sum(digits[:size]) + digits[size:]


def test_every_problem_with_the_operands_is_tried_and_only_the_result_counts():
    by_size = tried(exact)
    assert list(by_size) == [2, 3, 4, 5]
    for size, (entry, scores) in by_size.items():
        fitting = [n for n, operands in enumerate(OPERANDS) if len(operands) >= size]
        assert list(scores.numbers) == fitting
        assert (entry.problems, entry.granularity) == (len(fitting), str(size))
        assert entry.accuracy == entry.obeyed == 1 and entry.less_full is None
        lengths = [len(OPERANDS[n]) - size + 1 for n in fitting]
        assert entry.depth_fraction == pytest.approx(sum(lengths) / len(lengths) / 8)
    for correct in (
        tried(lambda digits, size: digit_sum(digits[:size])),  # forgets the rest
        tried(exact, opening="<think>\n"),
    ):
        assert all(all(scores.first) for _, scores in correct.values())
    one_less = tried(lambda digits, size: digit_sum(digits[: size - 1]))
    assert list(one_less[2][1].first) == [operands[1] == "0" for operands in OPERANDS]
    for wrong in (
        tried(lambda digits, size: "+" + digit_sum(digits[: size + 1])),  # a step of another size
        tried(lambda digits, size: "####" + digit_sum(digits)),
    ):
        for size, (entry, scores) in wrong.items():
            entry = less_full(entry, scores, by_size[size][1])
            assert entry.accuracy == entry.obeyed == 0
            assert entry.less_full == -1 and entry.less_full_ci95[1] < 0
    short = tried(lambda digits, size: None if len(digits) > 4 else digit_sum(digits[:size]))
    assert list(short) == [2, 3, 4]
    for size, (entry, scores) in short.items():
        _, all_scores = by_size[size]
        assert entry.left_out == len(all_scores.numbers) - len(scores.numbers) > 0
        assert less_full(entry, scores, all_scores).less_full == 0  # of the problems that both have
    for task in (Gsm8k(), make_task("tom")):  # whose steps announce nothing
        assert begun_steps("full", task, [], Scripted(None)) == []
        assert task.begun_step(PROBLEMS[0], 2) is None
    assert make_task("tom").first_result(PROBLEMS[0], "+3") == (0, False)


@dataclasses.dataclass(frozen=True)
class AddsInItsHead:
    """A decoder that is right where the prompt prescribes at most so many operands a step."""

    tokenizer: Tokenizer
    up_to: dict[str, int]  # by policy
    obedient: bool = True
    layers: int = 3
    max_new_tokens: int = 40

    def policy(self, name):
        return name

    def under(self, name):
        return self

    def decode(self, prompts, policy, *, judge=None, what, forced=None, **_):
        texts = [self.tokenizer.decode(prompt) for prompt in prompts]
        say = self.step if forced is not None else self.answer
        attempts = []
        for text in texts:
            said, first = say(text, self.up_to[policy])
            ids = self.tokenizer.encode(said)
            depths = [first] + [3] * (len(ids) - 1)
            attempts.append(Attempt(ids=ids, text=said, depths=depths))
        if judge:
            verdicts = judge(range(len(texts)), attempts)
            pairs = zip(attempts, verdicts, strict=True)
            attempts = [dataclasses.replace(made, verdict=verdict) for made, verdict in pairs]
        return attempts, 1.0

    def answer(self, prompt, most):
        digits = prompt.split()[-1]
        prescribed = re.search(r"by (\d)", prompt)
        size = int(prescribed[1]) if prescribed else len(digits)
        chain = ""
        if prescribed and self.obedient:
            chain, _ = reduce_by(digits, prescribed_steps(len(digits), size))
        return f"{chain}#### {(sum(map(int, digits)) + (size > most)) % 10}", 3

    def step(self, prompt, most):
        """The result of a step that was begun, off by one where it is too large for the head."""
        assert "by" not in prompt and "at once" not in prompt, "whatever the evaluation asks for"
        digits, signs = re.search(r"(\d+)\D*?(\++)\Z", prompt).groups()
        size = len(signs) + 1
        return f"{(sum(map(int, digits[:size])) + (size > most)) % 10}{digits[size:]}", 1


def capacity_of(up_to, **settings):
    config = make_config(
        "eval", TINY_CALIBRATED_PATH, task__options__operands_min=6, task__options__operands_max=8,
        eval__measures=("capacity",), eval__measured="threshold:0.5", eval__problems=8,
        task__options__steps="2",
    )  # fmt: skip
    tokenizer = Tokenizer.load(TINY_CALIBRATED_PATH)

    def with_steps(steps):
        options = config.task.options | {"steps": steps}
        task = load_task(dataclasses.replace(config.task, options=options), "test")
        return Examination.of(task, tokenizer, config)

    measurer = Measurer(
        config=config, decoder=AddsInItsHead(tokenizer, up_to, **settings),
        examination=with_steps("2"), with_steps=with_steps, split=None, exits=(1, 2),
        positions=512,
    )  # fmt: skip
    found = {}
    for part, measure in measurer.parts():
        found.setdefault(part, []).extend(measure())
    return found["capacity"], found["begun_steps"]


def test_capacity_is_what_can_be_added_in_the_head():
    up_to = {"threshold:0.5": 3, "full": 4}
    capacity, begun = capacity_of(up_to)
    accuracy = {(entry.policy, entry.granularity): entry.accuracy for entry in capacity}
    for policy, most in up_to.items():
        for size in (2, 3, 4, 5):
            assert accuracy[policy, str(size)] == float(size <= most), (policy, size)
        assert accuracy[policy, "at_once"] == 0.0
    less = [entry.less_full_ci95 for entry in capacity if entry.policy == "threshold:0.5"]
    assert all(low < 0 < high for low, high in (less[0], less[1], less[3], less[4]))
    assert less[2][1] < 0  # steps of four: never under the policy, always at full depth
    assert all(entry.obeyed == 1.0 for entry in capacity)
    assert all(entry.accuracy_obeyed == entry.accuracy for entry in capacity)
    results = {(entry.policy, entry.granularity): entry.accuracy for entry in begun}
    assert results == {
        (policy, str(size)): float(size <= most)
        for policy, most in up_to.items()
        for size in (2, 3, 4, 5)
    }
    assert all(entry.depth_fraction == pytest.approx(1 / 3) for entry in begun)
    assert begun[2].less_full == -1 and begun[1].less_full == begun[3].less_full == 0


def test_a_model_that_takes_other_steps_than_asked_for_shows_no_capacity():
    capacity, begun = capacity_of({"threshold:0.5": 9, "full": 9}, obedient=False)
    assert all(entry.accuracy == entry.obeyed == 1.0 for entry in begun)  # it needs not obey
    for entry in capacity:
        assert entry.accuracy == 1.0
        assert entry.obeyed == float(entry.granularity == "at_once")
        assert entry.accuracy_obeyed == (1.0 if entry.obeyed else None)
