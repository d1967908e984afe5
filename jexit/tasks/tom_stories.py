"""Theory-of-mind stories whose surface does not give the answer away.

Where a place is asked for, the story names three, each once with the thing; other things lie or
are moved between. Which of the three, in the order in which they come up with the thing, is the
answer is drawn before the story. So is, for beliefs and independently of the answer, all that a
rule could go by that tracks nobody (`Surface`): whether the thing is then moved, told about or
whispered about, hence where it is, and the last place that an event names together with the person.
Stories are drawn until one fits. So no rule on places, verbs, where the thing is or who is named
beats one in three, alone or together with others. Of a belief about a belief, the other person
knows where the thing is, as in the classic test (Perner and Wimmer 1985), and the question is
whether the first one knows that; were the other one wrong too, the answer would nearly always be
what they think.

For `reality` how often things are moved and talked about is the same for every answer. For
`memory`, where the thing's first place is the answer, both things share a pattern of places such as
first, second, first, third, and which of them is the answer, as they come up, is drawn. Only what
defines a question answers it: the last placing, the first one, and for beliefs who saw what.

Two people, or fewer than five sentences, are too few for some of these combinations, which then
occur less often or never.

Where the answer is yes or no, a story comes with a twin that has exactly the same words in another
order and the opposite answer, and in which the topic is told to the same people by name, and to
everybody, if it is in the story; one of the two is taken by a fair draw. So neither the words nor
who is named with the topic beat one half. Names, things and places are drawn uniformly.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import TypeAlias

from jexit.tasks.base import Draw
from jexit.tasks.tom_rules import SURFACES, Surface, told_by_name
from jexit.tasks.tom_text import (
    CONTAINERS,
    OF_PLACES,
    PEOPLE_ASKED,
    ROOMS,
    TOPICS,
    Kind,
    Question,
    Story,
)
from jexit.tasks.tom_world import PLACINGS, Event, EventKind, World
from jexit.tasks.word_problems import NAMES, OBJECTS

PLACES = 3  # that a story about things mentions

_STORIES = 5_000  # that are tried: more than any combination needs with three people
_PROPOSALS = 12
Kinds: TypeAlias = tuple[EventKind, ...]
_LATER_MENTIONS: tuple[EventKind, ...] = (
    "moves",
    "moves",
    "moves",
    "takes",
    "claims",
    "claims",
    "claims",
)
_MORE_SENTENCES = 2  # at most, than the largest number of moves: bounds the prompt
_EXTRA_PERCENT = 30  # of events: a secret witness or a distracted person
_WHISPER_PERCENT = 60  # of speech


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cast:
    """The words that one story uses, and how many sentences it may have after its opening."""

    people: tuple[str, ...]
    rooms: tuple[str, ...]
    places: tuple[str, ...]
    things: tuple[str, ...]
    topics: tuple[str, ...]
    longest: int


def draw_problem(
    draw: Draw, kind: Kind, *, people: Sequence[int], moves: Sequence[int]
) -> tuple[Story, Question]:
    """A story with a question of this kind.

    `people` and `moves` bound how many people there are and how many sentences name a place (or,
    where the answer is yes or no, a topic or a place).
    """
    cast = Cast(
        people=draw.sample(NAMES, draw.integer(*people)),
        rooms=draw.sample(ROOMS, 2),
        places=draw.sample(CONTAINERS, PLACES),
        things=draw.sample(OBJECTS, 2),
        topics=draw.sample(TOPICS, 2),
        longest=moves[1] + _MORE_SENTENCES,
    )
    count = draw.integer(*moves)
    if kind not in OF_PLACES:
        return _about_topics(draw, kind, cast, count)
    found = None
    while found is None:
        rank = draw.integer(0, PLACES - 1)
        surface = draw.choice(SURFACES) if PEOPLE_ASKED[kind] else None
        found = _about_places(draw, kind, cast, count, rank=rank, surface=surface)
    return found


def draw_pattern(draw: Draw, length: int) -> tuple[int, ...]:
    """Which of the three places each mention names, numbered by first mention; all three occur.

    >>> draw_pattern(Draw("any"), 3)
    (0, 1, 2)
    """
    while True:
        drawn = [draw.integer(0, PLACES - 1) for _ in range(length)]
        order = list(dict.fromkeys(drawn))
        if len(order) == PLACES:
            return tuple(map(order.index, drawn))


@dataclasses.dataclass(frozen=True)
class _How:
    """Of which kind an event may be, and whether speech is whispered (None: at times)."""

    kinds: Kinds = (*PLACINGS, "claims")
    whispered: bool | None = None


_ANYHOW = _How()
_PLACED, _TALK = _How(PLACINGS), _How(("claims",))
_VERBS = {
    "moves": _How(("moves",)),
    "tells": _How(("claims",), whispered=False),
    "whispers": _How(("claims",), whispered=True),
}


@dataclasses.dataclass(frozen=True)
class _Mention:
    """What an event of a story shall name, and how."""

    thing: str
    place: str
    how: _How = _ANYHOW


def _about_places(
    draw: Draw, kind: Kind, cast: Cast, count: int, *, rank: int, surface: Surface | None
) -> tuple[Story, Question] | None:
    """A story with `count` mentions and a question answered by the place numbered `rank`.

    Of a belief `surface` says what else shows. Stories are drawn until one fits; None when so many
    did not that none can.
    """
    thing, other = draw.sample(cast.things, 2)
    pattern = draw_pattern(draw, count)
    how = [_ANYHOW] * count
    if kind == "reality":
        how = _how_of_reality(count, rank)
    elif surface is not None:
        how[1:PLACES] = [_VERBS[verb] for verb in surface.verbs]
    for _ in range(_STORIES):
        if kind == "memory":
            mentions = _plan_of_memory(draw, cast, pattern, rank, thing, other)
        else:
            mentions = _plan(draw, cast, thing, other, how)
        told = _story_of_places(draw, cast, mentions)
        if told is None:
            continue
        (story, world), place = told, cast.places[rank]
        fitting = [
            question
            for question in questions(kind, cast.people, (thing,))
            if question.answer(world) == place
            and (surface is None or surface.is_of(question, story, world, cast.places))
        ]
        if fitting:
            return story, draw.choice(fitting)
    return None


def _how_of_reality(count: int, rank: int) -> list[_How]:
    """The thing is put down, moved and talked about, or talked about twice if it stays (rank 0).

    The first sentences about the other thing, which come last, make up for the difference.
    """
    how = [_ANYHOW] * count
    for at, turn in enumerate((PLACES + 1, 1, 2)):
        if turn < count:
            how[turn] = _PLACED if at == rank else _TALK
    return how


def _plan(draw: Draw, cast: Cast, thing: str, other: str, how: Sequence[_How]) -> list[_Mention]:
    """Every place with the thing; the other thing's sentences, the last ones, anywhere between."""
    count = len(how)
    places = [*cast.places, *(draw.choice(cast.places) for _ in range(count - PLACES))]
    order = list(range(PLACES))
    for extra in range(PLACES, count):
        least = order.index(extra - 1) + 1 if extra > PLACES else 0
        order.insert(draw.integer(least, len(order)), extra)
    return [_Mention((thing, other)[at >= PLACES], places[at], how[at]) for at in order]


