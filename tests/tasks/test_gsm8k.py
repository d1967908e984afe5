import codecs
import functools
import json
import logging
import os
import random
import re
import sys
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jexit.tasks import answers, make_task
from jexit.tasks.base import Problem

QUESTION = "Ann has 3 pens and buys 4. How many has she?"
ANSWER = "Ann has 3+4 = <<3+4=7>>7 pens.\n#### 7"


def row(number: int) -> dict[str, str]:
    return {"question": f"Question {number}?", "answer": f"It is <<1*{number}>>so.\n#### {number}"}


def write_rows(file, rows):
    lines = [line if isinstance(line, str) else json.dumps(line) for line in rows]
    file.write_text("\n".join(lines) + "\n", "utf-8")
    return file


@pytest.fixture
def folder(tmp_path):
    write_rows(tmp_path / "train.jsonl", map(row, range(5)))
    write_rows(tmp_path / "test_a.jsonl", map(row, range(10, 12)))
    write_rows(tmp_path / "test_b.jsonl", map(row, range(20, 23)))
    return tmp_path


def test_a_folder_of_jsonl(folder):
    task = make_task("gsm8k", str(folder))
    assert [task.size(split) for split in ("train", "val", "test")] == [4, 1, 5]
    assert [task.problem("test", i).answer for i in range(5)] == ["10", "11", "20", "21", "22"]
    assert task.skipped_rows == {"train": 0, "val": 0, "test": 0}
    write_rows(folder / "val.jsonl", map(row, range(30, 33)))
    task = make_task("gsm8k", str(folder))
    assert [task.size(split) for split in ("train", "val", "test")] == [5, 3, 5]


def test_prompt_and_reference_completion(tmp_path):
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


def test_a_byte_order_mark_costs_no_row(folder):
    for name in ("train.jsonl", "test_a.jsonl"):
        (folder / name).write_bytes(codecs.BOM_UTF8 + (folder / name).read_bytes())
    task = make_task("gsm8k", str(folder))
    assert task.size("train") + task.size("val") == task.size("test") == 5
    assert task.problem("train", 0).prompt.startswith("Question 0?")
    assert task.skipped_rows == {"train": 0, "val": 0, "test": 0}


def test_one_file_keeps_a_part_for_testing(tmp_path):
    rows = [row(i) for i in range(24)] + [row(7), row(8)]  # a held-out and a kept question again
    task = make_task("gsm8k", str(write_rows(tmp_path / "mine.jsonl", rows)))
    test = [task.problem("test", i).answer for i in range(task.size("test"))]
    train = [task.problem("train", i).answer for i in range(task.size("train"))]
    val = [task.problem("val", i).answer for i in range(task.size("val"))]
    assert test == ["7", "15", "23", "7"] and val == ["17"]
    assert len(train) == 21 and not set(train) & {*test, *val}
    whole = make_task("gsm8k", str(tmp_path / "mine.jsonl"), test_every=0)
    assert [whole.size(split) for split in ("train", "val", "test")] == [25, 1, 0]


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
        assert (task.size("train"), task.size("val")) == (1, 1)
        assert (task.size("train"), task.size("val")) == (1, 1)
    assert task.skipped_rows["train"] == 9
    assert [task.problem(split, 0).answer for split in ("train", "val")] == ["0", "1"]
    (warning,) = caplog.messages
    assert warning.startswith("skipped 9 of 11 rows of the train split")
    assert f"{file}:2: not a JSON object" in warning
    assert f"{file}:3: no 'answer'" in warning
    assert "4 more" in warning


def test_missing_data_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no data set at .*nowhere; set config.task.path"):
        make_task("gsm8k", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"holds no GSM8K data.*config.task.path"):
        make_task("gsm8k", str(tmp_path)).size("train")


@given(text=st.text())
def test_verify_is_total(text):
    task = make_task("gsm8k")
    verdict = task.verify(Problem(prompt="?", answer="7"), text)
    assert verdict.kind in ("strict", "lenient", "wrong", "none")


