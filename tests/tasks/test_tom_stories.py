import collections
import dataclasses
import itertools
import re

import numpy as np
import pytest
from story_reader import read_story

from jexit.tasks import make_task
from jexit.tasks.base import Draw
from jexit.tasks.tom_stories import (
    PLACES,
    Cast,
    _about_places,
    _exchanged,
    _story_of_topics,
    _twins,
    draw_pattern,
    questions,
)
from jexit.tasks.tom_text import CONTAINERS, KINDS, NO, OF_PLACES, YES
from jexit.tasks.tom_world import Event

COUNT = 6000
ASKING = r" (Where|Does) (?!.*\1).*"


def story_of(problem):
    return re.sub(ASKING, "", problem.prompt)


def mentioned(problem):
    """The containers that a story names, in order, each as often as it is named."""
    return re.findall("|".join(CONTAINERS), problem.prompt)


@pytest.fixture(scope="module")
def problems():
    task = make_task("tom", steps="at_once")
    return [task.problem("train", index) for index in range(COUNT)]


@pytest.fixture(scope="module")
def of_places(problems):
    return [problem for problem in problems if problem.fields["kind"] in OF_PLACES]


def share(values):
    values = list(values)
    return sum(values) / len(values)


def test_kinds_occur_equally_often_and_their_answers_are_balanced(problems):
    for kind in KINDS:
        some = [problem for problem in problems if problem.fields["kind"] == kind]
        assert abs(len(some) / COUNT - 1 / 6) < 0.02
        if kind not in OF_PLACES:
            assert abs(share(problem.answer == YES for problem in some) - 0.5) < 0.06
        elif kind not in ("reality", "memory"):
            assert abs(share(problem.fields["false_belief"] for problem in some) - 0.5) < 0.06


def test_false_means_what_it_says(problems):
    for problem in problems[:1500]:
        kind, people, thing = (problem.fields[name] for name in ("kind", "people", "thing"))
        if kind not in ("belief", "second_belief"):
            assert problem.fields["false_belief"] is False
            continue
        reading = read_story(story_of(problem))
        truth = (
            reading.answer("reality", (), thing)
            if kind == "belief"
            else reading.answer("belief", people[1:], thing)
        )
        assert problem.fields["false_belief"] == (problem.answer != truth)


BASELINES = {
    "last": lambda named: named[-1],
    "first": lambda named: named[0],
    "last to be new": lambda named: list(dict.fromkeys(named))[-1],
    "most often": lambda named: collections.Counter(named).most_common(1)[0][0],
    "least often": lambda named: collections.Counter(named).most_common()[-1][0],
}


@pytest.mark.parametrize("baseline", BASELINES)
@pytest.mark.parametrize("kind", OF_PLACES)
def test_no_rule_on_places_alone_beats_one_in_three(of_places, kind, baseline):
    some = [problem for problem in of_places if problem.fields["kind"] == kind]
    rule = BASELINES[baseline]
    right = share(rule(mentioned(problem)) == problem.answer for problem in some)
    assert abs(right - 1 / 3) < 0.06, right


def test_the_answer_is_each_place_equally_often_in_every_pattern_of_mentions(of_places):
    ranks = collections.defaultdict(list)
    for problem in of_places:
        named = mentioned(problem)
        order = list(dict.fromkeys(named))
        assert len(order) == PLACES
        ranks[tuple(map(order.index, named))].append(order.index(problem.answer))
    assert len(ranks) == 7  # of three mentions 1, of four 6
    for answers in ranks.values():
        spread = collections.Counter(answers)
        assert all(abs(spread[rank] / len(answers) - 1 / 3) < 0.1 for rank in range(PLACES))


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


def test_a_bag_of_words_does_not_tell_the_place(of_places):
    labels, choices = zip(*map(place_problem, of_places), strict=True)
    texts = [problem.prompt for problem in of_places]
    assert abs(held_out_accuracy(texts, labels, choices) - 1 / 3) < 0.05
    # The same classifier does find an answer that the words give away.
    leaky = [f"{problem.prompt} {problem.answer}" for problem in of_places]
    assert held_out_accuracy(leaky, labels, choices) > 0.5


def test_a_bag_of_words_does_not_tell_yes_from_no(problems):
    some = [problem for problem in problems if problem.fields["kind"] not in OF_PLACES]
    labels = [int(problem.answer == YES) for problem in some]
    choices = [{0, 1}] * len(some)
    texts = [problem.prompt for problem in some]
    assert abs(held_out_accuracy(texts, labels, choices) - 0.5) < 0.06
    leaky = [text + " yes" * label for text, label in zip(texts, labels, strict=True)]
    assert held_out_accuracy(leaky, labels, choices) > 0.95


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
    for number in range(600):
        draw = Draw("twins", number)
        story = _story_of_topics(draw, CAST, 4)
        pair = _twins(draw, story, asked) if story else None
        if pair is None:
            continue
        found += 1
        twin, question = pair
        texts = (story.text(), twin.text())
        assert texts[0] != texts[1]
        assert sorted(re.findall(r"\w+", texts[0])) == sorted(re.findall(r"\w+", texts[1]))
        answers = {
            read_story(text).answer(question.kind, question.people, question.thing)
            for text in texts
        }
        assert answers == {YES, NO}
    assert found > 100


def test_exchanges():
    before = (
        Event(kind="tells", actor="Tom", thing="trip", hearer="Mia"),
        Event(kind="enters", actor="Ben", room="hall"),
        Event(kind="tells", actor="Tom", thing="film", hearer="Ben"),
    )
    swapped = _exchanged(before, 0, 2, "hearer")
    assert [event.hearer for event in swapped] == ["Ben", "", "Mia"]
    assert [event.thing for event in _exchanged(before, 0, 2, "thing")] == ["film", "", "trip"]
    assert _exchanged(before, 0, 1, "order") == (before[1], before[0], before[2])
    assert _exchanged(before, 0, 1, "thing") is None  # nothing to exchange
    assert _exchanged(before, 0, 2, "actor") is None  # the same already


@pytest.mark.parametrize("kind", OF_PLACES)
def test_every_pattern_can_have_every_answer_with_two_people(kind):
    """Otherwise drawing the place first would never end."""
    patterns = {draw_pattern(Draw("patterns", n), 3 + n % 2) for n in range(200)}
    assert len(patterns) == 7
    wanted = itertools.product(sorted(patterns), range(PLACES), (False, True))
    for pattern, rank, false in wanted:
        draw = Draw("feasible", kind, pattern, rank, false)
        cast = dataclasses.replace(CAST, people=("Tom", "Mia"), longest=len(pattern) + 2)
        story, question = _about_places(draw, kind, cast, pattern, rank=rank, false=false)
        world = story.end()
        assert question.answer(world) == CONTAINERS[rank]


def test_yes_and_no_each_occur_with_every_number_of_people():
    task = make_task("tom", kinds=("knowledge", "second_knowledge"), people=(2, 2))
    assert {task.problem("train", index).answer for index in range(30)} == {YES, NO}
