"""Theory-of-mind stories whose surface does not give the answer away.

If the question asks for a place, the story names three places, each once with the thing. Between
these mentions, other things lie somewhere or are moved. The rank of the answer is drawn before the
story. Ranks number the three places in the order in which they come up with the thing.

In three of four stories about beliefs, only somebody's comings and goings determine the answer (see
`jexit.tasks.tom.presence`). In the fourth, the person asked about may be named where they learn of
a place: as the actor, as the hearer of a whisper, or as a secret witness. A rule that tracks nobody
could use some features of this story (see `Surface`). They are all drawn before the story,
independently of the answer: whether the thing is then moved, told about or whispered about, which
determines where it is, and the last place that an event names together with the person. Stories are
drawn until one fits. So no rule on places, verbs or the thing's position is right more often than
in one of three stories. A rule that knows in which roles the person is named answers the fourth
story better, and is right in about 0.4 of all stories. In the fourth story, the other person of a
belief about a belief knows where the thing is, as in the classic test (Perner and Wimmer 1985). The
question is whether the first person knows that.

For `reality`, things are moved and talked about equally often for every answer. For `memory`, the
answer is the thing's first place. Both things share a pattern of places, such as first, second,
first, third, and the rank of the answer in this pattern is drawn. Only the facts that define a
question answer it: the last placing, the first placing, or, for beliefs, who saw what.

With two people or fewer than five sentences, some of these combinations occur less often or never.

If the answer is yes or no, a story has a twin with exactly the same words in another order and the
opposite answer. The story and its twin agree on whether the topic is told to all people asked about
by name, and on whether it is told to everybody. A fair draw takes one of the two. So neither the
words nor the names of the people who are named with the topic answer more than half of the
questions. For what one person thinks that another knows, the twin is one in which the same people
know the topic, if there is such a twin. Names, things and places are drawn uniformly.
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
    """Draws a story and a question of this kind.

    `people` and `moves` are the bounds of the number of people and of the number of sentences that
    name a place. If the answer is yes or no, a sentence that names a topic counts as well.
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
    """Draws which of the three places each mention names. All three occur.

    Places are numbered by first mention.

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
    """Returns a story with `count` mentions, and a question answered by the place numbered `rank`.

    For a belief, the story must also have this `surface`. Stories are drawn until one fits. Returns
    None after `_STORIES` attempts, because then none is likely to fit.
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
    """Returns how each mention is told if the place numbered `rank` is the answer.

    The thing is put down, and then moved once and talked about once, or talked about twice if it
    stays (rank 0). The second sentence about the other thing, if there is one, makes up for the
    difference.
    """
    how = [ANYHOW] * count
    for at, turn in enumerate((PLACES + 1, 1, 2)):
        if turn < count:
            how[turn] = PLACED if at == rank else TALK
    return how


def _plan_of_memory(
    draw: Draw, cast: Cast, pattern: Sequence[int], rank: int, thing: str, other: str
) -> list[Mention]:
    """Divides the pattern between both things, so that the thing's first place is number `rank`.

    The number of sentences about the thing does not depend on the answer.
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
    """Returns a story of the same words in another order, and a question with another answer in it.

    In the twin, two events or one part of them (such as two people or topics) are exchanged.
    `told_by_name` is the same for both stories, and so is `who_knows` if possible. Returns None if
    no such exchange is found.
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
    """Returns the events after an exchange of two of them, or of one part of the two.

    Returns None if nothing changes or the parts cannot be exchanged.
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
