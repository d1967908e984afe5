"""Rules that answer stories about minds without tracking everybody, and how often they are right.

Written against the text alone, apart from `jexit.tasks`; beliefs are `story_reader`'s.
"""

import collections
import re

import numpy as np
from story_reader import read_story

from jexit.tasks.tom.text import CONTAINERS

ASKING = r" (Where|Does) (?!.*\1).*"


def story_of(problem):
    return re.sub(ASKING, "", problem.prompt)


def mentioned(problem):
    """The containers that a story names, in order, each as often as it is named."""
    return re.findall("|".join(CONTAINERS), problem.prompt)


def share(values):
    values = list(values)
    return sum(values) / len(values)


def events_of(problem, about):
    """The sentences that name what is `about` together with a place or as a topic, in order."""
    sentences = re.split(r"(?<=\.) ", story_of(problem))
    return [s for s in sentences if re.search(rf"\b{about}\b", s)]


def place_in(sentences):
    named = [re.findall("|".join(CONTAINERS), sentence) for sentence in sentences]
    return named[-1][-1] if named else None


def last_with(problem, person):
    """The last place named together with the thing and the person, else with the thing."""
    events = events_of(problem, problem.fields["thing"])
    return place_in([s for s in events if re.search(rf"\b{person}\b", s)] or events)


def own(problem, kind, person):
    """What a person asked about believes, or whether they know, themselves."""
    reading, fields = read_story(story_of(problem)), problem.fields
    return reading.answer(kind, fields["people"][person : person + 1], fields["thing"])


def before_last_move(problem, person):
    """The place that was named with the thing before the person last came or went."""
    name, before, named = problem.fields["people"][person], None, []
    for sentence in re.split(r"(?<=\.) ", story_of(problem)):
        if re.match(rf"{name} (enters|leaves) ", sentence):
            before = len(named)
        if re.search(rf"\b{problem.fields['thing']}\b", sentence):
            named.append(place_in([sentence]))
    return named[max(before - 1, 0)] if before is not None else named[-1]


def while_there(problem, people):
    """The sentences about the thing that were said while these people were all there.

    Somebody is there from the beginning if the opening puts them beside whoever is named first with
    the thing, then changes with each "enters" of theirs and is not after a "leaves". Rooms, others'
    ways, whispers and who looks on unseen play no part.
    """
    sentences = re.split(r"(?<=\.) ", story_of(problem))
    events = events_of(problem, problem.fields["thing"])
    first = events[0].split()[0]
    opening = [s for s in sentences[:3] if re.search(r" (is|are) in the ", s) and first in s]
    there = {name: name == first or any(name in s for s in opening) for name in people}
    said = []
    for sentence in sentences:
        for name in people:
            if re.match(rf"{name} enters ", sentence):
                there[name] = not there[name]
            elif re.match(rf"{name} leaves ", sentence):
                there[name] = False
        if sentence in events and all(there.values()):
            said.append(sentence)
    return said


def bags(texts):
    """Counts of words, one row a text, with a constant."""
    rows = [collections.Counter(re.findall(r"\w+", text.lower())) for text in texts]
    words = sorted(set().union(*rows))
    return np.array([[row[word] for word in words] + [1] for row in rows], float)


def held_out_accuracy(texts, labels, choices):
    """Multinomial logistic regression on bags of words, fitted on 2/3: accuracy on the rest.

    `choices` gives each text's classes among which it chooses; others have no probability.
    """
    x, y = bags(texts), np.array(labels)
    allowed = np.full((len(x), max(map(max, choices)) + 1), -np.inf)
    for row, some in enumerate(choices):
        allowed[row, list(some)] = 0.0
    cut = len(x) * 2 // 3
    x[:, :-1] -= x[:cut, :-1].mean(0)
    x[:, :-1] /= x[:cut, :-1].std(0) + 0.1
    weights = np.zeros((x.shape[1], allowed.shape[1]))
    target = np.eye(allowed.shape[1])[y[:cut]]
    for _ in range(300):
        scores = x[:cut] @ weights + allowed[:cut]
        exp = np.exp(scores - scores.max(1, keepdims=True))
        gradient = x[:cut].T @ (exp / exp.sum(1, keepdims=True) - target) / cut
        weights -= 0.5 * (gradient + 1e-3 * weights)
    return float(((x[cut:] @ weights + allowed[cut:]).argmax(1) == y[cut:]).mean())


def place_problem(problem):
    return CONTAINERS.index(problem.answer), {CONTAINERS.index(m) for m in mentioned(problem)}


def with_roles(problem):
    """The words with those asked about, the thing and the places, by first mention, marked."""
    roles = {name: f"asked{i}" for i, name in enumerate(problem.fields["people"])}
    roles[problem.fields["thing"]] = "thing"
    roles |= {place: f"place{i}" for i, place in enumerate(dict.fromkeys(mentioned(problem)))}
    return re.sub(r"\w+", lambda match: roles.get(match.group(), match.group()), problem.prompt)


def looked_up(some, look):
    """Accuracy of the commonest answer to what `look` sees, counted on the other half."""
    right = 0
    for half in (0, 1):
        counts = collections.defaultdict(collections.Counter)
        for problem in some[half::2]:
            counts[look(problem)][rank_of(problem)] += 1
        table = {seen: counter.most_common(1)[0][0] for seen, counter in counts.items()}
        right += sum(table.get(look(p), 0) == rank_of(p) for p in some[1 - half :: 2])
    return right / len(some)


def rank_of(problem):
    events = events_of(problem, problem.fields["thing"])
    return [place_in([event]) for event in events].index(problem.answer)
