"""Writes, reads and edits chains of thought for theory-of-mind stories: who saw what.

A line of the fine chain, which has a line for every event that matters for the answer, has one of
these forms. The word after the colon is the answer to the question at that time, except in lines
about people who enter or leave:

    Mia leaves: Tom                    the people who are in that room afterwards
    Tom Mia see jar: jar               the people who see the thing put into the jar
    Tom Mia see jar, Ben in secret: jar
    Tom Mia and Tom Ben see jar: jar   two rooms, whose people do not see each other
    Tom tells Mia Ben tin: jar         the hearers, and the place or the topic
    Tom moves jar: jar                 no witnesses if the question is not about beliefs

A line of the coarse chain, which has a line for every change of the answer, is `Mia: jar` (what Mia
thinks) or `Tom Mia: jar` (what Tom thinks that Mia thinks).
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence

from jexit.tasks.base import Draw
from jexit.tasks.chains import Corruption
from jexit.tasks.tom.text import CONTAINERS, NO, TOPICS, UNKNOWN, YES, Question, Story
from jexit.tasks.tom.world import PLACINGS, SPEECH, Event, Witnesses
from jexit.tasks.word_problems import NAMES

_NAME = "|".join(NAMES)
_PLACE = "|".join((*CONTAINERS, *TOPICS))
_STATE = "|".join((*CONTAINERS, UNKNOWN, YES, NO))
# Two witnesses, two hearers, or two people who stay in a room.
_TWO = rf"\b(?:{_NAME}) (?:{_NAME})"
_PEOPLE = re.compile(rf"{_TWO}(?= see\b)|(?<= tells ){_TWO}\b|(?<=: ){_TWO}\b")
_LINE = re.compile(
    rf"(?P<head>(?:{_NAME})(?: [A-Za-z]+)*?)(?: (?P<what>{_PLACE}))?"
    rf"(?:, (?P<secret>{_NAME}) in secret)?: (?P<state>{_STATE})\n?\Z"
)


def chain(story: Story, question: Question, *, fine: bool) -> list[str]:
    """Returns the lines that lead to the answer, each with its line break.

    With `fine`, every event that concerns the thing in the question has a line, which names the
    people who learn of the event and the answer after the event. For a question about a belief or
    knowledge, each coming and going before the last of these events also has a line, with the
    people who are in the room afterwards. Without `fine`, each change of the answer has a line.
    """
    about = [event.thing == question.thing for event in story.events]
    last = max((index for index, concerns in enumerate(about) if concerns), default=-1)
    world, lines = story.start(), []
    for index, event in enumerate(story.events):
        before, left = question.answer(world), world.room_of[event.actor]
        seen = world.witnesses(event)
        world.happen(event)
        state = question.answer(world)
        if about[index] and fine:
            lines.append(f"{_heading(event, question, seen)}: {state}\n")
        elif about[index] and state != before:
            lines.append(f"{' '.join(question.people) or event.actor}: {state}\n")
        elif fine and question.people and index < last:
            if event.kind == "leaves":
                lines.append(" ".join([event.actor, "leaves:", *world.inside(left)]) + "\n")
            elif event.room:  # entered, or taking another thing there
                lines.append(" ".join([event.actor, "enters:", *world.inside(event.room)]) + "\n")
    return lines


def _heading(event: Event, question: Question, seen: Witnesses) -> str:
    what = event.thing if event.kind == "tells" else event.place
    if not question.people:
        return f"{event.actor} {'tells' if event.kind in SPEECH else event.kind} {what}"
    secret = f", {event.secret} in secret" if event.secret else ""
    if event.kind in SPEECH:
        heard = [person for person in seen.groups[0] if person != event.actor]
        return " ".join([event.actor, "tells", *heard, what]) + secret
    groups = " and ".join(" ".join(group) for group in seen.groups)
    return f"{groups} see {what}{secret}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChainLine:
    """The parts of one line of a chain, which ends in the current answer to the question.

    `head` contains the words before the place or topic `what`, `secret` is the secret witness, and
    `state` the answer after the line. In a line of the coarse chain, such as `Mia: jar`, `head`
    contains only names, and `what` is empty.
    """

    head: tuple[str, ...]
    what: str
    secret: str
    state: str

    def text(self) -> str:
        secret = f", {self.secret} in secret" if self.secret else ""
        return " ".join([*self.head, self.what]).rstrip() + f"{secret}: {self.state}\n"

    def groups(self) -> list[list[str]]:
        """Returns the people in `head`, grouped by who sees each other; a speaker comes first."""
        groups: list[list[str]] = [[]]
        for word in self.head:
            if word == "and":
                groups.append([])
            elif word in NAMES:
                groups[-1].append(word)
        return groups

    def decides(self, question: Question) -> bool:
        """Returns whether this line alone, without earlier lines, determines the answer."""
        if not self.what:
            return True
        if question.kind == "memory":
            return "puts" in self.head
        if not question.people:
            return not set(PLACINGS).isdisjoint(self.head)
        a, b = question.people[0], question.people[-1]
        if a == b and "tells" in self.head and self.what in CONTAINERS and self.head[0] == a:
            return False  # speakers do not believe a place because they name it
        open_groups = self.groups()
        if a == self.secret:
            return a == b or any(b in group for group in open_groups)
        return any(a in group and b in group for group in open_groups)


def read_line(line: str) -> ChainLine | None:
    """Parses a line of a chain that ends in an answer; returns None for any other text."""
    match = _LINE.match(line)
    if match is None:
        return None
    return ChainLine(
        head=tuple(match["head"].split()),
        what=match["what"] or "",
        secret=match["secret"] or "",
        state=match["state"],
    )


def reordered(chain: str) -> str:
    """Returns the chain with the names exchanged in each pair of people whose order is arbitrary.

    >>> reordered("Tom Mia see jar: jar")
    'Mia Tom see jar: jar'
    """
    return _PEOPLE.sub(lambda match: " ".join(reversed(match.group().split())), chain)


def corruptions(
    lines: Sequence[str], question: Question, answer: str, places: Sequence[str], draw: Draw
) -> list[Corruption]:
    """Returns a corruption for each line that can be changed so that another answer follows.

    `lines` is a chain that leads to `answer`. If the question asks for a place, the changed line
    names another of `places`. If the question is about a topic, other people hear about the topic
    in the changed line, so that the answer (yes or no) changes.
    """
    read = [read_line(line) for line in lines]
    deciding = [i for i, line in enumerate(read) if line is not None and line.decides(question)]
    first, last = (deciding[0], deciding[-1]) if deciding else (len(read), -1)
    found = []
    for index, line in enumerate(read):
        if line is None:
            continue
        earlier, later = first < index, last > index
        if question.of_places and (later or not line.decides(question)):
            continue  # what comes later settles the answer, or the line never touched it
        changed = _changed(line, question, answer, places, draw)
        if changed is None or changed.state == answer:
            continue
        if changed.state == NO and (earlier or later):
            continue  # another line tells it as well
        if changed.what and changed.decides(question) == (changed.state == NO):
            continue  # problems of this kind have no such line
        prefix = "".join(lines[:index]) + changed.text()
        found.append(Corruption(prefix=prefix, answer=changed.state, step=index))
    return found


def _changed(
    line: ChainLine, question: Question, answer: str, places: Sequence[str], draw: Draw
) -> ChainLine | None:
    if question.of_places:
        place = draw.choice([name for name in places if name not in (line.what, line.state)])
        return dataclasses.replace(line, what=place if line.what else "", state=place)
    other = NO if answer == YES else YES
    if not line.what:
        return dataclasses.replace(line, state=other)
    if line.decides(question) != (answer == YES):
        return None
    if answer == NO:
        more = [person for person in question.people if person not in line.head]
        secret = "" if line.secret in more else line.secret
        return dataclasses.replace(line, head=(*line.head, *more), secret=secret, state=YES)
    if line.secret == question.people[0]:
        return dataclasses.replace(line, secret="", state=NO)
    hearers = [person for person in question.people if person in line.head[1:]]
    if not hearers:
        return None  # the speaker knows
    gone = draw.choice(hearers)
    return dataclasses.replace(line, head=tuple(w for w in line.head if w != gone), state=NO)
