import collections
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from story_reader import read_story

from jexit.tasks import make_task
from jexit.tasks.base import Draw, stable_hash
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


def split_prompt(prompt):
    match = ASKED.search(prompt)
    return prompt[: match.start()], match["question"], match["closing"]


def sally_anne():
    return Story(
        room_of={"Tom": "hall", "Mia": "hall"},
        homes={"box": "hall", "jar": "hall"},
        events=(
            Event(kind="puts", actor="Tom", thing="coins", place="box"),
            Event(kind="leaves", actor="Mia", room="hall"),
            Event(kind="moves", actor="Tom", thing="coins", place="jar"),
        ),
    )


def asking(kind, *people):
    return Question(kind=kind, people=people, thing="coins")


def test_the_example_of_the_docstring():
    problem = make_problem(sally_anne(), asking("belief", "Mia"), mode="fine", fine=True)
    assert problem.prompt == (
        "Tom and Mia are in the hall. Tom puts the coins in the box. Mia leaves the hall. "
        "Tom moves the coins to the jar. Where does Mia think the coins are? Answer in full."
    )
    assert problem.completion == "Tom Mia see box: box\nMia leaves: Tom\nTom see jar: box\n#### box"
    short = make_problem(sally_anne(), asking("belief", "Mia"), mode="coarse", fine=False)
    assert short.completion == "Mia: box\n#### box"
    assert short.fields["false_belief"] is True


OTHER_QUESTIONS = [
    (asking("reality"), "Tom puts box: box\nTom moves jar: jar\n#### jar"),
    (asking("memory"), "Tom puts box: box\nTom moves jar: box\n#### box"),
    (
        asking("second_belief", "Tom", "Mia"),
        "Tom Mia see box: box\nMia leaves: Tom\nTom see jar: box\n#### box",
    ),
]


def test_other_questions_about_the_same_story():
    for question, completion in OTHER_QUESTIONS:
        assert make_problem(sally_anne(), question, mode="fine", fine=True).completion == completion


def test_an_index_has_the_same_story_whatever_the_steps():
    tasks = [make_task("tom", steps=steps) for steps in (*CLOSINGS, "mixed")]
    for index in range(40):
        assert len({split_prompt(task.problem("train", index).prompt)[:2] for task in tasks}) == 1


def test_prompts_prescribe_the_chain():
    for steps in CLOSINGS:
        task = make_task("tom", steps=steps)
        for index in range(60):
            problem = task.problem("train", index)
            assert split_prompt(problem.prompt)[2] == CLOSINGS[steps]
            assert problem.completion.endswith(f"#### {problem.answer}")
            chain = problem.completion.removesuffix(f"#### {problem.answer}")
            assert chain == "".join(task.steps(problem.completion))
            assert all(line.endswith("\n") for line in task.steps(problem.completion))
            assert task.final_answer(problem.completion) == problem.answer
            if steps == "at_once":
                assert chain == ""


def test_answers_are_those_of_the_text():
    """The prompt alone, read by other code, gives the answer."""
    task = make_task("tom", steps="mixed", people=(2, 4), moves=(3, 5))
    forms = {
        "reality": r"Where are the (\w+) now",
        "memory": r"Where were the (\w+) at first",
        "second_belief": r"Where does (\w+) think (\w+) thinks the (\w+) are",
        "belief": r"Where does (\w+) think the (\w+) are",
        "second_knowledge": r"Does (\w+) think (\w+) knows about the (\w+)",
        "knowledge": r"Does (\w+) know about the (\w+)",
    }
    for index in range(400):
        problem = task.problem("train", index)
        story, question, _ = split_prompt(problem.prompt)
        kind, match = next(
            (kind, match) for kind, form in forms.items() if (match := re.match(form, question))
        )
        *people, thing = match.groups()
        assert (kind, tuple(people), thing) == tuple(
            problem.fields[name] for name in ("kind", "people", "thing")
        )
        assert read_story(story).answer(kind, people, thing) == problem.answer


def test_the_mixture_follows_its_weights():
    task = make_task("tom", steps="mixed")
    modes = collections.Counter(task.problem("train", i).fields["mode"] for i in range(800))
    assert abs(modes["free"] / 800 - 0.45) < 0.05
    assert abs(modes["fine"] / 800 - 0.20) < 0.04
    assert abs(modes["coarse"] / 800 - 0.20) < 0.04
    assert abs(modes["at_once"] / 800 - 0.15) < 0.04
    only = make_task("tom", steps="mixed", mixture={"at_once": 1.0})
    assert {only.problem("train", i).fields["mode"] for i in range(10)} == {"at_once"}


def test_the_free_reference_is_at_times_fine_and_at_times_coarse():
    free, fine, coarse = (make_task("tom", steps=steps) for steps in ("free", "fine", "coarse"))
    seen = collections.Counter()
    for index in range(200):
        text = free.problem("train", index).completion
        either = {
            name: task.problem("train", index).completion
            for name, task in (("fine", fine), ("coarse", coarse))
        }
        assert text in either.values()
        seen.update(name for name, other in either.items() if text == other)
    assert min(seen.values()) > 60


def test_kinds_people_and_moves_can_be_chosen():
    task = make_task("tom", kinds=("memory", "knowledge"), people=(4, 5), moves=(5, 6))
    for index in range(60):
        problem = task.problem("train", index)
        assert problem.fields["kind"] in ("memory", "knowledge")
        story = split_prompt(problem.prompt)[0]
        assert 4 <= len(read_story(story).logs) <= 5
        named = re.findall("|".join((*problem.fields["places"], *TOPICS)), story)
        assert 5 <= len(named) <= 6


# Quick to draw with two people and three sentences.
QUICK = ("memory", "reality")


