"""Answers questions about theory-of-mind stories from the text alone, by replaying logs.

Written apart from `jexit.tasks.tom.world`: the story is read sentence by sentence, everybody keeps
a log of what they noticed and whom they noticed noticing it, and a belief is what the part of a log
that counts says last.
"""

import dataclasses
import re

OPENING = re.compile(r"(.+) (?:is|are) in the (\w+)")
ENTERS = re.compile(r"(\w+) enters the (\w+)")
LEAVES = re.compile(r"(\w+) leaves the (\w+)")
PLACES = re.compile(r"(\w+) (?:puts|moves|takes) the (\w+) (?:in|to) the (\w+)(?: in the (\w+))?")
SAYS = re.compile(
    r"(\w+) (?:tells everybody|whispers to (\w+)) "
    r"(?:that the (\w+) are in the (\w+)|about the (\w+))"
)
PEEPS = re.compile(r"(\w+) (?:sees|hears) it in secret")
DREAMS = re.compile(r"(\w+) is distracted")


@dataclasses.dataclass(frozen=True)
class Entry:
    thing: str
    value: str
    speaker: str | None
    noticed: frozenset


@dataclasses.dataclass
class Reading:
    logs: dict
    placings: dict

    def answer(self, kind, people, thing):
        if kind == "reality":
            return self.placings[thing][-1] if thing in self.placings else "unknown"
        if kind == "memory":
            return self.placings[thing][0] if thing in self.placings else "unknown"
        mine = [entry for entry in self.logs[people[0]] if entry.thing == thing]
        if kind.startswith("second"):
            mine = [entry for entry in mine if people[1] in entry.noticed]
        elif kind == "belief":
            mine = [entry for entry in mine if entry.speaker != people[0]]
        nothing = "no" if kind.endswith("knowledge") else "unknown"
        return mine[-1].value if mine else nothing


def read_story(text):
    """Reads a story without its question."""
    room, logs, placings = {}, {}, {}
    sentences = text.removesuffix(".").split(". ")
    extras = (PEEPS, DREAMS)
    while sentences:
        sentence = sentences.pop(0)
        peeping = dreaming = None
        while sentences and any(extra.fullmatch(sentences[0]) for extra in extras):
            extra = sentences.pop(0)
            if match := PEEPS.fullmatch(extra):
                peeping = match[1]
            else:
                dreaming = DREAMS.fullmatch(extra)[1]

        def circle(name, dreaming=dreaming):
            return {p for p in room if room[p] == room[name] and p != dreaming}

        if match := PLACES.fullmatch(sentence):
            actor, thing, place, arrival = match.groups()
            parties = [circle(actor)]
            if arrival:
                room[actor] = arrival
                parties.append(circle(actor))
            entry, speaker = (thing, place), None
            placings.setdefault(thing, []).append(place)
        elif match := SAYS.fullmatch(sentence):
            speaker, hearer, thing, place, topic = match.groups()
            parties = [{speaker, hearer} if hearer else circle(speaker)]
            entry = (topic, "yes") if topic else (thing, place)
        elif match := ENTERS.fullmatch(sentence):
            room[match[1]] = match[2]
            continue
        elif match := LEAVES.fullmatch(sentence):
            assert room[match[1]] == match[2]
            room[match[1]] = None
            continue
        else:
            names, where = OPENING.fullmatch(sentence).groups()
            for name in re.findall(r"[A-Z]\w+", names):
                room[name], logs[name] = where, []
            continue
        noticed = {}
        for party in parties:
            for person in party:
                noticed[person] = noticed.get(person, frozenset()) | party
        if peeping:
            noticed[peeping] = frozenset().union(*parties) | {peeping}
        for person, others in noticed.items():
            logs[person].append(Entry(*entry, speaker, frozenset(others)))
    return Reading(logs, placings)
