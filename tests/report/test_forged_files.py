"""Files that somebody has tampered with: the report is written, or one sentence names the file."""

import copy
import csv
import json
import os
import pathlib

import pytest

from jexit.report import __main__ as report
from jexit.report import studies
from jexit.report.plots import plot_training
from jexit.results import LARGEST
from jexit.sweep import __main__ as sweep
from report_files import write_evaluated, write_trained

DEEP = "\0nested"  # stands for what json.dumps could not write
HOSTILE = {
    "true": True,
    "null": None,
    "zero": 0,
    "minus one": -1,
    "1e308": 1e308,
    "-1e308": -1e308,
    "1e-320": 1e-320,
    "10**17": 10**17,
    "10**300": 10**300,
    "10**400": 10**400,
    "NaN": float("nan"),
    "Infinity": float("inf"),
    "empty": "",
    "half a character": "\ud800",
    "long": "x" * 100_000,
    "number": "1e999",
    "list": [[1], {}],
    "empty list": [],
    "object": {"x": [None]},
    "nested": DEEP,
}
CELLS = ("", "x", "nan", "-inf", "1e308", "-1e308", "1" + "0" * 400, "true", "[1]", "9" * 5000)


def write(path: pathlib.Path, values: list) -> None:
    """JSON lines of values, or JSON of the only one."""
    text = "\n".join(json.dumps(value) for value in values)
    deep = '{"a": ' * 50_000 + "[" * 50_000
    path.write_text(text.replace(json.dumps(DEEP), deep) + "\n" * path.name.endswith("l"))


def places(value, path=()):
    """The path to every leaf, and to every list and object; of a list's entries the first only."""
    yield path
    entries = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        entries = list(enumerate(value))[:1]
    for key, entry in entries:
        yield from places(entry, (*path, key))


def with_hostile(value, path, hostile):
    if not path:
        return hostile
    changed = copy.deepcopy(value)
    *owner, last = path
    place = changed
    for key in owner:
        place = place[key]
    place[last] = hostile
    return changed


NAMES = ("", "²", "9" * 5000, "exit/x", "runs/<b>")


def with_name(value, path, name):
    """The value under another key."""
    changed = copy.deepcopy(value)
    *owner, last = path
    place = changed
    for key in owner:
        place = place[key]
    place[name] = place.pop(last)
    return changed


def forgeries(values):
    """`values`, the last of which is changed in one place: each hostile value, then each name."""
    *others, value = values
    for path in places(value):
        for name, hostile in HOSTILE.items():
            yield f"{path} {name}", [*others, with_hostile(value, path, hostile)]
        if path and isinstance(path[-1], str):
            for name in NAMES:
                yield f"{path} named {name[:9]}", [*others, with_name(value, path, name)]


def trimmed(value):
    """Two entries of every list that is long: what is read costs less, and its kinds stay."""
    if isinstance(value, dict):
        return {key: trimmed(entry) for key, entry in value.items()}
    return [trimmed(entry) for entry in value[:2]] if isinstance(value, list) else value


def read(path: pathlib.Path) -> list:
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [json.loads(line) for line in lines]


def assert_told(code, error, where):
    """The command wrote what it writes, or said in one sentence why it did not."""
    lines = error.splitlines()
    assert code in (0, 1), where
    assert all(line.startswith("jexit: ") for line in lines) and len(error) < 1000, (where, error)
    assert len(lines) == 1 if code else True, (where, error)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def evaluated(tmp_path):
    directory = write_evaluated(tmp_path / "eval")
    for name in ("eval.json", "completions.json"):
        write(directory / name, [trimmed(*read(directory / name))])
    return directory


@pytest.fixture
def trained(tmp_path):
    directory = write_trained(tmp_path / "rl", steps=2)
    (config,) = read(directory / "config.json")
    kept = ("command", "preset", "seed", "model", "exits", "task")
    write(directory / "config.json", [{key: config[key] for key in kept}])
    write(directory / "samples.jsonl", [trimmed(read(directory / "samples.jsonl")[-1])])
    return directory


