"""Chains that end in numbers: read into steps, edited, and worked out again."""

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from jexit.tasks import Draw, Gsm8k, WordProblems
from jexit.tasks.answers import parse_number
from jexit.tasks.base import Problem
from jexit.tasks.number_chain import nearby_numbers, result_of, with_result

GSM8K, WORDS = Gsm8k(), WordProblems()
PROBLEM = Problem(prompt="?", answer="7")
PIECES = ["3+4=7", " = 12", "=", ". ", "\n", "#### ", "<think>", "</think>", "$5", "1,200", "-"]
chain_like = st.lists(st.sampled_from([*PIECES, " x", "9" * 30, "٣"]), max_size=20).map("".join)


LINES_OR_SENTENCES = [
    ("3+4=7\n7*2=14\n#### 14", ["3+4=7", "\n7*2=14"]),
    ("3+4=7\n\n  7*2=14 \n\n#### 14", ["3+4=7", "\n\n  7*2=14"]),
    ("First 3.5 more. Then 7! So? #### 7", ["First 3.5 more.", " Then 7!", " So?"]),
    ("<think>\n3+4=7\n7*2=14\n</think>\n\n#### 14", ["<think>\n3+4=7", "\n7*2=14"]),
    ("<think>One. Two.</think>#### 3", ["<think>One.", " Two."]),
    ("3+4=7", ["3+4=7"]),
    ("#### 7", []),
    ("", []),
]


def test_steps_are_lines_or_else_sentences():
    for completion, steps in LINES_OR_SENTENCES:
        assert GSM8K.steps(completion) == steps


def test_all_steps_the_cue_and_the_answer_are_the_completion():
    for index in range(300):
        problem = WORDS.problem("train", index)
        chain = "".join(WORDS.steps(problem.completion))
        assert chain + WORDS.cue + problem.answer == problem.completion
        assert len(WORDS.steps(problem.completion)) == problem.fields["steps"]


def test_the_cue_stands_on_a_line_of_its_own_after_any_number_of_steps():
    for text in (
        "3+4=7\n7*2=14\n#### 14",
        "It is 7. It is 14. #### 14",
        "<think>a\nb</think>#### 2",
    ):
        steps = GSM8K.steps(text)
        for kept in range(len(steps) + 1):
            prefix = "".join(steps[:kept])
            asked = prefix + GSM8K.cue_after(prefix)
            assert asked.endswith("\n#### ")
            assert GSM8K.final_answer(asked + "5") == "5"
            assert GSM8K.verify(Problem(prompt="?", answer="5"), asked + "5").kind == "strict"


EQUAL_ANSWERS = [
    ("#### 1,000", "1000"),
    ("#### 1000.0", "1000"),
    ("so 0.50", "1/2"),
    ("\\boxed{1/2}", "1/2"),
    ("<think>3</think>#### 4", "4"),
    ("<think>3", None),
    ("nothing", None),
]


def test_equal_answers_are_equal_texts():
    for completion, answer in EQUAL_ANSWERS:
        assert GSM8K.final_answer(completion) == answer


THE_RESULT_OF_A_STEP = [
    ("He has 3+4 = 7 pens.", "7"),
    ("3*4=12, 12-2=10", "10"),
    ("That is $5 x 4 = $1,250.50 then.", "1,250.50"),
    ("x = 3 + 4", None),
    ("x = 3 + 4 = 7", "7"),
    ("= 1/2", None),
    ("7 pens", None),
    ("= " + "9" * 5000, None),
]


def test_the_result_of_a_step():
    for step, result in THE_RESULT_OF_A_STEP:
        assert result_of(step) == result


def test_a_result_changes_where_the_step_repeats_it():
    assert with_result("7-0 = 7, so 7 of 17 or 7.5", "9") == "7-0 = 9, so 9 of 17 or 7.5"


def test_nearby_numbers():
    for literal in ["0", "7", "1,000", "2.50", "999", "123456789012345"]:
        value = parse_number(literal)
        numbers = list(nearby_numbers(literal, Draw("nearby", literal)))
        values = [parse_number(number) for number in numbers]
        assert len(set(values)) == len(values) >= 4
        for number in values:
            assert number >= 0 and 0 < abs(number - value) <= 10
        if "." in literal:
            assert all(number.endswith(literal[literal.index(".") :]) for number in numbers)


