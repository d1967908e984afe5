import collections
import dataclasses
import statistics

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jexit.tasks import Draw, Problem, make_task, sums

sums_like = st.text(alphabet="0123456789+# .\n", max_size=60)


def test_the_chain_by_hand():
    assert sums.reduce_by("37295184", [2, 3, 2, 2, 2, 2]) == ("+0295184++15184+6184+784+54+9", "9")
    assert sums.reduce_by("372", [3]) == ("++2", "2")
    assert sums.reduce_by("372", []) == ("", "2")
    assert sums.prescribed_steps(8, 3) == [3, 3, 3, 2]
    assert sums.prescribed_steps(3, 5) == [3]


def test_prompts():
    for steps, start in [
        ("free", "sum "),
        (2, "sum by 2 "),
        ("5", "sum by 5 "),
        ("at_once", "sum at once "),
    ]:
        task = make_task("sums", steps=steps)
        for index in range(50):
            problem = task.problem("train", index)
            operands = problem.prompt.removeprefix(start)
            assert operands == problem.fields["operands"]
            assert 3 <= len(operands) <= 8
            assert problem.answer == str(sum(int(digit) for digit in operands) % 10)


def test_prescribed_chains_take_the_prescribed_steps():
    for step in [2, 3, 4, 5]:
        task = make_task("sums", steps=step)
        for index in range(100):
            problem = task.problem("test", index)
            sizes = sums.step_sizes(problem.fields["operands"], problem.completion)
            assert all(size == step for size in sizes[:-1])
            assert 2 <= sizes[-1] <= step
            assert sum(size - 1 for size in sizes) == len(problem.fields["operands"]) - 1


def test_at_once_has_no_chain():
    problem = make_task("sums", steps="at_once").problem("train", 3)
    assert problem.completion == f"####{problem.answer}"
    operands = problem.fields["operands"]
    assert sums.step_sizes(operands, problem.completion) == [len(operands)]


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
    only = make_task("sums", steps="mixed", mixture={"at_once": 1.0})
    assert {only.problem("train", index).fields["mode"] for index in range(20)} == {"at_once"}


def test_no_operand_string_is_on_both_sides():
    seen = {"train": set(), "val": set(), "test": set()}
    for split, strings in seen.items():
        for seed in (0, 1):
            task = make_task("sums", operands=(3, 4), seed=seed)
            count = 3000 if split == "train" else 500
            strings.update(task.problem(split, i).fields["operands"] for i in range(count))
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
    # Short strings are few enough to see all sides nearly whole: an eighth is held out for each.
    short = {split: sum(len(s) == 3 for s in strings) for split, strings in seen.items()}
    assert sum(short.values()) > 900
    assert 0.08 < short["test"] / 1000 < 0.17 and 0.08 < short["val"] / 1000 < 0.17


VERDICTS = [
    ("+02+2####2", "strict"),
    ("####2", "strict"),
    ("#### 2", "lenient"),
    ("####2\n", "lenient"),
    ("+02+2", "lenient"),
    ("the answer is 2.", "lenient"),
    ("####3", "wrong"),
    ("+02+2####3", "wrong"),
    ("####2####3", "wrong"),
    ("####22", "none"),
    ("+02", "none"),
    ("+02+2####", "none"),
    ("", "none"),
    ("####٢", "none"),
]


def test_verdicts():
    for completion, kind in VERDICTS:
        task = make_task("sums")
        problem = sums._problem("sum 372", "372", [2, 2], mode="free", step=None)
        assert task.verify(problem, completion).kind == kind


@given(text=st.text() | sums_like)
def test_verify_and_the_readers_are_total(text):
    task = make_task("sums")
    assert task.verify(task.problem("train", 0), text).kind in (
        "strict",
        "lenient",
        "wrong",
        "none",
    )
    steps = sums.chain_steps("372", text)
    assert all(step.size >= 2 for step in steps if step.correct)
    assert 0 <= sums.written_reductions("372", steps) <= 2


WRITTEN_OUT = [
    ("+129+39+2####2", 2),  # a slip
    ("+029+29+1####1", 3),
    ("+029+29####1", 2),
    ("+029+29+3####3", 2),
    ("+88+6####6", 0),  # made up
    ("+028+20+2####2", 0),
    ("+029+029+29+1####1", 3),  # repeated, and still once
]


def test_what_is_on_the_page_has_to_follow_from_the_operands():
    for text, count in WRITTEN_OUT:
        assert sums.written_reductions("3729", sums.chain_steps("3729", text)) == count


PRESCRIBED = [
    ("2", "+029+29+1####1", True),
    ("2", "+129+39+2####2", True),  # of the right sizes, however wrong
    ("2", "++29+1####1", False),
    ("3", "++29+1####1", True),
    ("3", "+029+29+1####1", False),
    ("3", "+029++1####1", False),  # as many steps of other sizes
    ("at_once", "####1", True),
    ("at_once", "+029####1", False),
    ("free", "####1", True),
]


