import re

from hypothesis import given
from hypothesis import strategies as st

from jexit.tasks import make_task
from jexit.tasks.word_problems import BOXES, NAMES, OBJECTS, TEMPLATES

OPERATIONS = {"+": lambda x, y: x + y, "-": lambda x, y: x - y, "*": lambda x, y: x * y}


def test_every_line_of_a_completion_is_true_arithmetic():
    task = make_task("word_problems")
    for index in range(1000):
        problem = task.problem("train", index)
        *lines, last = problem.completion.split("\n")
        assert 1 <= len(lines) <= 3
        for line in lines:
            x, operation, y, result = re.fullmatch(r"(\d+)([-+*])(\d+)=(\d+)", line).groups()
            assert OPERATIONS[operation](int(x), int(y)) == int(result)
        assert last == f"#### {result}" == f"#### {problem.answer}"


def test_every_given_number_is_in_the_question_and_used():
    task = make_task("word_problems")
    for index in range(300):
        problem = task.problem("test", index)
        for number in problem.fields["numbers"].values():
            assert re.search(rf"\b{number}\b", problem.prompt)
            assert re.search(rf"\b{number}\b", problem.completion)


def test_no_template_with_its_numbers_is_in_two_splits():
    training = [make_task("word_problems", seed=seed) for seed in (0, 1)]
    train = {asked_of(task.problem("train", i).prompt) for task in training for i in range(20_000)}
    task = make_task("word_problems")
    for split in ("val", "test"):
        held_out = [asked_of(task.problem(split, index).prompt) for index in range(500)]
        assert len(set(held_out)) == 500
        assert not train & set(held_out)
    assert len(train) < 8000  # the same ones do come again with other names


def asked_of(prompt):
    """The question without names and things: its other words and numbers, in order."""
    return re.sub(rf"\b({'|'.join((*NAMES, *OBJECTS, *BOXES))})\b", "_", prompt)


def test_all_templates_occur():
    task = make_task("word_problems")
    train = {task.problem("train", index).prompt for index in range(3000)}
    endings = {template.text.rpartition("}")[2] for template in TEMPLATES}
    assert len(TEMPLATES) >= 12
    for ending in endings:
        assert any(prompt.endswith(ending) for prompt in train)


@given(text=st.text())
def test_verify_is_total(text):
    task = make_task("word_problems")
    verdict = task.verify(task.problem("train", 0), text)
    assert verdict.kind in ("strict", "lenient", "wrong", "none")
