"""Changed steps are undone at the very place where they were made."""

from jexit.tasks import Draw, Gsm8k, make_task
from jexit.tasks.base import Problem


def test_all_but_one_step_of_a_reference_is_undisturbed():
    for name, settings in [
        ("sums", {"steps": 2}),
        ("tom", {"steps": "fine"}),
        ("tom", {"steps": "coarse"}),
        ("word_problems", {}),
    ]:
        task, seen = make_task(name, **settings), 0
        for index in range(60):
            problem = task.problem("test", index)
            steps = task.steps(problem.completion)
            made = task.corrupted(problem, problem.completion, Draw("undone", index))
            if made is None:
                continue
            undone = made.undone(steps)
            ends = ["".join(steps[:count]) for count in range(1, len(steps) + 1)]
            assert undone in ends and undone != made.prefix
            before = "".join(steps[: ends.index(undone)])
            assert made.prefix.startswith(before)
            assert len(task.steps(made.prefix)) == ends.index(undone) + 1
            seen += 1
        assert seen > 20


def test_a_number_that_grows_at_the_end_of_its_line():
    """ "= 1" is a beginning of "= 11": the texts first differ in the line after."""
    completion = "3-2 = 1\n1+4 = 5\n#### 5"
    problem, task = Problem(prompt="?", answer="5"), Gsm8k()
    made = [task.corrupted(problem, completion, Draw("grows", index)) for index in range(200)]
    (grown, *_) = [change for change in made if change.prefix == "3-2 = 11"]
    assert grown.undone(task.steps(completion)) == "3-2 = 1"
