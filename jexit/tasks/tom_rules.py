"""Rules that answer a story's question without tracking what anybody knows.

Stories are drawn so that each is right as seldom as guessing is. `world` is the one at the end.
"""

from __future__ import annotations

from jexit.tasks.tom_text import Question, Story
from jexit.tasks.tom_world import World


def last_named(question: Question, story: Story, world: World) -> str:
    """The last place that an event names together with the thing and the first person asked about.

    Where none does, the last one named with the thing.
    """
    person = question.people[0]
    events = [event for event in story.events if event.thing == question.thing]
    naming = [event for event in events if person in (event.actor, event.hearer, event.secret)]
    return (naming or events)[-1].place


def true_place(question: Question, story: Story, world: World) -> str | None:
    """Where the thing is at the end."""
    return world.place_of.get(question.thing)


def others_belief(question: Question, story: Story, world: World) -> str | None:
    """Where the second person asked about thinks that the thing is at the end."""
    return world.beliefs.get((question.people[1:], question.thing))


def told_by_name(question: Question, story: Story) -> tuple[bool, bool]:
    """Whether all people asked about are named with the topic, and whether everybody is told."""
    tells = [e for e in story.events if e.kind == "tells" and e.thing == question.thing]
    named = [set(question.people) <= {e.actor, e.hearer, e.secret} for e in tells]
    return any(named), any(not event.hearer for event in tells)
