import codecs
import csv
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cpu_time import assert_linear
from jexit.tasks import ExploreToM, make_task, phrases
from jexit.tasks.base import Problem
from jexit.tasks.exploretom import KNOWLEDGE, KNOWS, KNOWS_NOT, candidates, style_of

STORY = (
    "Ida entered the boat house. Ida moved the lamp to the oak chest, which is also located in the "
    "boat house. Otto told privately to Ida that the lamp is in the iron trunk. Otto left the yard."
)


def row(number, answer="oak chest", **more):
    story = f"Ida entered room {number}. {STORY}"
    return {"story": story, "question": "In which container is the lamp?", "answer": answer} | more


def write(file, rows, columns=("story", "question", "answer")):
    with file.open("w", newline="", encoding="utf-8") as lines:
        writer = csv.DictWriter(lines, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    return file


def problem(answer, question="Where?"):
    fields = {"story": STORY, "question": question, "style": style_of(answer)}
    return Problem(prompt="?", answer=answer, fields=fields)


@pytest.fixture(scope="module")
def task(tmp_path_factory):
    return ExploreToM(path=write(tmp_path_factory.mktemp("csv") / "stories.csv", [row(0)]))


def test_prompts_hold_story_question_and_format(tmp_path):
    file = write(tmp_path / "test.csv", [row(1)])
    task = make_task("exploretom", str(file))
    got = task.problem("test", 0)
    story = row(1)["story"]
    assert got.prompt.startswith(f"{story}\n\nIn which container is the lamp?\n\n")
    assert got.prompt.endswith("\n#### answer")
    assert (got.answer, got.completion) == ("oak chest", None)
    assert got.fields["story"] == story
    bare = make_task("tom", str(file), instruction="").problem("test", 0)
    assert bare.prompt == f"{story}\n\nIn which container is the lamp?"


def test_a_byte_order_mark_is_no_part_of_the_first_column(tmp_path):
    file = write(tmp_path / "test.csv", [row(1), row(2)])
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    assert make_task("tom", str(file)).size("test") == 2


def test_a_file_keeps_whole_stories_for_testing(tmp_path):
    rows = [row(number // 3, answer=f"chest {number}") for number in range(48)]
    task = make_task("exploretom", str(write(tmp_path / "mine.csv", rows)))
    sides = {
        split: [task.problem(split, i) for i in range(task.size(split))]
        for split in ("train", "val", "test")
    }
    assert [p.answer for p in sides["test"]] == [f"chest {n}" for n in (21, 22, 23, 45, 46, 47)]
    stories = {split: {p.fields["story"] for p in problems} for split, problems in sides.items()}
    assert sum(map(len, stories.values())) == len(set().union(*stories.values())) == 16
    assert [len(problems) for problems in sides.values()] == [39, 3, 6]
    whole = make_task("exploretom", str(tmp_path / "mine.csv"), test_every=0)
    assert [whole.size(split) for split in ("train", "val", "test")] == [45, 3, 0]


def test_folders(tmp_path):
    write(tmp_path / "a.csv", map(row, range(8)))
    write(tmp_path / "b.csv", map(row, range(8, 16)))
    task = make_task("exploretom", str(tmp_path))
    assert [task.size(split) for split in ("train", "val", "test")] == [13, 1, 2]
    write(tmp_path / "train_1.csv", map(row, range(3)))
    write(tmp_path / "test_1.csv", map(row, range(3, 5)))
    write(tmp_path / "test_2.csv", map(row, range(5, 6)))
    task = make_task("exploretom", str(tmp_path))
    assert [task.size(split) for split in ("train", "val", "test")] == [2, 1, 3]
    write(tmp_path / "val.csv", map(row, range(6, 8)))
    task = make_task("exploretom", str(tmp_path))
    assert [task.size(split) for split in ("train", "val", "test")] == [3, 2, 3]


def test_surplus_columns_and_a_byte_order_mark_do_no_harm(tmp_path):
    file = write(tmp_path / "x.csv", [row(0, index="7")], ("index", "story", "question", "answer"))
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes())
    assert make_task("exploretom", str(file)).problem("train", 0).answer == "oak chest"


def test_corrupt_rows_are_counted_and_named(tmp_path, caplog):
    rows = [row(0), row(1, answer=""), row(2, answer="..."), row(3, story="  "), row(4)]
    file = write(tmp_path / "train.csv", rows)
    with file.open("ab") as lines:
        lines.write(b"only a story\r\n")
        lines.write(b'"\xff story",Where?,box\r\n')
        lines.write(b"x" * 200_000 + b",Where?,box\r\n")
        lines.write(b"A last story.,Where?,box\r\n")
        lines.write(b"A lamp, a chest,Where?,box\r\n")
        lines.write(b'"cut short, Where?')
    task = make_task("exploretom", str(tmp_path))
    with caplog.at_level(logging.WARNING):
        assert (task.size("train"), task.size("val")) == (2, 1)
        assert (task.size("train"), task.size("val")) == (2, 1)
    assert task.skipped_rows["train"] == 8
    assert [task.problem("train", i).answer for i in range(2)] == ["oak chest", "oak chest"]
    assert task.problem("val", 0).answer == "box"
    (warning,) = caplog.messages
    assert warning.startswith(f"skipped 8 of 11 rows of the train split: {file}:3: 'answer' is not")
    assert "'answer' has no word" in warning and "'story' is not a text" in warning
    assert "holds half a character" in warning and "3 more" in warning


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"got no path; set config\.task\.path to a CSV file"):
        make_task("exploretom")
    with pytest.raises(FileNotFoundError, match=r"no data set at .*nowhere; set config.task.path"):
        make_task("exploretom", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"holds no CSV file; set config.task.path"):
        make_task("exploretom", str(tmp_path)).size("train")
    for text in ("story,answer\nx,y\n", ""):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=r"no column '.*'; its first line must name the col"):
            make_task("exploretom", str(tmp_path)).size("train")