@pytest.fixture
def tfds_folder(tmp_path):
    """GSM8K as tensorflow-datasets' own builder writes it, with the download replaced."""
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.text.gsm8k import gsm8k

    sources = {
        split: str(write_rows(tmp_path / f"{name}.jsonl", map(row, numbers)))
        for split, (name, numbers) in {
            "train": ("train", range(6)),
            "test": ("test", range(6, 12)),
        }.items()
    }
    files = mock.patch.object(
        tfds.download.DownloadManager,
        "download_and_extract",
        lambda self, urls: {split: sources[split.partition("_")[0]] for split in urls},
    )
    data_dir = tmp_path / "data"
    with files:
        gsm8k.Gsm8k(data_dir=str(data_dir), file_format="array_record").download_and_prepare()
    return data_dir


def test_tensorflow_datasets_round_trip(tfds_folder):
    (version,) = tfds_folder.glob("gsm8k/*")
    expected = {json.dumps(row(i)["question"]) for i in range(6)}
    for path in (tfds_folder, version):
        task = make_task("gsm8k", str(path))
        assert [task.size(split) for split in ("train", "val", "test")] == [5, 1, 6]
        problems = [*(task.problem("train", i) for i in range(5)), task.problem("val", 0)]
        assert {json.dumps(problem.fields["question"]) for problem in problems} == expected
        for problem in problems:
            assert problem.fields["question"] == f"Question {problem.answer}?"
            assert problem.completion == f"It is so.\n#### {problem.answer}"
    assert "tensorflow" not in sys.modules


def test_the_default_is_the_prepared_data_directory(tfds_folder, monkeypatch):
    from tensorflow_datasets.text.gsm8k import gsm8k

    at_home = functools.partial(gsm8k.Gsm8k, data_dir=str(tfds_folder))
    monkeypatch.setattr(gsm8k, "Gsm8k", at_home)
    assert make_task("gsm8k").size("test") == 6


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch):
    tfds = pytest.importorskip("tensorflow_datasets")
    from tensorflow_datasets.text.gsm8k import gsm8k

    def refuse(*_):
        raise OSError("no network")

    at_home = functools.partial(gsm8k.Gsm8k, data_dir=str(tmp_path / "data"))
    monkeypatch.setattr(gsm8k, "Gsm8k", at_home)
    monkeypatch.setattr(tfds.download.DownloadManager, "download_and_extract", refuse)
    with pytest.raises(ValueError, match=r"no network.*set config.task.path"):
        make_task("gsm8k").size("train")
    assert not list(tmp_path.glob("data/gsm8k/*"))


def test_shots_are_training_examples_and_never_the_problem(folder):
    task = make_task("gsm8k", str(folder), shots=3)
    plain = make_task("gsm8k", str(folder))
    examples = {}
    for index in range(4):
        problem = plain.problem("train", index)
        examples[problem.prompt] = problem.completion
    for split in ("train", "val", "test"):
        for index in range(plain.size(split)):
            problem = task.problem(split, index)
            questions = [question for question, _ in problem.shots]
            assert len(set(questions)) == 3 and problem.prompt not in questions
            assert all(examples[question] == answer for question, answer in problem.shots)
            assert problem.prompt == plain.problem(split, index).prompt
    first = task.problem("test", 0).shots
    assert all(task.problem("test", index).shots == first for index in range(5))
    assert plain.problem("train", 0).shots == ()


def test_the_seed_draws_the_shots(folder):
    def shots(seed):
        return make_task("gsm8k", str(folder), shots=2, seed=seed).problem("test", 0).shots

    assert shots(0) == shots(0)
    assert len({shots(seed) for seed in range(12)}) > 3
    assert {question for seed in range(40) for question, _ in shots(seed)} == {
        make_task("gsm8k", str(folder)).problem("train", index).prompt for index in range(4)
    }


