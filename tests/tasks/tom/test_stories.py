"""Nothing but understanding a story answers its question more often than guessing."""

import collections
import itertools
import re

import pytest
from story_reader import read_story
from story_rules import (
    before_last_move,
    events_of,
    held_out_accuracy,
    last_with,
    looked_up,
    mentioned,
    own,
    place_in,
    place_problem,
    rank_of,
    share,
    story_of,
    with_roles,
)

from jexit.tasks import make_task
from jexit.tasks.base import Draw
from jexit.tasks.tom.events import (
    ANYHOW,
    PLACES,
    Cast,
    plan,
    questions,
    story_of_places,
    story_of_topics,
)
from jexit.tasks.tom.presence import _MOVES, _by_answer
from jexit.tasks.tom.rules import SURFACES, last_named
from jexit.tasks.tom.stories import _about_places, _twins
from jexit.tasks.tom.text import CONTAINERS, KINDS, NO, OF_PLACES, PEOPLE_ASKED, YES

COUNT = 6000
CAST = Cast(
    people=("Tom", "Mia", "Ben"),
    rooms=("hall", "garden"),
    places=CONTAINERS[:PLACES],
    things=("coins", "books"),
    topics=("trip", "film"),
    longest=6,
)


def test_twins_have_the_same_words_and_opposite_answers():
    asked = questions("knowledge", CAST.people, CAST.topics)
    asked += questions("second_knowledge", CAST.people, CAST.topics)
    found = 0
    for number in range(400):
        draw = Draw("twins", number)
        story = story_of_topics(draw, CAST, 4)
        pair = _twins(draw, story, asked) if story else None
        if pair is None:
            continue
        found += 1
        twin, question = pair
        texts = (story.text(), twin.text())
        assert texts[0] != texts[1]
        assert sorted(re.findall(r"\w+", texts[0])) == sorted(re.findall(r"\w+", texts[1]))
        asking = (question.kind, question.people, question.thing)
        assert {read_story(text).answer(*asking) for text in texts} == {YES, NO}
    assert found > 70


def test_every_combination_can_be_with_three_people():
    """Otherwise what is drawn before the story would not be what stories come to have."""
    for kind in OF_PLACES:
        surfaces = SURFACES if PEOPLE_ASKED[kind] else (None,)
        for surface, rank in itertools.product(surfaces, range(PLACES)):
            draw = Draw("feasible", kind, surfaces.index(surface), rank)
            story, question = _about_places(draw, kind, CAST, 4, rank=rank, surface=surface)
            world = story.end()
            assert question.answer(world) == CONTAINERS[rank]
            if surface is None:
                continue
            moved = [place for place, verb in enumerate(surface.verbs, 1) if verb == "moves"]
            assert world.place_of[question.thing] == CONTAINERS[max(moved, default=0)]
            assert last_named(question, story) == CONTAINERS[surface.last_named]


def test_three_stories_differ_in_one_persons_comings_and_goings():
    for kind, whose in (("belief", 0), ("second_belief", 0), ("second_belief", 1)):
        found = 0
        for index in range(300):
            draw = Draw("three", kind, index)
            thing, other = CAST.things
            told = story_of_places(draw, CAST, plan(draw, CAST, thing, other, [ANYHOW] * 4))
            if told is None:
                continue
            for question in questions(kind, CAST.people, (thing,)):
                person, moves = question.people[whose], draw.choice(_MOVES)
                three = _by_answer(draw, CAST, told[0], question, person, moves)
                if three is None:
                    continue
                found += 1
                same = set()
                for place, story in ((p, story) for p in CAST.places for story in three[p]):
                    reading = read_story(story.text())
                    assert reading.answer(kind, question.people, thing) == place
                    truth = reading.answer("reality", (), thing)
                    others = set(question.people) - {person}
                    assert all(reading.answer("belief", (one,), thing) == truth for one in others)
                    mine = [e for e in story.events if e.actor == person and not e.thing]
                    assert sorted(e.kind for e in mine) == sorted(moves)
                    starts = sorted((n, r) for n, r in story.room_of.items() if n != person)
                    same.add((tuple(e for e in story.events if e not in mine), tuple(starts)))
                assert len(same) == 1
        assert found > 30


