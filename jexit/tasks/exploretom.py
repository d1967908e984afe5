"""The task `exploretom`: stories from CSV files with the columns story, question and answer.

The format of the data is that of ExploreToM (Sclar et al., "Explore Theory of Mind: Program-guided
adversarial data generation for theory of mind reasoning", arXiv:2412.12175).
"""

from __future__ import annotations

import itertools
import os
import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

from jexit.errors import MissingFile, UserError
from jexit.tasks import phrases
from jexit.tasks.base import SPLITS, Problem, Rewards, Verdict
from jexit.tasks.files import FileTask, Row, Source, read_csv, source_of, text_fault

INSTRUCTION = "Think step by step. End with a line of the form\n#### answer"
COLUMNS = ("story", "question", "answer")

KNOWS, KNOWS_NOT = "knows about it", "does not know about it"
_KNOWING = ("know", "knows", "knew", "aware", "any knowledge", "has knowledge", "have knowledge")
_NOT_KNOWING = (
    *("know nothing", "knows nothing", "knew nothing", "no knowledge", "no idea"),
    *("lack knowledge", "lacks knowledge", "lacked knowledge"),
)
KNOWLEDGE: Mapping[str, str | None] = {
    **dict.fromkeys((*_KNOWING, "not unaware"), KNOWS),
    **dict.fromkeys((f"not {phrase}" for phrase in _KNOWING), KNOWS_NOT),
    **dict.fromkeys((*_NOT_KNOWING, "unaware"), KNOWS_NOT),
    **dict.fromkeys(("i know", "we know", "you know"), None),  # the narrator
}
UNKNOWN = "unknown"
NOT_SAID = (UNKNOWN, "not known", "not mentioned", "not specified", "not stated")
CANNOT_SAY = ("cannot be determined", "can't be determined", "cannot be known")

# Where the stories name places: "entered X.", "moved the Y to X, which is also located in Z." A
# thing or place has a few words: without that bound, "moved moved moved" would be searched to the
# end of the sentence from each of them.
_MOVED = r"moved (?:[^\s.]++\s++){1,12}?to"
_NAME = r"[^\s.,]++(?:\s++[^\s.,]++){0,11}?"
_PLACE = re.compile(
    rf"\b(?:entered|left|{_MOVED}|located in|is in|leaving) (?P<place>[^.,]+?)"
    r"(?= in its original location|[.,?]|$)"
)
_ROOM = re.compile(
    r"\b(?:entered|left|located in) (?P<entered>[^.,]+)"
    rf"|\b{_MOVED} (?P<taken>{_NAME}), leaving {_NAME} in its original location"
)


class ExploreToM(FileTask):
    """Questions about theory-of-mind stories, answered by a place or a short phrase.

    The answer is a container, a room, yes or no, or whether somebody knows about something. `path`
    is a CSV file or a folder, in which the files `train*.csv`, `val*.csv` and `test*.csv` contain
    the splits. Without such files, all CSV files are read, and every `test_every`-th story is held
    out for the test split. `instruction` is the text at the end of every prompt.

    If the last line of a completion is `#### answer`, this answer is compared without regard to
    case, articles and punctuation. Other answers are found by candidate phrases: the places of the
    story, yes and no, or phrases about knowing (see `phrases.lenient_phrase`). If the question asks
    for a container, rooms count only if the completion names no container, so that "the bag in the
    hall" gives the bag. Likewise, if the question asks for a room, containers count only if the
    completion names no room.
    """

    name = "exploretom"
    wanted = "a CSV file or a folder of them"

    def __init__(
        self,
        *,
        path: str | os.PathLike[str] | None = None,
        instruction: str = INSTRUCTION,
        test_every: int = 8,
        rewards: Rewards | None = None,
    ) -> None:
        if not path:
            raise UserError(
                f"task {self.name!r} reads stories from files, but no path was given; "
                f"set config.task.path to {self.wanted}"
            )
        super().__init__(path=path, instruction=instruction, test_every=test_every, rewards=rewards)

    def verify(self, problem: Problem, completion: str) -> Verdict:
        known = candidates(problem)
        asked = asked_for(problem, known)
        judged = phrases.judge(completion, problem.answer, asked)
        if judged == "none" and asked != known:
            judged = phrases.judge(completion, problem.answer, known)
        return self.verdict(judged)

    def answer_mark(self, text: str) -> tuple[int, int] | None:
        return phrases.answer_mark(text)

    def _sources(self) -> Mapping[Source, Iterable[Row]]:
        assert self.path is not None
        if self.path.is_file():
            return {source_of(self.path): read_csv(self.path, COLUMNS)}
        files: dict[Source, list[pathlib.Path]]
        files = {split: sorted(self.path.glob(f"{split}*.csv")) for split in SPLITS}
        if not any(files.values()):
            files = {"whole": sorted(self.path.glob("*.csv"))}
        if not any(files.values()):
            raise MissingFile(
                f"{self.path} contains no CSV file; set config.task.path to {self.wanted}"
            )
        return {
            source: itertools.chain.from_iterable(read_csv(file, COLUMNS) for file in some)
            for source, some in files.items()
        }

    def _fault(self, row: dict[str, Any]) -> str | None:
        if fault := text_fault(row, COLUMNS):
            return fault
        return None if phrases.words_of(row["answer"]) else "'answer' contains no word"

    def _to_problem(self, row: dict[str, Any]) -> Problem:
        story, question, answer = (row[column].strip() for column in COLUMNS)
        return Problem(
            prompt=f"{story}\n\n{question}\n\n{self.instruction}".strip(),
            answer=answer,
            fields={"story": story, "question": question, "style": style_of(answer)},
        )

    def _group(self, problem: Problem) -> str:
        return problem.fields["story"]  # several questions are asked about one story


task = ExploreToM


def style_of(answer: str) -> str:
    words = phrases.words_of(answer)
    if words in (("yes",), ("no",)):
        return "yes_no"
    return "knowledge" if words in map(phrases.words_of, (KNOWS, KNOWS_NOT)) else "place"


def candidates(problem: Problem) -> phrases.Candidates:
    """Returns a dict from the phrases that count as answers to the answers that they stand for.

    For a place, phrases such as "not mentioned" also count, and stand for "unknown".
    """
    style = problem.fields["style"]
    if style == "yes_no":
        return phrases.YES_NO
    if style == "knowledge":
        return KNOWLEDGE
    texts = (problem.fields["story"], problem.fields["question"])
    places = [match["place"] for text in texts for match in _PLACE.finditer(text)]
    known = {place: place for place in (*places, problem.answer)}
    return known | dict.fromkeys((*NOT_SAID, *CANNOT_SAY), UNKNOWN)


def asked_for(problem: Problem, known: phrases.Candidates) -> phrases.Candidates:
    """Returns those of the candidates `known` that the question asks for: containers or rooms.

    All candidates are returned unless the question begins with "In which container" or "In which
    room". The candidates for the correct answer and for "unknown" are always included.
    """
    sort = re.match(r"in which (container|room)\b", problem.fields["question"], re.IGNORECASE)
    if sort is None or problem.fields["style"] != "place":
        return known
    found = (
        match["entered"] or match["taken"] for match in _ROOM.finditer(problem.fields["story"])
    )
    rooms = set(map(phrases.words_of, found))
    return {
        phrase: answer
        for phrase, answer in known.items()
        if answer in (problem.answer, UNKNOWN)
        or (phrases.words_of(phrase) in rooms) == (sort[1].lower() == "room")
    }