def test_a_question_that_is_there_twice_is_no_shot_of_its_twin(tmp_path):
    rows = [row(0), row(0), row(1), row(2), row(3)]  # the last one is to validate with
    write_rows(tmp_path / "train.jsonl", rows)
    task = make_task("gsm8k", str(tmp_path), shots=2)
    for index in range(4):
        problem = task.problem("train", index)
        assert problem.prompt not in [question for question, _ in problem.shots]
    with pytest.raises(ValueError, match=r"3 shots need 4 different .* there are 3; lower config"):
        make_task("gsm8k", str(tmp_path), shots=3).problem("train", 0)


def test_training_rows_that_are_test_rows_too_are_left_out(tmp_path, caplog):
    write_rows(tmp_path / "train.jsonl", map(row, range(10)))
    write_rows(tmp_path / "test.jsonl", map(row, range(8, 12)))
    task = make_task("gsm8k", str(tmp_path))
    prompts = {
        split: {task.problem(split, index).prompt for index in range(task.size(split))}
        for split in ("train", "val", "test")
    }
    assert len(prompts["test"]) == 4 and len(prompts["train"] | prompts["val"]) == 8
    assert not prompts["test"] & (prompts["train"] | prompts["val"])
    assert "left out 2 of 10 training rows, which are in the val or test split too" in caplog.text


def test_a_thought_is_not_judged(folder):
    task = make_task("gsm8k", str(folder))
    problem = task.problem("train", 3)
    assert task.verify(problem, "<think>\n1? 2?\n</think>\n\n#### 3").kind == "strict"
    assert task.verify(problem, "<think>\nIt is 3.\n#### 3").kind == "none"


def published_form(draw):
    """An answer in the forms of the published ones, and its number."""
    number = draw.choice([draw.randrange(10), draw.randrange(1000), draw.randrange(10**7)])
    text = draw.choice([str(number), f"{number:,}", f"{number}.00"])
    lines = [
        f"There are {a}*{b}=<<{a}*{b}={a * b}>>{a * b} of them{draw.choice(['.', '', '!'])}"
        for a, b in [(draw.randrange(99), draw.randrange(99)) for _ in range(draw.randrange(1, 6))]
    ]
    return "\n".join([*lines, f"#### {text}"]), number


def test_answers_of_the_published_forms_are_read_back(tmp_path):
    draw = random.Random(0)
    made = [published_form(draw) for _ in range(2000)]
    rows = [{"question": f"Question {i}?", "answer": text} for i, (text, _) in enumerate(made)]
    write_rows(tmp_path / "test.jsonl", rows)
    task = make_task("gsm8k", str(tmp_path))
    assert task.size("test") == len(made)
    for index, (_, number) in enumerate(made):
        problem = task.problem("test", index)
        assert "<<" not in problem.completion
        assert task.verify(problem, problem.completion).kind == "strict"
        assert task.final_answer(problem.completion) == str(number)
        assert "".join(task.steps(problem.completion)) + task.cue + problem.answer == (
            problem.completion
        )


@pytest.mark.weights
def test_every_published_training_answer_is_read_back():
    """`JEXIT_GSM8K` names a folder with the published train.jsonl."""
    path = os.environ.get("JEXIT_GSM8K", "")
    if not path:
        pytest.skip("JEXIT_GSM8K names no folder with GSM8K's train.jsonl")
    task = make_task("gsm8k", path)
    assert task.size("train") == 7473 and task.skipped_rows["train"] == 0
    for index in range(7473):
        problem = task.problem("train", index)
        # All published answers are whole numbers, some with commas.
        published = int(re.search(r"#### ([-0-9,]+)\Z", problem.completion)[1].replace(",", ""))
        assert answers.final_number(problem.completion) == published
        assert task.verify(problem, problem.completion).kind == "strict"
        assert "".join(task.steps(problem.completion)) + task.cue + problem.answer == (
            problem.completion
        )
