import collections
import re

import pytest
from story_reader import read_story

from jexit.tasks import Attempt, make_task
from jexit.tasks.base import Draw
from jexit.tasks.tom.task import canonical, make_problem
from jexit.tasks.tom.text import KINDS, OF_PLACES, TOPICS, Question, Story
from jexit.tasks.tom.world import Event

ASKED = re.compile(r" (?P<question>(?:Where|Does) [^.?]*\?)(?P<closing>.*)\Z")
CLOSINGS = {
    "free": "",
    "fine": " Answer in full.",
    "coarse": " Answer in short.",
    "at_once": " Answer at once.",
}
SALLY_ANNE = Story(
    room_of={"Tom": "hall", "Mia": "hall"},
    homes={"box": "hall", "jar": "hall"},
    events=(
        Event(kind="puts", actor="Tom", thing="coins", place="box"),
        Event(kind="leaves", actor="Mia", room="hall"),
        Event(kind="moves", actor="Tom", thing="coins", place="jar"),
    ),
)


def split_prompt(prompt):
    match = ASKED.search(prompt)
    return prompt[: match.start()], match["question"], match["closing"]


def asked(kind, *people, thing="coins", mode="fine"):
    question = Question(kind=kind, people=people, thing=thing)
    return make_problem(SALLY_ANNE, question, mode=mode, fine=mode == "fine")


def test_the_example_of_the_docstring():
    problem = asked("belief", "Mia")
    assert problem.prompt == (
        "Tom and Mia are in the hall. Tom puts the coins in the box. Mia leaves the hall. "
        "Tom moves the coins to the jar. Where does Mia think the coins are? Answer in full."
    )
    seen = "Tom Mia see box: box\nMia leaves: Tom\nTom see jar: box\n#### box"
    assert problem.completion == asked("second_belief", "Tom", "Mia").completion == seen
    assert asked("belief", "Mia", mode="coarse").completion == "Mia: box\n#### box"
    assert asked("reality").completion == "Tom puts box: box\nTom moves jar: jar\n#### jar"
    assert asked("memory").completion == "Tom puts box: box\nTom moves jar: box\n#### box"


def test_prompts_prescribe_the_chain(stories):
    task = make_task("tom")
    for pair in stories[:60]:
        told = set()
        for mode, closing in CLOSINGS.items():
            problem = make_problem(*pair, mode=mode, fine=mode == "fine")
            *story, said = split_prompt(problem.prompt)
            told.add(tuple(story))
            assert said == closing
            steps = task.steps(problem.completion)
            assert "".join(steps) + f"#### {problem.answer}" == problem.completion
            assert all(line.endswith("\n") for line in steps)
            assert task.final_answer(problem.completion) == problem.answer
            assert mode != "at_once" or not steps
        assert len(told) == 1


def test_answers_are_those_of_the_text(stories):
    """The prompt alone, read by other code, gives the answer."""
    forms = {
        "reality": r"Where are the (\w+) now",
        "memory": r"Where were the (\w+) at first",
        "second_belief": r"Where does (\w+) think (\w+) thinks the (\w+) are",
        "belief": r"Where does (\w+) think the (\w+) are",
        "second_knowledge": r"Does (\w+) think (\w+) knows about the (\w+)",
        "knowledge": r"Does (\w+) know about the (\w+)",
    }
    for pair in stories:
        problem = make_problem(*pair, mode="free", fine=True)
        story, question, _ = split_prompt(problem.prompt)
        kind, match = next(
            (kind, match) for kind, form in forms.items() if (match := re.match(form, question))
        )
        *people, thing = match.groups()
        fields = [problem.fields[name] for name in ("kind", "people", "thing")]
        assert fields == [kind, tuple(people), thing]
        assert read_story(story).answer(kind, people, thing) == problem.answer


def test_modes_follow_the_steps_and_the_mixture():
    def drawn(count, **options):
        task = make_task("tom", **options)
        return collections.Counter(task._draw_mode("train", index) for index in range(count))

    assert drawn(9, steps="fine").keys() == {(True, "fine")}
    assert drawn(9, steps="coarse").keys() == {(False, "coarse")}
    free = drawn(400, steps="free")  # the reference is one or the other
    assert free.keys() == {(True, "free"), (False, "free")} and min(free.values()) > 150
    mixed = drawn(4000, steps="mixed")
    for mode, share in (("fine", 0.2), ("coarse", 0.2), ("at_once", 0.15), ("free", 0.45)):
        count = sum(count for (_, drawn), count in mixed.items() if drawn == mode)
        assert abs(count / 4000 - share) < 0.03


def test_kinds_people_and_moves_can_be_chosen():
    task = make_task(
        "tom", kinds=("memory", "knowledge"),
        people_min=4, people_max=5, moves_min=5, moves_max=6,
    )  # fmt: skip
    for index in range(12):
        problem = task.problem("train", index)
        assert problem.fields["kind"] in ("memory", "knowledge")
        story = split_prompt(problem.prompt)[0]
        assert 4 <= len(read_story(story).logs) <= 5
        named = re.findall("|".join((*problem.fields["places"], *TOPICS)), story)
        assert 5 <= len(named) <= 6


