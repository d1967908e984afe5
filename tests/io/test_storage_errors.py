"""A disk that refuses a write is one sentence, and nothing else is printed."""

import errno
import os
import resource
import subprocess
import sys

import pytest

import jexit
from jexit.io.storage_errors import reason, system_reason
from small_runs import ROOT, saved_small_model, small_settings

FULL = os.strerror(errno.ENOSPC)
SCRIPT = """
import pathlib, resource, sys
import numpy as np
from jexit.config import CheckpointConfig
from jexit.io import storage_errors
from jexit.io.array_store import ArrayStore
from jexit.io.checkpoint import Checkpoints

storage_errors.say_once()
directory, draw = pathlib.Path(sys.argv[1]), np.random.default_rng(0)
checkpoints = Checkpoints(directory, CheckpointConfig(every=1, keep=2))
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

def save():
    checkpoints.save(1, {f"a{n}": draw.normal(size=(30, 40)) for n in range(64)})
    checkpoints.wait()

for write in (save, lambda: ArrayStore(directory / "base").write("w", draw.normal(size=10_000))):
    try:
        write()
    except ValueError as error:
        print(error)
"""


def python(*arguments, **options):
    # JAX itself warns when its cache of programs cannot be written.
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "0"}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, **options
    )


def test_threads_do_not_repeat_what_is_raised(tmp_path):
    """A file that may not grow further is refused as on a full disk, in the library's threads."""
    done = python("-c", SCRIPT, tmp_path)
    assert done.returncode == 0 and done.stderr == ""
    for line, start in zip(
        done.stdout.splitlines(),
        (
            f"a checkpoint cannot be written to {tmp_path}/checkpoints (File too large); free some",
            f"the parameter w cannot be written to {tmp_path}/base (File too large); free some",
        ),
        strict=True,
    ):
        assert line.startswith(start)


def test_the_reason_is_the_systems_wherever_it_is_said():
    of_storage = ValueError(f"Error writing \"/x\": {FULL} [os_error_code='{errno.ENOSPC}'] [a=b]")
    raised = RuntimeError("the commit failed")
    raised.__cause__ = OSError(errno.ENOSPC, FULL)
    for error in (of_storage, raised, OSError(errno.ENOSPC, FULL)):
        assert system_reason(error) == reason(error) == FULL
    other = ValueError("arrays differ\nin shape")
    assert system_reason(other) is None and reason(other) == "arrays differ"
    assert reason(ValueError()) == "ValueError"


@pytest.mark.slow
def test_a_run_on_a_full_disk_is_one_sentence(tmp_path):
    settings = small_settings(saved_small_model(tmp_path / "small"), checkpoint__every=2)
    flags = [f"--config.{key}={value}" for key, value in settings.items()]
    for largest in (2_000, 6_000, 12_000, 20_000, 40_000):
        run = tmp_path / str(largest) / "run"
        done = python(
            *("-m", "jexit.main", "--config=configs/rl.py", *flags, f"--workdir={run}"),
            preexec_fn=lambda most=largest: resource.setrlimit(resource.RLIMIT_FSIZE, (most, most)),
        )
        *shown, said = done.stderr.splitlines()
        assert "File too large" in said
        if largest == 40_000:  # no file but the page and its charts is larger: the model is there
            assert done.returncode == 0 and "`python -m jexit.report " in said
            assert jexit.load(run / "model") and not (run / "report.html").exists()
            continue
        assert done.returncode == 1 and said.startswith("jexit: ")
        assert all(line.startswith("rl ") for line in shown), done.stderr  # the progress
        assert not (run / "model").exists()
