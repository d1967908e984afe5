"""The task `tom`: theory-of-mind stories about who saw what and who thinks what.

    Tom and Mia are in the hall. Tom puts the coins in the box. Mia leaves the hall. Tom moves the
    coins to the jar. Where does Mia think the coins are? Answer in full.

    Tom Mia see box: box
    Mia leaves: Tom
    Tom see jar: box
    #### box

The last sentence prescribes the chain of thought: a line for every event that matters for the
answer (`in full`), a line for every change of the answer (`in short`: `Mia: box`), or none (`at
once`).
"""

from __future__ import annotations

import functools
import re
from collections.abc import Sequence
from typing import ClassVar

from jexit.errors import UserError
from jexit.tasks import answers, phrases
from jexit.tasks.base import Attempt, Draw, Problem, Rewards, Split, Verdict
from jexit.tasks.chains import ChainTask, Corruption
from jexit.tasks.options import MIXTURE, check_range, check_steps
from jexit.tasks.streams import ProblemStream
from jexit.tasks.tom.chain import chain, corruptions, read_line, reordered
from jexit.tasks.tom.stories import PLACES, draw_problem
from jexit.tasks.tom.text import (
    CLOSINGS,
    CONTAINERS,
    KINDS,
    NO,
    OF_PLACES,
    ROOMS,
    TOPICS,
    YES,
    Question,
    Story,
)
from jexit.tasks.word_problems import NAMES, OBJECTS

STEP_MODES = ("free", "fine", "coarse", "at_once", "mixed")

_NAMED = re.compile(r"[A-Za-z]+")
_CLASS_OF = {
    word: number
    for number, words in enumerate((NAMES, ROOMS, CONTAINERS, OBJECTS, TOPICS))
    for word in words
}


class Tom(ChainTask):
    """Stories with a question about a place, or about who knows about a topic (yes or no).

    `steps` is `fine` (a line for every event that matters for the answer), `coarse` (a line for
    every change of the answer), `at_once` (no chain of thought), `free` (the model chooses; the
    reference completion is fine or coarse, drawn for each problem), or `mixed` (each problem draws
    free, prescribed or no steps, with the probabilities in `MIXTURE`). `people_min` and
    `people_max` bound the number of people. `moves_min` and `moves_max` bound the number of
    sentences that name a place or a topic. `kinds` contains the kinds of question, which occur
    equally often. The story and its question decide the split, whatever the names and things.

    Answers are balanced (see `jexit.tasks.tom.stories`): each of the three places of a story is the
    answer equally often, two of three questions about a belief ask for a false belief, and half of
    the yes-or-no questions have the answer yes.
    """

    name = "tom"
    cue: ClassVar[str] = phrases.MARKER
    granularities: ClassVar[tuple[str, ...]] = ("fine", "coarse")

    def __init__(
        self,
        *,
        steps: str = "free",
        people_min: int = 3,
        people_max: int = 3,
        moves_min: int = 3,
        moves_max: int = 3,
        kinds: Sequence[str] = KINDS,
        seed: int = 0,
        rewards: Rewards | None = None,
    ) -> None:
        super().__init__(rewards=rewards)
        check_steps(self.name, steps, STEP_MODES)
        if not kinds:
            raise UserError(
                "config.task.options.kinds is empty, but it must contain at least one kind; add "
                f"one of {', '.join(KINDS)}"
            )
        if unknown := [kind for kind in kinds if kind not in KINDS]:
            raise UserError(
                f"config.task.options.kinds contains {unknown[0]!r}, but a kind must be one of "
                f"{', '.join(KINDS)}; remove or replace it"
            )
        self.mode = steps
        self.people = check_range(self.name, "people", people_min, people_max, 2, len(NAMES))
        self.moves = check_range(self.name, "moves", moves_min, moves_max, PLACES, 8)
        if people_min == 2 and moves_max > 6:
            raise UserError(
                f"config.task.options.moves_max is {moves_max}, but two people rarely make a story "
                "of more than 6 moves; set it to at most 6, or set config.task.options.people_min "
                "to 3"
            )
        self.kinds = tuple(kinds)
        self.seed = seed
        self._stories = _stories(seed, self.kinds, self.people, self.moves)

    def problem(self, split: Split, index: int) -> Problem:
        story, question = self._stories.at(split, index)
        fine, mode = self._draw_mode(split, index)
        return make_problem(story, question, mode=mode, fine=fine)

    def _draw_mode(self, split: Split, index: int) -> tuple[bool, str]:
        """Returns (whether the reference chain is fine, mode); the mode is a key of CLOSINGS.

        The mode is the kind of chain that the prompt prescribes. Both values are drawn
        independently of the story, which does not depend on the option `steps`.
        """
        draw = Draw("tom steps", self.seed, split, index)
        mode = draw.weighted(MIXTURE) if self.mode == "mixed" else self.mode
        if mode == "prescribed":
            mode = draw.choice(self.granularities)
        return (draw.choice((True, False)) if mode == "free" else mode == "fine"), mode

    def verify(self, problem: Problem, completion: str) -> Verdict:
        of_places = problem.fields["kind"] in OF_PLACES
        candidates = phrases.themselves(CONTAINERS) if of_places else phrases.YES_NO
        return self.verdict(phrases.judge(completion, problem.answer, candidates))

    def text_totals(
        self, problems: Sequence[Problem], attempts: Sequence[Attempt]
    ) -> dict[str, tuple[float, int]]:
        """Returns (sum, count) of the metric `chain_lines`, the mean number of lines in a chain."""
        lines = sum(len(self.steps(attempt.text)) for attempt in attempts)
        return {"chain_lines": (lines, len(attempts))}

    def steps(self, completion: str) -> list[str]:
        chain = completion.partition(self.cue)[0]
        if answers.THINK_START in completion or answers.THINK_END in completion:
            chain = answers.chain_of_thought(completion)
        return answers.with_think_start(chain.splitlines(keepends=True))

    def final_answer(self, completion: str) -> str | None:
        text = answers.visible_text(completion) or ""
        return phrases.final_phrase(text, phrases.themselves(CONTAINERS) | dict(phrases.YES_NO))

    def answer_mark(self, text: str) -> tuple[int, int] | None:
        return phrases.answer_mark(text)

    def reworded(self, completion: str) -> str | None:
        """Returns the chain with two names in each list of people exchanged; None if unchanged."""
        chain = "".join(self.steps(completion))
        changed = reordered(chain)
        return changed if changed != chain else None

    def answer_follows(self, completion: str) -> bool:
        steps = self.steps(completion)
        line = read_line(steps[-1]) if steps else None
        return line is not None and line.state == self.final_answer(completion)

    def corrupted(self, problem: Problem, completion: str, draw: Draw) -> Corruption | None:
        """Returns the chain up to a random line, which is changed so that another answer follows.

        The changed line names another place, or other people who hear about the topic. Only lines
        that determine the answer are changed, so the new answer is known; it is the last word of
        the line. A model that merely copies the last word of its chain therefore also passes. In
        the task `sums`, such a model fails, because more steps must be computed. Returns None if no
        line can be changed.
        """
        answer, lines = self.final_answer(completion), self.steps(completion)
        if answer is None:
            return None
        question = Question(
            kind=problem.fields["kind"],
            people=problem.fields["people"],
            thing=problem.fields["thing"],
        )
        possible = corruptions(lines, question, answer, problem.fields["places"], draw)
        return draw.choice(possible) if possible else None

    def wrong_answer(self, problem: Problem, draw: Draw) -> str:
        """Returns another place in the story or, for an answer yes or no, the opposite answer."""
        possible = problem.fields["places"] if problem.fields["kind"] in OF_PLACES else (YES, NO)
        return draw.choice([answer for answer in possible if answer != problem.answer])


