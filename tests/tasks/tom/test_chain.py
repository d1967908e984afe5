"""A chain of thought leads to its answer, read apart from the code that writes it."""

import itertools
import re

from jexit.tasks import make_task
from jexit.tasks.base import Draw
from jexit.tasks.tom.chain import corruptions, read_line
from jexit.tasks.tom.task import make_problem
from jexit.tasks.tom.text import CONTAINERS, KINDS, OF_PLACES, TOPICS, Question

WHAT = "|".join((*CONTAINERS, *TOPICS))
SEE = re.compile(rf"(.+) see ({WHAT})(?:, (\w+) in secret)?: (\w+)")
TELLS = re.compile(rf"(\w+) tells((?: [A-Z]\w+)*) ({WHAT})(?:, (\w+) in secret)?: (\w+)")
PUTS = re.compile(rf"(\w+) (puts|moves|takes) ({WHAT}): (\w+)")
PRESENT = re.compile(r"(\w+) (enters|leaves):((?: \w+)*)")
COARSE = re.compile(r"(\w+(?: \w+)?): (\w+)")


def follow(lines, fields):
    """What each line of a chain comes to, from who it says saw and heard what."""
    kind, people = fields["kind"], fields["people"]
    state = nothing_of(kind)
    for line in lines:
        if PRESENT.fullmatch(line):
            continue
        secret, circles, speaker = None, [], None
        if match := PUTS.fullmatch(line):
            if kind == "reality" or state == nothing_of(kind):
                state = match[3]
        elif match := SEE.fullmatch(line):
            circles = [set(group.split()) for group in match[1].split(" and ")]
            what, secret = match.group(2, 3)
        elif match := TELLS.fullmatch(line):
            speaker, what, secret = match.group(1, 3, 4)
            circles = [{speaker, *match[2].split()}]
        else:
            state = COARSE.fullmatch(line)[2]
        value = "yes" if circles and what in TOPICS else circles and what
        both = any(set(people) <= circle for circle in circles)
        if secret and secret == (people or ("",))[0]:
            both = len(people) == 1 or any(people[1] in circle for circle in circles)
        lies = kind == "belief" and people == (speaker,)
        if people and circles and both and not lies:
            state = value
        yield state


def nothing_of(kind):
    return "unknown" if kind in OF_PLACES else "no"


def lines_of(problem):
    return problem.completion.rpartition("####")[0].splitlines()


def test_every_line_states_what_it_comes_to_and_the_last_one_is_the_answer(wild_stories):
    forms, fewer = dict.fromkeys((SEE, TELLS, PUTS, PRESENT), 0), 0
    pairs = [(story, question) for story, asked in wild_stories[:50] for question in asked]
    for pair in pairs:
        fine = make_problem(*pair, mode="fine", fine=True)
        coarse = make_problem(*pair, mode="coarse", fine=False)
        lines, nothing = lines_of(fine), nothing_of(fine.fields["kind"])
        told = [line for line in lines if not PRESENT.fullmatch(line)]
        states = [nothing, *(line.rpartition(": ")[2] for line in told)]
        assert states == [nothing, *follow(told, fine.fields)]
        assert states[-1] == fine.answer == coarse.answer
        for line in lines:
            (form,) = [form for form in forms if form.fullmatch(line)]
            forms[form] += 1
        # Coarse lines are the changes that fine lines state.
        changes = [b for a, b in itertools.pairwise(states) if a != b]
        assert [COARSE.fullmatch(line)[2] for line in lines_of(coarse)] == changes
        fewer += len(changes) < len(lines)
    assert all(forms.values())
    assert fewer > len(pairs) / 2


def test_a_corrupted_line_leads_to_the_answer_that_is_said_to_follow(stories):
    task = make_task("tom")
    for mode in ("fine", "coarse"):
        made = dict.fromkeys(KINDS, 0)
        for index, pair in enumerate(stories):
            problem = make_problem(*pair, mode=mode, fine=mode == "fine")
            kind, places = problem.fields["kind"], problem.fields["places"]
            before, draw = lines_of(problem), Draw("corrupt", index)
            chain = [f"{line}\n" for line in before]
            changes = corruptions(chain, pair[1], problem.answer, places, draw)
            assert (task.corrupted(problem, problem.completion, draw) is None) == (not changes)
            for change in changes:
                made[kind] += 1
                lines = change.prefix.splitlines(keepends=True)
                assert lines[:-1] == chain[: change.step] and lines[-1] != chain[change.step]
                *_, end = follow(
                    [*change.prefix.splitlines(), *before[len(lines) :]], problem.fields
                )
                assert end == change.answer != problem.answer
                assert lines[-1].endswith(f": {change.answer}\n")
                assert kind not in OF_PLACES or change.answer in places
        assert min(made.values()) > 4, made
    heard = ["Tom tells Mia trip: yes\n", "Ben tells Mia trip: yes\n"]
    asked = Question(kind="knowledge", people=("Mia",), thing="trip")
    assert len(corruptions(heard[:1], asked, "yes", (), Draw("once"))) == 1
    assert not corruptions(heard, asked, "yes", (), Draw("twice"))  # she hears it all the same
    at_once = make_problem(*stories[0], mode="at_once", fine=False)
    for completion in (at_once.completion, "no chain at all"):
        assert task.corrupted(at_once, completion, Draw("nothing")) is None


def test_lines_are_read_back(stories):
    for pair in stories:
        for line in make_problem(*pair, mode="fine", fine=True).completion.splitlines(True):
            read = read_line(line)
            assert read is None or read.text() == line
            assert (read is None) == (PRESENT.match(line) is not None or line.startswith("####"))
