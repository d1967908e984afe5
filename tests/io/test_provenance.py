"""When a run was started, and by which jexit."""

import re

import pytest

import jexit
from jexit.io.provenance import STARTS_FILE, read_starts, record_start


def test_each_start_is_a_line_with_its_time_version_and_commit(tmp_path):
    assert read_starts(tmp_path) == ()
    record_start(tmp_path)
    record_start(tmp_path)  # the run goes on
    with (tmp_path / STARTS_FILE).open("a") as file:
        file.write('[1]\n{"time": 3}\n{"ti')
    first, second = read_starts(tmp_path)
    for start in (first, second):
        assert re.fullmatch(r"\d{4}-\d\d-\d\d \d\d:\d\d", start.time)
        assert start.version == jexit.__version__
        assert re.fullmatch(r"([0-9a-f]{7,}(-dirty)?)?", start.commit)
    assert first.time <= second.time


def test_a_place_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / STARTS_FILE).mkdir()
    with pytest.raises(ValueError, match=f"cannot write .*{STARTS_FILE}"):
        record_start(tmp_path)
