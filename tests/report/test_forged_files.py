"""Files that somebody has tampered with: the report is written, or one sentence names the file."""

import copy
import functools
import itertools
import json
import operator
import os

import pytest

from jexit.report import __main__ as report
from jexit.report.runs import read_run
from jexit.report.training_curves import write_charts
from jexit.results import LARGEST
from jexit.sweep import __main__ as sweep
from report_files import write_evaluated, write_trained

DEEP = "\0nested"  # stands for what json.dumps could not write
HOSTILE = [
    *(True, None, 0, -1, 1e308, -1e308, 1e-320, 10**17, 10**400, float("nan"), float("inf")),
    *("", "\ud800", "x" * 100_000, "1e999", [[1], {}], [], {"x": [None]}, DEEP),
]
NAMES = ("", "²", "9" * 5000, "exit/x", "runs/<b>")


def write(path, values):
    """JSON lines of values, or JSON of the only one."""
    text = "\n".join(json.dumps(value) for value in values)
    deep = '{"a": ' * 50_000 + "[" * 50_000
    path.write_text(text.replace(json.dumps(DEEP), deep) + "\n" * path.name.endswith("l"))


def read(path):
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    return [json.loads(line) for line in lines]


def places(value, path=()):
    """The path to every leaf, and to every list and object; of a list's entries the first only."""
    yield path
    entries = value.items() if isinstance(value, dict) else ()
    if isinstance(value, list):
        entries = list(enumerate(value))[:1]
    for key, entry in entries:
        yield from places(entry, (*path, key))


def forgeries(value):
    """`value` changed in one place: each hostile value there, then each name for its key."""
    yield from HOSTILE
    for path in filter(None, places(value)):
        *owner, last = path
        for name, hostile in [*((last, h) for h in HOSTILE), *((n, DEEP) for n in NAMES)]:
            changed = copy.deepcopy(value)
            place = functools.reduce(operator.getitem, owner, changed)
            if name is last:
                place[last] = hostile
            elif isinstance(last, str):
                place[name] = place.pop(last)
            yield changed


def trimmed(value):
    """Two entries of every list that is long: what is read costs less, and its kinds stay."""
    if isinstance(value, dict):
        return {key: trimmed(entry) for key, entry in value.items()}
    return [trimmed(entry) for entry in value[:2]] if isinstance(value, list) else value


def forge(path, command, capsys, every):
    """Runs a command on each forgery of a file, or one in `every`; returns how many it refused.

    Each time it has to write what it writes, or to say in one sentence why it did not.
    """
    refused, before = 0, path.read_bytes()
    *others, last = read(path)
    for value in itertools.islice(forgeries(last), 0, None, every):
        write(path, [*others, value])
        code, error = command(), capsys.readouterr().err
        lines = error.splitlines()
        assert code in (0, 1) and len(error) < 1000, (path, error)
        assert all(line.startswith("jexit: ") for line in lines), (path, error)
        assert len(lines) == 1 if code else True, (path, error)
        refused += code
    path.write_bytes(before)
    return refused


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A training run, and an evaluation of it in its directory."""
    monkeypatch.setattr(os, "fsync", lambda _: None)
    directory = write_trained(tmp_path / "run", steps=2)
    (config,) = read(directory / "config.json")
    kept = ("command", "preset", "seed", "model", "exits", "task")
    write(directory / "config.json", [{key: config[key] for key in kept}])
    write(directory / "samples.jsonl", [trimmed(read(directory / "samples.jsonl")[-1])])
    evaluated = write_evaluated(directory / "eval")
    for name in ("eval.json", "completions.json"):
        write(evaluated / name, [trimmed(*read(evaluated / name))])
    return directory


@pytest.mark.parametrize("every", [61, pytest.param(1, marks=pytest.mark.slow)])
def test_a_forged_file_is_drawn_or_refused(run, every, capsys, recwarn):
    for directory, names in (
        (run / "eval", ("eval.json", "completions.json")),
        (run, ("config.json", "metrics.jsonl", "samples.jsonl", "after.json")),
    ):
        for name in names:
            command = functools.partial(report.main, [str(directory)])
            refused = forge(directory / name, command, capsys, every)
            assert (refused or name == "metrics.jsonl") and not recwarn.list, name


def test_a_forged_run_is_collected_or_refused(run, capsys):
    given = ["--config=a.py", f"--into={run.parent}", "--table_only"]
    assert sweep.main(given) == 0
    for name in ("eval/eval.json", "after.json"):
        assert forge(run / name, lambda: sweep.main(given), capsys, 61)


def test_the_largest_numbers_can_be_drawn(run):
    ends = ((0, LARGEST), (2**31 - 1, -LARGEST))
    rows = [{"step": s, "accuracy": v, "loss": v, "exit/1": abs(v)} for s, v in ends]
    write(run / "metrics.jsonl", rows)
    assert write_charts(read_run(run)) and report.main([str(run)]) == 0


def test_what_is_no_file_is_not_waited_for(run, deadline, capsys):
    for name in ("eval.json", "config.json", "metrics.jsonl", "starts.jsonl", "after.json"):
        kept = (run / name).read_bytes() if (run / name).exists() else None
        for make, remove, what in (
            (os.mkfifo, os.unlink, "a named pipe"), (os.mkdir, os.rmdir, "a directory"),
        ):  # fmt: skip
            (run / name).unlink(missing_ok=True)
            make(run / name)
            assert report.main([str(run)]) == 1
            error = capsys.readouterr().err
            assert f"{name} is {what}, not a file; " in error and error.count("\n") == 1
            remove(run / name)
        if kept is not None:
            (run / name).write_bytes(kept)
