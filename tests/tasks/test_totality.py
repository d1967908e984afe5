"""Random and hostile texts, through everything that a task reads completions with."""

import csv
import functools
import json
import random

import pytest

from cpu_time import assert_linear, cpu_seconds
from jexit.tasks import ChainTask, Draw, make_task

KINDS = ("strict", "lenient", "wrong", "none")

DIGITS = ["0", "7", "18", "1,000", ".5", "1/2", "9" * 70, "٣٤", "²", "½", "Ⅷ", "𝟛", "೧"]
SIGNS = ["+", "++", "-", "\u2212", "*", "×", "÷", "=", "$", "%", "/", "(", ")"]
MARKERS = ["####", "#### ", "\n#### ", "#", "Answer:", "<think>", "</think>", "<|im_end|>"]
MARKUP = [
    "\\boxed{",
    "\\frac{1}{2}",
    "{",
    "}",
    "\\[",
    "**",
    "_",
    "<b>",
    "</b>",
    "```",
    "\\",
    "&lt;",
]
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


def make_exploretom(folder):
    file = folder / "stories.csv"
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.writer(lines)
        writer.writerows([("story", "question", "answer")])
        writer.writerows((STORY, "In which container is it?", answer) for answer in ANSWERS)
    return make_task("exploretom", str(file), test_every=0)


def make_gsm8k(folder):
    rows = [{"question": f"{n}?", "answer": f"Well.\n1+{n}={n + 1}\n#### {n + 1}"} for n in (6, 17)]
    file = folder / "train.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return make_task("gsm8k", str(folder))


def make_blend(folder):
    return make_task("blend", tasks=[make_task("sums"), make_task("tom")])


MAKERS = {
    "sums": lambda folder: make_task("sums", steps="mixed"),
    "word_problems": lambda folder: make_task("word_problems"),
    "tom": lambda folder: make_task("tom", steps="mixed"),
    "exploretom": make_exploretom,
    "gsm8k": make_gsm8k,
    "blend": make_blend,
}


@pytest.mark.parametrize("texts", [5_000, pytest.param(100_000, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", MAKERS)
def test_every_text_is_read(name, texts, tmp_path):
    task, draw = MAKERS[name](tmp_path), random.Random(texts)
    problems = [task.problem("train", i) for i in range(min(task.size("train") or 12, 12))]
    kinds, whole = dict.fromkeys(KINDS, 0), {}
    for number in range(texts):
        problem = problems[number % len(problems)]
        text = random_text(draw, problem.answer)
        kinds[task.verify(problem, text).kind] += 1
        for figure, (total, count) in task.text_totals([problem], [text]).items():
            assert total >= 0 and count >= 0
            before = whole.get(figure, (0, 0))
            whole[figure] = (before[0] + total, before[1] + count)
        if isinstance(task, ChainTask):
            found = task.final_answer(text)
            assert found is None or found
            steps = task.steps(text)
            assert all(steps) and text.startswith("".join(steps))
            assert task.cue in task.cue_after(text)
            made = task.corrupted(problem, text, Draw("total", number))
            assert made is None or made.answer is None or made.answer != found
    assert sum(kinds.values()) == texts
    assert min(kinds.values()) > 10, "the texts reach every verdict"
    assert all(count > 0 for _, count in whole.values())


# Repeated, they make searches start again and again that end far off, or nowhere.
REPEATED = ["#", "#### ", "####\n", "#### a\n", "#### step ", "#### 2. a\n"]
REPEATED += ["1", "1 ", "1,", "1.", "111,", "1/", "1 / ", "1 1/2 ", "$-", "++1"]
REPEATED += ["+", "-", ".", "=", "= ", "=1,", "=1+1", "3+4=7\n"]
REPEATED += [" ", "\n", "a\n", ". ", "(", ")", "[", "{", "}", "{}", "\u0130"]
REPEATED += ["\\boxed", "\\boxed{", "\\boxed{1}", "\\boxed{a ", "\\frac{", "\\frac{1}", "\\text{"]
REPEATED += ["<think>", "</think>", "answer ", "answer is ", "the answer is 1 + "]
REPEATED += ["Answer: no box\n", "not box ", "Tom Mia see box: box\n", "Tom Mia: box\n"]
AROUND = [("", ""), ("#### 1\n", "x"), ("\\boxed{", "\n#### 1")]


def hostile_texts(length):
    for unit in REPEATED:
        for before, after in AROUND:
            yield before + unit * (length // len(unit)) + after


def readings(task, problem):
    """Each way in which the task reads a completion of the problem."""
    yield lambda text: task.verify(problem, text)
    yield task.answer_mark
    yield lambda text: task.answerable(text, cut=True)
    yield lambda text: task.text_totals([problem], [text])
    if isinstance(task, ChainTask):
        yield task.steps
        yield task.final_answer
        yield task.cue_after
        yield lambda text: task.obeys(problem, text)
        yield lambda text: task.first_result(problem, text)
        yield lambda text: task.corrupted(problem, text, Draw("linear"))


@pytest.mark.parametrize(
    ("short", "long"), [(10_000, 100_000), pytest.param(100_000, 1_000_000, marks=pytest.mark.slow)]
)
@pytest.mark.parametrize("name", MAKERS)
def test_reading_takes_linear_time(name, short, long, tmp_path):
    task = MAKERS[name](tmp_path)
    for read in readings(task, task.problem("train", 0)):
        for texts in zip(hostile_texts(short), hostile_texts(long), strict=True):
            assert_linear(read, *texts)


@pytest.mark.parametrize("name", MAKERS)
def test_a_hundred_thousand_characters_are_verified_in_50_ms(name, tmp_path):
    task = MAKERS[name](tmp_path)
    for index in range(0, min(task.size("train") or 6, 6), 2):
        verify = functools.partial(task.verify, task.problem("train", index))
        for text in hostile_texts(100_000):
            assert cpu_seconds(verify, text, 0.05) <= 0.05, text[:40]
