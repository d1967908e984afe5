import pytest

from jexit.tasks.base import Draw
from jexit.tasks.tom.events import questions
from jexit.tasks.tom.stories import draw_problem
from jexit.tasks.tom.text import CONTAINERS, KINDS, OF_PLACES, ROOMS, TOPICS, Story
from jexit.tasks.tom.world import Event, World
from jexit.tasks.word_problems import NAMES, OBJECTS


@pytest.fixture(scope="session")
def stories():
    """Stories with their questions of every kind, drawn once: each takes some 20 ms."""
    return [
        draw_problem(Draw("stories", n), KINDS[n % len(KINDS)], people=(2, 4), moves=(3, 5))
        for n in range(180)
    ]


@pytest.fixture(scope="session")
def wild_stories():
    """Whatever can happen, without regard to questions, of which each story has all there are."""
    return [_wild_story(Draw("wild", number)) for number in range(300)]


def _wild_story(draw):
    people = draw.sample(NAMES, draw.integer(2, 5))
    rooms, places = draw.sample(ROOMS, 2), draw.sample(CONTAINERS, 4)
    things, topics = draw.sample(OBJECTS, 2), draw.sample(TOPICS, 2)
    room_of = {person: draw.choice(rooms) for person in people}
    homes = {place: draw.choice(rooms) for place in places}
    world, events = World(room_of, homes), []
    for _ in range(60):
        kind = draw.choice(("enters", "leaves", "puts", "moves", "takes", "claims", "tells"))
        place, nobody = draw.choice(places), draw.integer(0, 2)
        fields = {"kind": kind, "actor": draw.choice(people)}
        if kind == "tells":
            fields["thing"] = draw.choice(topics)
        elif kind in ("enters", "leaves"):
            fields["room"] = draw.choice(rooms)
        else:
            fields |= {"thing": draw.choice(things), "place": place}
        if kind == "takes":
            fields["room"] = homes[place]
        if kind in ("claims", "tells") and draw.integer(0, 1):
            fields["hearer"] = draw.choice(people)
        if kind not in ("enters", "leaves") and not nobody:
            fields[draw.choice(("secret", "distracted"))] = draw.choice(people)
        event = Event(**fields)
        if world.possible(event):
            world.happen(event)
            events.append(event)
    asked = [
        question
        for kind in KINDS
        for question in questions(kind, people, things if kind in OF_PLACES else topics)
    ]
    return Story(room_of=room_of, homes=homes, events=tuple(events)), asked