def _plan_of_memory(
    draw: Draw, cast: Cast, pattern: Sequence[int], rank: int, thing: str, other: str
) -> list[_Mention]:
    """The pattern is both things'; how many of its sentences are the thing's knows no answer."""
    least = len(pattern) - pattern.index(PLACES - 1)
    count = draw.integer(1, least)
    first = draw.choice(
        [
            index
            for index, number in enumerate(pattern)
            if number == rank and len(pattern) - index >= count
        ]
    )
    later = draw.sample(range(first + 1, len(pattern)), count - 1)
    return [
        _Mention(thing if index in (first, *later) else other, cast.places[number])
        for index, number in enumerate(pattern)
    ]


def _about_topics(draw: Draw, kind: Kind, cast: Cast, count: int) -> tuple[Story, Question]:
    while True:
        story = _story_of_topics(draw, cast, count)
        told = [event.thing for event in story.events if event.kind == "tells"] if story else []
        if story is None or not told:
            continue
        asked = questions(kind, cast.people, tuple(dict.fromkeys(told)))
        pair = _twins(draw, story, asked)
        if pair is not None:
            twin, question = pair
            return (story, twin)[draw.integer(0, 1)], question


def questions(kind: Kind, people: Sequence[str], things: Sequence[str]) -> list[Question]:
    """Every question of a kind about these people and things."""
    asked: list[tuple[str, ...]] = [()]
    for _ in range(PEOPLE_ASKED[kind]):
        asked = [(*some, one) for some in asked for one in people if one not in some]
    return [Question(kind=kind, people=some, thing=thing) for some in asked for thing in things]


def _twins(draw: Draw, story: Story, asked: Sequence[Question]) -> tuple[Story, Question] | None:
    """The same words in another order, and a question of those that it answers otherwise.

    Two events change places, or two people or topics do; `told_by_name` is the same
    for both stories. None if no such change is found.
    """
    before = story.end()
    assert before is not None
    answers = [question.answer(before) for question in asked]
    exchanges = [
        (first, second, part)
        for first, second in itertools.combinations(range(len(story.events)), 2)
        for part in ("order", "actor", "hearer", "thing", "secret", "distracted")
    ]
    for first, second, part in draw.sample(exchanges, len(exchanges)):
        changed = _exchanged(story.events, first, second, part)
        if changed is None:
            continue
        twin = dataclasses.replace(story, events=changed)
        after = twin.end()
        if after is None:
            continue
        turned = [
            question
            for question, answer in zip(asked, answers, strict=True)
            if question.answer(after) != answer
            and told_by_name(question, story) == told_by_name(question, twin)
        ]
        if turned:
            return twin, draw.choice(turned)
    return None


