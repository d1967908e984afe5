import collections
import dataclasses
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jexit.tasks import Attempt, Draw, Problem, make_task, sums


def problem_of(operands, answer=""):
    fields = {"operands": operands, "mode": "free", "step": None}
    return Problem(prompt=f"sum {operands}", answer=answer, fields=fields)


def metrics(operands, *texts):
    """The means of the task's metrics over completions of one problem."""
    attempts = [Attempt(text=text) for text in texts]
    totals = make_task("sums").text_totals([problem_of(operands)] * len(texts), attempts)
    return {name: total / count for name, (total, count) in totals.items() if count}


def test_the_chain_by_hand():
    assert sums.reduce_by("37295184", [2, 3, 2, 2, 2, 2]) == ("+0295184++15184+6184+784+54+9", "9")
    assert sums.reduce_by("372", [3]) == ("++2", "2")
    assert sums.reduce_by("372", []) == ("", "2")
    assert sums.prescribed_steps(8, 3) == [3, 3, 3, 2]
    assert sums.prescribed_steps(3, 5) == [3]


def test_prompts_prescribe_the_steps_that_chains_take():
    for steps, start in ((2, "sum by 2 "), ("5", "sum by 5 "), ("at_once", "sum at once ")):
        task = make_task("sums", steps=steps)
        for index in range(50):
            problem = task.problem("train", index)
            operands = problem.prompt.removeprefix(start)
            assert operands == problem.fields["operands"] and 3 <= len(operands) <= 8
            assert problem.answer == str(sum(int(digit) for digit in operands) % 10)
            *sizes, last = sums.step_sizes(operands, problem.completion)
            if steps == "at_once":
                assert (sizes, last) == ([], len(operands))
                assert problem.completion == f"####{problem.answer}"
            else:
                assert set(sizes) <= {int(steps)} and 2 <= last <= int(steps)


def test_the_mixture_follows_its_weights_and_has_every_step_size():
    task = make_task("sums", steps="mixed")
    problems = [task.problem("train", index) for index in range(2000)]
    modes = collections.Counter(problem.fields["mode"] for problem in problems)
    assert abs(modes["free"] / 2000 - 0.45) < 0.04
    assert abs(modes["prescribed"] / 2000 - 0.40) < 0.04
    assert abs(modes["at_once"] / 2000 - 0.15) < 0.03
    assert {problem.fields["step"] for problem in problems} == {None, 2, 3, 4, 5}
    free = [p for p in problems if p.fields["mode"] == "free"]
    sizes = {size for p in free for size in sums.step_sizes(p.fields["operands"], p.completion)}
    assert sizes == {2, 3, 4, 5}


def test_no_operand_string_is_on_both_sides():
    seen = {"train": set(), "val": set(), "test": set()}
    for split, strings in seen.items():
        for seed in (0, 1):
            task = make_task("sums", operands_max=4, seed=seed)
            count = 3000 if split == "train" else 500
            strings.update(task.problem(split, i).fields["operands"] for i in range(count))
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
    # Short strings are few enough to see all sides nearly whole: an eighth is held out for each.
    short = {split: sum(len(s) == 3 for s in strings) for split, strings in seen.items()}
    assert sum(short.values()) > 900
    assert 0.08 < short["test"] / 1000 < 0.17 and 0.08 < short["val"] / 1000 < 0.17


def test_verdicts():
    task, problem = make_task("sums"), problem_of("372", "2")
    for kind, *completions in (
        ("strict", "+02+2####2", "####2"),
        ("lenient", "#### 2", "####2\n", "+02+2", "the answer is 2."),
        ("wrong", "####3", "+02+2####3", "####2####3"),
        ("none", "####22", "+02", "+02+2####", "", "####٢"),
    ):
        for completion in completions:
            assert task.verify(problem, completion).kind == kind, completion


