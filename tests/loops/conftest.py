"""A random model directory that every loop can train in seconds."""

import pathlib

import pytest

from small_runs import saved_small_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> pathlib.Path:
    """A model directory with the shipped tokenizer and no adapters."""
    return saved_small_model(tmp_path_factory.mktemp("models") / "small")
