"""A small world of people, rooms and containers, and the people's beliefs about it.

These rules decide who learns what from an event:
- `enters`, `leaves`: nobody learns where an object is, because containers are closed.
- `puts` (the object's first place), `moves` (to another container of the same room): everybody in
  the room sees the event, and sees that the others there see it.
- `takes` (to a container of another room, where the actor then is): the people in the room that is
  left and those in the room that is entered see it. They are two groups, and people see each other
  within a group only.
- `claims` (where an object is, true or not), `tells` (about a topic): the speaker and the hearer
  learn from a whisper, and otherwise everybody in the room learns. Hearers believe what they hear
  and take the speaker at their word. The speaker's own belief stays, but the speaker knows what
  the hearers now believe.
- A `secret` witness is not in the room. This person learns what the open witnesses learn, and knows
  that they did. The open witnesses do not know about the secret witness.
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
    """One event in the world.

    `thing` is an object, or a topic for `tells`. `place` is the container into which the object is
    put, or in which it is said to be. `room` is the room that is entered or left, or to which the
    object is taken. `hearer` is the person to whom the actor whispers. It is empty if everybody
    hears the actor.
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
    """Those who learn from an event: groups whose members see each other, and a secret witness."""

    groups: tuple[tuple[str, ...], ...]
    secret: str = ""

    @property
    def everyone(self) -> set[str]:
        return {person for group in self.groups for person in group} | {self.secret} - {""}

    def pairs(self) -> Iterator[tuple[str, str]]:
        """Yields every (a, b) such that a saw that b saw the event, and (a, a) if a saw it."""
        for group in self.groups:
            for a in group:
                for b in group:
                    yield a, b
                if self.secret:
                    yield self.secret, a
        if self.secret:
            yield self.secret, self.secret


class World:
    """The state of the world after the events so far.

    `room_of` contains each person's room (None: outside), and `homes` each container's room.
    `place_of` contains the place where each object is, and `first_place_of` the place where it was
    put first. `beliefs` maps a chain of one or two people and a thing to a belief:
    `beliefs[("Mia",), "coins"]` is where Mia thinks that the coins are, and `beliefs[("Tom",
    "Mia"), "coins"]` is where Tom thinks that Mia thinks they are. If an entry is missing, the
    subject never came up. The belief about a topic that is known is KNOWN.
    """

    def __init__(self, room_of: Mapping[str, str], homes: Mapping[str, str]) -> None:
        self.room_of: dict[str, str | None] = dict(room_of)
        self.homes = dict(homes)
        self.place_of: dict[str, str] = {}
        self.first_place_of: dict[str, str] = {}
        self.beliefs: dict[tuple[tuple[str, ...], str], str] = {}
        self._eyewitnesses: dict[str, set[str]] = {}  # of the object's last placing

    def inside(self, room: str | None) -> tuple[str, ...]:
        """Returns the people in a room, in the order in which the story introduced them."""
        return tuple([person for person, place in self.room_of.items() if place == room])

    def in_company(self) -> bool:
        """Returns whether at least two people are in the same room."""
        rooms = [room for room in self.room_of.values() if room is not None]
        return len(set(rooms)) < len(rooms)

    def witnesses(self, event: Event) -> Witnesses:
        """Returns the people who would learn from the event if it happened now.

        Nobody learns from entering and leaving.
        """
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
        """Returns whether the event can happen now.

        People move only objects that are in their room. A speaker must have a belief about the
        object. A place is claimed only to people who did not see the object's last placing, so
        nobody hears a claim against something that they saw and that is still true. What they saw
        before that placing, and what they heard, gives way to what they hear later.
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
        """Returns whether these are two different people in the same room."""
        return person != actor and self.room_of.get(person) == self.room_of[actor]

    def happen(self, event: Event) -> Witnesses:
        """Changes the world by a possible event, and returns the people who learnt of it."""
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
