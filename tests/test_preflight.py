"""`--aot`: what it says about the tiny config's steps, and when it says no."""

import os
import subprocess
import sys

import aot
import pytest

from jexit.aot.preflight import collectives
from jexit.aot.topologies import get_topology


def run(code: str) -> subprocess.CompletedProcess:
    env = os.environ | {"JAX_PLATFORMS": "cpu", "TPU_LIBRARY_PATH": str(aot.LIBTPU)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, cwd=aot.ROOT, capture_output=True, text=True,
        timeout=900, check=False,
    )  # fmt: skip


MAIN = "import sys; from jexit import main; sys.argv = {argv!r}; sys.exit(main.main(sys.argv))"


@pytest.mark.tpu_aot
@aot.needs_libtpu
@pytest.mark.parametrize("config", ["sft", "rl"])
def test_every_step_of_a_stage_is_compiled(config):
    done = run(MAIN.format(argv=["jexit", f"--config=configs/{config}.py", "--aot=v5e:2x2"]))
    assert done.returncode == 0, done.stderr[-2000:]
    steps = {"sft": ["calibration step", "teacher prefill", "teacher decode"]}
    steps["rl"] = ["RL update", "rollout prefill", "rollout decode"]
    for step in steps[config]:
        assert step in done.stdout
    assert "fsdp 4" in done.stdout and "all-gather" in done.stdout


@pytest.mark.tpu_aot
@aot.needs_libtpu
def test_what_does_not_fit_is_refused_by_name():
    argv = ["jexit", "--config=configs/sft.py", "--aot=v5e:2x2"]
    small = "from jexit.aot import preflight; preflight.CAPACITY_GIB['v5e'] = 0.001; "
    done = run(small + MAIN.format(argv=argv))
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("jexit: ") and "GiB on v5e:2x2" in last
    assert "config.optim.accumulate" in last or "config.mesh" in last


def test_collectives_are_counted_with_their_bytes():
    text = """
  %a = bf16[4,8]{1,0} all-gather(bf16[1,8] %x), dimensions={0}
  %b = (f32[16]{0}, f32[2,2]{1,0}) all-reduce-start(f32[16] %y, f32[2,2] %z), channel_id=1
  %c = f32[16]{0} all-reduce(f32[16] %y), channel_id=2
  %d = f32[16]{0} add(f32[16] %y, f32[16] %y)
"""
    assert collectives(text) == {"all-gather": (1, 64), "all-reduce": (2, 144)}


@pytest.mark.parametrize("name", ["v9:2x2", "v5e:2x2x2", "h100", "h100:0", "v5p:4x4"])
def test_a_topology_that_is_not_known_is_one_sentence(name):
    with pytest.raises(ValueError, match="is not known; use one like"):
        get_topology(name)
