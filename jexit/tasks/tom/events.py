"""Draws the events of a theory-of-mind story: people come and go, move things and talk.

Each event is drawn from those that are possible in the current state of the world (see
`jexit.tasks.tom.world`).
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import TypeAlias

from jexit.tasks.base import Draw
from jexit.tasks.tom.text import PEOPLE_ASKED, Kind, Question, Story
from jexit.tasks.tom.world import PLACINGS, Event, EventKind, World

PLACES = 3  # the number of places that a story about things mentions

_PROPOSALS = 12
Kinds: TypeAlias = tuple[EventKind, ...]
_LATER_MENTIONS: Kinds = (*("moves",) * 3, "takes", *("claims",) * 3)
_EXTRA_PERCENT = 30  # percentage of events that may get a secret witness or a distracted person
_WHISPER_PERCENT = 60  # percentage of speech that is whispered


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
    """The names and other words that one story uses; `places` contains the containers.

    `longest` is the largest number of sentences after those that state who is in which room.
    """

    people: tuple[str, ...]
    rooms: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    topics: tuple[str, ...]
    longest: int


@dataclasses.dataclass(frozen=True)
class How:
    """The kinds of event that may name a place.

    `whispered` is True if speech must be whispered, False if it must not be, and None if both are
    allowed.
    """

    kinds: Kinds = (*PLACINGS, "claims")
    whispered: bool | None = None


ANYHOW = How()
PLACED, TALK = How(PLACINGS), How(("claims",))
VERBS = {
    "moves": How(("moves",)),
    "tells": How(("claims",), whispered=False),
    "whispers": How(("claims",), whispered=True),
}


@dataclasses.dataclass(frozen=True)
class Mention:
    """The thing and the place that an event must name; `how` restricts the kind of event."""

    thing: str
    place: str
    how: How = ANYHOW


def plan(draw: Draw, cast: Cast, thing: str, other: str, how: Sequence[How]) -> list[Mention]:
    """Plans the mentions of a story: which thing and which place each of its events names.

    `thing` is mentioned once with each place of `cast`, by the first PLACES (3) entries of `how`.
    The remaining entries are for the mentions of `other`, which keep their order and are inserted
    at random positions.
    """
    count = len(how)
    places = [*cast.places, *(draw.choice(cast.places) for _ in range(count - PLACES))]
    order = list(range(PLACES))
    for extra in range(PLACES, count):
        least = order.index(extra - 1) + 1 if extra > PLACES else 0
        order.insert(draw.integer(least, len(order)), extra)
    return [Mention((thing, other)[at >= PLACES], places[at], how[at]) for at in order]


def questions(kind: Kind, people: Sequence[str], things: Sequence[str]) -> list[Question]:
    return [
        Question(kind=kind, people=asked, thing=thing)
        for asked in itertools.permutations(people, PEOPLE_ASKED[kind])
        for thing in things
    ]


def story_of_places(
    draw: Draw, cast: Cast, mentions: Sequence[Mention]
) -> tuple[Story, World] | None:
    """Draws a story whose events name the things and places in `mentions`, in the same order.

    Returns the story and the state of the world after it, or None if a mention is impossible or the
    story is too long.
    """
    return _story(
        draw, cast, len(mentions), lambda at, world, _: _named(draw, world, cast, mentions[at])
    )


def story_of_topics(draw: Draw, cast: Cast, count: int) -> Story | None:
    """Draws a story in which `count` events name a topic or, with probability 1/6, a thing.

    Returns None if an event is impossible or repeated, or if the story is too long.
    """

    def mention(_: int, world: World, events: list[Event]) -> Event | None:
        if draw.integer(0, 5):
            if not world.in_company():
                events.append(world.happen(_joining(draw, world, cast)))
            event = _speech(draw, world, cast)
        else:
            of_thing = Mention(draw.choice(cast.things), draw.choice(cast.places))
            event = _named(draw, world, cast, of_thing)
        return None if event in events else event

    told = _story(draw, cast, count, mention)
    return told and told[0]


def _story(
    draw: Draw, cast: Cast, count: int, mention: Callable[[int, World, list[Event]], Event | None]
) -> tuple[Story, World] | None:
    """Draws a story, and returns the story and the state of the world at its end.

    The story consists of `count` events with random arrivals and departures in between. Event
    number i, counted from 0, is the result of `mention(i, world, events)`, which gets the state of
    the world and the events so far. Each person and each container starts in the first of the two
    rooms with probability 3/4. Returns None if `mention` returns None, or if the story exceeds
    `cast.longest` sentences.
    """
    main, other = cast.rooms
    room_of = {person: other if draw.integer(0, 3) == 0 else main for person in cast.people}
    homes = {place: other if draw.integer(0, 3) == 0 else main for place in cast.places}
    world, events = World(room_of, homes), []
    for index in range(count):
        if events and draw.integer(0, 1):
            events.append(world.happen(_coming_or_going(draw, world, cast)))
        event = mention(index, world, events)
        if event is None:
            return None
        events.append(world.happen(event))
    if sentences(events) > cast.longest:
        return None
    return Story(room_of=room_of, homes=homes, events=tuple(events)), world


def sentences(events: Sequence[Event]) -> int:
    return sum(1 + bool(event.secret) + bool(event.distracted) for event in events)


def _coming_or_going(draw: Draw, world: World, cast: Cast) -> Event:
    actor = draw.choice(cast.people)
    room = world.room_of[actor]
    if room is not None and draw.integer(0, 1):
        return Event(kind="leaves", actor=actor, room=room)
    return Event(
        kind="enters", actor=actor, room=draw.choice([name for name in cast.rooms if name != room])
    )


def _joining(draw: Draw, world: World, cast: Cast) -> Event:
    hosts = [person for person in cast.people if world.room_of[person]] or cast.people
    host = draw.choice(hosts)
    actor = draw.choice([person for person in cast.people if person != host])
    return Event(kind="enters", actor=actor, room=world.room_of[host] or cast.rooms[0])


def _named(draw: Draw, world: World, cast: Cast, mention: Mention) -> Event | None:
    """Returns a possible event that names the thing and the place of `mention`.

    The event may have a secret witness or a distracted person. Returns None if none of `_PROPOSALS`
    drawn events is possible.
    """
    thing, place = mention.thing, mention.place
    home, now = world.homes[place], world.place_of.get(thing)
    possible = ("puts",) if now is None else _LATER_MENTIONS
    kinds = [kind for kind in possible if kind in mention.how.kinds]
    for _ in range(_PROPOSALS if kinds else 0):
        kind = draw.choice(kinds)
        room = world.homes[now] if kind == "takes" and now is not None else home
        actors = cast.people if kind == "claims" else world.inside(room)
        if not actors:
            continue
        event = Event(
            kind=kind,
            actor=draw.choice(actors),
            thing=thing,
            place=place,
            room=home if kind == "takes" else "",
            hearer=_hearer(draw, cast, mention.how.whispered) if kind == "claims" else "",
        )
        if world.possible(event):
            return _with_extra(draw, world, cast, event)
    return None


def _speech(draw: Draw, world: World, cast: Cast) -> Event | None:
    """Returns a possible event in which somebody talks about a topic.

    Returns None if none of `_PROPOSALS` drawn events is possible.
    """
    for _ in range(_PROPOSALS):
        event = Event(
            kind="tells",
            actor=draw.choice(cast.people),
            thing=cast.topics[draw.integer(0, 2) == 0],
            hearer=_hearer(draw, cast),
        )
        if world.possible(event):
            return _with_extra(draw, world, cast, event)
    return None


def _hearer(draw: Draw, cast: Cast, whispered: bool | None = None) -> str:
    if whispered is None:
        whispered = draw.integer(1, 100) <= _WHISPER_PERCENT
    return draw.choice(cast.people) if whispered else ""


def _with_extra(draw: Draw, world: World, cast: Cast, event: Event) -> Event:
    if draw.integer(1, 100) > _EXTRA_PERCENT:
        return event
    person = draw.choice(cast.people)
    extras = [dataclasses.replace(event, **{role: person}) for role in ("secret", "distracted")]
    allowed = [extra for extra in extras if world.possible(extra)]
    return draw.choice(allowed) if allowed else event