task = Tom


@functools.lru_cache(maxsize=8)  # an evaluation uses the same stories with other `steps`
def _stories(
    seed: int, kinds: tuple[str, ...], people: tuple[int, int], moves: tuple[int, int]
) -> ProblemStream[tuple[Story, Question]]:
    def draw_story(draw: Draw) -> tuple[Story, Question]:
        return draw_problem(draw, draw.choice(kinds), people=people, moves=moves)

    def key_of(drawn: tuple[Story, Question]) -> str:
        return canonical(" ".join(part.text() for part in drawn))

    return ProblemStream("tom", seed, draw_story, key_of)


def make_problem(story: Story, question: Question, *, mode: str, fine: bool) -> Problem:
    """Returns the problem that asks `question` about `story`, with its reference completion.

    `mode` is a key of CLOSINGS: the kind of chain that the prompt prescribes. `fine` selects the
    fine or the coarse reference chain; with the mode "at_once", there is no chain.
    """
    world = story.end()
    assert world is not None, "the story cannot happen"
    answer = question.answer(world)
    lines = [] if mode == "at_once" else chain(story, question, fine=fine)
    return Problem(
        prompt=f"{story.text()} {question.text()}{CLOSINGS[mode]}",
        answer=answer,
        completion="".join(lines) + f"{phrases.MARKER} {answer}",
        fields={
            "kind": question.kind,
            "mode": mode,
            "people": question.people,
            "thing": question.thing,
            "places": tuple(dict.fromkeys(e.place for e in story.events if e.place)),
        },
    )


def canonical(text: str) -> str:
    """Returns `text` with names, rooms, containers, objects and topics replaced by codes.

    A code is a letter for the class of the word, followed by a number. The words of a class are
    numbered in the order in which they first occur, so the first name becomes "P0".
    """
    numbers: dict[str, str] = {}
    counts = [0] * (1 + max(_CLASS_OF.values()))

    def number(match: re.Match[str]) -> str:
        word = match.group()
        if word not in _CLASS_OF:
            return word
        if word not in numbers:
            group = _CLASS_OF[word]
            numbers[word] = f"{'PRCOT'[group]}{counts[group]}"
            counts[group] += 1
        return numbers[word]

    return _NAMED.sub(number, text)
