"""A random model directory that every loop can train in seconds."""

import pathlib

import pytest

from jexit.data.tokenizer import Tokenizer
from jexit.io.model_dir import save_model
from small_runs import small_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> pathlib.Path:
    """A model directory with the shipped tokenizer and no adapters."""
    tokenizer = Tokenizer.load("jexit/assets/tiny")
    path = tmp_path_factory.mktemp("models") / "small"
    save_model(path, small_model(tokenizer.vocab_size), tokenizer)
    return path