def test_places_are_found_in_the_story():
    found = set(candidates(problem("the attic", "Where was it before Ida moved it to the vase?")))
    assert {"the boat house", "the oak chest", "the iron trunk", "the yard", "the vase"} <= found
    assert "the attic" in found


@pytest.mark.parametrize(
    "part",
    [
        "moved ",
        "moved it to ",
        "moved it to the yard, leaving the oak chest ",
        "moved it to the yard, leaving ",
        "moved to to to to to to to to, leaving ",
        "entered ",
        "left the yard, ",
        "located in ",
        "is in",
        "in its original location ",
    ],
)
def test_places_are_found_in_linear_time(task, part):
    def read(story):
        asked = problem("oak chest", "In which container is the lamp?")
        asked.fields["story"] = story
        task.verify(asked, "the oak chest")

    texts = (part * (length // len(part)) for length in (1_000, 10_000, 100_000))
    short, medium, long = texts
    assert_linear(read, short, medium)
    assert_linear(read, medium, long)


VERDICTS = [
    ("oak chest", "#### oak chest", "strict"),
    ("oak chest", "#### The oak chest.", "strict"),
    ("the oak chest", "So:\n#### **Oak Chest**", "strict"),
    ("oak chest", "#### The lamp is in the oak chest.", "lenient"),
    ("oak chest", "She put it into the oak chest", "lenient"),
    ("oak chest", "Not in the iron trunk but in the oak chest.", "lenient"),
    ("oak chest", "It was in the oak chest and is now in the iron trunk.", "wrong"),
    ("oak chest", "#### iron trunk", "wrong"),
    ("oak chest", "#### chest", "wrong"),
    ("oak chest", "Who knows?", "none"),
    ("boat house", "In the Boat House, then.", "lenient"),
    ("unknown", "#### unknown", "strict"),
    ("unknown", "That cannot be determined from the story.", "lenient"),
    ("unknown", "#### oak chest", "wrong"),
    ("oak chest", "Unknown.", "wrong"),
    ("yes", "#### Yes", "strict"),
    ("yes", "Yes, she does.", "lenient"),
    ("no", "Nothing is known.", "none"),
    ("no", "#### No, Otto left.", "lenient"),
    ("no", "Not yes: no", "lenient"),
    ("no", "yes", "wrong"),
    ("knows about it", "#### knows about it", "strict"),
    ("knows about it", "#### does not know about it", "wrong"),
    ("knows about it", "Otto thinks that Ida knows about it.", "lenient"),
    ("does not know about it", "#### Does not know about it.", "strict"),
    ("does not know about it", "#### knows about it", "wrong"),
    ("does not know about it", "Ida doesn't know about it", "lenient"),
    ("does not know about it", "", "none"),
    # A denied answer is not given.
    ("oak chest", "#### not oak chest", "wrong"),
    ("oak chest", "#### not in the oak chest", "wrong"),
    ("oak chest", "It is not in the oak chest.", "none"),
    ("oak chest", "It is no longer in the iron trunk, it is in the oak chest.", "lenient"),
    ("iron trunk", "It's in the iron trunk and no longer in the oak chest.", "lenient"),
    ("unknown", "#### not unknown", "wrong"),
    ("unknown", "#### It is not mentioned.", "lenient"),
    ("yes", "#### not yes", "wrong"),
    ("no", "#### not no", "wrong"),
    ("no", "It is not yes. No.", "lenient"),
    ("knows about it", "#### not knows about it", "wrong"),
    ("does not know about it", "#### not does not know about it", "wrong"),
    ("knows about it", "#### She does not really know about it.", "wrong"),
    ("does not know about it", "#### She does not really know about it.", "lenient"),
    ("does not know about it", "#### no knowledge of it; she is not aware of it", "lenient"),
]


def test_verdicts(task):
    for answer, completion, kind in VERDICTS:
        assert task.verify(problem(answer), completion).kind == kind


ASKED_FOR = [
    ("container", "oak chest", "#### the oak chest in the boat house", "lenient"),
    ("container", "oak chest", "In the oak chest, which stands in the boat house.", "lenient"),
    ("container", "oak chest", "the iron trunk in the boat house", "wrong"),
    ("container", "oak chest", "#### the boat house", "wrong"),
    ("container", "oak chest", "It is in the boat house.", "wrong"),
    ("container", "unknown", "That cannot be determined.", "lenient"),
    ("room", "boat house", "#### the boat house, in the oak chest", "lenient"),
    ("room", "boat house", "The boat house: it lies in the iron trunk.", "lenient"),
    ("room", "boat house", "#### the yard, in the oak chest", "wrong"),
    ("room", "attic", "In the attic, in the oak chest.", "lenient"),
    ("room", "attic", "In the oak chest.", "wrong"),
]


def test_only_places_of_the_sort_that_is_asked_for_count(task):
    for sort, answer, completion, kind in ASKED_FOR:
        question = f"In which {sort} is the lamp?"
        asked = problem(answer, question)
        moved = (
            " Otto moved the lamp to the attic, leaving the iron trunk in its original location."
        )
        asked.fields["story"] += moved
        assert task.verify(asked, completion).kind == kind


KNOWING = [
    ("does not know about it", KNOWS_NOT),
    ("knows about it", KNOWS),
    ("Ann thinks that Bob knows about it, but he does not know about it.", KNOWS_NOT),
    ("Ann doesn\u2019t know about it", KNOWS_NOT),
    ("He does NOT know.", KNOWS_NOT),
    ("She knows.", KNOWS),
    ("Knowledge is power", None),
    # The question's own style: what A thinks about B's belief.
    ("Bryce thinks that Elijah does not really know about it.", KNOWS_NOT),
    ("Bryce does not think that Elijah knows about it.", KNOWS_NOT),
    ("Bryce doesn't believe Elijah knows about staffing needs.", KNOWS_NOT),
    ("Bryce does not think that Elijah does not know about it.", KNOWS),
    ("It is not the case that Kayla actually knows about it.", KNOWS_NOT),
    ("Kayla was not in the room, but she knows about it.", KNOWS),
    ("Kayla was told. Not only that: she knows about it.", KNOWS),
    ("Is that so? Not quite. Kayla knows about it.", KNOWS),
    ("Kayla isn't even aware of it", KNOWS_NOT),
    ("Kayla is fully aware of it", KNOWS),
    ("Kayla is not unaware of it", KNOWS),
    ("Kayla no longer knows about it", KNOWS_NOT),
    ("Kayla has never really known; she does not have any knowledge of it", KNOWS_NOT),
    ("Nobody knows about it", KNOWS_NOT),
    ("Mia is unlikely to know about it", KNOWS_NOT),
    ("She hardly knows about it", KNOWS_NOT),
    ("She doubts that he knows about it", KNOWS_NOT),
    ("She does not doubt that he knows about it", KNOWS),
    ("There is no doubt that she knows about it", KNOWS),
    ("It is false that she knows about it", KNOWS_NOT),
    ("She lacks knowledge of it", KNOWS_NOT),
    ("As we know, Otto left.", None),
]


def test_knowing():
    for text, answer in KNOWING:
        assert phrases.lenient_phrase(text, KNOWLEDGE) == answer


THOUGHTS_ARE_NO_ANSWERS = [
    ("<think>\nThe answer is\n#### oak chest", "none"),
    ("<think>\nIt is in the oak chest.", "none"),
    ("<think>oak chest</think>\n\nI cannot say.", "none"),
    ("<think>the tin</think>\n#### oak chest", "strict"),
    ("It is in the tin.</think>\nIt is in the oak chest.", "lenient"),
    ("<think>oak chest</think>\n#### tin", "wrong"),
]


def test_thoughts_are_no_answers():
    for text, kind in THOUGHTS_ARE_NO_ANSWERS:
        candidates = phrases.themselves(["oak chest", "tin"])
        assert phrases.judge(text, "oak chest", candidates) == kind


@given(text=st.text(), answer=st.sampled_from(["oak chest", "no", "knows about it", "?"]))
def test_verify_is_total(task, text, answer):
    verdict = task.verify(problem(answer), text)
    assert verdict.kind in ("strict", "lenient", "wrong", "none")