def test_prescribed_steps_are_taken_or_not():
    for prompt, text, obeyed in (
        ("2", "+029+29+1####1", True),
        ("2", "+129+39+2####2", True),  # of the right sizes, however wrong
        ("2", "++29+1####1", False),
        ("3", "++29+1####1", True),
        ("3", "+029++1####1", False),  # as many steps of other sizes
        ("at_once", "####1", True),
        ("at_once", "+029####1", False),
        ("free", "####1", True),
    ):
        task = make_task("sums", steps=prompt, operands_min=4, operands_max=4)
        drawn = task.problem("test", 0)
        problem = dataclasses.replace(drawn, fields={**drawn.fields, "operands": "3729"})
        assert task.obeys(problem, text) == obeyed


def test_chain_steps_judge_each_step_by_its_own_input():
    for operands, text, expected in (
        ("3729", "+129+39+2####2", [("129", 2, 2, False), ("39", 2, 2, True), ("2", 2, 2, True)]),
        ("37", "++0", [("0", 2, 3, True)]),  # the list tells: two digits became one
        ("37", "+37", [("37", 1, 2, False)]),
        ("372", "+02####2", [("02", 2, 2, True), ("2", 2, None, True)]),
        ("372", "####3", [("3", 3, None, False)]),
        ("372", "+++ and on", []),
    ):
        steps = sums.chain_steps(operands, text)
        assert [(s.wrote, s.size, s.announced, s.correct) for s in steps] == expected


def test_wrong_options_name_value_and_remedy():
    for name, options in (
        *(("steps", {"steps": steps}) for steps in (6, "often", "fine")),
        *(("operands", bounds) for bounds in ({"operands_min": 1}, {"operands_min": 9})),
        ("operands", {"operands_max": 101}),
    ):
        said = rf"config\.task\.options\.{name}.* is .*, but .*task 'sums' .*; (choose|change) one"
        with pytest.raises(ValueError, match=said):
            make_task("sums", **options)
    said = r"options\.operands_max is 'x', but it must be of type int"
    with pytest.raises(ValueError, match=said):
        make_task("sums", operands_max="x")


def test_what_is_written_out():
    """The share of additions written out, the mean size of steps, the share that says so."""
    for text, written_out, step_size, as_announced in (
        ("+0295+295+15+6####6", 1.0, 2.0, 1.0),  # every addition written
        ("+0295####6", 1 / 4, (2 + 4) / 2, 1.0),  # three of four in the head
        ("+6####6", 1 / 4, 5.0, 0.0),  # all in one step, which says that it takes two
        ("++++6####6", 1 / 4, 5.0, 1.0),
        ("####6", 0.0, 5.0, None),
        ("+####6", 0.0, 5.0, None),
        ("", 0.0, None, None),
        ("+0295+295", 1 / 2, 2.0, 1.0),  # cut off
        ("++295++6####6", 1 / 2, 3.0, 1.0),
        ("+1295+395+25+7####7", 3 / 4, 2.0, 1.0),  # 3 + 7 does not end in 1; the rest is right
    ):
        found = metrics("37295", text)
        assert found["written_out"] == pytest.approx(written_out)
        assert found.get("step_size") == (None if step_size is None else pytest.approx(step_size))
        assert found.get("as_announced") == as_announced
    # 1 + 2 is not 4, but 4 + 3 + 4 ends in 1. A jump counts among the steps: 33 + 4 is not 1.
    wrong = metrics("1234", "+434++1####1")
    assert wrong["steps_correct"] == 0.5 and wrong["written_out"] == pytest.approx(1 / 3)
    assert metrics("1234", "+334####1")["steps_correct"] == 0.5
    # Over problems additions are summed: 3 of 3, and none of 3.
    assert metrics("1234", "+334+64+0####0", "####0")["written_out"] == 0.5
    # Going round in circles puts nothing on the page, and what is made up neither.
    for text, share in (
        ("+02+372+02+372+02", 0.5),
        ("+02+02+02####2", 0.5),
        ("+2+72+9####9", 0.5),  # only 3 + 7 + 2 = 12 is right
        ("+88+6####6", 0.0),
    ):
        assert metrics("372", text)["written_out"] == share


