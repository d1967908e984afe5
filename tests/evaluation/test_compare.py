"""Two evaluations compared problem by problem."""

import json

import numpy as np

from jexit.evaluation.compare import Outcomes, comparison, main, read, write_problems
from jexit.results import Evaluation, PolicyResult
from jexit.tasks import Attempt, Verdict, make_task

COUNT = 200


def attempts(correct, depths):
    return [
        Attempt(
            text="", depths=row, verdict=Verdict(kind="strict" if right else "wrong", reward=0.0)
        )
        for right, row in zip(correct, depths, strict=True)
    ]


def written(directory, policies, *, layers=8, first=0):
    """An evaluation's files; `policies` has attempts by name, at problems from the `first` on."""
    directory.mkdir()
    task = make_task("sums")
    runs = [
        PolicyResult(
            policy=name, accuracy=sum(a.correct for a in made) / len(made),
            accuracy_ci95=(0.4, 0.6), depth_mean=4.0, depth_fraction=0.5, depth_histogram={},
            problems=len(made), tokens=sum(len(a.depths) for a in made), tokens_per_second=1.0,
        )
        for name, made in policies.items()
    ]  # fmt: skip
    model = {"path": "x", "layers": layers, "exits": (2, 4)}
    Evaluation(task={"name": "sums"}, model=model, runs=runs).write(directory / "eval.json")
    count = len(next(iter(policies.values())))
    problems = [task.problem("test", first + index) for index in range(count)]
    write_problems(directory / "problems.csv", problems, policies)
    return directory


def test_differences_and_savings(tmp_path, capsys):
    rng = np.random.default_rng(0)
    shallow = [rng.choice([2, 4], 5).tolist() for _ in range(COUNT)]
    deep = [[8] * 10 for _ in range(COUNT)]
    right = rng.random(COUNT) < 0.8
    first = written(
        tmp_path / "a", {"full": attempts(right, deep), "sample": attempts(~right, shallow)}
    )
    second = written(tmp_path / "b", {"full": attempts(right, deep)}, layers=10)
    assert main([f"{first}@sample", str(second)]) == 0
    text = capsys.readouterr().out
    share, layers = right.mean(), np.sum(shallow)
    assert f"difference in points:    {100 * (1 - 2 * share):+.1f} (" in text
    assert f"per token, of all:    {0.8 - layers / (5 * COUNT * 8):.1%} (" in text
    assert f"per problem:          {1 - layers / (80 * COUNT):.1%} (" in text
    assert f"{COUNT} problems" in text
    # The same attempts differ in nothing, and the pairing knows it.
    assert main([f"{first}@full", f"{first}@full"]) == 0
    text = capsys.readouterr().out
    assert "points:    +0.0 (" in text and "0.0% (0.0% to 0.0%)" in text
    ours, theirs = read(f"{first}@full"), read(str(second))
    assert isinstance(ours, Outcomes) and ours.name == f"{first}@full"
    line = comparison(ours, theirs).splitlines()[1]
    assert f"{share:.1%}" in line and "8.00 (100%)" in line and "80.0" in line


def test_what_cannot_be_compared_is_one_sentence(tmp_path, capsys):
    made = attempts([True] * 4, [[8]] * 4)
    one = written(tmp_path / "one", {"full": made})
    other = written(tmp_path / "other", {"full": made}, first=1)
    fewer = written(tmp_path / "fewer", {"full": made[:3]})
    old = written(tmp_path / "old", {"full": made})
    (old / "problems.csv").unlink()
    torn = written(tmp_path / "torn", {"full": made})
    (torn / "problems.csv").write_text("policy,problem\nfull,0\n")
    cut = written(tmp_path / "cut", {"full": made})
    lines = (cut / "problems.csv").read_text().splitlines()
    (cut / "problems.csv").write_text("\n".join(lines[:-1]))
    for places, sentence in [
        ([one], "1 evaluations were given, but two are compared"),
        ([one, f"{one}@sample"], "has no results of the policy 'sample'; use one of full"),
        ([one, other], "have different problems; evaluate both on the same task, split and number"),
        ([one, fewer], "have different problems"),
        ([one, old], "problems.csv does not exist; run the evaluation again"),
        ([one, torn], "problems.csv is damaged"),
        ([one, cut], "does not agree with eval.json under 'full'"),
        ([one, tmp_path / "no"], "eval.json"),
    ]:
        assert main([*map(str, places)]) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1, said
    (one / "eval.json").write_text(json.dumps({"task": {}}))
    assert main([str(one), str(one)]) == 1
    assert main(["--help"]) == 0
