"""Theory-of-mind stories whose surface does not give the answer away.

Where a place is asked for, the story mentions three places in a pattern such as first, second,
first, third. The pattern, which of the three is the answer and whether the belief is false are
drawn before the story, independently of each other, and stories are drawn until one fits. So no
rule on places alone (the last, the first, the most often mentioned) beats one in three, not even
for the question where the thing is now: what is mentioned after its last placing are other things'
places and what people say.

Where the answer is yes or no, a story comes with a twin that has exactly the same words in another
order and the opposite answer, and one of the two is taken by a fair draw. So no rule on the words
alone beats one half. Names, things and places are drawn uniformly.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence

from jexit.tasks.base import Draw
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
from jexit.tasks.tom_world import PLACINGS, Event, World
from jexit.tasks.word_problems import NAMES, OBJECTS

PLACES = 3  # that a story about things mentions

_PROPOSALS = 12
_LATER_MENTIONS = ("moves", "moves", "moves", "takes", "claims", "claims", "claims")
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
    if kind in OF_PLACES:
        pattern = draw_pattern(draw, count)
        return _about_places(
            draw, kind, cast, pattern, rank=draw.integer(0, 2), false=draw.integer(0, 1) == 1
        )
    return _about_topics(draw, kind, cast, count)


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


def is_false(question: Question, world: World) -> bool:
    """Whether the belief asked for is wrong: about the place, or about the other's own belief."""
    belief = world.beliefs.get((question.people, question.thing))
    if len(question.people) == 2:
        return belief != world.beliefs.get((question.people[1:], question.thing))
    return belief != world.place_of.get(question.thing)


def _about_places(
    draw: Draw, kind: Kind, cast: Cast, pattern: Sequence[int], *, rank: int, false: bool
) -> tuple[Story, Question]:
    """A story with these mentions and a question answered by the place numbered `rank`.

    Stories are drawn until one fits; to find one sooner, the mention that shall decide the answer
    is drawn first, and only events that may stand there and around it are tried.
    """
    mentions = [index for index, number in enumerate(pattern) if number == rank]
    while True:
        thing, deciding = draw.choice(cast.things), draw.choice(mentions)

        def allowed(event: Event, index: int, thing: str = thing, deciding: int = deciding) -> bool:
            if index == deciding:
                placed = kind not in ("reality", "memory") or event.kind in PLACINGS
                return event.thing == thing and placed
            if kind == "memory":
                return index > deciding or event.thing != thing
            placed_later = index > deciding and event.thing == thing and event.kind in PLACINGS
            return kind != "reality" or not placed_later

        story = _story_of_places(draw, cast, pattern, allowed)
        if story is None:
            continue
        world = story.end()
        assert world is not None
        fitting = [
            question
            for question in questions(kind, cast.people, (thing,))
            if question.answer(world) == cast.places[rank]
            and (not question.people or is_false(question, world) == false)
        ]
        if fitting:
            return story, draw.choice(fitting)


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

    Two events change places, or two people or topics do. None if no such change is found.
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
        turned = [q for q, answer in zip(asked, answers, strict=True) if q.answer(after) != answer]
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
    draw: Draw, cast: Cast, pattern: Sequence[int], allowed: Callable[[Event, int], bool]
) -> Story | None:
    stage = _stage(draw, cast)
    world, events = stage.start(), []
    for index, number in enumerate(pattern):
        if events and draw.integer(0, 1):
            events.append(_happening(world, _coming_or_going(draw, world, cast)))
        event = _mention(
            draw, world, cast, cast.places[number], lambda event, at=index: allowed(event, at)
        )
        if event is None:
            return None
        events.append(_happening(world, event))
    return _told(stage, events, cast)


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
            event = _mention(draw, world, cast, draw.choice(cast.places), lambda _: True)
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


def _mention(
    draw: Draw, world: World, cast: Cast, place: str, allowed: Callable[[Event], bool]
) -> Event | None:
    """A possible and allowed event that names the place; None if none is found quickly."""
    home = world.homes[place]
    for _ in range(_PROPOSALS):
        thing = draw.choice(cast.things)
        now = world.place_of.get(thing)
        kind = "puts" if now is None else draw.choice(_LATER_MENTIONS)
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
            hearer=_hearer(draw, cast) if kind == "claims" else "",
        )
        if allowed(event) and world.possible(event):
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


def _hearer(draw: Draw, cast: Cast) -> str:
    return draw.choice(cast.people) if draw.integer(1, 100) <= _WHISPER_PERCENT else ""


def _with_extra(draw: Draw, world: World, cast: Cast, event: Event) -> Event:
    """The event, at times with a secret witness or a distracted person where one is possible."""
    if draw.integer(1, 100) > _EXTRA_PERCENT:
        return event
    person = draw.choice(cast.people)
    extras = [dataclasses.replace(event, **{role: person}) for role in ("secret", "distracted")]
    allowed = [extra for extra in extras if world.possible(extra)]
    return draw.choice(allowed) if allowed else event