def test_prescribed_steps_are_taken_or_not():
    for prompt, text, obeyed in PRESCRIBED:
        task = make_task("sums", steps=prompt, operands=(4, 4))
        drawn = task.problem("test", 0)
        problem = dataclasses.replace(drawn, fields={**drawn.fields, "operands": "3729"})
        assert task.obeys(problem, text) == obeyed


def test_chain_steps_judge_each_step_by_its_own_input():
    steps = sums.chain_steps("3729", "+129+39+2####2")
    assert [(s.size, s.given, s.wrote, s.correct) for s in steps] == [
        (2, "3729", "129", False),
        (2, "129", "39", True),
        (2, "39", "2", True),
    ]
    too_large = sums.chain_steps("37", "++0")  # the list tells: two digits became one
    assert [(s.size, s.announced, s.correct) for s in too_large] == [(2, 3, True)]
    (repeats,) = sums.chain_steps("37", "+37")
    assert (repeats.size, repeats.correct) == (1, False)
    jump = sums.chain_steps("372", "+02####2")[-1]
    assert (jump.size, jump.given, jump.wrote, jump.announced, jump.correct) == (
        *(2, "02", "2"), None, True,
    )  # fmt: skip
    assert not sums.chain_steps("372", "####3")[0].correct
    assert sums.chain_steps("372", "+++ and on") == []
    problem = make_task("sums").problem("train", 5)
    read = sums.chain_steps(problem.fields["operands"], problem.completion)
    assert read and all(step.correct for step in read)


WRONG_OPTIONS = [
    {"steps": 6},
    {"steps": "often"},
    {"operands": (1, 4)},
    {"operands": (5, 4)},
    {"operands": (5,)},
    {"mixture": {"free": 0.0}},
    {"mixture": {"sometimes": 1.0}},
    {"mixture": {}},
]


def test_wrong_options_name_value_and_remedy():
    for options in WRONG_OPTIONS:
        name = next(iter(options))
        remedy = "give other weights" if name == "mixture" else rf"change config\.task\.{name}"
        with pytest.raises(ValueError, match=rf"{name}.* got .*; {remedy}"):
            make_task("sums", **options)


def test_figures_of_parts_add_up_to_those_of_the_whole():
    task = make_task("sums", steps="mixed")
    problems = [task.problem("train", index) for index in range(42)]
    texts = [problem.completion for problem in problems[:40]] + ["", "no steps at all"]

    def totals(part):
        return task.text_totals(problems[part], texts[part])

    whole = totals(slice(0, 42))
    parts = [totals(part) for part in (slice(0, 7), slice(7, 40), slice(40, 42))]
    for name, total in whole.items():
        assert tuple(map(sum, zip(*(part[name] for part in parts), strict=True))) == total
    silent = sum(len(problem.fields["operands"]) - 1 for problem in problems[40:])
    assert parts[2] == dict.fromkeys(whole, (0, 0)) | {"on_the_page": (0, silent)}
    total, count = whole["step_size"]
    assert total / count == pytest.approx(
        statistics.mean(
            size
            for problem, text in zip(problems, texts, strict=True)
            for size in sums.step_sizes(problem.fields["operands"], text)
        )
    )


def figures(operands, *texts):
    """The means of the task's figures over completions of one problem."""
    problem = Problem(prompt=f"sum {operands}", answer="", fields={"operands": operands})
    totals = make_task("sums").text_totals([problem] * len(texts), texts)
    return {name: total / count for name, (total, count) in totals.items() if count}


WHAT_IS_ON_THE_PAGE = [
    ("+0295+295+15+6####6", 1.0, 2.0, 1.0),  # every addition written
    ("+0295####6", 1 / 4, (2 + 4) / 2, 1.0),  # three of four in the head
    ("+6####6", 1 / 4, 5.0, 0.0),  # all in one step, which says that it takes two
    ("++++6####6", 1 / 4, 5.0, 1.0),
    ("####6", 0.0, 5.0, None),
    ("+####6", 0.0, 5.0, None),
    ("It is 6.", 0.0, 5.0, None),
    ("", 0.0, None, None),
    ("+0295+295", 1 / 2, 2.0, 1.0),  # cut off
    ("++295++6####6", 1 / 2, 3.0, 1.0),
    ("+1295+395+25+7####7", 3 / 4, 2.0, 1.0),  # 3 + 7 does not end in 1; the rest is right
]


def test_what_is_on_the_page():
    for text, on_the_page, step_size, as_announced in WHAT_IS_ON_THE_PAGE:
        found = figures("37295", text)
        assert found["on_the_page"] == pytest.approx(on_the_page)
        assert found.get("step_size") == (None if step_size is None else pytest.approx(step_size))
        assert found.get("as_announced") == as_announced