def _exchanged(
    events: tuple[Event, ...], first: int, second: int, part: str
) -> tuple[Event, ...] | None:
    """The events with two of them, or one part of the two, exchanged; None if nothing changes."""
    one, other = events[first], events[second]
    if part == "order":
        one, other = other, one
    else:
        mine, theirs = getattr(one, part), getattr(other, part)
        # Words count the same only where both sentences use the word in the same way.
        alike = part != "thing" or one.kind == other.kind == "tells"
        if not mine or not theirs or mine == theirs or not alike:
            return None
        one = dataclasses.replace(one, **{part: theirs})
        other = dataclasses.replace(other, **{part: mine})
    changed = (*events[:first], one, *events[first + 1 : second], other, *events[second + 1 :])
    return None if changed == events else changed


def _stage(draw: Draw, cast: Cast) -> Story:
    """Where people and places are before anything happens: mostly in one of the two rooms."""
    main, other = cast.rooms
    return Story(
        room_of={person: other if draw.integer(0, 3) == 0 else main for person in cast.people},
        homes={place: other if draw.integer(0, 3) == 0 else main for place in cast.places},
        events=(),
    )


def _story_of_places(
    draw: Draw, cast: Cast, mentions: Sequence[_Mention]
) -> tuple[Story, World] | None:
    """A story and the world at its end; None if one of the mentions cannot be."""
    stage = _stage(draw, cast)
    world, events = stage.start(), []
    for mention in mentions:
        if events and draw.integer(0, 1):
            events.append(_happening(world, _coming_or_going(draw, world, cast)))
        event = _named(draw, world, cast, mention)
        if event is None:
            return None
        events.append(_happening(world, event))
    story = _told(stage, events, cast)
    return None if story is None else (story, world)


def _story_of_topics(draw: Draw, cast: Cast, count: int) -> Story | None:
    stage = _stage(draw, cast)
    world, events = stage.start(), []
    for _ in range(count):
        if events and draw.integer(0, 1):
            events.append(_happening(world, _coming_or_going(draw, world, cast)))
        if draw.integer(0, 5):
            if not world.in_company():
                events.append(_happening(world, _joining(draw, world, cast)))
            event = _speech(draw, world, cast)
        else:
            event = _named(
                draw, world, cast, _Mention(draw.choice(cast.things), draw.choice(cast.places))
            )
        if event is None or event in events:
            return None
        events.append(_happening(world, event))
    return _told(stage, events, cast)


def _told(stage: Story, events: Sequence[Event], cast: Cast) -> Story | None:
    """The story of these events; None if it has grown too long."""
    sentences = sum(1 + bool(event.secret) + bool(event.distracted) for event in events)
    if sentences > cast.longest:
        return None
    return dataclasses.replace(stage, events=tuple(events))


def _happening(world: World, event: Event) -> Event:
    world.happen(event)
    return event


def _coming_or_going(draw: Draw, world: World, cast: Cast) -> Event:
    actor = draw.choice(cast.people)
    room = world.room_of[actor]
    if room is not None and draw.integer(0, 1):
        return Event(kind="leaves", actor=actor, room=room)
    return Event(
        kind="enters", actor=actor, room=draw.choice([name for name in cast.rooms if name != room])
    )


def _joining(draw: Draw, world: World, cast: Cast) -> Event:
    """Somebody enters the room where somebody else is, if anybody is in one."""
    hosts = [person for person in cast.people if world.room_of[person]] or cast.people
    host = draw.choice(hosts)
    actor = draw.choice([person for person in cast.people if person != host])
    return Event(kind="enters", actor=actor, room=world.room_of[host] or cast.rooms[0])


def _named(draw: Draw, world: World, cast: Cast, mention: _Mention) -> Event | None:
    """A possible event that names this thing and place; None if none is found quickly."""
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
    """Somebody tells about a topic; None if nobody is found quickly who can."""
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
    """The event, at times with a secret witness or a distracted person where one is possible."""
    if draw.integer(1, 100) > _EXTRA_PERCENT:
        return event
    person = draw.choice(cast.people)
    extras = [dataclasses.replace(event, **{role: person}) for role in ("secret", "distracted")]
    allowed = [extra for extra in extras if world.possible(extra)]
    return draw.choice(allowed) if allowed else event