def forge(directory, name, command, capsys, every):
    """Runs a command on each forgery of a file, or one in `every`; returns how many it refused."""
    path = directory / name
    refused = 0
    for where, values in list(forgeries(read(path)))[::every]:
        write(path, values)
        code = command()
        assert_told(code, capsys.readouterr().err, f"{name} {where}")
        refused += code
    return refused


SOME_OR_ALL = pytest.mark.parametrize("every", [3, pytest.param(1, marks=pytest.mark.slow)])


@SOME_OR_ALL
@pytest.mark.parametrize("name", ["eval.json", "completions.json"])
def test_a_forged_evaluation_is_drawn_or_refused(evaluated, name, every, capsys, recwarn):
    refused = forge(evaluated, name, lambda: report.main([str(evaluated)]), capsys, every)
    assert refused > 50 and not recwarn.list


@SOME_OR_ALL
@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "samples.jsonl", "after.json"])
def test_a_forged_training_run_is_drawn_or_refused(trained, name, every, capsys, recwarn):
    forge(trained, name, lambda: report.main([str(trained)]), capsys, every)
    assert not recwarn.list


@pytest.mark.parametrize(
    "name", ["eval/eval.json", "eval/completions.json", "metrics.jsonl", "after.json"]
)
def test_a_forged_run_is_collected_or_refused(evaluated, trained, name, capsys, tmp_path):
    evaluated.rename(trained / "eval")
    trained.rename(tmp_path / "run")
    given = ["--config=a.py", f"--into={tmp_path}", "--table_only"]
    assert sweep.main(given) == 0
    forge(tmp_path / "run", name, lambda: sweep.main(given), capsys, 7)


@pytest.mark.parametrize("name", ["a.csv", "a-curves.csv"])
def test_a_forged_study_is_written_or_refused(tmp_path, name, capsys):
    results = tmp_path / "docs" / "results"
    results.mkdir(parents=True)
    (tmp_path / "docs" / "results.md").write_text("<!-- a: right; depth -->\n<!-- end -->\n")
    tables = {
        "a.csv": (["seed", "rl.depth_coef", "sample/accuracy"], ["0", "2", "0.5"]),
        "a-curves.csv": (["seed", "rl.depth_coef", "step", "accuracy"], ["0", "2", "10", "0.5"]),
    }
    for place in range(len(tables[name][0])):
        for row in (0, 1):
            for cell in CELLS:
                forged = copy.deepcopy(tables)
                forged[name][row][place] = cell
                for file, lines in forged.items():
                    with (results / file).open("w", newline="") as target:
                        csv.writer(target).writerows(lines)
                code = studies.main([str(results)])
                assert_told(code, capsys.readouterr().err, (name, place, row, cell[:9]))


@pytest.mark.filterwarnings("ignore:constrained_layout not applied:UserWarning")
def test_the_largest_numbers_can_be_drawn(tmp_path, trained):
    write(
        trained / "metrics.jsonl",
        [
            {"step": step, "accuracy": sign * LARGEST, "loss": sign * LARGEST, "exit/1": LARGEST}
            for step, sign in ((0, 1), (2**31 - 1, -1))
        ],
    )
    assert plot_training(trained)
    assert report.main([str(trained)]) == 0
    (tmp_path / "a.csv").write_text(
        "seed,rl.depth_coef,sample/accuracy,sample/depth_fraction,before/accuracy\n"
        f"0,0,{LARGEST},0.5,0.5\n0,1,{-LARGEST},{LARGEST},0.5\n"
    )
    assert studies.main([str(tmp_path), "--all"]) == 0


@pytest.mark.parametrize("name", ["eval.json", "config.json", "metrics.jsonl", "after.json"])
def test_a_pipe_in_place_of_a_file_is_not_waited_for(trained, deadline, capsys, name):
    (trained / name).unlink(missing_ok=True)
    os.mkfifo(trained / name)
    assert report.main([str(trained)]) == 1
    error = capsys.readouterr().err
    assert f"{name} is a named pipe, not a file; remove it" in error and error.count("\n") == 1
