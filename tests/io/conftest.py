"""A disk that fills up, and small models that have been saved."""

import builtins
import errno
import io
import pathlib
import shutil

import pytest
from saved_models import HEAD, TOKENIZER, edit, is_trainable, make_model, parameters

from jexit.data.tokenizer import Tokenizer
from jexit.io.model_dir import save_model, write_model


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


class FullDisk(io.FileIO):
    """A file that takes `room` more bytes, then none, as a disk that is filling up does."""

    room = 0

    def write(self, data):
        if len(data) > self.room:
            taken, self.room = self.room, 0
            if not taken:
                no_space()
            return super().write(data[:taken])
        self.room -= len(data)
        return super().write(data)


@pytest.fixture
def full_disk(monkeypatch):
    """Call it with a number of bytes: files opened for writing from then on take no more."""
    real = io.open

    def fill(room: int) -> None:
        def open_full(file, mode="r", buffering=-1, encoding=None, *args, **kwargs):
            if not set(mode) & set("wax+"):
                return real(file, mode, buffering, encoding, *args, **kwargs)
            raw = FullDisk(file, mode.replace("b", "").replace("t", ""))
            raw.room = room
            if buffering == 0:
                return raw
            buffered = io.BufferedWriter(raw)
            return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding)

        monkeypatch.setattr(io, "open", open_full)
        monkeypatch.setattr(builtins, "open", open_full)

    return fill


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
    weights = {k: v for k, v in parameters(model).items() if not is_trainable(k)}
    (root / "base").mkdir()
    write_model(
        root / "base",
        model.arch,
        weights=weights.items(),
        adapters={},
        exits={},
        exit_layers=(),
        exit_head=HEAD,
        lora=None,
        tokenizer=tokenizer,
        source="org/small",
    )
    save_model(root / "whole", model, tokenizer)
    save_model(root / "refers", model, tokenizer, base=root / "base")
    edit(root / "refers", base="../base")  # so that copies refer to their own
    return root


@pytest.fixture
def models(saved_once, tmp_path):
    return pathlib.Path(shutil.copytree(saved_once, tmp_path / "models"))