@given(
    operands=st.text(alphabet="0123456789", min_size=2, max_size=12),
    step=st.integers(2, 5),
    kept=st.integers(0, 11),
    signs=st.lists(st.integers(1, 6), min_size=11, max_size=11),
)
def test_chains_of_prescribed_steps_are_read_back(operands, step, kept, signs):
    steps = sums.prescribed_steps(len(operands), step)[:kept]
    chain, answer = sums.reduce_by(operands, steps)
    left = len(operands) - sum(size - 1 for size in steps)
    expected = [*steps, left] if left > 1 else steps
    lists = [piece.lstrip("+") for piece in make_task("sums").steps(chain)]
    announced = "".join("+" * n + digits for n, digits in zip(signs, lists, strict=False))
    for text in (f"{chain}####{answer}", f"{announced}####{answer}"):
        read = sums.chain_steps(operands, text)
        assert sums.step_sizes(operands, text) == expected
        assert all(taken.correct for taken in read)
        found = metrics(operands, text)
        assert found["step_size"] == pytest.approx(statistics.mean(expected))
        assert found["written_out"] == pytest.approx(len(steps) / (len(operands) - 1))
        said = [s.announced for s in read if s.announced is not None]
        assert said == [piece.count("+") + 1 for piece in make_task("sums").steps(text)]


def test_the_first_result_of_a_completion():
    task, problem = make_task("sums"), problem_of("373")
    assert [task.begun_step(problem, size) for size in task.begun_sizes] == ["+", "++", None, None]
    for completion, size, correct in (
        ("+0####3", 2, True),
        ("+13", 2, False),
        ("++3", 3, True),
        ("+++3####3", 4, False),  # of three operands
        ("3", 0, False),  # no signs begin no step
        ("++", 0, False),
        ("+####0", 0, False),
    ):
        assert task.first_result(problem, completion) == (size, correct)


def test_steps_the_cue_and_the_answer_are_the_completion():
    task = make_task("sums", steps="mixed")
    assert task.steps("+0295184++15184+++1####1") == ["+0295184", "++15184", "+++1"]
    for index in range(100):
        problem = task.problem("train", index)
        steps = task.steps(problem.completion)
        sizes = [len(step) - len(step.lstrip("+")) + 1 for step in steps]
        direct = [] if steps else [len(problem.fields["operands"])]
        assert sums.step_sizes(problem.fields["operands"], problem.completion) == sizes + direct
        assert "".join(steps) + task.cue + problem.answer == problem.completion


def test_a_corrupted_list_adds_up_to_the_answer_that_follows():
    task, places = make_task("sums"), set()
    for index in range(200):
        problem = task.problem("train", index)
        steps = task.steps(problem.completion)
        made = task.corrupted(problem, problem.completion, Draw("corrupted", index))
        kept = task.steps(made.prefix)
        place = len(kept) - 1
        places.add(place)
        assert kept[:place] == steps[:place]
        # One digit, the first after the signs, is another one.
        different = [a != b for a, b in zip(kept[place], steps[place], strict=True)]
        assert different.index(True) == steps[place].rindex("+") + 1 and sum(different) == 1
        digits = kept[place].lstrip("+")
        assert made.answer == str(sum(map(int, digits)) % 10) != problem.answer
    assert len(places) >= 5
    for seed in range(60):  # never where the completion ended: here with a slip, at 5
        assert task.corrupted(problem_of("372"), "+02+2####5", Draw("slip", seed)).answer != "5"
    for nothing in ("####2", "+++"):
        assert task.corrupted(problem_of("372"), nothing, Draw("nothing")) is None


def test_wrong_answers_are_other_digits():
    task, problem = make_task("sums"), problem_of("372", "2")
    wrong = {task.wrong_answer(problem, Draw("wrong", seed)) for seed in range(200)}
    assert wrong == set("013456789")


def test_whether_an_answer_follows_from_its_chain():
    task = make_task("sums")
    for text, follows in [
        ("+02+2####2", True),  # whatever the operands were
        ("++2####2", True),
        ("+0295####6", True),
        ("+0295####7", False),
        ("+0295++15+6####6", True),
        ("+0295++25+7####7", False),  # a slip in the second step
        ("+02+2####3", False),
        ("####2", False),  # nothing is written that it could follow from
        ("", False),
    ]:
        assert task.answer_follows(text) == follows, text
