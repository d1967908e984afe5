"""A disk that fills up, and the tokenizer that the tiny models use."""

import builtins
import errno
import io
import pathlib

import pytest

import jexit

TINY = pathlib.Path(jexit.__file__).parent / "assets" / "tiny"


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
