"""Stored trajectories survive a kill at any byte."""

import pytest

from jexit.data.teacher_store import TeacherStore, Trajectory

SETTINGS = {"model": "deadbeef", "temperature": 1.0}
BATCHES = [[Trajectory([1, 2], [3]), Trajectory([4], [5, 6])], [], [Trajectory([7], [8, 9])]]


def filled(directory):
    store = TeacherStore(directory, SETTINGS)
    for batch in BATCHES:
        store.append(batch)
    return store


def test_batches_come_back_in_order(tmp_path):
    filled(tmp_path)
    store = TeacherStore(tmp_path, SETTINGS)
    assert store.batches == 3
    assert store.trajectories == [row for batch in BATCHES for row in batch]


def test_other_settings_are_another_file(tmp_path):
    filled(tmp_path)
    other = TeacherStore(tmp_path, SETTINGS | {"temperature": 0.7})
    assert other.batches == 0 and len(list(tmp_path.iterdir())) == 2


def test_a_file_cut_at_any_byte_continues_from_its_whole_batches(tmp_path):
    path = filled(tmp_path / "whole").path
    data = path.read_bytes()
    for length in range(len(data)):
        cut = tmp_path / f"cut{length}"
        cut.mkdir()
        (cut / path.name).write_bytes(data[:length])
        store = TeacherStore(cut, SETTINGS)
        lines = data[:length].count(b"\n")
        assert store.batches == max(lines - 1, 0)
        for batch in BATCHES[store.batches :]:
            store.append(batch)
        assert store.path.read_bytes() == data


def test_a_damaged_byte_costs_its_batch_and_those_after_it(tmp_path):
    path = filled(tmp_path).path
    data = bytearray(path.read_bytes())
    start = data.index(b"\n") + 1
    second = data.index(b"\n", start) + 1
    for position in range(start, second):
        damaged = data.copy()
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert TeacherStore(tmp_path, SETTINGS).batches == 0


@pytest.mark.parametrize("content", [b"{}\n[]\n", b"not settings\n"])
def test_a_strange_header_starts_anew(tmp_path, content):
    path = filled(tmp_path).path
    path.write_bytes(content)
    assert TeacherStore(tmp_path, SETTINGS).batches == 0
