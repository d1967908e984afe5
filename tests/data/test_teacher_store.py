"""Stored trajectories survive a kill at any byte, and writers share them."""

from jexit.data.teacher_store import TeacherStore, Trajectory

SETTINGS = {"model": "deadbeef", "temperature": 1.0}
BATCHES = [[Trajectory([1, 2], [3]), Trajectory([4], [5, 6])], [None, Trajectory([7], [8, 9])]]
ALL = [row for batch in BATCHES for row in batch if row is not None]


def done(store):
    return [store.holds(batch, 2) for batch in range(3)]


def filled(directory):
    store = TeacherStore(directory, SETTINGS)
    for number, batch in enumerate(BATCHES):
        store.append(number, [0, 1], batch)
    return store


def test_batches_come_back_in_order_under_their_own_settings(tmp_path):
    path = filled(tmp_path).path
    store = TeacherStore(tmp_path, SETTINGS)
    assert done(store) == [True, True, False]
    assert store.trajectories(2) == store.trajectories(3) == ALL
    assert store.trajectories(1) == BATCHES[0]
    other = TeacherStore(tmp_path, SETTINGS | {"temperature": 0.7})
    assert not any(done(other)) and len(list(tmp_path.iterdir())) == 2
    for content in (b"{}\n[]\n", b"not settings\n", b""):  # a strange header starts anew
        path.write_bytes(content)
        assert not any(done(TeacherStore(tmp_path, SETTINGS)))
        filled(tmp_path)
        assert TeacherStore(tmp_path, SETTINGS).trajectories(2) == ALL


def test_a_file_cut_at_any_byte_continues_from_its_whole_batches(tmp_path):
    path = filled(tmp_path).path
    data = path.read_bytes()
    for length in range(0, len(data), 5):
        path.write_bytes(data[:length])
        store = TeacherStore(tmp_path, SETTINGS)
        kept = max(data[:length].count(b"\n") - 1, 0)
        assert done(store) == [number < kept for number in range(3)]
        for number in range(kept, 2):
            store.append(number, [0, 1], BATCHES[number])
        assert path.read_bytes() == data


def test_a_damaged_byte_costs_its_batch_and_those_after_it(tmp_path):
    path = filled(tmp_path).path
    data = bytearray(path.read_bytes())
    start = data.index(b"\n") + 1
    for position in range(start, data.index(b"\n", start) + 1):
        damaged = data.copy()
        damaged[position] ^= 1
        path.write_bytes(damaged)
        assert not any(done(TeacherStore(tmp_path, SETTINGS)))


def test_several_writers_make_one_pool_and_one_continues_it(tmp_path):
    first, second = (TeacherStore(tmp_path, SETTINGS, writer=n) for n in (0, 1))
    for number, batch in enumerate(BATCHES):
        first.append(number, [1], batch[1:])
        second.append(number, [0], batch[:1])
    assert not any(done(first))
    first.read()
    assert done(first) == [True, True, False] and first.trajectories(2) == ALL

    damaged = second.path.read_bytes()[:-3]
    second.path.write_bytes(damaged)
    alone = TeacherStore(tmp_path, SETTINGS)
    assert done(alone) == [True, False, False]
    alone.append(1, [0], BATCHES[1][:1])
    assert alone.trajectories(2) == ALL
    assert second.path.read_bytes() == damaged  # another writer's file is only read
