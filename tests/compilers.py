"""Compilers for accelerators that this machine does not have, as launch/test.sh installs them."""

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest

import jexit

ROOT = pathlib.Path(jexit.__file__).parent.parent
LIBTPU = pathlib.Path(sys.prefix) / "aot/tpu/libtpu/libtpu.so"
CUDA = pathlib.Path(sys.prefix) / "aot/cuda"

needs_libtpu = pytest.mark.skipif(
    not LIBTPU.exists(), reason=f"libtpu is not in {LIBTPU.parent}; launch/test.sh puts it there"
)
needs_cuda_plugin = pytest.mark.skipif(
    not (CUDA / "jax_plugins").exists(),
    reason=f"JAX's CUDA plugin is not in {CUDA}; launch/test.sh puts it there",
)


def run_compiler(command: list[str], timeout: float = 900) -> list[Any]:
    """The JSON lines that a Python script prints in a process that has both compilers.

    The CUDA plugin clutters stderr where there is no GPU, so it shows only on failure.
    """
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "0",  # what is compiled is what is measured
        "TPU_LIBRARY_PATH": str(LIBTPU),
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(CUDA)]),
    }
    done = subprocess.run(
        [sys.executable, *command], env=env, cwd=ROOT, capture_output=True, text=True,
        timeout=timeout, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
