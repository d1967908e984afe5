"""Random and hostile texts, through everything that a task reads completions with."""

import csv
import json
import random
from fractions import Fraction

import pytest

from cpu_time import assert_linear, cpu_seconds
from jexit.tasks import Attempt, ChainTask, Draw, Problem, answers, make_task

DIGITS = ["0", "7", "18", "1,000", ".5", "1/2", "9" * 70, "٣٤", "²", "½", "Ⅷ", "𝟛", "೧"]
SIGNS = ["+", "++", "-", "\u2212", "*", "×", "÷", "=", "$", "%", "/", "(", ")"]
MARKERS = ["####", "#### ", "\n#### ", "#", "Answer:", "<think>", "</think>", "<|im_end|>"]
MARKUP = ["\\boxed{", "\\frac{1}{2}", "{", "}", "\\[", "**", "_", "<b>", "```", "\\", "&lt;"]
SPACES = [" ", "\n", "\r\n", "\t", "\x00", "\x85", "\u2028", "\u200b", "\ufeff", "\u00a0"]
WORDS = ["Tom", "Mia", "see", "leaves", "box", "jar", "hall", "oak chest", "unknown", "Yes", "no"]
WORDS += ["not", "doesn’t", "knows about it", "that", "the", "İßﬁ", "e\u0301", "ffi\u0130", "é"]
WORDS += ["Tom Mia see box: box\n", "Mia leaves: Tom\n", "3+4=7\n", "+0295", "++15"]
PIECES = [*DIGITS, *SIGNS, *MARKERS, *MARKUP, *SPACES, *WORDS]

STORY = "Ida entered the yard. Ida moved the lamp to the oak chest, which is also located in it."
ANSWERS = ("oak chest", "unknown", "yes", "no", "knows about it", "does not know about it")


