import itertools
import re

from hypothesis import given
from hypothesis import strategies as st

from jexit.tasks import make_task
from jexit.tasks.base import Draw
from jexit.tasks.tom.chain import read_line
from jexit.tasks.tom.text import CONTAINERS, OF_PLACES, TOPICS
from jexit.tasks.word_problems import NAMES

WHAT = "|".join((*CONTAINERS, *TOPICS))
SEE = re.compile(rf"(.+) see ({WHAT})(?:, (\w+) in secret)?: (\w+)")
TELLS = re.compile(rf"(\w+) tells((?: [A-Z]\w+)*) ({WHAT})(?:, (\w+) in secret)?: (\w+)")
PUTS = re.compile(rf"(\w+) (puts|moves|takes) ({WHAT}): (\w+)")
PRESENT = re.compile(r"(\w+) (enters|leaves):((?: \w+)*)")
COARSE = re.compile(r"(\w+(?: \w+)?): (\w+)")


def follow(lines, fields, unknown):
    """What each line of a chain comes to, from who it says saw and heard what."""
    kind, people = fields["kind"], fields["people"]
    state = unknown
    for line in lines:
        if PRESENT.fullmatch(line):
            continue
        secret, circles, speaker = None, [], None
        if match := PUTS.fullmatch(line):
            if kind == "reality" or state == unknown:
                state = match[3]
        elif match := SEE.fullmatch(line):
            circles, what, secret = (
                [set(g.split()) for g in match[1].split(" and ")],
                *match.group(2, 3),
            )
        elif match := TELLS.fullmatch(line):
            speaker, what, secret = match.group(1, 3, 4)
            circles = [{speaker, *match[2].split()}]
        else:
            match = COARSE.fullmatch(line)
            state = match[2]
        value = "yes" if circles and what in TOPICS else circles and what
        both = any(set(people) <= circle for circle in circles)
        if secret and secret == (people or ("",))[0]:
            both = len(people) == 1 or any(people[1] in circle for circle in circles)
        lies = kind == "belief" and people == (speaker,)
        if people and circles and both and not lies:
            state = value
        yield state


def unknown_of(problem):
    return "unknown" if problem.fields["kind"] in OF_PLACES else "no"


def lines_of(completion):
    return completion.rpartition("####")[0].splitlines()


def test_the_answer_follows_from_the_chain_alone():
    for steps in ["fine", "coarse", "free"]:
        task = make_task("tom", steps=steps, people=(2, 4), moves=(3, 5))
        for index in range(150):
            problem = task.problem("train", index)
            states = list(follow(lines_of(problem.completion), problem.fields, unknown_of(problem)))
            assert (states or [unknown_of(problem)])[-1] == problem.answer


def test_every_fine_line_states_what_it_comes_to():
    task = make_task("tom", steps="fine", people=(2, 4))
    forms = dict.fromkeys((SEE, TELLS, PUTS, PRESENT), 0)
    for index in range(150):
        problem = task.problem("train", index)
        lines = lines_of(problem.completion)
        told = [line for line in lines if not PRESENT.fullmatch(line)]
        states = [line.rpartition(": ")[2] for line in told]
        assert states == list(follow(told, problem.fields, unknown_of(problem)))
        assert told  # the thing asked for does occur
        for line in lines:
            (form,) = [form for form in forms if form.fullmatch(line)]
            forms[form] += 1
    assert all(forms.values())


def test_coarse_lines_are_the_changes_that_fine_lines_state():
    fine = make_task("tom", steps="fine", people=(2, 4))
    coarse = make_task("tom", steps="coarse", people=(2, 4))
    fewer = 0
    for index in range(150):
        long, short = (task.problem("train", index) for task in (fine, coarse))
        told = [line for line in lines_of(long.completion) if not PRESENT.fullmatch(line)]
        states = [unknown_of(long), *(line.rpartition(": ")[2] for line in told)]
        changes = [b for a, b in itertools.pairwise(states) if a != b]
        lines = lines_of(short.completion)
        assert [COARSE.fullmatch(line)[2] for line in lines] == changes
        fewer += len(lines) < len(lines_of(long.completion))
    assert fewer > 75


def test_a_corrupted_line_leads_to_the_answer_that_is_said_to_follow():
    for steps in ["fine", "coarse"]:
        task = make_task("tom", steps=steps, people=(2, 4), moves=(3, 5))
        made = dict.fromkeys(task.kinds, 0)
        for index in range(150):
            problem = task.problem("train", index)
            change = task.corrupted(problem, problem.completion, Draw("corrupt", index))
            if change is None:
                continue
            made[problem.fields["kind"]] += 1
            lines, before = change.prefix.splitlines(), lines_of(problem.completion)
            assert change.prefix.endswith("\n")
            assert lines[:-1] == before[: len(lines) - 1] and lines[-1] != before[len(lines) - 1]
            rest = before[len(lines) :]
            if steps == "coarse":
                assert not rest or problem.fields["kind"].endswith("knowledge")
            *_, end = follow([*lines, *rest], problem.fields, unknown_of(problem))
            assert end == change.answer != problem.answer
            assert lines[-1].endswith(f": {change.answer}")
            if problem.fields["kind"] in OF_PLACES:
                assert change.answer in problem.fields["places"]
        assert min(made.values()) > 4, made


def test_nothing_to_corrupt():
    task = make_task("tom", steps="at_once")
    problem = task.problem("train", 0)
    assert task.corrupted(problem, problem.completion, Draw("x")) is None
    assert task.corrupted(problem, "no chain at all", Draw("x")) is None


PIECES = (
    *(*NAMES[:3], *CONTAINERS[:3], *TOPICS[:2], "see", "tells", "and", "in secret", "puts", ","),
    *(": box\n", ": yes\n", ": no\n", "enters:", "#### box", "####"),
)
chain_like = st.lists(st.sampled_from(PIECES)).map(" ".join)


@given(text=st.text() | chain_like, index=st.integers(0, 11))
def test_reading_and_corrupting_are_total(text, index):
    task = make_task("tom", steps="mixed")
    problem = task.problem("train", index)
    assert "".join(task.steps(text)) == text.partition("####")[0]
    change = task.corrupted(problem, text, Draw("total"))
    assert change is None or change.answer != task.final_answer(text)
    for line in text.splitlines(keepends=True):
        read = read_line(line)
        assert read is None or read_line(read.text()) == read
