"""Theory-of-mind stories whose surface does not give the answer away.

Where a place is asked for, the story names three, each once with the thing; other things lie or
are moved between. Which of the three, in the order in which they come up with the thing, is the
answer is drawn before the story.

In three of four stories about beliefs only somebody's comings and goings tell the answer
(`jexit.tasks.tom.presence`). In the fourth the person asked about may be named where they learn of
a place: as who does it, to whom it is whispered, or as a secret witness. All that a rule could go
by there that tracks nobody (`Surface`) is drawn before the story, independently of the answer:
whether the thing is then moved, told about or whispered about, hence where it is, and the last
place that an event names together with the person. Stories are drawn until one fits. So no rule on
places, verbs or where the thing is beats one in three. One that knows in which roles the person is
named gets the fourth story, and about 0.4 of all. There the other person of a belief about a belief
knows where the thing is, as in the classic test (Perner and Wimmer 1985), and the question is
whether the first one knows that.

For `reality` how often things are moved and talked about is the same for every answer. For
`memory`, where the thing's first place is the answer, both things share a pattern of places such as
first, second, first, third, and which of them is the answer, as they come up, is drawn. Only what
defines a question answers it: the last placing, the first one, and for beliefs who saw what.

Two people, or fewer than five sentences, are too few for some of these combinations, which then
occur less often or never.

Where the answer is yes or no, a story comes with a twin that has exactly the same words in another
order and the opposite answer, and in which the topic is told to the same people by name, and to
everybody, if it is in the story; one of the two is taken by a fair draw. So neither the words nor
who is named with the topic beat one half. Of what one person thinks that another knows, the twin is
one in which the same people know, where there is such a one. Names, things and places are drawn
uniformly.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

from jexit.tasks.base import Draw
from jexit.tasks.tom.events import (
    ANYHOW,
    PLACED,
    PLACES,
    TALK,
    VERBS,
    Cast,
    How,
    Mention,
    plan,
    questions,
    story_of_places,
    story_of_topics,
)
from jexit.tasks.tom.presence import story_of_presence
from jexit.tasks.tom.rules import SURFACES, Surface, told_by_name, who_knows
from jexit.tasks.tom.text import (
    CONTAINERS,
    OF_PLACES,
    PEOPLE_ASKED,
    ROOMS,
    TOPICS,
    Kind,
    Question,
    Story,
)
from jexit.tasks.tom.world import Event
from jexit.tasks.word_problems import NAMES, OBJECTS

_STORIES = 5_000  # that are tried: more than any combination needs with three people
_NAMED_PERCENT = 25  # of beliefs: the person may be named where they learn of a place
_MORE_SENTENCES = 2  # at most, than the largest number of moves: bounds the prompt


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
    named = draw.integer(1, 100) <= _NAMED_PERCENT
    found = None
    while found is None:
        rank = draw.integer(0, PLACES - 1)
        if PEOPLE_ASKED[kind] and not named:
            found = story_of_presence(draw, kind, cast, count, rank=rank)
        else:
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


def _about_places(
    draw: Draw, kind: Kind, cast: Cast, count: int, *, rank: int, surface: Surface | None
) -> tuple[Story, Question] | None:
    """A story with `count` mentions and a question answered by the place numbered `rank`.

    Of a belief `surface` says what else shows. Stories are drawn until one fits; None when so many
    did not that none can.
    """
    thing, other = draw.sample(cast.things, 2)
    pattern = draw_pattern(draw, count)
    how = [ANYHOW] * count
    if kind == "reality":
        how = _how_of_reality(count, rank)
    elif surface is not None:
        how[1:PLACES] = [VERBS[verb] for verb in surface.verbs]
    for _ in range(_STORIES):
        if kind == "memory":
            mentions = _plan_of_memory(draw, cast, pattern, rank, thing, other)
        else:
            mentions = plan(draw, cast, thing, other, how)
        told = story_of_places(draw, cast, mentions)
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


def _how_of_reality(count: int, rank: int) -> list[How]:
    """The thing is put down, moved and talked about, or talked about twice if it stays (rank 0).

    The first sentences about the other thing, which come last, make up for the difference.
    """
    how = [ANYHOW] * count
    for at, turn in enumerate((PLACES + 1, 1, 2)):
        if turn < count:
            how[turn] = PLACED if at == rank else TALK
    return how


def _plan_of_memory(
    draw: Draw, cast: Cast, pattern: Sequence[int], rank: int, thing: str, other: str
) -> list[Mention]:
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
        Mention(thing if index in (first, *later) else other, cast.places[number])
        for index, number in enumerate(pattern)
    ]


def _about_topics(draw: Draw, kind: Kind, cast: Cast, count: int) -> tuple[Story, Question]:
    while True:
        story = story_of_topics(draw, cast, count)
        told = [event.thing for event in story.events if event.kind == "tells"] if story else []
        if story is None or not told:
            continue
        asked = questions(kind, cast.people, tuple(dict.fromkeys(told)))
        pair = _twins(draw, story, asked)
        if pair is not None:
            twin, question = pair
            return (story, twin)[draw.integer(0, 1)], question


def _twins(draw: Draw, story: Story, asked: Sequence[Question]) -> tuple[Story, Question] | None:
    """The same words in another order, and a question of those that it answers otherwise.

    Two events change places, or two people or topics do; `told_by_name` is the same for both
    stories, and `who_knows` where that can be. None if no such change is found.
    """
    before = story.end()
    assert before is not None
    answers = [question.answer(before) for question in asked]
    exchanges = [
        (first, second, part)
        for first, second in itertools.combinations(range(len(story.events)), 2)
        for part in ("order", "actor", "hearer", "thing", "secret", "distracted")
    ]
    found = None
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
        if not turned:
            continue
        found = found or (twin, draw.choice(turned))
        nested = [
            question
            for question in turned
            if who_knows(question, before) == who_knows(question, after)
        ]
        if nested:
            return twin, draw.choice(nested)
    return found


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
