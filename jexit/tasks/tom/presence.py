"""Draws stories in which the comings and goings of one person determine the answer.

Every story has three versions with different answers, one of which is drawn. The versions differ
only in the room in which one of the people asked about starts, and in the times at which this
person comes and goes. A rule that does not work out who was in which room therefore cannot give the
correct answer in more than one of three stories.

If the question is what A thinks that B thinks, either A or B comes and goes, while the other one
knows where the thing is. The answer is therefore not always what A thinks, and not always what B
thinks. It is still nearly always what the person with less information thinks.

With probability 1/3, the rule `before_last_move` must give the answer, and otherwise it must fail.
The rule succeeds somewhat more often, because a draw is repeated if no story meets the requirement.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence

from jexit.tasks.base import Draw
from jexit.tasks.tom.events import (
    ANYHOW,
    PLACES,
    VERBS,
    Cast,
    plan,
    questions,
    sentences,
    story_of_places,
)
from jexit.tasks.tom.rules import before_last_move, is_named, others_know_place
from jexit.tasks.tom.text import PEOPLE_ASKED, Kind, Question, Story
from jexit.tasks.tom.world import Event, EventKind, World

_STORIES = 60  # stories tried with a pair of verbs: some pairs cannot occur in short stories
# The person's moves, in any order. They are the same in all three stories.
_MOVES: tuple[tuple[EventKind, ...], ...] = (
    ("enters",),
    ("leaves",),
    ("enters", "enters"),
    ("enters", "leaves"),
)


def story_of_presence(
    draw: Draw, kind: Kind, cast: Cast, count: int, *, rank: int
) -> tuple[Story, Question] | None:
    """Returns (story, question), where the comings and goings of one person determine the answer.

    The story has `count` events that name a place. The question is about a belief, and its answer
    is `cast.places[rank]`. The person who comes and goes is one of the people asked about. After
    the first event about the thing in the question, no event about it names this person. The other
    person asked about, if any, knows where the thing is. Returns None if no such story is found.
    """
    thing, other = draw.sample(cast.things, 2)
    how = [ANYHOW] * count
    how[1:PLACES] = [VERBS[draw.choice(("moves", "tells"))] for _ in range(PLACES - 1)]
    whose = draw.integer(0, PEOPLE_ASKED[kind] - 1)
    by_rule = draw.integer(1, PLACES) == 1
    for _ in range(_STORIES):
        told = story_of_places(draw, cast, plan(draw, cast, thing, other, how))
        if told is None:
            continue
        story, _ = told
        later = [event for event in story.events if event.thing == thing][1:]
        asked = [
            question
            for question in questions(kind, cast.people, (thing,))
            if not any(is_named(question.people[whose], event) for event in later)
        ]
        for question in draw.sample(asked, len(asked)):
            for moves in draw.sample(_MOVES, len(_MOVES)):
                found = _by_answer(draw, cast, story, question, question.people[whose], moves)
                if found is None:
                    continue
                place = cast.places[rank]
                for one in found[place]:
                    if (before_last_move(question.people[whose], thing, one) == place) == by_rule:
                        return one, question
    return None


def _by_answer(
    draw: Draw,
    cast: Cast,
    story: Story,
    question: Question,
    person: str,
    moves: tuple[EventKind, ...],
) -> dict[str, list[Story]] | None:
    """Returns versions of `story`, grouped by the place that is the answer to `question`.

    The versions differ in the first room of `person`, and in the times and order of this person's
    `moves`. Returns None if one of the places cannot be the answer, or if the versions are too
    long.
    """
    others = [event for event in story.events if event.thing or event.actor != person]
    if sentences(others) + len(moves) > cast.longest:
        return None
    ways = [
        (room, dict(zip(after, order, strict=True)))
        for room in cast.rooms
        for after in itertools.combinations(range(len(others)), len(moves))
        for order in sorted(set(itertools.permutations(moves)))
    ]
    found: dict[str, list[Story]] = {place: [] for place in cast.places}
    for room, move_after in draw.sample(ways, len(ways)):
        world = World({**story.room_of, person: room}, story.homes)
        events = _with_moves(draw, cast, world, others, person, move_after)
        if events is not None and others_know_place(question, person, world):
            told = dataclasses.replace(
                story, room_of={**story.room_of, person: room}, events=tuple(events)
            )
            found.setdefault(question.answer(world), []).append(told)
    return found if all(found[place] for place in cast.places) else None


def _with_moves(
    draw: Draw,
    cast: Cast,
    world: World,
    others: Sequence[Event],
    person: str,
    move_after: Mapping[int, EventKind],
) -> list[Event] | None:
    """Returns the events `others` with the comings and goings of `person` inserted.

    `move_after` maps the index of an event in `others` to the kind of the move after it. `world` is
    the state before the events, and is updated. Returns None if an event is impossible.
    """
    events = []
    for index, event in enumerate(others):
        if not world.possible(event):
            return None
        events.append(world.happen(event))
        if index not in move_after:
            continue
        here = world.room_of[person]
        if move_after[index] == "enters":
            room = draw.choice([name for name in cast.rooms if name != here])
        elif here is None:
            return None
        else:
            room = here
        move = Event(kind=move_after[index], actor=person, room=room)
        events.append(world.happen(move))
    return events
