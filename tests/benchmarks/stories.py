"""How often rules that track less than the story are right about theory-of-mind stories.

    python tests/benchmarks/stories.py [--people 3 4] [--moves 4 5] [--problems 600]

Chance is one in three for places and one half for yes and no. The lines below "who track" are rules
that do track what people see, and show how much of a question is left to them.
"""

import argparse
import collections
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

from story_reader import read_story
from story_rules import (
    before_last_move,
    events_of,
    held_out_accuracy,
    last_with,
    mentioned,
    own,
    place_in,
    place_problem,
    share,
    story_of,
    while_there,
    with_roles,
)

from jexit.tasks import make_task
from jexit.tasks.tom.text import KINDS, NO, OF_PLACES, PEOPLE_ASKED, YES


def bag_of_words(problems, *, marked: bool) -> float:
    """Held-out accuracy of a classifier of words, fitted on two thirds of the problems.

    `marked`: those asked about, the thing and the places by first mention have names of their own.
    """
    texts = [with_roles(p) if marked else p.prompt for p in problems]
    if problems[0].fields["kind"] not in OF_PLACES:
        labels, choices = [int(p.answer == YES) for p in problems], [{0, 1}] * len(problems)
    elif marked:
        labels = [list(dict.fromkeys(mentioned(p))).index(p.answer) for p in problems]
        choices = [{0, 1, 2}] * len(problems)
    else:
        labels, choices = zip(*map(place_problem, problems), strict=True)
    return held_out_accuracy(texts, labels, choices)


def less_informed(problem) -> str:
    """The belief of the person asked about who is wrong about where the thing is."""
    truth = read_story(story_of(problem)).answer("reality", (), problem.fields["thing"])
    first = own(problem, "belief", 0)
    return first if first != truth else own(problem, "belief", 1)


def _while_there(problem) -> str:
    said = while_there(problem, problem.fields["people"])
    if problem.fields["kind"] not in OF_PLACES:
        return YES if said else NO
    return place_in(said or events_of(problem, problem.fields["thing"]))


def rules_of(kind: str):
    """What each rule answers; None where it says nothing about this kind."""
    thing = lambda p: p.fields["thing"]  # noqa: E731
    if PEOPLE_ASKED[kind]:
        yield "who track: what was said while those asked about were there", _while_there
    if kind not in OF_PLACES:
        yield "who track: the first person knows", lambda p: own(p, "knowledge", 0)
        if PEOPLE_ASKED[kind] == 2:
            yield "who track: the other one knows", lambda p: own(p, "knowledge", 1)
            both = lambda p: min(own(p, "knowledge", 0), own(p, "knowledge", 1))  # noqa: E731
            yield "who track: both know", both
        return
    if kind != "memory":  # whose answer it is
        yield "first place of the thing", lambda p: place_in(events_of(p, thing(p))[:1])
    yield "last place of the thing", lambda p: place_in(events_of(p, thing(p)))
    if not PEOPLE_ASKED[kind]:
        return
    yield "last place named with the first person", lambda p: last_with(p, p.fields["people"][0])
    for person in range(PEOPLE_ASKED[kind]):
        yield (
            f"place named before person {person + 1} last moved",
            lambda p, person=person: before_last_move(p, person),
        )
        yield (
            f"who track: belief of person {person + 1}",
            lambda p, person=person: own(p, "belief", person),
        )
    if PEOPLE_ASKED[kind] == 2:
        yield "who track: belief of the one who is wrong", less_informed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--people", type=int, nargs=2, default=(3, 4))
    parser.add_argument("--moves", type=int, nargs=2, default=(4, 5))
    parser.add_argument("--problems", type=int, default=600, help="of each kind")
    options = parser.parse_args()
    table: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for kind in KINDS:
        task = make_task(
            "tom", steps="at_once", kinds=(kind,),
            people_min=options.people[0], people_max=options.people[1],
            moves_min=options.moves[0], moves_max=options.moves[1],
        )  # fmt: skip
        problems = [task.problem("test", index) for index in range(options.problems)]
        table["bag of words"][kind] = bag_of_words(problems, marked=False)
        table["bag of words, roles marked"][kind] = bag_of_words(problems, marked=True)
        for name, rule in rules_of(kind):
            table[name][kind] = share(rule(problem) == problem.answer for problem in problems)
    print(f"{'rule':<62}" + "".join(f"{kind.replace('_', ' '):>18}" for kind in KINDS))
    for name in sorted(table, key=lambda name: name.startswith("who track")):
        cells = (f"{table[name][k]:>18.1%}" if k in table[name] else " " * 18 for k in KINDS)
        print(f"{name:<62}" + "".join(cells))


if __name__ == "__main__":
    main()
