"""Heuristics that answer a question from a story's sentences, without tracking who knows what.

Stories are drawn so that these heuristics are hardly ever better than a guess. The argument `world`
is always the state of the world at the end of the story.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from jexit.tasks.tom.text import Question, Story
from jexit.tasks.tom.world import Event, World


def is_named(person: str, event: Event) -> bool:
    return person in (event.actor, event.hearer, event.secret, event.distracted)


def last_named(question: Question, story: Story) -> str:
    """Returns the last place named together with the thing and the first person in `question`.

    If no event names both the thing and the person, returns the last place named with the thing.
    """
    person = question.people[0]
    events = [event for event in story.events if event.thing == question.thing]
    naming = [event for event in events if person in (event.actor, event.hearer, event.secret)]
    return (naming or events)[-1].place


def before_last_move(person: str, thing: str, story: Story) -> str:
    """Returns the last place named with `thing` before `person` last entered or left a room.

    If the person never entered or left a room, returns the last place named with the thing. If no
    place was named before the person's last move, returns the first place named with the thing.
    """
    moves = [at for at, e in enumerate(story.events) if e.actor == person and not e.place]
    until = story.events[: moves[-1]] if moves else story.events
    named = [event.place for event in until if event.thing == thing and event.place]
    return named[-1] if named else next(e.place for e in story.events if e.thing == thing)


def others_know_place(question: Question, person: str, world: World) -> bool:
    place = world.place_of.get(question.thing)
    others = (other for other in question.people if other != person)
    return all(world.beliefs.get(((other,), question.thing)) == place for other in others)


def told_by_name(question: Question, story: Story) -> tuple[bool, bool]:
    """Returns (all named, told to everybody) for the sentences that tell of the question's topic.

    The first value is True if one of the sentences names all people asked about. The second value
    is True if one of the sentences tells everybody in the room.
    """
    tells = [e for e in story.events if e.kind == "tells" and e.thing == question.thing]
    named = [set(question.people) <= {e.actor, e.hearer, e.secret} for e in tells]
    return any(named), any(not event.hearer for event in tells)


def who_knows(question: Question, world: World) -> tuple[bool, ...]:
    return tuple(((person,), question.thing) in world.beliefs for person in question.people)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Surface:
    """Features of a story about a belief that do not depend on who knows what.

    `verbs` contains the verbs of the second and the third event about the thing ("moves", "tells"
    or "whispers"). `last_named` is the number of the place that the function `last_named` returns,
    if places are numbered from 0 in the order in which the story names them with the thing.
    """

    verbs: tuple[str, str]
    last_named: int

    def is_of(self, question: Question, story: Story, world: World, places: Sequence[str]) -> bool:
        return last_named(question, story) == places[self.last_named] and others_know_place(
            question, question.people[0], world
        )


# The ranks that `last_named` may have for each pair of verbs. Other ranks make some answers
# impossible or very rare, because nobody is talked out of what they saw.
_LASTS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("moves", "moves"): (0, 2),
    ("moves", "tells"): (0, 2),
    ("moves", "whispers"): (2,),
    ("tells", "moves"): (2,),
    ("whispers", "moves"): (1,),
    ("tells", "tells"): (2,),
    ("tells", "whispers"): (2,),
    ("whispers", "tells"): (1, 2),
    ("whispers", "whispers"): (2,),
}
SURFACES = tuple(
    Surface(verbs=verbs, last_named=last) for verbs, lasts in _LASTS.items() for last in lasts
)
