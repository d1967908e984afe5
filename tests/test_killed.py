"""A run that is killed at any moment and started again ends, to the bit, as if nothing happened."""

import json
import os
import pathlib
import random
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from small_runs import ROOT, metrics, parameters, saved_small_model, small_settings

pytestmark = pytest.mark.slow

FINISHED, INTERRUPTED = 0, 3
# A checkpoint after every second step: most moments of training are near one that is being written.
SETTINGS = {"steps": 12, "checkpoint__every": 2, "checkpoint__keep": 2}


def start(stage: str, source: pathlib.Path, workdir: pathlib.Path) -> subprocess.Popen:
    """Starts a stage from a model; what it prints is in a file beside `workdir`."""
    flags = [f"--config.{k}={value}" for k, value in small_settings(source, **SETTINGS).items()]
    command = [f"--config=configs/{stage}.py", f"--workdir={workdir}", *flags]
    with open(f"{workdir}.log", "a") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "jexit.main", *command],
            cwd=ROOT,
            env=os.environ | {"JAX_PLATFORMS": "cpu"},
            stdout=output,
            stderr=output,
        )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> dict[str, tuple[pathlib.Path, pathlib.Path, float]]:
    """Both stages, never interrupted: the model that each starts from, its workdir, its seconds."""
    directory = tmp_path_factory.mktemp("whole")
    source, stages = saved_small_model(directory / "model"), {}
    for stage in ("sft", "rl"):  # reinforcement takes up the model that calibration ended with
        began = time.monotonic()
        code = start(stage, source, directory / stage).wait(600)
        assert code == FINISHED, (directory / f"{stage}.log").read_text()
        stages[stage] = (source, directory / stage, time.monotonic() - began)
        source = directory / stage
    return stages


def moments(stage: str, number: signal.Signals, count: int) -> list:
    """Shares of a run's time, drawn at random, one from each of `count` equal stretches."""
    draw = random.Random(f"{stage} {number}")
    shares = [(index + draw.random()) / count for index in range(count)]
    return [
        pytest.param(stage, number, share, id=f"{stage}-{number.name}-at-{share:.2f}")
        for share in shares
    ]


TRIALS = [
    trial
    for number, count in ((signal.SIGKILL, 5), (signal.SIGTERM, 2))
    for stage in ("sft", "rl")
    for trial in moments(stage, number, count)
]


@pytest.mark.parametrize(("stage", "number", "moment"), TRIALS)
def test_killed_and_rerun(stage, number, moment, whole, tmp_path):
    (source, uninterrupted, seconds), workdir = whole[stage], tmp_path / stage
    process, log = start(stage, source, workdir), pathlib.Path(f"{workdir}.log")
    time.sleep(moment * seconds)
    process.send_signal(number)
    code = process.wait(120)
    # SIGTERM while nothing is trained yet ends the process as it would any other.
    allowed = {FINISHED, -number} | ({INTERRUPTED} if number == signal.SIGTERM else set())
    assert code in allowed, log.read_text()
    if code == INTERRUPTED:
        assert "stopped by SIGTERM after step" in log.read_text()
    assert start(stage, source, workdir).wait(600) == FINISHED, log.read_text()
    assert "Traceback" not in log.read_text()
    assert_same(workdir, uninterrupted)
    shutil.rmtree(workdir)


def assert_same(run: pathlib.Path, other: pathlib.Path) -> None:
    """Bit for bit the same log, model, samples and measurements."""
    assert metrics(run) == metrics(other)
    first, second = parameters(run), parameters(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        np.testing.assert_array_equal(second[name], value, err_msg=name)
    for name in ("before.json", "after.json"):
        ours, theirs = (json.loads((path / name).read_text()) for path in (run, other))
        ours.pop("tokens_per_second"), theirs.pop("tokens_per_second")
        assert ours == theirs
    for pattern in ("samples.jsonl", "teacher/*/*.jsonl"):
        ours, theirs = (
            sorted(line for file in path.rglob(pattern) for line in file.open())
            for path in (run, other)
        )
        assert ours == theirs