# The default of three moves, which the shipped model can learn, leaves rules some successes.
LONGER = {"steps": "at_once", "people_max": 4, "moves_min": 4, "moves_max": 5}


@pytest.fixture(scope="module")
def drawn():
    task = make_task("tom", **LONGER)
    return [task.problem("train", index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def problems(drawn):
    """Problems by their kind."""
    return {kind: [p for p in drawn if p.fields["kind"] == kind] for kind in KINDS}


def where_it_is(problem):
    return read_story(story_of(problem)).answer("reality", (), problem.fields["thing"])


def named(problem):
    told = events_of(problem, problem.fields["thing"])
    return any(all(name in event for name in problem.fields["people"]) for event in told)


def openly(problem):
    return any("everybody" in event for event in events_of(problem, problem.fields["thing"]))


def yes(told):
    return YES if told else NO


ON_PLACES = {
    "the last": lambda p: mentioned(p)[-1],
    "the first": lambda p: mentioned(p)[0],
    "the last to be new": lambda p: list(dict.fromkeys(mentioned(p)))[-1],
    "the most often": lambda p: collections.Counter(mentioned(p)).most_common(1)[0][0],
    "the least often": lambda p: collections.Counter(mentioned(p)).most_common()[-1][0],
}
ON_THE_THING = {
    "the thing's last": lambda p: place_in(events_of(p, p.fields["thing"])),
    "the thing's first": lambda p: place_in(events_of(p, p.fields["thing"])[:1]),
}
ON_BELIEFS = (
    ON_PLACES
    | ON_THE_THING
    | {
        "where the thing is": where_it_is,
        "the last that names the person": lambda p: last_with(p, p.fields["people"][0]),
    }
)
ON_TOPICS = {
    "those asked about are named": lambda p: yes(named(p)),
    "everybody is told": lambda p: yes(openly(p)),
    "either": lambda p: yes(named(p) or openly(p)),
}
GUESSING = {
    "reality": ON_PLACES | ON_THE_THING,
    "memory": ON_PLACES,
    **dict.fromkeys(("belief", "second_belief"), ON_BELIEFS),
    **dict.fromkeys(("knowledge", "second_knowledge"), ON_TOPICS),
}
# What tracks somebody is right at times: nobody's own belief is always what one thinks that the
# other thinks, nor never, or nobody could think that it is theirs.
MORE_THAN_GUESSING = [
    ("second_belief", lambda p: own(p, "belief", 0), 0.4, 0.78),
    ("second_belief", lambda p: own(p, "belief", 1), 0.4, 0.68),
    ("second_knowledge", lambda p: own(p, "knowledge", 0), 0.5, 0.76),
    ("second_knowledge", lambda p: own(p, "knowledge", 1), 0.5, 0.76),
    (
        "second_knowledge",
        lambda p: yes(own(p, "knowledge", 0) == own(p, "knowledge", 1) == YES),
        *(0.5, 0.76),
    ),
    # The place before somebody last moved tracks no rooms and nobody else.
    ("belief", lambda p: before_last_move(p, 0), 0.3, 0.5),
    ("second_belief", lambda p: before_last_move(p, 0), 0.3, 0.5),
    ("second_belief", lambda p: before_last_move(p, 1), 0.3, 0.5),
    ("reality", where_it_is, 1, 1),
]


@pytest.mark.slow
def test_rules_that_track_nobody_are_no_better_than_guessing(problems):
    for kind, some in problems.items():
        assert abs(len(some) / COUNT - 1 / 6) < 0.02
        chance = 1 / 3 if kind in OF_PLACES else 1 / 2
        for name, rule in GUESSING[kind].items():
            accuracy = share(rule(problem) == problem.answer for problem in some)
            assert abs(accuracy - chance) < 0.06, (kind, name, accuracy)
        if kind not in OF_PLACES:
            assert abs(share(problem.answer == YES for problem in some) - chance) < 0.06
    false = share(where_it_is(problem) != problem.answer for problem in problems["belief"])
    assert abs(false - 2 / 3) < 0.06
    for number, (kind, rule, low, high) in enumerate(MORE_THAN_GUESSING):
        accuracy = share(rule(problem) == problem.answer for problem in problems[kind])
        assert low <= accuracy <= high, (number, kind, accuracy)


@pytest.mark.slow
def test_the_answer_is_each_of_its_places_equally_often(problems):
    """As they come up with the thing; for `memory`, where that is the answer, in every pattern."""
    for kind in OF_PLACES:
        ranks, some = collections.defaultdict(list), problems[kind]
        if kind == "memory":  # many patterns, quick to draw
            task = make_task("tom", **LONGER, kinds=("memory",))
            some = [task.problem("train", index) for index in range(COUNT)]
        for problem in some:
            places = mentioned(problem)
            if kind != "memory":
                places = [place_in([s]) for s in events_of(problem, problem.fields["thing"])]
                assert len(places) == PLACES
            order = list(dict.fromkeys(places))
            assert len(order) == PLACES
            ranks[tuple(map(order.index, places))].append(order.index(problem.answer))
        assert len(ranks) == (6 + 25 if kind == "memory" else 1)  # of four mentions 6, of five 25
        pooled = collections.Counter(rank for answers in ranks.values() for rank in answers)
        for spread in [pooled, *map(collections.Counter, ranks.values())]:
            bound = 3.5 * (2 / 9 / spread.total()) ** 0.5  # standard errors
            assert all(abs(spread[rank] / spread.total() - 1 / 3) < bound for rank in range(PLACES))


# What is left to a bag of words that is told who and what is asked about. More than for beliefs
# remains where a thing is now: its placing is a matter of which sentence the words stand in.
WITH_ROLES = {
    "reality": 0.62, "memory": 0.45, "belief": 0.5, "second_belief": 0.5,
    "knowledge": 0.6, "second_knowledge": 0.6,
}  # fmt: skip


@pytest.mark.slow
def test_a_bag_of_words_tells_little(drawn, problems):
    places = [problem for problem in drawn if problem.fields["kind"] in OF_PLACES]
    topics = [problem for problem in drawn if problem.fields["kind"] not in OF_PLACES]
    for some, classes, chance, leaky in (
        (places, map(place_problem, places), 1 / 3, 0.5),
        (topics, ((int(p.answer == YES), {0, 1}) for p in topics), 1 / 2, 0.95),
    ):
        labels, choices = zip(*classes, strict=True)
        texts = [problem.prompt for problem in some]
        assert abs(held_out_accuracy(texts, labels, choices) - chance) < 0.06
        # The same classifier does find an answer that the words give away.
        given = [f"{problem.prompt} {problem.answer}" for problem in some]
        assert held_out_accuracy(given, labels, choices) > leaky
    for kind, some in problems.items():
        if kind in OF_PLACES:
            labels = [list(dict.fromkeys(mentioned(p))).index(p.answer) for p in some]
        else:
            labels = [int(p.answer == YES) for p in some]
        choices = [set(range(max(labels) + 1))] * len(some)
        accuracy = held_out_accuracy(list(map(with_roles, some)), labels, choices)
        assert accuracy < WITH_ROLES[kind], (kind, accuracy)


def seen_of(problem):
    """What a rule without anybody's mind could look at, places numbered as they come up."""
    events = events_of(problem, problem.fields["thing"])
    order = [place_in([event]) for event in events]
    verbs = tuple(re.search(r"puts|moves|takes|tells|whispers", event).group() for event in events)
    last = last_with(problem, problem.fields["people"][0])
    return verbs, order.index(last), order.index(where_it_is(problem))


@pytest.mark.slow
def test_rules_that_track_nobody_are_no_better_together(problems):
    """A table of answers for all of what such rules see, and for parts of it."""
    for kind in ("belief", "second_belief"):
        some = problems[kind]
        for look in (lambda p: seen_of(p)[1:], lambda p: seen_of(p)[0], seen_of):
            assert looked_up(some, look) < 0.42
        # The table would find an answer that is given away.
        assert looked_up(some, lambda p: (seen_of(p), rank_of(p))) > 0.9
