"""Chains that end in numbers: read into steps, edited, and worked out again."""

import re

from jexit.tasks import Draw
from jexit.tasks.answers import parse_number
from jexit.tasks.base import Problem
from jexit.tasks.gsm8k import Gsm8k
from jexit.tasks.number_chain import nearby_numbers, result_of, with_result
from jexit.tasks.word_problems import BOXES, NAMES, OBJECTS, TEMPLATES, WordProblems

GSM8K, WORDS = Gsm8k(), WordProblems()
PROBLEM = Problem(prompt="?", answer="7")
OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}


def test_steps_are_lines_or_else_sentences():
    for completion, steps in (
        ("3+4=7\n7*2=14\n#### 14", ["3+4=7", "\n7*2=14"]),
        ("3+4=7\n\n  7*2=14 \n\n#### 14", ["3+4=7", "\n\n  7*2=14"]),
        ("First 3.5 more. Then 7! So? #### 7", ["First 3.5 more.", " Then 7!", " So?"]),
        ("<think>\n3+4=7\n7*2=14\n</think>\n\n#### 14", ["<think>\n3+4=7", "\n7*2=14"]),
        ("<think>One. Two.</think>#### 3", ["<think>One.", " Two."]),
        ("3+4=7", ["3+4=7"]),
        ("#### 7", []),
    ):
        assert GSM8K.steps(completion) == steps
        for kept in range(len(steps) + 1):  # the cue has a line of its own after any number
            prefix = "".join(steps[:kept])
            asked = prefix + GSM8K.cue_after(prefix)
            assert asked.endswith("\n#### ")
            assert GSM8K.final_answer(asked + "5") == "5"
            assert GSM8K.verify(Problem(prompt="?", answer="5"), asked + "5").kind == "strict"


def test_stories_are_true_arithmetic_on_numbers_of_the_question():
    prompts = []
    for index in range(1000):
        problem = WORDS.problem("train", index)
        prompts.append(problem.prompt)
        *lines, last = problem.completion.split("\n")
        assert len(WORDS.steps(problem.completion)) == len(lines) <= 3
        assert "".join(WORDS.steps(problem.completion)) + WORDS.cue + problem.answer == (
            problem.completion
        )
        for line in lines:
            x, operation, y, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups()
            assert OPERATIONS[operation](int(x), int(y)) == int(result)
        assert last == f"#### {result}" == f"#### {problem.answer}"
        for number in problem.fields["numbers"].values():
            assert re.search(rf"\b{number}\b", problem.prompt)
            assert re.search(rf"\b{number}\b", problem.completion)
    for template in TEMPLATES:
        assert any(prompt.endswith(template.text.rpartition("}")[2]) for prompt in prompts)


def test_no_template_with_its_numbers_is_in_two_splits():
    def asked_of(problem):
        """The question without names and things: its other words and numbers, in order."""
        return re.sub(rf"\b({'|'.join((*NAMES, *OBJECTS, *BOXES))})\b", "_", problem.prompt)

    training = [WordProblems(seed=seed) for seed in (0, 1)]
    train = {asked_of(task.problem("train", i)) for task in training for i in range(10_000)}
    for split in ("val", "test"):
        held_out = [asked_of(WORDS.problem(split, index)) for index in range(500)]
        assert len(set(held_out)) == 500
        assert not train & set(held_out)
    assert len(train) < 8000  # the same ones do come again with other names


def test_the_result_of_a_step():
    for step, result in (
        ("He has 3+4 = 7 pens.", "7"),
        ("3*4=12, 12-2=10", "10"),
        ("That is $5 x 4 = $1,250.50 then.", "1,250.50"),
        ("x = 3 + 4", None),
        ("x = 3 + 4 = 7", "7"),
        ("= 1/2", None),
        ("7 pens", None),
        ("= " + "9" * 5000, None),
    ):
        assert result_of(step) == result
    assert with_result("7-0 = 7, so 7 of 17 or 7.5", "9") == "7-0 = 9, so 9 of 17 or 7.5"


def test_nearby_numbers_and_wrong_answers():
    for literal in ["0", "7", "1,000", "2.50", "999", "123456789012345"]:
        value = parse_number(literal)
        numbers = list(nearby_numbers(literal, Draw("nearby", literal)))
        values = [parse_number(number) for number in numbers]
        assert len(set(values)) == len(values) >= 4
        assert all(number >= 0 and 0 < abs(number - value) <= 10 for number in values)
        if "." in literal:
            assert all(number.endswith(literal[literal.index(".") :]) for number in numbers)
    for answer in ["7", "0", "1,000", "$18.00", "1/2", "1/2310", "-3"]:
        problem = Problem(prompt="?", answer=answer)
        for seed in range(30):
            wrong = GSM8K.wrong_answer(problem, Draw("wrong", seed))
            assert 0 < abs(parse_number(wrong) - parse_number(answer)) <= 10
            assert GSM8K.verify(problem, f"#### {wrong}").kind == "wrong"


