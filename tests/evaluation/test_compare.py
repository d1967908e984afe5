"""Two evaluations compared problem by problem."""

import json

import numpy as np

from jexit.evaluation.compare import Outcomes, compared, main, read, write_problems
from jexit.results import Evaluation, PolicyResult
from jexit.tasks import Attempt, Verdict

COUNT = 200


def attempts(correct, depths):
    return [
        Attempt(
            text="", depths=row, verdict=Verdict(kind="strict" if right else "wrong", reward=0.0)
        )
        for right, row in zip(correct, depths, strict=True)
    ]


def written(directory, policies, *, layers=8, **changed):
    """An evaluation's files; `policies` has attempts by name."""
    directory.mkdir()
    runs = [
        PolicyResult(
            policy=name, accuracy=0.5, accuracy_ci95=(0.4, 0.6), depth_mean=4.0,
            depth_fraction=0.5, depth_histogram={}, problems=len(made), tokens=1,
            tokens_per_second=1.0,
        )
        for name, made in policies.items()
    ]  # fmt: skip
    model = {"path": "x", "layers": layers, "exits": (2, 4)}
    values = {"task": {"name": "sums"}, "model": model, "runs": runs} | changed
    Evaluation(**values).write(directory / "eval.json")
    write_problems(directory / "problems.csv", policies)
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
    (ours, _), (theirs, _) = read(f"{first}@full"), read(str(second))
    assert isinstance(ours, Outcomes) and ours.name == f"{first}@full"
    line = compared(ours, theirs, [8, 10]).splitlines()[1]
    assert f"{share:.1%}" in line and "8.00 (100%)" in line and "80.0" in line


def test_what_cannot_be_compared_is_one_sentence(tmp_path, capsys):
    made = attempts([True] * 4, [[8]] * 4)
    one = written(tmp_path / "one", {"full": made})
    other = written(tmp_path / "other", {"full": made}, split="val")
    fewer = written(tmp_path / "fewer", {"full": made[:3]})
    words = written(tmp_path / "words", {"full": made}, task={"name": "word_problems"})
    old = written(tmp_path / "old", {"full": made})
    (old / "problems.csv").unlink()
    torn = written(tmp_path / "torn", {"full": made})
    (torn / "problems.csv").write_text("policy,problem\nfull,0\n")
    cut = written(tmp_path / "cut", {"full": made})
    lines = (cut / "problems.csv").read_text().splitlines()
    (cut / "problems.csv").write_text("\n".join(lines[:-1]))
    for places, sentence in [
        ([one], "1 places were given, but two are compared"),
        ([one, f"{one}@sample"], "has no results of the policy 'sample'; use one of full"),
        ([one, other], "have different splits, test and val"),
        ([one, fewer], "have different numbers of problems, 4 and 3"),
        ([one, words], "have different tasks"),
        ([one, old], "problems.csv does not exist; run the evaluation again"),
        ([one, torn], "problems.csv is damaged"),
        ([one, cut], "does not have the 4 problems of eval.json"),
        ([one, tmp_path / "no"], "eval.json"),
    ]:
        assert main([*map(str, places)]) == 1
        said = capsys.readouterr().err
        assert sentence in said and said.count("\n") == 1, said
    (one / "eval.json").write_text(json.dumps({"task": {}}))
    assert main([str(one), str(one)]) == 1
    assert main(["--help"]) == 0
