"""Two evaluations compared problem by problem."""

import csv
import json

import numpy as np

from jexit.evaluation.compare import Outcomes, comparison, main, read, write_problems
from jexit.results import Evaluation, PolicyResult
from jexit.tasks import Attempt, Verdict, make_task
from studies import collect
from studies.study import Study

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
        ([one, other], "have different problems; evaluate them on the same task, split and number"),
        ([one, fewer], "have different problems"),
        ([one, old], "problems.csv does not exist; run the evaluation again"),
        ([one, torn], "problems.csv is damaged"),
        ([one, cut], "problems under 'full', but eval.json has"),
        ([one, tmp_path / "no"], "eval.json"),
    ]:
        assert main([*map(str, places)]) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1, said
    (one / "eval.json").write_text(json.dumps({"task": {}}))
    assert main([str(one), str(one)]) == 1
    assert main(["--help"]) == 0


def test_a_study_has_what_each_run_gains_over_the_initial_checkpoint(tmp_path, capsys):
    rng = np.random.default_rng(1)
    right = rng.random(COUNT) < 0.8
    deep, shallow = ([[depth] * 10 for _ in range(COUNT)] for depth in (8, 2))
    initial = written(tmp_path / "trunk", {"full": attempts(right, deep)})
    (tmp_path / "sweep").mkdir()
    runs = {"full": attempts(right, deep), "sample": attempts(right[::-1], shallow)}
    written(tmp_path / "sweep" / "seed=0", runs)
    asked = {"settings": {"seed": "0"}, "run": None, "eval": []}
    (tmp_path / "sweep" / "seed=0.json").write_text(json.dumps(asked))
    target = tmp_path / "page"
    arguments = [str(tmp_path / "sweep"), str(target)]
    assert collect.main([*arguments, f"--initial={initial}@full"]) == 0
    (line,) = csv.DictReader(target.with_name("page.csv").open())
    for policy, saved in (("full", "0"), ("sample", "0.75")):
        assert line[f"{policy} less initial/saved_per_token"] == saved
        assert line[f"{policy} less initial/saved_per_problem_ci95/low"] == saved
        assert line[f"{policy} less initial/accuracy_difference"] == "0"
    ends = (f"sample less initial/accuracy_difference_ci95/{end}" for end in ("low", "high"))
    low, high = (line[end] for end in ends)
    assert float(low) < -0.03 and float(high) > 0.03
    other = written(tmp_path / "other", {"full": attempts(right, deep)}, first=1)
    assert collect.main([*arguments, f"--initial={other}@full"]) == 1
    assert "have different problems" in capsys.readouterr().err


def test_several_seeds_of_a_setting_have_intervals_over_runs_and_problems(tmp_path, capsys):
    rng = np.random.default_rng(2)

    def answered(directory, count, depth, first=0):
        made = attempts(rng.permutation(COUNT) < count, [[depth] * 10] * COUNT)
        return written(directory, {"sample": made}, first=first)

    sweep, target = tmp_path / "sweep", tmp_path / "page"
    sweep.mkdir()
    initial = answered(tmp_path / "trunk", 160, 8)
    for level, seed, count, depth in (
        ("0", 0, 100, 3), ("0", 1, 120, 4), ("0", 2, 140, 5), ("1", 0, 180, 2),
    ):  # fmt: skip
        name = f"rl.depth_coef={level},seed={seed}"
        answered(sweep / name, count, depth)
        settings = {"rl.depth_coef": level, "seed": str(seed)}
        asked = {"settings": settings, "run": None, "eval": []}
        (sweep / f"{name}.json").write_text(json.dumps(asked))
    assert collect.main([str(sweep), str(target), f"--initial={initial}@sample"]) == 0
    assert "page-seeds.csv" in capsys.readouterr().out
    (line,) = csv.DictReader(target.with_name("page-seeds.csv").open())  # of several seeds only
    assert line["rl.depth_coef"] == "0" and "seed" not in line

    def interval(name):
        return [float(line[f"sample{name}_ci95/{end}"]) for end in ("low", "high")]

    # A draw takes two of the three runs, and both may be the one that is the shallowest.
    assert interval("/depth_fraction") == [3 / 8, 5 / 8]
    assert interval("/layers_per_problem") == [30, 50]
    assert interval(" less initial/saved_per_problem") == [3 / 8, 5 / 8]
    assert interval(" less initial/saved_per_token") == [3 / 8, 5 / 8]
    low, high = interval("/accuracy")
    assert 0.45 < low < 0.5 and 0.7 < high < 0.75  # wider than the range of the runs
    low, high = interval(" less initial/accuracy_difference")
    assert -0.38 < low < -0.3 and -0.1 < high < -0.02
    table = Study(target.with_name("page.csv")).table(["depth, interval", "accuracy"])
    assert "| 0 | 3 | 37.5 to 62.5 | 60.0 (50.0 to 70.0) |" in table
    answered(sweep / "rl.depth_coef=1,seed=1", 100, 2, first=1)
    (sweep / "rl.depth_coef=1,seed=1.json").write_text(
        json.dumps({"settings": {"rl.depth_coef": "1", "seed": "1"}, "run": None, "eval": []})
    )
    assert collect.main([str(sweep), str(target)]) == 1
    assert "evaluate them on the same task" in capsys.readouterr().err
