"""Draws theory-of-mind stories whose wording does not reveal the answer.

If the question asks for a place, the story names three places, each of them once with the thing
asked about. Sentences about another thing may come in between. (For `memory`, see below.) The rank
of a place is its position in the order in which the places are named with the thing. The rank of
the answer is drawn before the story.

In three of four stories about beliefs, only the comings and goings of one person determine the
answer (see `jexit.tasks.tom.presence`). In the fourth, a sentence may name the person asked about
when this person learns of a place. Some features of such a story could help a rule that does not
track knowledge (see `Surface`): whether the thing is later moved, told about or whispered about,
and the last place that an event names together with the person. These features are drawn before the
story and independently of the answer, and stories are drawn until one has them. Therefore no rule
about places, verbs or the position of the thing gives the correct answer in more than one of three
stories. A rule that uses the rooms in which the person is named does better on this fourth kind of
story, and gives the correct answer in about 40 % of all stories. If the question then asks what one
person thinks that another thinks, the other knows where the thing is, as in the classic test
(Perner and Wimmer 1985).

For questions of the kind `reality` (where the thing is now), things are moved and talked about
equally often for every answer. For `memory` (where the thing was at first), the thing and another
thing share a pattern of places, such as first, second, first, third, and the rank of the answer in
this pattern is drawn. With two people or fewer than five sentences, some of these combinations
occur less often or never.

If the answer is yes or no, a story has a twin, which consists of exactly the same words in another
order and has the opposite answer. One of the two stories is drawn. Both agree on whether the topic
is told to all people asked about by name, and on whether it is told to everybody. Therefore neither
the words nor the names of the people who are named with the topic answer more than half of the
questions. If the question is whether one person thinks that another knows about a topic, the same
people know about it in both stories, if there is such a twin. Names, things and places are drawn
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

_STORIES = 5_000  # stories tried: more than any combination needs with three people
_NAMED_PERCENT = 25  # percentage of beliefs where the person may be named on learning of a place
_MORE_SENTENCES = 2  # at most beyond the largest number of moves, to bound the prompt


def draw_problem(
    draw: Draw, kind: Kind, *, people: Sequence[int], moves: Sequence[int]
) -> tuple[Story, Question]:
    """Draws a story and a question of the given kind about the story, and returns both.

    `people` contains the smallest and the largest number of people. `moves` contains the smallest
    and the largest number of sentences that name a place or, if the answer is yes or no, a topic.
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
    """Draws the numbers of the places that `length` events name, so that all three places occur.

    Places are numbered in the order in which they are first named.

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
    """Draws a story and a question whose answer is `cast.places[rank]`, and returns both.

    The story has `count` events that name a place. For a question about a belief, the story has the
    features in `surface`, if given. Stories are drawn until one fits. Returns None after `_STORIES`
    attempts, because a fitting story is then unlikely to exist.
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
    """Returns the allowed kinds of event for each of `count` mentions of a place.

    `rank` is the number of the place that is the answer to a question of the kind `reality`. The
    thing asked about is put down in its first place. It is then moved once and talked about once,
    or talked about twice if the answer is the first place. The second mention of the story's other
    thing, if any, makes up for this difference, so that the number of moves is the same for every
    answer.
    """
    how = [ANYHOW] * count
    for at, turn in enumerate((PLACES + 1, 1, 2)):
        if turn < count:
            how[turn] = PLACED if at == rank else TALK
    return how


def _plan_of_memory(
    draw: Draw, cast: Cast, pattern: Sequence[int], rank: int, thing: str, other: str
) -> list[Mention]:
    """Returns mentions of two things for a question about the first place of `thing`.

    `pattern` contains the number of the place in each mention. The first mention of `thing` names
    the answer, which is the place numbered `rank`. The number of mentions of `thing` does not
    depend on `rank`.
    """
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
    """Returns a twin of `story`, and a question in `asked` to which the twin has another answer.

    A twin is the story after an exchange of two events, or of one part of two events, such as their
    actors. `told_by_name` and, if possible, `who_knows` give the same result for both stories.
    Returns None if there is no such twin.
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
    """Returns `events` after an exchange between the events at the indices `first` and `second`.

    `part` is "order" to exchange the events themselves, or a field of `Event`. Returns None if
    nothing changes or the parts cannot be exchanged.
    """
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