def random_text(draw, answer):
    """Pieces that tasks look for, any characters, or both; one in three ends in an answer."""
    parts = draw.choices(PIECES, k=draw.randrange(12))
    if draw.random() < 0.3:  # surrogates included
        last = draw.choice((0x80, 0x3000, 0x110000))
        parts += [chr(draw.randrange(last)) for _ in range(draw.randrange(8))]
        draw.shuffle(parts)
    if draw.random() < 0.33:
        parts += [draw.choice(("", "\n")), draw.choice(MARKERS[:3]), answer]
        parts.append(draw.choice(("", "", ".", "\n", " and on")))
    return "".join(parts)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """Every task, each with some problems; the last two read as the others do."""
    folder = tmp_path_factory.mktemp("files")
    with (folder / "stories.csv").open("w", newline="", encoding="utf-8") as lines:
        rows = [(STORY, "In which container is it?", answer) for answer in ANSWERS]
        csv.writer(lines).writerows([("story", "question", "answer"), *rows])
    rows = [{"question": f"{n}?", "answer": f"Well.\n1+{n}={n + 1}\n#### {n + 1}"} for n in (6, 17)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    made = [
        make_task("sums", steps="mixed"),
        make_task("gsm8k", str(folder)),
        make_task("tom", steps="mixed"),
        make_task("exploretom", str(folder / "stories.csv"), test_every=0),
        make_task("word_problems"),
        make_task("blend", parts=("sums", "tom"), steps="free"),
    ]
    return [
        (task, [task.problem("train", i) for i in range(task.size("train") or 12)]) for task in made
    ]


def check_reading(task, problem, text, number=0):
    """What holds of every text; returns the verdict and the text's totals."""
    kind = task.verify(problem, text).kind
    for value in (answers.parse_number(text), answers.final_number(text)):
        assert isinstance(value, Fraction | None)
    assert task.answerable(text, cut=True) in ("", text)
    totals = task.text_totals([problem], [Attempt(text=text)])
    assert all(total >= 0 and count >= 0 for total, count in totals.values())
    if isinstance(task, ChainTask):
        steps, found = task.steps(text), task.final_answer(text)
        assert all(steps) and text.startswith("".join(steps))
        assert found is None or found
        assert task.cue_after(text).endswith(task.cue)
        made = task.corrupted(problem, text, Draw("total", number))
        if made is not None:
            assert made.answer is None or made.answer != found
            # Undone, it is the completion up to the very step that was changed.
            undone = made.undone(steps)
            assert text.startswith(undone) and undone != made.prefix
            assert made.prefix.startswith("".join(steps[: made.step]))
    return kind, totals


@pytest.mark.parametrize("texts", [2_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_every_text_is_read(tasks, texts):
    for task, problems in tasks:
        draw, kinds, counts = random.Random(texts), [], {}
        for number in range(texts):
            problem = problems[number % len(problems)]
            text = random_text(draw, problem.answer)
            kind, totals = check_reading(task, problem, text, number)
            kinds.append(kind)
            for name, (_, count) in totals.items():
                counts[name] = counts.get(name, 0) + count
        assert set(kinds) == {"strict", "lenient", "wrong", "none"}, "texts reach every verdict"
        assert all(counts.values())


# Repeated, they make searches start again and again that end far off, or nowhere.
REPEATED = ["#", "#### ", "####\n", "#### a\n", "#### step ", "#### 2. a\n"]
REPEATED += ["1", "1 ", "1,", "1.", "111,", "1/", "1 / ", "1 1/2 ", "$-", "++1"]
REPEATED += ["+", "-", ".", "=", "= ", "=1,", "=1+1", "3+4=7\n"]
REPEATED += [" ", "\n", "a\n", ". ", "(", ")", "[", "{", "}", "{}", "\u0130"]
REPEATED += ["\\boxed", "\\boxed{", "\\boxed{1}", "\\boxed{a ", "\\frac{", "\\frac{1}", "\\text{"]
REPEATED += ["<think>", "</think>", "answer ", "answer is ", "the answer is 1 + "]
REPEATED += ["Answer: no box\n", "not box ", "is ", "Tom Mia see box: box\n", "Tom Mia: box\n"]
AROUND = [("", ""), ("#### 1\n", "x"), ("\\boxed{", "\n#### 1")]


def hostile_texts(length):
    for unit in REPEATED:
        for before, after in AROUND:
            yield before + unit * (length // len(unit)) + after


def readings(task, problem):
    """Each way in which the task reads a completion of the problem."""
    yield lambda text: task.verify(problem, text)
    yield task.answer_mark
    yield lambda text: task.text_totals([problem], [Attempt(text=text)])
    if isinstance(task, ChainTask):
        yield task.steps
        yield task.final_answer
        yield task.cue_after
        yield lambda text: task.obeys(problem, text)
        yield lambda text: task.first_result(problem, text)
        yield lambda text: task.corrupted(problem, text, Draw("linear"))


@pytest.mark.parametrize("length", [4_000, pytest.param(100_000, marks=pytest.mark.slow)])
def test_reading_takes_linear_time(tasks, length):
    for task, problems in tasks[:4]:
        for read in readings(task, problems[0]):
            for texts in zip(hostile_texts(length), hostile_texts(10 * length), strict=True):
                assert_linear(read, *texts)


@pytest.mark.slow
def test_a_hundred_thousand_characters_are_verified_in_50_ms(tasks):
    for task, problems in tasks[:4]:
        for text in hostile_texts(100_000):
            for problem in problems[:6:2] if task.name == "exploretom" else problems[:1]:
                seconds = cpu_seconds(lambda t, p=problem, v=task.verify: v(p, t), text, 0.05)
                assert seconds <= 0.05, (task.name, text[:40])


def test_places_are_found_in_linear_time(tasks):
    """A story may be as hostile as a completion."""
    task, (problem, *_) = tasks[3]
    for part in (
        *("moved ", "moved it to ", "moved it to the yard, leaving the oak chest ", "entered "),
        *("moved it to the yard, leaving ", "moved to to to to to to to to, leaving "),
        *("left the yard, ", "located in ", "is in", "in its original location "),
    ):

        def read(story):
            fields = {**problem.fields, "story": story}
            asked = Problem(prompt="?", answer="oak chest", fields=fields)
            task.verify(asked, "the oak chest")

        short, medium, long = (part * (length // len(part)) for length in (1_000, 10_000, 100_000))
        assert_linear(read, short, medium)
        assert_linear(read, medium, long)
