import codecs
import csv
import logging

import pytest

from jexit.tasks import make_task, phrases
from jexit.tasks.base import SPLITS, Problem
from jexit.tasks.exploretom import KNOWLEDGE, KNOWS, KNOWS_NOT, ExploreToM, candidates, style_of

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


def sizes(task):
    return [task.size(split) for split in SPLITS]


def problem(answer, question="Where?", more=""):
    fields = {"story": STORY + more, "question": question, "style": style_of(answer)}
    return Problem(prompt="?", answer=answer, fields=fields)


@pytest.fixture
def task(tmp_path):
    return ExploreToM(path=write(tmp_path / "stories.csv", [row(0)]))


def test_prompts_hold_story_question_and_format(tmp_path):
    # A surplus column and a byte order mark do no harm.
    file = write(tmp_path / "test.csv", [row(1, index=7)], ("index", "story", "question", "answer"))
    file.write_bytes(codecs.BOM_UTF8 + file.read_bytes())
    got = make_task("exploretom", str(file)).problem("test", 0)
    story = row(1)["story"]
    assert got.prompt.startswith(f"{story}\n\nIn which container is the lamp?\n\n")
    assert got.prompt.endswith("\n#### answer")
    assert (got.answer, got.completion, got.fields["story"]) == ("oak chest", None, story)
    bare = make_task("tom", str(file), instruction="").problem("test", 0)
    assert bare.prompt == f"{story}\n\nIn which container is the lamp?"