def test_no_story_is_on_both_sides_whatever_its_names():
    seen = {}
    for split in ("train", "val", "test"):
        seen[split] = set()
        for seed in (0, 1):
            task = make_task(
                "tom", steps="mixed", people=(2, 2), moves=(3, 3), kinds=QUICK, seed=seed
            )
            for index in range(600 if split == "train" else 60):
                story, question, _ = split_prompt(task.problem(split, index).prompt)
                seen[split].add(canonical(f"{story} {question}"))
    assert sum(map(len, seen.values())) == len(set().union(*seen.values()))
    # The same stories do come again with other names, so that the test could fail.
    assert len(seen["train"]) < 1150 and len(seen["val"]) < 120 and len(seen["test"]) < 120


def test_the_canonical_form_forgets_names_only():
    first = canonical("Tom and Mia are in the hall. Tom puts the coins in the box. Tom leaves.")
    assert first == canonical(
        "Eva and Sam are in the garden. Eva puts the pens in the jar. Eva leaves."
    )
    assert first != canonical(
        "Eva and Sam are in the garden. Sam puts the pens in the jar. Eva leaves."
    )


def test_the_stream_is_fixed_for_good():
    # Written down once: a change here silently changes every data set and its split.
    task = make_task("tom", steps="mixed")
    prompts = [task.problem("train", index).prompt for index in range(24)]
    assert stable_hash(*prompts) == 0x60F9A6AA8DE1EEFE


VERDICTS_ON_PLACES = [
    ("Mia: box\n#### box", "strict"),
    ("#### box", "strict"),
    ("#### box\n", "strict"),
    ("#### The box.", "strict"),
    ("####box", "lenient"),
    ("Mia thinks they are in the box.", "lenient"),
    ("First the jar, then the Box", "lenient"),
    ("#### I think it is the box", "lenient"),
    ("#### jar", "wrong"),
    ("the box\n#### jar", "wrong"),
    ("#### box\n#### jar", "wrong"),
    ("#### nowhere", "wrong"),
    ("boxes and jars", "none"),
    ("Mia leaves: Tom\n", "none"),
    ("####", "none"),
    ("", "none"),
]


def test_verdicts_on_places():
    for completion, kind in VERDICTS_ON_PLACES:
        task = make_task("tom")
        problem = make_problem(sally_anne(), asking("belief", "Mia"), mode="free", fine=False)
        assert task.verify(problem, completion).kind == kind


VERDICTS_ON_YES_AND_NO = [
    ("#### no", "strict"),
    ("#### No.", "strict"),
    ("so no", "lenient"),
    ("No, nobody said yes to her.", "lenient"),
    ("#### yes", "wrong"),
    ("Yes, she does; no doubt", "wrong"),
    ("nobody knows of nothing now", "none"),
    ("no one told her", "none"),
    ("#### box", "wrong"),
]


def test_verdicts_on_yes_and_no():
    for completion, kind in VERDICTS_ON_YES_AND_NO:
        task = make_task("tom")
        story = Story(
            room_of={"Tom": "hall", "Mia": "hall"},
            homes={},
            events=(
                Event(kind="leaves", actor="Mia", room="hall"),
                Event(kind="enters", actor="Mia", room="garden"),
            ),
        )
        question = Question(kind="knowledge", people=("Mia",), thing="trip")
        problem = make_problem(story, question, mode="free", fine=False)
        assert task.verify(problem, completion).kind == kind


@given(text=st.text(), index=st.integers(0, 11))
def test_verify_is_total(text, index):
    task = make_task("tom")
    verdict = task.verify(task.problem("train", index), text)
    assert verdict.kind in ("strict", "lenient", "wrong", "none")
    task.final_answer(text)


def test_a_chain_may_be_a_thought():
    task = make_task("tom", steps="fine")
    problem = task.problem("train", 0)
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


def test_wrong_answers_are_plausible_and_wrong():
    task = make_task("tom")
    drawn = collections.defaultdict(set)
    for index in range(120):
        problem = task.problem("train", index)
        wrong = task.wrong_answer(problem, Draw("wrong", index))
        assert wrong != problem.answer
        assert task.verify(problem, f"#### {wrong}").kind == "wrong"
        if problem.fields["kind"] in OF_PLACES:
            assert wrong in problem.fields["places"]
        drawn[problem.fields["kind"]].add(wrong)
    assert set(drawn) == set(KINDS)


WRONG_OPTIONS = [
    ({"steps": "often"}, r"change config\.task\.steps"),
    ({"steps": "3"}, r"change config\.task\.steps"),
    ({"people": (1, 3)}, r"change config\.task\.people_min or people_max"),
    ({"people": (3, 2)}, r"change config\.task\.people_min or people_max"),
    ({"people": (3, 9)}, r"change config\.task\.people_min or people_max"),
    ({"moves": (2, 4)}, r"change config\.task\.moves_min or moves_max"),
    ({"moves": (4,)}, r"change config\.task\.moves_min or moves_max"),
    ({"kinds": ()}, r"change config\.task\.kinds"),
    ({"kinds": ("desire",)}, r"change config\.task\.kinds"),
    ({"mixture": {"free": 0.0}}, "give other weights"),
    ({"mixture": {"sometimes": 1.0}}, "give other weights"),
]


def test_wrong_options_name_value_and_remedy():
    for options, remedy in WRONG_OPTIONS:
        with pytest.raises(ValueError, match=rf"tom: {next(iter(options))}.* got .*; {remedy}"):
            make_task("tom", **options)


def test_the_lines_of_chains_are_counted():
    task = make_task("tom", steps="mixed")
    problem = task.problem("train", 0)
    totals = task.text_totals([problem] * 2, ["a\nb\n#### box", ""])
    assert totals["chain_lines"] == (2, 2)