def test_no_story_is_on_both_sides_whatever_its_names():
    quick = {"people_min": 2, "people_max": 2, "kinds": ("memory",), "steps": "mixed"}
    seen = {}
    for seed, (split, count) in enumerate((("train", 400), ("val", 40), ("test", 40))):
        task = make_task("tom", seed=seed, **quick)
        asked_of = [split_prompt(task.problem(split, index).prompt)[:2] for index in range(count)]
        seen[split] = {canonical(" ".join(texts)) for texts in asked_of}
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
    assert len(seen["train"]) < 380  # they do come again, so that the test could fail
    first = "Tom and Mia are in the hall. Tom puts the coins in the box. Tom leaves."
    same = "Eva and Sam are in the garden. Eva puts the pens in the jar. Eva leaves."
    assert canonical(first) == canonical(same) != canonical(same.replace("Eva puts", "Sam puts"))


def test_verdicts():
    task = make_task("tom")
    place, unknown = asked("belief", "Mia"), asked("knowledge", "Mia", thing="trip")
    for problem, kind, *completions in (
        (place, "strict", "Mia: box\n#### box", "#### box\n", "#### The box."),
        (place, "lenient", "####box", "First the jar, then the Box", "#### I think it is the box"),
        (place, "wrong", "#### jar", "the box\n#### jar", "#### box\n#### jar", "#### nowhere"),
        (place, "none", "boxes and jars", "Mia leaves: Tom\n", "####", ""),
        (unknown, "strict", "#### no", "#### No."),
        (unknown, "lenient", "so no", "No, nobody said yes to her."),
        (unknown, "wrong", "#### yes", "Yes, she does; no doubt", "#### box"),
        (unknown, "none", "nobody knows of nothing now", "no one told her"),
    ):
        for completion in completions:
            assert task.verify(problem, completion).kind == kind, completion


def test_a_chain_may_be_a_thought(stories):
    task = make_task("tom")
    problem = make_problem(*stories[0], mode="fine", fine=True)
    chain, _, answer = problem.completion.partition("####")
    thought = f"<think>\n{chain}</think>\n####{answer}"
    assert task.verify(problem, thought).kind == "strict"
    assert task.final_answer(thought) == problem.answer
    assert "".join(task.steps(thought)) == f"<think>\n{chain}".rstrip()
    assert len(task.steps(thought)) == len(task.steps(problem.completion))
    cut = f"<think>\n{chain}####{answer}"
    assert task.verify(problem, cut).kind == "none" and task.final_answer(cut) is None
    assert task.cue_after(f"<think>\n{chain}") == "\n</think>\n####"
    assert task.cue_after(chain) == "####"
    attempts = [Attempt(text="a\nb\n#### box"), Attempt(text="")]
    assert task.text_totals([problem] * 2, attempts) == {"chain_lines": (2, 2)}


def test_wrong_answers_are_plausible_and_wrong(stories):
    task = make_task("tom")
    for index, pair in enumerate(stories):
        problem = make_problem(*pair, mode="free", fine=True)
        wrong = task.wrong_answer(problem, Draw("wrong", index))
        assert task.verify(problem, f"#### {wrong}").kind == "wrong"
        assert problem.fields["kind"] not in OF_PLACES or wrong in problem.fields["places"]


def test_wrong_options_name_value_and_remedy():
    for name, *wrong in (
        ("steps", {"steps": "often"}, {"steps": "3"}),
        ("people", {"people_min": 1}, {"people_max": 2}, {"people_max": 9}),
        ("moves", {"moves_min": 2}, {"moves_max": 9}),
        ("kinds", {"kinds": ()}, {"kinds": ("desire",)}),
    ):
        for options in wrong:
            said = rf"config\.task\.options\.{name}.* (is|contains) .*, but .*; (ch|add one|remove)"
            with pytest.raises(ValueError, match=said):
                make_task("tom", **options)
    with pytest.raises(
        ValueError, match="two people rarely make a story of more than 6 moves; set"
    ):
        make_task("tom", people_min=2, moves_max=8)


def test_two_people_are_enough_for_a_problem():
    answers = collections.defaultdict(set)
    for kind in KINDS:
        task = make_task("tom", kinds=(kind,), people_min=2, people_max=2, moves_max=4)
        for index in range(3 if kind in OF_PLACES else 16):
            answers[kind].add(task.problem("train", index).answer)
    assert answers["knowledge"] == answers["second_knowledge"] == {"yes", "no"}


def test_a_chain_in_other_words_names_the_same_people():
    task, seen = make_task("tom", steps="fine"), set()
    for index in range(60):
        problem = task.problem("test", index)
        assert task.answer_follows(problem.completion)
        other = task.wrong_answer(problem, Draw("wrong", index))
        assert not task.answer_follows("".join(task.steps(problem.completion)) + f"#### {other}")
        changed = task.reworded(problem.completion)
        if changed is None:
            continue
        lines = "".join(task.steps(problem.completion)).splitlines()
        for before, after in zip(lines, changed.splitlines(), strict=True):
            assert sorted(before.split()) == sorted(after.split())
            if before != after:
                seen.add(re.sub(r"[A-Z][a-z]+", "X", after).split(":")[0].split()[-2])
    assert seen >= {"see", "X"}
    # Whose belief it is depends on the order.
    assert make_task("tom").reworded("Tom Mia: jar\n#### jar") is None