def test_figures_of_known_chains():
    assert figures("1234", "+334+64+0####0") == {
        "step_size": 2.0, "steps_right": 1.0, "on_the_page": 1.0, "as_announced": 1.0,
    }  # fmt: skip
    assert figures("1234", "++64+0####0")["step_size"] == 2.5
    # 1 + 2 is not 4, but 4 + 3 + 4 ends in 1.
    wrong = figures("1234", "+434++1####1")
    assert wrong["steps_right"] == 0.5 and wrong["on_the_page"] == pytest.approx(1 / 3)
    # A jump counts among the steps: 33 + 4 does not end in 1.
    assert figures("1234", "+334####1")["steps_right"] == 0.5
    # Over problems additions are summed: 3 of 3, and none of 3.
    assert figures("1234", "+334+64+0####0", "####0")["on_the_page"] == 0.5


def test_going_round_in_circles_puts_nothing_on_the_page():
    assert figures("372", "+02+372+02+372+02")["on_the_page"] == 0.5
    assert figures("372", "+02+02+02####2")["on_the_page"] == 0.5
    assert figures("372", "+2+72+9####9")["on_the_page"] == 0.5  # only 3 + 7 + 2 = 12 is right


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
        found = figures(operands, text)
        assert found["step_size"] == pytest.approx(statistics.mean(expected))
        assert found["on_the_page"] == pytest.approx(len(steps) / (len(operands) - 1))
        said = [s.announced for s in read if s.announced is not None]
        assert said == [piece.count("+") + 1 for piece in make_task("sums").steps(text)]


FIRST_RESULTS = [
    ("+03", 2, True),
    ("+0####3", 2, True),
    ("+13", 2, False),
    ("++3", 3, True),
    ("+++3####3", 4, False),  # of three operands
    ("3", 0, False),  # no signs begin no step
    ("++", 0, False),
    ("+####0", 0, False),
    ("", 0, False),
]


def test_the_first_result_of_a_completion():
    for completion, size, right in FIRST_RESULTS:
        problem = Problem(prompt="sum 373", answer="3", completion=None, fields={"operands": "373"})
        assert make_task("sums").first_result(problem, completion) == (size, right)
        task = make_task("sums")
        begun = [task.begun_step(problem, size) for size in task.begun_sizes]
        assert begun == ["+", "++", None, None]


def test_steps_the_cue_and_the_answer_are_the_completion():
    task = make_task("sums", steps="mixed")
    assert task.granularities == ("2", "3", "4", "5")
    assert task.steps("+0295184++15184+++1####1") == ["+0295184", "++15184", "+++1"]
    for index in range(300):
        problem = task.problem("train", index)
        steps = task.steps(problem.completion)
        sizes = [len(step) - len(step.lstrip("+")) + 1 for step in steps]
        direct = [] if steps else [len(problem.fields["operands"])]
        assert sums.step_sizes(problem.fields["operands"], problem.completion) == sizes + direct
        assert "".join(steps) + task.cue + problem.answer == problem.completion
        assert task.cue_after("".join(steps[:1])) == "####"


def test_final_answers():
    for completion, answer in [
        ("+02+2####2", "2"),
        ("#### 2", "2"),
        ("it is 3.", "3"),
        ("####22", None),
        ("", None),
    ]:
        assert make_task("sums").final_answer(completion) == answer


def test_a_corrupted_list_adds_up_to_the_answer_that_follows():
    task, places = make_task("sums"), set()
    for index in range(400):
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


def test_a_corruption_never_leads_where_the_completion_ended():
    task = make_task("sums")
    problem = sums._problem("sum 372", "372", [2, 2], mode="free", step=None)
    for seed in range(60):
        # The chain is right and its last line is not: 5 is what some changed digits would lead to.
        made = task.corrupted(problem, "+02+2####5", Draw("slip", seed))
        assert made.answer not in ("2", "5") or made.prefix[1:2] != "0"
        assert made.answer != "5"
    assert task.corrupted(problem, "####2", Draw("no chain")) is None
    assert task.corrupted(problem, "+++", Draw("no list")) is None


def test_wrong_answers_are_other_digits():
    task, problem = make_task("sums"), make_task("sums").problem("train", 0)
    wrong = {task.wrong_answer(problem, Draw("wrong", seed)) for seed in range(200)}
    assert wrong == set("0123456789") - {problem.answer}


@given(text=st.text() | sums_like)
def test_reading_and_editing_chains_is_total(text):
    task, problem = make_task("sums"), make_task("sums").problem("train", 0)
    assert "".join(task.steps(text)) == text.partition("####")[0]
    made = task.corrupted(problem, text, Draw("total"))
    if made is not None:
        assert len(task.steps(made.prefix)) <= len(task.steps(text))
        assert made.answer != task.final_answer(text)
