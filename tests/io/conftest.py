"""A disk that is full, and small models that have been saved."""

import contextlib
import pathlib
import resource
import shutil

import pytest
from saved_models import TOKENIZER, edit, make_model

from jexit.data.tokenizer import Tokenizer
from jexit.io.model_dir import save_model


@pytest.fixture
def full_disk():
    """`full_disk(room)`: within it no file grows beyond so many bytes, whoever writes it."""

    @contextlib.contextmanager
    def limited(room):
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))
        try:
            yield
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))

    return limited


@pytest.fixture(scope="session")
def tokenizer():
    return Tokenizer.load(TOKENIZER)


@pytest.fixture(scope="session")
def model(tokenizer):
    return make_model(tokenizer.vocab_size)


@pytest.fixture(scope="session")
def saved_once(tmp_path_factory, model, tokenizer):
    """`base` (weights only), `whole` (everything) and `refers` (to `base`)."""
    root = tmp_path_factory.mktemp("models")
    save_model(root / "whole", model, tokenizer)
    parts = shutil.ignore_patterns("adapters", "exits")
    shutil.copytree(root / "whole", root / "base", ignore=parts)
    edit(root / "base", exit_layers=[], exit_head=None, lora=None, source="org/small")
    save_model(root / "refers", model, tokenizer, base=root / "base")
    edit(root / "refers", base="../base")  # so that copies refer to their own
    return root


@pytest.fixture
def models(saved_once, tmp_path):
    return pathlib.Path(shutil.copytree(saved_once, tmp_path / "models"))
