import codecs
import json
import logging
import os
import random
import re

import pytest

from jexit.tasks import answers, make_task
from jexit.tasks.base import SPLITS

QUESTION = "Ann has 3 pens and buys 4. How many has she?"
ANSWER = "Ann has 3+4 = <<3+4=7>>7 pens.\n#### 7"


def row(number):
    return {"question": f"Question {number}?", "answer": f"It is <<1*{number}>>so.\n#### {number}"}


def write_rows(file, rows):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


def sizes(task):
    return [task.size(split) for split in SPLITS]


def answers_of(task, split):
    return [task.problem(split, index).answer for index in range(task.size(split))]


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "train.jsonl", map(row, range(5)))
    write_rows(tmp_path / "test_a.jsonl", map(row, range(10, 12)))
    write_rows(tmp_path / "test_b.jsonl", map(row, range(20, 23)))
    return tmp_path


def test_a_folder_of_jsonl(folder, caplog):
    for name in ("train.jsonl", "test_a.jsonl"):  # a byte order mark costs no row
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    task = make_task("gsm8k", str(folder))
    assert sizes(task) == [4, 1, 5]
    assert answers_of(task, "test") == ["10", "11", "20", "21", "22"]
    write_rows(folder / "val.jsonl", map(row, range(30, 33)))
    assert sizes(make_task("gsm8k", str(folder))) == [5, 3, 5]
    assert not caplog.messages
    # Training rows that are test rows too are left out.
    write_rows(folder / "test_c.jsonl", map(row, range(3, 6)))
    task = make_task("gsm8k", str(folder))
    assert answers_of(task, "train") == ["0", "1", "2"]
    assert "left out 2 of 5 training rows because they are also in the val or test" in caplog.text


def test_one_file_keeps_a_part_for_testing(tmp_path):
    rows = [row(i) for i in range(24)] + [row(7), row(8)]  # a held-out and a kept question again
    task = make_task("gsm8k", str(write_rows(tmp_path / "mine.jsonl", rows)))
    train, val, test = (answers_of(task, split) for split in SPLITS)
    assert test == ["7", "15", "23", "7"] and val == ["17"]
    assert len(train) == 21 and not set(train) & {*test, *val}
    assert sizes(make_task("gsm8k", str(tmp_path / "mine.jsonl"), test_every=0)) == [25, 1, 0]


def test_prompt_reference_completion_and_verdicts(tmp_path):
    file = write_rows(tmp_path / "test.jsonl", [{"question": QUESTION, "answer": ANSWER}])
    task = make_task("gsm8k", str(file))
    problem = task.problem("test", 0)
    assert problem.prompt.startswith(QUESTION + "\n\n")
    assert "step by step" in problem.prompt and "#### answer" in problem.prompt
    assert problem.completion == "Ann has 3+4 = 7 pens.\n#### 7"
    assert task.verify(problem, problem.completion).kind == "strict"
    assert task.verify(problem, "so \\boxed{7}").kind == "lenient"
    assert task.verify(problem, "#### 8").kind == "wrong"
    assert make_task("gsm8k", str(file), instruction="").problem("test", 0).prompt == QUESTION