def test_a_corrupted_story_is_worked_out_from_its_changed_line():
    changed = set()
    for index in range(300):
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
        later = zip(problem.fields["program"][place + 1 :], lines[place + 1 :], strict=True)
        for (left, operator, right), line in later:
            x, y = line.split("=")[0].split(operator)
            x, y = (new if left == "_" else int(x)), (new if right == "_" else int(y))
            new = OPERATIONS[operator](x, y)
            assert new >= 0
        assert made.answer == str(new) != problem.answer
    assert {(0, 1), (0, 2), (1, 2), (0, 3), (1, 3), (2, 3)} <= changed


def test_what_follows_from_a_changed_step():
    def story(third, last):
        fields = {"numbers": {"a": 3, "b": 4, "c": third}, "program": ("a+b", last)}
        return Problem(prompt="?", answer="0", fields=fields)

    times, less = story(2, "_*c"), story(7, "_-c")
    for problem, steps, number, expected in (
        (times, ["3+4=7"], "9", (True, "18")),
        (times, ["3+4=7", "\n7*2=14"], "15", (True, "15")),
        # A chain that is not the story's own: nobody knows what follows.
        (times, ["4+3=7"], "9", (True, None)),
        (times, ["3+4=7"] * 3, "9", (True, None)),
        (less, ["3+4=7"], "6", (False, "-1")),  # no result falls below 0
    ):
        assert WORDS.follow(problem, steps, number) == expected
    for seed in range(50):
        made = WORDS.corrupted(less, "3+4=7\n7-7=0\n#### 0", Draw("below", seed))
        assert int(made.answer) > 0


def test_the_corruption_never_comes_out_as_the_completion_did():
    problem = WORDS.problem("train", 1)
    chain = problem.completion.rpartition("#### ")[0]
    for seed in range(100):
        other = WORDS.corrupted(problem, problem.completion, Draw("coincidence", seed)).answer
        # This completion's slip at the end is what the changed step would lead to.
        made = WORDS.corrupted(problem, f"{chain}#### {other}", Draw("coincidence", seed))
        assert made.answer != other


def test_gsm8k_does_not_know_what_follows():
    completion = "Ann has 3+4 = 7 pens. Then 7*2 = 14.\n#### 14"
    made = GSM8K.corrupted(PROBLEM, completion, Draw("unknown"))
    assert made.answer is None
    assert completion.startswith(made.prefix[:14]) and not completion.startswith(made.prefix)
    assert GSM8K.corrupted(PROBLEM, "no sums here\n#### 7", Draw("none")) is None
    lines = "".join(f"{n}+{n}={2 * n}\n" for n in range(10, 16)) + "#### 1"
    made = [GSM8K.corrupted(PROBLEM, lines, Draw("spread", seed)) for seed in range(80)]
    assert {change.step for change in made} == set(range(6))  # any step may be the one
    # "= 1" is a beginning of "= 11": what is undone is not told by comparing texts.
    made = [GSM8K.corrupted(PROBLEM, "3-2 = 1\n1+4 = 5", Draw("grows", n)) for n in range(200)]
    grown = next(change for change in made if change.prefix == "3-2 = 11")
    assert grown.undone(["3-2 = 1", "\n1+4 = 5"]) == "3-2 = 1"


def test_equal_answers_are_equal_texts():
    for answer, *completions in (
        ("1000", "#### 1,000", "#### 1000.0"),
        ("1/2", "so 0.50", "\\boxed{1/2}"),
        ("4", "<think>3</think>#### 4"),
        (None, "<think>3", "nothing"),
    ):
        for completion in completions:
            assert GSM8K.final_answer(completion) == answer


def test_a_chain_in_other_words_says_the_same():
    for text, other in [
        ("3+4=7\n7-2=5\n#### 5", "4+3=7\n7-2=5"),
        ("He has 3 * 4 = 12 and 12-3+2 = 11.\n#### 11", "He has 4 * 3 = 12 and 12-3+2 = 11."),
        ("1+2+3=6\n#### 6", None),
        ("2 x 4 + 3 = 11\n#### 11", None),
        ("7-2=5\n#### 5", None),
        ("", None),
    ]:  # fmt: skip
        assert WORDS.reworded(text) == other, text
    for index in range(50):
        problem = WORDS.problem("test", index)
        changed = WORDS.reworded(problem.completion)
        if changed is not None:
            assert changed != problem.completion.partition("\n####")[0]
            assert WORDS.answer_follows(f"{changed}\n#### {problem.answer}")


def test_whether_an_answer_follows_from_its_chain():
    for text, follows in [
        ("3+4=7\n7-2=5\n#### 5", True),
        ("3+4=7\n7-2=5\n#### 7", False),
        ("3+4=8\n8-2=6\n#### 6", False),
        ("1,000 / 8 = 125 and 10/4 = 2.5\n#### 2.5", True),
        ("5/0 = 1\n#### 1", False),
        ("2 x 4 + 3 = 11\n#### 11", True),
        ("2 x 4 = 9\n#### 9", False),
        ("3 + 4 = 14 / 2 = 7\n#### 7", True),
        ("30 / 7 = 4\n#### 4", True),
        ("30 / 7 = 5\n#### 5", False),
        ("(1 + 2) * 3 = 9\n#### 9", True),
        ("1+2+3=6\n#### 6", True),
        ("It is 5.\n#### 5", False),
        ("#### 5", False),
        ("", False),
    ]:
        assert WORDS.answer_follows(text) == follows, text
