"""Settings that hold for every test: eight CPU devices, where the real checkpoint lies."""

import os
import pathlib

import jax
import pytest

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Before JAX first looks for devices, and in this process only: commands that tests start see one.
jax.config.update("jax_num_cpu_devices", 8)


@pytest.fixture(scope="session")
def real_checkpoint() -> pathlib.Path:
    """A real Qwen2 or Qwen3 checkpoint in Hugging Face format, named by JEXIT_WEIGHTS."""
    path = os.environ.get("JEXIT_WEIGHTS", "")
    if not path:
        pytest.skip("JEXIT_WEIGHTS names no checkpoint directory")
    return pathlib.Path(path)