def test_corrupt_rows_are_counted_and_named(tmp_path, caplog):
    file = write_rows(
        tmp_path / "train.jsonl",
        [
            row(0),
            '{"question": "cut sho',
            {"question": "no answer here"},
            {"question": 3, "answer": "#### 3"},
            "",
            {"question": "What?", "answer": "no marker 3"},
            {"question": "What?", "answer": "#### many"},
            "[1, 2]",
            '{"question": "\\ud800?", "answer": "#### 3"}',
            "[" * 100_000,
            row(1),
        ],
    )
    file.write_bytes(file.read_bytes() + b'{"question": "\xff", "answer": "#### 1"}\n')
    task = make_task("gsm8k", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert answers_of(task, "train") + answers_of(task, "val") == ["0", "1"]
    (warning,) = caplog.messages
    assert warning.startswith("skipped 9 of 11 rows of the train split")
    assert f"{file}:2: not a JSON object" in warning
    assert f"{file}:3: no 'answer'" in warning
    assert "4 more" in warning


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set at .*nowhere; set config.task.path"):
        make_task("gsm8k", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"contains no GSM8K data.*config.task.path"):
        make_task("gsm8k", str(tmp_path)).size("train")


def test_shots_are_training_examples_drawn_by_the_seed_and_never_the_problem(folder):
    plain = make_task("gsm8k", str(folder))
    trained = [plain.problem("train", index) for index in range(4)]
    examples = {problem.prompt: problem.completion for problem in trained}
    task = make_task("gsm8k", str(folder), shots=3)
    for split in SPLITS:
        for index in range(plain.size(split)):
            problem = task.problem(split, index)
            questions = [said["content"] for said in problem.earlier[::2]]
            solved = [said["content"] for said in problem.earlier[1::2]]
            assert [said["role"] for said in problem.earlier] == ["user", "assistant"] * 3
            assert len(set(questions)) == 3 and problem.prompt not in questions
            assert [examples[question] for question in questions] == solved
            assert problem.prompt == plain.problem(split, index).prompt
            assert split == "train" or problem.earlier == task.problem("test", 0).earlier
    assert plain.problem("train", 0).earlier == ()

    def shots(seed):
        task = make_task("gsm8k", str(folder), shots=2, seed=seed)
        return tuple(said["content"] for said in task.problem("test", 0).earlier[::2])

    assert shots(0) == shots(0)
    assert len({shots(seed) for seed in range(12)}) > 3
    assert {question for seed in range(40) for question in shots(seed)} == set(examples)


def test_a_question_that_is_there_twice_is_no_shot_of_its_twin(tmp_path):
    rows = [row(0), row(0), row(1), row(2), row(3)]  # the last one is to validate with
    write_rows(tmp_path / "train.jsonl", rows)
    task = make_task("gsm8k", str(tmp_path), shots=2)
    for index in range(4):
        problem = task.problem("train", index)
        assert problem.prompt not in [said["content"] for said in problem.earlier]
    with pytest.raises(ValueError, match=r"3 shots need 4 different .* there are only 3; lower"):
        make_task("gsm8k", str(tmp_path), shots=3).problem("train", 0)


def check_read_back(task, split, index, number):
    """The reference completion is strict, gives the number, and is its own chain and cue."""
    problem = task.problem(split, index)
    assert "<<" not in problem.completion
    assert task.verify(problem, problem.completion).kind == "strict"
    assert answers.final_number(problem.completion) == number
    assert "".join(task.steps(problem.completion)) + task.cue + problem.answer == problem.completion


def test_answers_of_the_published_forms_are_read_back(tmp_path):
    draw, rows, numbers = random.Random(0), [], []
    for index in range(1000):
        numbers.append(
            draw.choice([draw.randrange(10), draw.randrange(1000), draw.randrange(10**7)])
        )
        text = draw.choice([str(numbers[-1]), f"{numbers[-1]:,}", f"{numbers[-1]}.00"])
        factors = [(draw.randrange(99), draw.randrange(99)) for _ in range(draw.randrange(1, 6))]
        lines = [
            f"There are {a}*{b}=<<{a}*{b}={a * b}>>{a * b} of them{draw.choice(['.', '', '!'])}"
            for a, b in factors
        ]
        answer = "\n".join([*lines, f"#### {text}"])
        rows.append({"question": f"Question {index}?", "answer": answer})
    task = make_task("gsm8k", str(write_rows(tmp_path / "test.jsonl", rows)))
    for index, number in enumerate(numbers):
        check_read_back(task, "test", index, number)


@pytest.mark.weights
def test_every_published_training_answer_is_read_back(caplog):
    """`JEXIT_GSM8K` names a folder with the published train.jsonl."""
    path = os.environ.get("JEXIT_GSM8K", "")
    if not path:
        pytest.skip("JEXIT_GSM8K names no folder with GSM8K's train.jsonl")
    task = make_task("gsm8k", path)
    assert sum(map(task.size, ("train", "val"))) == 7473 and not caplog.messages
    for index in range(task.size("train")):
        # All published answers are whole numbers, some with commas.
        published = re.search(r"#### ([-0-9,]+)\Z", task.problem("train", index).completion)
        check_read_back(task, "train", index, int(published[1].replace(",", "")))
