"""A small world of people, rooms and containers, and who believes what about it.

Who learns what from an event:
- `enters`, `leaves`: nobody learns where an object is. Containers are closed.
- `puts` (the object's first place), `moves` (to another container of the same room): everybody in
  the room sees it, and sees that the others there see it.
- `takes` (to a container of another room, where the actor then is): those in the room that is left
  and those in the room that is entered, two groups; people see each other within a group only.
- `claims` (where an object is, true or not), `tells` (about a topic): the speaker and the hearer
  when whispered, else everybody in the room. Hearers believe what they hear and take the speaker at
  their word; the speaker's own belief stays, but the speaker knows what the hearers now believe.
- A `secret` witness is not in the room, learns what the open witnesses learn and knows that they
  did; they do not know about the secret witness.
- A `distracted` person is in the room and learns nothing, and the witnesses know it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Literal

EventKind = Literal["enters", "leaves", "puts", "moves", "takes", "claims", "tells"]
PLACINGS: tuple[EventKind, ...] = ("puts", "moves", "takes")
SPEECH = ("claims", "tells")
KNOWN = "yes"  # what is believed about a topic that somebody has heard about


@dataclasses.dataclass(frozen=True, kw_only=True)
class Event:
    """One thing that happens.

    `thing` is an object (a topic for `tells`), `place` the container it is put in or said to be in,
    `room` the room entered, left or taken to, `hearer` whom it is whispered to (empty: everybody).
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
    """Who learns from an event: groups whose members see each other, and a secret witness."""

    groups: tuple[tuple[str, ...], ...]
    secret: str = ""

    @property
    def everyone(self) -> set[str]:
        return {person for group in self.groups for person in group} | {self.secret} - {""}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Every (a, b) where a saw that b saw it; (a, a) where a saw it."""
        for group in self.groups:
            for a in group:
                for b in group:
                    yield a, b
                if self.secret:
                    yield self.secret, a
        if self.secret:
            yield self.secret, self.secret


class World:
    """The state after the events so far.

    `room_of` gives each person's room (None: outside), `homes` each container's room, `place_of`
    and `first_place_of` where each object is and where it was put first. `beliefs` maps a chain of
    one or two people and a thing to what is believed: `beliefs[("Mia",), "coins"]` is where Mia
    thinks that the coins are, `beliefs[("Tom", "Mia"), "coins"]` where Tom thinks that Mia thinks
    they are; no entry means that it never came up. A topic that is known has the belief KNOWN.
    """

    def __init__(self, room_of: Mapping[str, str], homes: Mapping[str, str]) -> None:
        self.room_of: dict[str, str | None] = dict(room_of)
        self.homes = dict(homes)
        self.place_of: dict[str, str] = {}
        self.first_place_of: dict[str, str] = {}
        self.beliefs: dict[tuple[tuple[str, ...], str], str] = {}
        self._eyewitnesses: dict[str, set[str]] = {}  # of the object's last placing

    def inside(self, room: str | None) -> tuple[str, ...]:
        """The people in a room, in the order in which the story introduced them."""
        return tuple([person for person, place in self.room_of.items() if place == room])

    def in_company(self) -> bool:
        """Whether two people are in one room."""
        rooms = [room for room in self.room_of.values() if room is not None]
        return len(set(rooms)) < len(rooms)

    def witnesses(self, event: Event) -> Witnesses:
        """Who would learn from the event if it happened now; nobody for entering and leaving."""
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
        """Whether the event can happen now.

        People move only objects that are in their room. A speaker has a belief about the object and
        a place is claimed only to those who did not see the object's last placing, so that nobody
        hears against what is still so before their eyes. What they saw before that, and what they
        heard, gives way to what they hear later.
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
        """Whether they are two people in one room."""
        return person != actor and self.room_of.get(person) == self.room_of[actor]

    def happen(self, event: Event) -> Witnesses:
        """Changes the world by an event that is possible; returns who learnt of it."""
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
        return seen
