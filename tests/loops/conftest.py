"""A random model directory that every loop can train in seconds, and programs compiled once."""

import pathlib
from collections.abc import Iterator

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache

from small_runs import saved_small_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> pathlib.Path:
    """A model directory with the shipped tokenizer and no adapters."""
    return saved_small_model(tmp_path_factory.mktemp("models") / "small")


@pytest.fixture(scope="session")
def program_dir(tmp_path_factory) -> pathlib.Path:
    return tmp_path_factory.mktemp("programs")


@pytest.fixture(scope="module", autouse=True)
def _programs_kept(program_dir) -> Iterator[None]:
    """Every run makes its steps anew: what XLA has compiled for one serves those like it."""
    settings = {
        "jax_compilation_cache_dir": str(program_dir),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    _configure(settings)
    yield
    _configure(before)


def _configure(settings: dict) -> None:
    for name, value in settings.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()
