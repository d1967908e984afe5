"""A run that is killed at any moment and started again ends, to the bit, as if nothing happened."""

import dataclasses
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

from small_runs import metrics, parameters, saved_small_model, small_settings

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[1]
FINISHED, INTERRUPTED = 0, 3
STAGES = ("sft", "rl")
# A checkpoint after every second step: most moments of training are near one that is being written.
SETTINGS = {"steps": 12, "checkpoint__every": 2, "checkpoint__keep": 2}


@dataclasses.dataclass
class Whole:
    """Both stages, one after the other, never interrupted."""

    model_dir: pathlib.Path
    workdirs: dict[str, pathlib.Path]
    seconds: dict[str, float]

    def start(self, stage: str, workdir: pathlib.Path) -> subprocess.Popen:
        """Starts a stage; RL takes up the model that calibration ended with."""
        source = self.model_dir if stage == "sft" else self.workdirs["sft"]
        settings = small_settings(source, **SETTINGS)
        flags = [f"--config.{key}={value}" for key, value in settings.items()]
        command = [f"--config=configs/{stage}.py", f"--workdir={workdir}", *flags]
        workdir.parent.mkdir(exist_ok=True)
        with open(f"{workdir}.log", "a") as output:
            return subprocess.Popen(
                [sys.executable, "-m", "jexit.main", *command],
                cwd=ROOT,
                env=os.environ | {"JAX_PLATFORMS": "cpu"},
                stdout=output,
                stderr=output,
            )


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Whole:
    directory = tmp_path_factory.mktemp("whole")
    saved_small_model(directory / "model")
    whole = Whole(directory / "model", {s: directory / s for s in STAGES}, {})
    for stage in STAGES:
        began = time.monotonic()
        code = whole.start(stage, whole.workdirs[stage]).wait(600)
        assert code == FINISHED, pathlib.Path(f"{whole.workdirs[stage]}.log").read_text()
        whole.seconds[stage] = time.monotonic() - began
    return whole


def moments(stage: str, number: signal.Signals, count: int) -> list[float]:
    """Shares of a run's time, drawn at random, one from each of `count` equal stretches."""
    draw = random.Random(f"{stage} {number}")
    return [(index + draw.random()) / count for index in range(count)]


def trials(number: signal.Signals, count: int) -> list:
    return [
        pytest.param(stage, number, moment, id=f"{stage}-{number.name}-at-{moment:.2f}")
        for stage in STAGES
        for moment in moments(stage, number, count)
    ]


@pytest.mark.parametrize(
    ("stage", "number", "moment"), trials(signal.SIGKILL, 5) + trials(signal.SIGTERM, 2)
)
def test_killed_and_rerun(stage, number, moment, whole, tmp_path):
    workdir = tmp_path / stage
    process = whole.start(stage, workdir)
    time.sleep(moment * whole.seconds[stage])
    process.send_signal(number)
    code = process.wait(120)
    log = pathlib.Path(f"{workdir}.log")
    # SIGTERM while nothing is trained yet ends the process as it would any other.
    allowed = {FINISHED, -number} | ({INTERRUPTED} if number == signal.SIGTERM else set())
    assert code in allowed, log.read_text()
    if code == INTERRUPTED:
        assert "stopped by SIGTERM after step" in log.read_text()
    assert whole.start(stage, workdir).wait(600) == FINISHED, log.read_text()
    assert "Traceback" not in log.read_text()
    assert_same(workdir, whole.workdirs[stage])
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
    samples = [path / "samples.jsonl" for path in (run, other)]
    assert samples[0].exists() == samples[1].exists()
    if samples[0].exists():
        assert samples[0].read_text() == samples[1].read_text()
    caches = [
        sorted(line for file in path.rglob("teacher/*/*.jsonl") for line in file.open())
        for path in (run, other)
    ]
    assert caches[0] == caches[1]
