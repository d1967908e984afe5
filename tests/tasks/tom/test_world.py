"""Who believes what after which events, by hand and by a replay of the text alone."""

from story_reader import read_story

from jexit.tasks.tom.text import CONTAINERS
from jexit.tasks.tom.world import Event, World

HOMES = {"box": "hall", "jar": "hall", "tin": "garden"}
TOGETHER = {"Tom": "hall", "Mia": "hall", "Ben": "hall"}
AWAY = {**TOGETHER, "Ben": "garden"}


def event(kind, actor, **fields):
    thing = {"tells": "trip", "enters": "", "leaves": ""}.get(kind, "coins")
    room = {"enters": "hall", "leaves": "hall"}.get(kind, "")
    return Event(kind=kind, actor=actor, **({"thing": thing, "room": room} | fields))


PUTS = event("puts", "Tom", place="box")
MOVES = event("moves", "Mia", place="jar")
TELLS = event("tells", "Tom", hearer="Mia")


def world_after(*events, room_of=TOGETHER):
    world = World(room_of, HOMES)
    for one in events:
        world.happen(one)
    return world


def beliefs(*events, room_of=TOGETHER):
    """Every belief, by the names of the people: {"Tom": ..., "Tom Mia": ...}."""
    held = world_after(*events, room_of=room_of).beliefs
    return {" ".join(who): what for (who, _), what in held.items()}


def test_beliefs_by_hand():
    two = {"Tom": "hall", "Mia": "hall"}
    # A first-order false belief, and a second-order one of somebody who is watched in secret.
    came_back = (PUTS, event("leaves", "Tom"), MOVES, event("enters", "Tom"))
    expected = {"Tom": "box", "Mia": "jar", "Tom Mia": "box", "Mia Tom": "box"}
    assert beliefs(*came_back, room_of=two) == expected
    world = world_after(*came_back, room_of=two)
    assert (world.place_of, world.first_place_of) == ({"coins": "jar"}, {"coins": "box"})
    watched = (PUTS, event("leaves", "Tom"), event("moves", "Mia", place="jar", secret="Tom"))
    assert beliefs(*watched, room_of=two) == dict.fromkeys(("Tom", "Mia", "Tom Mia"), "jar") | {
        "Mia Tom": "box"
    }
    # The distracted learn nothing, and the others know it.
    held = beliefs(PUTS, event("moves", "Mia", place="jar", distracted="Ben"))
    assert {who for who in held if held[who] == "jar"} == {"Tom", "Mia", "Tom Mia", "Mia Tom"}
    assert held["Tom Ben"] == held["Ben Tom"] == held["Ben"] == "box"
    # A lie is believed by those whom it is told, not by who tells it.
    out = [event("leaves", "Mia"), event("leaves", "Ben")]
    hidden = [*out, PUTS, event("enters", "Mia"), event("enters", "Ben")]
    lie = event("claims", "Tom", place="jar", hearer="Mia")
    assert beliefs(*hidden, lie) == {"Tom": "box"} | dict.fromkeys(
        ("Mia", "Tom Mia", "Mia Tom"), "jar"
    )
    # Public speech reaches the room and a secret listener, not who comes later.
    room = {"Tom", "Mia", "Tom Mia", "Mia Tom"}
    heard = beliefs(event("tells", "Tom", secret="Ben"), room_of=AWAY)
    assert heard.keys() == room | {"Ben", "Ben Tom", "Ben Mia"}
    assert beliefs(event("tells", "Tom"), event("enters", "Ben"), room_of=AWAY).keys() == room
    # Carrying is seen in two rooms that do not see each other. Containers are closed.
    taking = event("takes", "Tom", place="tin", room="garden")
    assert beliefs(PUTS, taking, room_of=AWAY) == dict.fromkeys(
        room | {"Ben", "Tom Ben", "Ben Tom"}, "tin"
    )
    assert not any(
        "Ben" in who for who in beliefs(event("leaves", "Ben"), PUTS, event("enters", "Ben"))
    )


def test_what_cannot_happen():
    assert world_after().possible(PUTS) and world_after().possible(TELLS)
    for impossible in (
        event("puts", "Tom", place="tin"),  # in another room
        MOVES,  # nothing has been put anywhere
        event("enters", "Tom"),  # is there
        event("leaves", "Tom", room="garden"),  # is elsewhere
        event("puts", "Tom", place="box", secret="Mia"),  # sees it anyway
        event("puts", "Tom", place="box", distracted="Tom"),  # does it
        event("tells", "Tom", hearer="Tom"),
        event("claims", "Tom", place="jar"),  # has no idea where the coins are
        event("tells", "Tom", hearer="Mia", distracted="Ben"),  # is not spoken to
    ):
        assert not world_after().possible(impossible), impossible
    # Nobody claims a place to those who saw another.
    world = world_after(PUTS, event("leaves", "Ben"), MOVES, event("enters", "Ben"))
    assert world.possible(event("claims", "Tom", place="box", hearer="Ben"))
    assert not world.possible(event("claims", "Tom", place="box", hearer="Mia"))
    assert not world.possible(event("claims", "Tom", place="box"))
    assert world.possible(event("claims", "Tom", place="box", distracted="Mia"))
    assert not world.possible(MOVES) and world.possible(event("moves", "Mia", place="box"))


def test_beliefs_are_those_of_a_replay_of_what_everybody_noticed(wild_stories):
    compared = set()
    for story, asked in wild_stories:
        world, reading = story.end(), read_story(story.text())
        for question in asked:
            expected = reading.answer(question.kind, question.people, question.thing)
            assert question.answer(world) == expected, (story.text(), question)
            compared.add((question.kind, expected))
    assert len(compared) == 4 * (len(CONTAINERS) + 1) + 2 * 2
