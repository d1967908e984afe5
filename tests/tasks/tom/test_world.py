from story_reader import read_story

from jexit.tasks.base import Draw
from jexit.tasks.tom.events import questions
from jexit.tasks.tom.text import CONTAINERS, KINDS, OF_PLACES, ROOMS, TOPICS, Story
from jexit.tasks.tom.world import Event, World
from jexit.tasks.word_problems import NAMES, OBJECTS

HOMES = {"box": "hall", "jar": "hall", "tin": "garden"}
TOGETHER = {"Tom": "hall", "Mia": "hall", "Ben": "hall"}


def world_after(*events, room_of=TOGETHER):
    world = World(room_of, HOMES)
    for event in events:
        world.happen(event)
    return world


def puts(actor="Tom", place="box", **extra):
    return Event(kind="puts", actor=actor, thing="coins", place=place, **extra)


def moves(actor="Mia", place="jar", **extra):
    return Event(kind="moves", actor=actor, thing="coins", place=place, **extra)


def leaves(actor, room="hall"):
    return Event(kind="leaves", actor=actor, room=room)


def enters(actor, room="hall"):
    return Event(kind="enters", actor=actor, room=room)


def claims(actor, place, **extra):
    return Event(kind="claims", actor=actor, thing="coins", place=place, **extra)


def tells(actor, **extra):
    return Event(kind="tells", actor=actor, thing="trip", **extra)


def beliefs(world, thing="coins"):
    """Every belief about a thing, by the names of the people: {"Tom": ..., "Tom Mia": ...}."""
    return {" ".join(who): what for (who, about), what in world.beliefs.items() if about == thing}


def test_a_first_order_false_belief():
    two = {"Tom": "hall", "Mia": "hall"}
    world = world_after(puts(), leaves("Tom"), moves(), enters("Tom"), room_of=two)
    assert beliefs(world) == {"Tom": "box", "Mia": "jar", "Tom Mia": "box", "Mia Tom": "box"}
    assert (world.place_of, world.first_place_of) == ({"coins": "jar"}, {"coins": "box"})


def test_a_second_order_false_belief_of_one_who_is_watched_in_secret():
    two = {"Tom": "hall", "Mia": "hall"}
    world = world_after(puts(), leaves("Tom"), moves(secret="Tom"), room_of=two)
    assert beliefs(world) == {"Tom": "jar", "Mia": "jar", "Tom Mia": "jar", "Mia Tom": "box"}


def test_the_distracted_learn_nothing_and_the_others_know_it():
    world = world_after(puts(), moves(distracted="Ben"))
    assert {who: what for who, what in beliefs(world).items() if what == "jar"} == {
        **dict.fromkeys(("Tom", "Mia", "Tom Mia", "Mia Tom"), "jar")
    }
    assert beliefs(world)["Tom Ben"] == beliefs(world)["Ben Tom"] == beliefs(world)["Ben"] == "box"


def test_a_lie_is_believed_by_whom_it_is_told_alone():
    hidden = [leaves("Mia"), leaves("Ben"), puts(), enters("Mia"), enters("Ben")]
    world = world_after(*hidden, claims("Tom", "jar", hearer="Mia"))
    assert beliefs(world) == {"Tom": "box", "Mia": "jar", "Tom Mia": "jar", "Mia Tom": "jar"}
    assert world.place_of == {"coins": "box"}


def test_public_speech_reaches_the_room_and_a_secret_listener():
    away = {**TOGETHER, "Ben": "garden"}
    world = world_after(tells("Tom", secret="Ben"), room_of=away)
    assert set(beliefs(world, "trip")) == {
        *("Tom", "Mia", "Tom Mia", "Mia Tom", "Ben", "Ben Tom", "Ben Mia")
    }
    missed = world_after(tells("Tom"), enters("Ben"), room_of=away)
    assert set(beliefs(missed, "trip")) == {"Tom", "Mia", "Tom Mia", "Mia Tom"}


def test_carrying_is_seen_in_two_rooms_that_do_not_see_each_other():
    away = {**TOGETHER, "Ben": "garden"}
    taking = Event(kind="takes", actor="Tom", thing="coins", place="tin", room="garden")
    world = world_after(puts(), taking, room_of=away)
    assert beliefs(world) == dict.fromkeys(
        ("Tom", "Mia", "Ben", "Tom Mia", "Mia Tom", "Tom Ben", "Ben Tom"), "tin"
    )
    assert world.room_of["Tom"] == "garden"


def test_containers_are_closed():
    world = world_after(leaves("Ben"), puts(), enters("Ben"))
    assert not {who for who in beliefs(world) if "Ben" in who}


WHAT_CANNOT_HAPPEN = [
    puts(place="tin"),  # in another room
    moves(),  # nothing has been put anywhere
    enters("Tom"),  # is there
    leaves("Tom", room="garden"),  # is elsewhere
    puts(secret="Mia"),  # sees it anyway
    puts(distracted="Tom"),  # does it
    tells("Tom", hearer="Tom"),
    claims("Tom", "jar"),  # has no idea where the coins are
    tells("Tom", hearer="Mia", distracted="Ben"),  # is not spoken to
]


def test_what_cannot_happen():
    for event in WHAT_CANNOT_HAPPEN:
        assert not world_after().possible(event)
        assert world_after().possible(puts()) and world_after().possible(tells("Tom", hearer="Mia"))


def test_nobody_claims_a_place_to_those_who_saw_another():
    world = world_after(puts(), leaves("Ben"), moves(), enters("Ben"))
    assert world.possible(claims("Tom", "box", hearer="Ben"))
    assert not world.possible(claims("Tom", "box", hearer="Mia"))
    assert not world.possible(claims("Tom", "box"))
    assert world.possible(claims("Tom", "box", distracted="Mia"))
    assert not world.possible(moves(place="jar")) and world.possible(moves(place="box"))


def any_story(draw):
    """Whatever can happen, without regard to questions: longer and wilder than a problem's."""
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
    return Story(room_of=room_of, homes=homes, events=tuple(events)), (*things, *topics)


def test_beliefs_are_those_of_a_replay_of_what_everybody_noticed():
    compared = set()
    for number in range(1500):
        story, things = any_story(Draw("any story", number))
        world, reading = story.end(), read_story(story.text())
        for kind in KINDS:
            about = things[:2] if kind in OF_PLACES else things[2:]
            for question in questions(kind, tuple(story.room_of), about):
                expected = reading.answer(kind, question.people, question.thing)
                assert question.answer(world) == expected, (story.text(), question)
                compared.add((kind, expected))
    assert len(compared) == 4 * (len(CONTAINERS) + 1) + 2 * 2
