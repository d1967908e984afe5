"""A small world of people, rooms and containers, and the people's beliefs about it.

These rules decide who learns what from an event:

- `enters`, `leaves`: nobody learns where an object is, because containers are closed.
- `puts` (an object in its first place), `moves` (an object to another container of the same room):
  everybody in the room sees the event, and sees that the others in the room see it.
- `takes` (an object to a container of another room, into which the actor moves): the people in the
  room that is left and those in the room that is entered see the event. They form two groups, and
  people see only the members of their own group.
- `claims` (that an object is in a place, true or not), `tells` (about a topic): a whisper informs
  the speaker and the hearer, and other speech everybody in the room. Hearers believe what they hear
  and assume that the speaker believes it, too. A claim does not change the speaker's own belief,
  but the speaker knows what the hearers now believe.
- A `secret` witness is a person outside the room who learns what the open witnesses learn, and
  knows that they learnt it. The open witnesses do not know about the secret witness.
- A `distracted` person is in the room but learns nothing, and the witnesses know this.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

EventKind = Literal["enters", "leaves", "puts", "moves", "takes", "claims", "tells"]
PLACINGS: tuple[EventKind, ...] = ("puts", "moves", "takes")
SPEECH = ("claims", "tells")
KNOWN = "yes"  # the belief about a topic that somebody has heard about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One event in the world, such as "Tom moves the coins to the jar".

    `actor` is the person who acts. `thing` is an object, or a topic for `tells`. `place` is the
    container into which the object is put, or in which it is said to be. `room` is the room that is
    entered or left, or to which the object is taken. `hearer` is the person to whom the actor
    whispers, and empty if everybody hears. `secret` is the secret witness, and `distracted` the
    person who misses the event.
    """

    kind: EventKind
    actor: str
    thing: str = ""
    place: str = ""
    room: str = ""
    hearer: str = ""
    secret: str = ""
    distracted: str = ""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Witnesses:
    """The people who learn from an event.

    The members of each of `groups` see each other. If `secret` is not empty, this person sees all
    others but is not seen.
    """

    groups: tuple[tuple[str, ...], ...]
    secret: str = ""

    @property
    def everyone(self) -> set[str]:
        return {person for group in self.groups for person in group} | {self.secret} - {""}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields (a, b) if a saw that b saw the event, and (a, a) if a saw the event."""
        for group in self.groups:
            for a in group:
                for b in group:
                    yield a, b
                if self.secret:
                    yield self.secret, a
        if self.secret:
            yield self.secret, self.secret


class World:
    """The state of the world after the events so far, with the beliefs of the people.

    `room_of` maps each person to their room (None: outside), and `homes` each container to its
    room. `place_of` and `first_place_of` map each object to its present and its first container.
    `beliefs[("Mia",), "coins"]` is where Mia thinks that the coins are, and `beliefs[("Tom",
    "Mia"), "coins"]` is where Tom thinks that Mia thinks that they are. A missing entry means that
    there is no belief. The belief about a known topic is KNOWN ("yes").
    """

    def __init__(self, room_of: Mapping[str, str], homes: Mapping[str, str]) -> None:
        self.room_of: dict[str, str | None] = dict(room_of)
        self.homes = dict(homes)
        self.place_of: dict[str, str] = {}
        self.first_place_of: dict[str, str] = {}
        self.beliefs: dict[tuple[tuple[str, ...], str], str] = {}
        self._eyewitnesses: dict[str, set[str]] = {}  # of the object's last placing

    def inside(self, room: str | None) -> tuple[str, ...]:
        """Returns the people in `room` (None: outside), in the order of their introduction."""
        return tuple([person for person, place in self.room_of.items() if place == room])

    def in_company(self) -> bool:
        rooms = [room for room in self.room_of.values() if room is not None]
        return len(set(rooms)) < len(rooms)

    def witnesses(self, event: Event) -> Witnesses:
        """Returns the people who would learn from `event` if it happened in the current state."""
        if event.kind in ("enters", "leaves"):
            return Witnesses(groups=())
        if event.hearer:
            return Witnesses(groups=((event.actor, event.hearer),), secret=event.secret)
        here = self.inside(self.room_of[event.actor])
        if event.distracted:
            here = tuple([person for person in here if person != event.distracted])
        groups = [here]
        if event.kind == "takes":
            groups.append((event.actor, *self.inside(event.room)))
            groups = [group for group in groups if len(group) > 1] or groups[:1]
        return Witnesses(groups=tuple(groups), secret=event.secret)

    def possible(self, event: Event) -> bool:
        """Returns whether `event` can happen in the current state.

        People move only objects that are in their room. A speaker who claims where an object is
        must have a belief about it. Nobody who saw the object's last placing may hear a claim about
        the object, which could contradict what they know. Other beliefs are replaced by what people
        hear.
        """
        room = self.room_of.get(event.actor)
        if event.kind == "enters":
            return room != event.room
        if room is None:
            return False
        if event.kind == "leaves":
            return room == event.room
        if event.kind == "takes" and (event.secret or event.distracted):
            return False
        if event.secret and self.room_of.get(event.secret) == room:
            return False
        if event.distracted and not self._is_beside(event.distracted, event.actor):
            return False
        if event.kind in SPEECH:
            if event.hearer:
                if event.distracted or not self._is_beside(event.hearer, event.actor):
                    return False
            elif len(self.inside(room)) < 2:
                return False
            if event.kind == "tells":
                return True
            if ((event.actor,), event.thing) not in self.beliefs:
                return False
            hearers = self.witnesses(event).everyone - {event.actor}
            return hearers.isdisjoint(self._eyewitnesses.get(event.thing, ()))
        now, home = self.place_of.get(event.thing), self.homes[event.place]
        if event.kind == "puts":
            return now is None and home == room
        if now is None or self.homes[now] != room or now == event.place:
            return False
        if event.kind == "moves":
            return home == room
        return home == event.room != room

    def _is_beside(self, person: str, actor: str) -> bool:
        return person != actor and self.room_of.get(person) == self.room_of[actor]

    def happen(self, event: Event) -> Event:
        """Updates the state and the beliefs by `event`, which must be possible; returns `event`."""
        seen = self.witnesses(event)
        value = KNOWN if event.kind == "tells" else event.place
        for a, b in seen.pairs():
            if event.kind == "claims" and a == b == event.actor:
                continue  # saying it does not make the speaker believe it
            self.beliefs[(a,) if a == b else (a, b), event.thing] = value
        if event.kind in PLACINGS:
            self.place_of[event.thing] = event.place
            self.first_place_of.setdefault(event.thing, event.place)
            self._eyewitnesses[event.thing] = seen.everyone
        if event.kind in ("enters", "takes"):
            self.room_of[event.actor] = event.room
        if event.kind == "leaves":
            self.room_of[event.actor] = None
        return event
