"""A small model that every test here may evaluate."""

import pathlib

import pytest

from small_runs import saved_small_model


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory) -> pathlib.Path:
    return saved_small_model(tmp_path_factory.mktemp("model") / "small")