def test_a_corrupted_story_is_worked_out_from_its_changed_line():
    operations = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}
    changed = set()
    for index in range(600):
        problem = WORDS.problem("train", index)
        lines = problem.completion.split("\n")[:-1]
        made = WORDS.corrupted(problem, problem.completion, Draw("corrupted", index))
        kept = made.prefix.split("\n")
        place = len(kept) - 1
        changed.add((place, len(lines)))
        assert kept[:place] == lines[:place]
        expression, wrong = kept[place].split("=")
        assert expression == lines[place].split("=")[0] and wrong != lines[place].split("=")[1]
        # By hand: every later expression takes the new result in the place of the old one.
        new = int(wrong)
        for (left, operator, right), line in zip(
            problem.fields["program"][place + 1 :], lines[place + 1 :], strict=True
        ):
            sides = line.split("=")[0].split(operator)
            x, y = (
                new if side == "_" else int(text)
                for side, text in zip((left, right), sides, strict=True)
            )
            new = operations[operator](x, y)
            assert new >= 0
        assert made.answer == str(new) != problem.answer
    assert {(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)} <= changed


def test_a_known_corruption():
    problem = Problem(
        prompt="?",
        answer="14",
        completion="3+4=7\n7*2=14\n#### 14",
        fields={"numbers": {"a": 3, "b": 4, "c": 2}, "program": (("a", "+", "b"), ("_", "*", "c"))},
    )
    assert WORDS.follow(problem, ["3+4=7"], "9") == (True, "18")
    assert WORDS.follow(problem, ["3+4=7", "\n7*2=14"], "15") == (True, "15")
    # A chain that is not the story's own: nobody knows what follows.
    assert WORDS.follow(problem, ["4+3=7"], "9") == (True, None)
    assert WORDS.follow(problem, ["3+4=7"] * 3, "9") == (True, None)


def test_no_result_falls_below_zero():
    problem = Problem(
        prompt="?",
        answer="0",
        completion="3+4=7\n7-7=0\n#### 0",
        fields={"numbers": {"a": 3, "b": 4, "c": 7}, "program": (("a", "+", "b"), ("_", "-", "c"))},
    )
    assert WORDS.follow(problem, ["3+4=7"], "6") == (False, "-1")
    for seed in range(50):
        made = WORDS.corrupted(problem, problem.completion, Draw("below", seed))
        assert int(made.answer) > 0


def test_the_corruption_never_comes_out_as_the_completion_did():
    problem = WORDS.problem("train", 1)
    right = problem.completion.rpartition("#### ")[0]
    for seed in range(100):
        draw = Draw("coincidence", seed)
        other = WORDS.corrupted(problem, problem.completion, draw).answer
        # This completion's slip at the end is what the changed step would lead to.
        made = WORDS.corrupted(problem, f"{right}#### {other}", Draw("coincidence", seed))
        assert made.answer != other


def test_gsm8k_does_not_know_what_follows():
    completion = "Ann has 3+4 = 7 pens. Then 7*2 = 14.\n#### 14"
    made = GSM8K.corrupted(PROBLEM, completion, Draw("unknown"))
    assert made.answer is None
    assert completion.startswith(made.prefix[:14]) and not completion.startswith(made.prefix)
    assert GSM8K.corrupted(PROBLEM, "no sums here\n#### 7", Draw("none")) is None


def test_wrong_answers_are_near_and_wrong():
    for answer in ["7", "0", "1,000", "$18.00", "1/2", "1/2310", "-3"]:
        problem = Problem(prompt="?", answer=answer)
        for seed in range(30):
            wrong = GSM8K.wrong_answer(problem, Draw("wrong", seed))
            number = parse_number(wrong)
            assert number != parse_number(answer)
            assert abs(number - parse_number(answer)) <= 10
            assert GSM8K.verify(problem, f"#### {wrong}").kind == "wrong"


@given(text=st.text() | chain_like)
def test_every_method_is_total(text):
    for task, problem in ((GSM8K, PROBLEM), (WORDS, WORDS.problem("train", 0))):
        steps = task.steps(text)
        assert text.startswith("".join(steps)) and all(step.strip() for step in steps)
        answer = task.final_answer(text)
        assert answer is None or answer == str(Fraction(answer))
        made = task.corrupted(problem, text, Draw("total", text.encode("utf-8", "replace")))
        if made is not None:
            assert not text.startswith(made.prefix)
            assert made.answer is None or made.answer != answer
        assert task.cue_after(text).endswith(task.cue)


def test_draws_are_spread_over_steps():
    completion = "".join(f"{n}+{n}={2 * n}\n" for n in range(10, 16)) + "#### 1"
    places = {
        GSM8K.corrupted(PROBLEM, completion, Draw("spread", seed)).prefix.count("\n")
        for seed in range(80)
    }
    assert places == set(range(6))
