"""The text of theory-of-mind stories and questions; see `jexit.tasks.tom.task` for an example."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Literal, get_args

from jexit.tasks.tom.world import SPEECH, Event, World

ROOMS = ("hall", "kitchen", "garden", "office")
CONTAINERS = ("box", "bag", "jar", "tin", "chest", "basket")
TOPICS = ("trip", "party", "game", "film")
UNKNOWN = "unknown"  # in a chain, the state before anything is believed
YES, NO = "yes", "no"

Kind = Literal["reality", "memory", "belief", "second_belief", "knowledge", "second_knowledge"]
KINDS: tuple[Kind, ...] = get_args(Kind)
OF_PLACES: tuple[Kind, ...] = KINDS[:4]
PEOPLE_ASKED: Mapping[str, int] = dict(zip(KINDS, (0, 0, 1, 2, 1, 2), strict=True))

QUESTIONS: Mapping[str, str] = {
    "reality": "Where are the {thing} now?",
    "memory": "Where were the {thing} at first?",
    "belief": "Where does {a} think the {thing} are?",
    "second_belief": "Where does {a} think {b} thinks the {thing} are?",
    "knowledge": "Does {a} know about the {thing}?",
    "second_knowledge": "Does {a} think {b} knows about the {thing}?",
}
CLOSINGS: Mapping[str, str] = {
    "free": "",
    "fine": " Answer in full.",
    "coarse": " Answer in short.",
    "at_once": " Answer at once.",
}
SENTENCES: Mapping[str, str] = {
    "enters": "{actor} enters the {room}.",
    "leaves": "{actor} leaves the {room}.",
    "puts": "{actor} puts the {thing} in the {place}.",
    "moves": "{actor} moves the {thing} to the {place}.",
    "takes": "{actor} takes the {thing} to the {place} in the {room}.",
    "claims": "{actor} tells everybody that the {thing} are in the {place}.",
    "tells": "{actor} tells everybody about the {thing}.",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Question:
    """A question about a thing and perhaps about the thoughts of one or two people.

    Without `people`, the question is about the world itself. With one person A, it asks what A
    thinks or knows about the thing; with two people A and B, what A thinks that B thinks or knows.
    """

    kind: Kind
    people: tuple[str, ...]
    thing: str

    @property
    def of_places(self) -> bool:
        return self.kind in OF_PLACES

    def answer(self, world: World) -> str:
        """Returns the answer if the world is in the state `world`.

        If nobody has put the thing anywhere, or the person asked about has no belief, the answer is
        UNKNOWN for a place and NO for a topic.
        """
        if self.kind == "reality":
            return world.place_of.get(self.thing, UNKNOWN)
        if self.kind == "memory":
            return world.first_place_of.get(self.thing, UNKNOWN)
        return world.beliefs.get((self.people, self.thing), UNKNOWN if self.of_places else NO)

    def text(self) -> str:
        a, b = (*self.people, "", "")[:2]
        return QUESTIONS[self.kind].format(a=a, b=b, thing=self.thing)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Story:
    """A story: people and containers in rooms, and the events that follow.

    `room_of` maps each person, and `homes` each container, to the room at the beginning.
    """

    room_of: Mapping[str, str]
    homes: Mapping[str, str]
    events: tuple[Event, ...]

    def start(self) -> World:
        return World(self.room_of, self.homes)

    def end(self) -> World | None:
        """Returns the state of the world after all events, or None if an event is impossible."""
        world = self.start()
        for event in self.events:
            if not world.possible(event):
                return None
            world.happen(event)
        return world

    def text(self) -> str:
        rooms = dict.fromkeys(self.room_of.values())
        opening = [_opening(self.start().inside(room), room) for room in rooms]
        return " ".join([*opening, *map(sentence, self.events)])


def _opening(people: Sequence[str], room: str) -> str:
    verb = "are" if len(people) > 1 else "is"
    listed = " and ".join([", ".join(people[:-1]), people[-1]] if people[1:] else people)
    return f"{listed} {verb} in the {room}."


def sentence(event: Event) -> str:
    """Returns the text of `event`, with a second sentence for a secret or distracted person."""
    text = SENTENCES[event.kind].format_map(dataclasses.asdict(event))
    if event.hearer:
        text = text.replace("tells everybody", f"whispers to {event.hearer}")
    if event.secret:
        text += f" {event.secret} {'hears' if event.kind in SPEECH else 'sees'} it in secret."
    if event.distracted:
        text += f" {event.distracted} is distracted."
    return text