def test_a_file_keeps_whole_stories_for_testing(tmp_path):
    rows = [row(number // 3, answer=f"chest {number}") for number in range(48)]
    task = make_task("exploretom", str(write(tmp_path / "mine.csv", rows)))
    sides = {split: [task.problem(split, i) for i in range(task.size(split))] for split in SPLITS}
    assert [p.answer for p in sides["test"]] == [f"chest {n}" for n in (21, 22, 23, 45, 46, 47)]
    stories = [{p.fields["story"] for p in problems} for problems in sides.values()]
    assert sum(map(len, stories)) == len(set().union(*stories)) == 16
    assert [len(problems) for problems in sides.values()] == [39, 3, 6]
    assert sizes(make_task("exploretom", str(tmp_path / "mine.csv"), test_every=0)) == [45, 3, 0]


def test_folders(tmp_path):
    write(tmp_path / "a.csv", map(row, range(8)))
    write(tmp_path / "b.csv", map(row, range(8, 16)))
    assert sizes(make_task("exploretom", str(tmp_path))) == [13, 1, 2]
    write(tmp_path / "train_1.csv", map(row, range(3)))
    write(tmp_path / "test_1.csv", map(row, range(3, 5)))
    write(tmp_path / "test_2.csv", map(row, range(5, 6)))
    assert sizes(make_task("exploretom", str(tmp_path))) == [2, 1, 3]
    write(tmp_path / "val.csv", map(row, range(6, 8)))
    assert sizes(make_task("exploretom", str(tmp_path))) == [3, 2, 3]


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
        assert (task.size("train"), task.size("val")) == (task.size("train"), task.size("val"))
    assert [task.problem("train", i).answer for i in range(2)] == ["oak chest", "oak chest"]
    assert task.problem("val", 0).answer == "box"
    (warning,) = caplog.messages
    assert warning.startswith(f"skipped 8 of 11 rows of the train split: {file}:3: 'answer' is emp")
    assert "'answer' contains no word" in warning and "'story' is empty" in warning
    assert "is not valid Unicode" in warning and "3 more" in warning


def test_missing_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no path was given; set config\.task\.path to a CSV"):
        make_task("exploretom")
    with pytest.raises(FileNotFoundError, match=r"no data set at .*nowhere; set config.task.path"):
        make_task("exploretom", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"contains no CSV file; set config.task.path"):
        make_task("exploretom", str(tmp_path)).size("train")
    for text in ("story,answer\nx,y\n", ""):
        (tmp_path / "bad.csv").write_text(text)
        with pytest.raises(ValueError, match=r"no column '.*', but its first line must name the"):
            make_task("exploretom", str(tmp_path)).size("train")


VERDICTS = {
    ("oak chest", "strict"): ["#### oak chest", "#### The oak chest.", "So:\n#### **Oak Chest**"],
    ("oak chest", "lenient"): [
        "#### The lamp is in the oak chest.",
        "She put it into the oak chest",
        "Not in the iron trunk but in the oak chest.",
        "It is no longer in the iron trunk, it is in the oak chest.",
    ],
    ("oak chest", "wrong"): [
        "It was in the oak chest and is now in the iron trunk.",
        *("#### iron trunk", "#### chest", "Unknown."),
        *("#### not oak chest", "#### not in the oak chest"),
    ],
    ("oak chest", "none"): ["Who knows?", "It is not in the oak chest."],
    ("iron trunk", "lenient"): ["It's in the iron trunk and no longer in the oak chest."],
    ("boat house", "lenient"): ["In the Boat House, then."],
    ("unknown", "strict"): ["#### unknown"],
    ("unknown", "lenient"): [
        "That cannot be determined from the story.",
        "#### It is not mentioned.",
    ],
    ("unknown", "wrong"): ["#### oak chest", "#### not unknown"],
    ("yes", "strict"): ["#### Yes"],
    ("yes", "lenient"): ["Yes, she does."],
    ("yes", "wrong"): ["#### not yes"],
    ("no", "none"): ["Nothing is known."],
    ("no", "lenient"): ["#### No, Otto left.", "Not yes: no", "It is not yes. No."],
    ("no", "wrong"): ["yes", "#### not no"],
    (KNOWS, "strict"): ["#### knows about it"],
    (KNOWS, "lenient"): ["Otto thinks that Ida knows about it."],
    (KNOWS, "wrong"): [
        *("#### does not know about it", "#### not knows about it"),
        "#### She does not really know about it.",
    ],
    (KNOWS_NOT, "strict"): ["#### Does not know about it."],
    (KNOWS_NOT, "lenient"): [
        *("Ida doesn't know about it", "#### She does not really know about it."),
        "#### no knowledge of it; she is not aware of it",
    ],
    (KNOWS_NOT, "wrong"): ["#### knows about it", "#### not does not know about it"],
    (KNOWS_NOT, "none"): [""],
}


def test_verdicts(task):
    for (answer, kind), completions in VERDICTS.items():
        for completion in completions:
            assert task.verify(problem(answer), completion).kind == kind, (answer, completion)


def test_places_are_those_of_the_story_and_of_the_sort_that_is_asked_for(task):
    found = set(candidates(problem("the attic", "Where was it before Ida moved it to the vase?")))
    assert {"the boat house", "the oak chest", "the iron trunk", "the yard", "the vase"} <= found
    assert "the attic" in found
    moved = " Otto moved the lamp to the attic, leaving the iron trunk in its original location."
    for sort, answer, completion, kind in (
        ("container", "oak chest", "#### the oak chest in the boat house", "lenient"),
        ("container", "oak chest", "In the oak chest, which stands in the boat house.", "lenient"),
        ("container", "oak chest", "the iron trunk in the boat house", "wrong"),
        ("container", "oak chest", "It is in the boat house.", "wrong"),
        ("container", "unknown", "That cannot be determined.", "lenient"),
        ("room", "boat house", "#### the boat house, in the oak chest", "lenient"),
        ("room", "boat house", "The boat house: it lies in the iron trunk.", "lenient"),
        ("room", "boat house", "#### the yard, in the oak chest", "wrong"),
        ("room", "attic", "In the attic, in the oak chest.", "lenient"),
        ("room", "attic", "In the oak chest.", "wrong"),
    ):
        asked = problem(answer, f"In which {sort} is the lamp?", moved)
        assert task.verify(asked, completion).kind == kind, completion


KNOWING = {
    KNOWS: [
        "She knows.",
        "Bryce does not think that Elijah does not know about it.",
        "Kayla was not in the room, but she knows about it.",
        "Kayla was told. Not only that: she knows about it.",
        "Is that so? Not quite. Kayla knows about it.",
        *("Kayla is fully aware of it", "Kayla is not unaware of it"),
        *("She does not doubt that he knows about it", "There is no doubt that she knows"),
    ],
    KNOWS_NOT: [
        "Ann thinks that Bob knows about it, but he does not know about it.",
        *("Ann doesn\u2019t know about it", "He does NOT know.", "Nobody knows about it"),
        "Bryce thinks that Elijah does not really know about it.",
        "Bryce does not think that Elijah knows about it.",
        "Bryce doesn't believe Elijah knows about staffing needs.",
        "It is not the case that Kayla actually knows about it.",
        *("Kayla isn't even aware of it", "Kayla no longer knows about it"),
        "Kayla has never really known; she does not have any knowledge of it",
        *("Mia is unlikely to know about it", "She hardly knows about it"),
        *("She doubts that he knows about it", "It is false that she knows about it"),
        "She lacks knowledge of it",
    ],
    None: ["Knowledge is power", "As we know, Otto left."],
}


def test_knowing():
    for answer, texts in KNOWING.items():
        for text in texts:
            assert phrases.lenient_phrase(text, KNOWLEDGE) == answer, text
