"""Which rows a tick takes, how large a pool is, and which prompts are prefilled together."""

import jax.numpy as jnp
import numpy as np
import pytest

from jexit.config import EngineSize
from jexit.kernels.dispatch import compiling_for
from jexit.model import cache
from jexit.rollout import scheduling
from jexit.rollout.scheduling import PATIENCE, Layout, Segments, choose, fitted, pick


def chosen(segment_P, waits_P=None, since_P=None, tick=0):
    """The segment of a tick of four rows; of three segments with two layers each."""
    segment_P = jnp.asarray(segment_P)
    waits_P = jnp.ones(segment_P.shape, bool) if waits_P is None else jnp.asarray(waits_P)
    since_P = jnp.zeros_like(segment_P) if since_P is None else jnp.asarray(since_P)
    segments = Segments(bounds=(0, 2, 4, 6), head=3.0)
    return int(choose(segments, segment_P, waits_P, since_P, jnp.int32(tick), 4))


def test_the_least_waste_goes_first_and_nobody_waits_for_ever():
    assert chosen([0, 0, 0, 0, 1, 1, 2]) == 0, "the only one that fills the tick"
    assert chosen([0, 0, 0, 0, 2, 2, 2, 2]) == 2, "the deepest of equals"
    assert chosen([0, 0, 0, 1, 1, 1]) == 1, "drawing a token costs more than two layers"
    assert chosen([0, 0, 0, 1, 1]) == 0, "5 · 1/3 is less than 2 · 2/2"
    assert chosen([0, 0, 0, 1, 1, 1, 1], waits_P=[1, 1, 1, 1, 0, 0, 0]) == 0
    # A single row against segments that always fill the tick.
    segment_P, since_P = [1, 0, 0, 0, 0], [0, 50, 50, 50, 50]
    assert chosen(segment_P, since_P=since_P, tick=3 * PATIENCE) == 0
    assert chosen(segment_P, since_P=since_P, tick=3 * PATIENCE + 1) == 1


def test_those_that_wait_longest_take_the_places():
    here_P = jnp.asarray([True, False, True, True, True])
    since_P = jnp.asarray([4, 0, 1, 9, 2])
    rows_B, here_B = pick(here_P, since_P, jnp.int32(10), 2)
    assert rows_B.tolist() == [2, 4] and here_B.all()
    rows_B, here_B = pick(here_P & (since_P < 3), since_P, jnp.int32(10), 3)
    assert sorted(np.asarray(rows_B)[np.asarray(here_B)].tolist()) == [2, 4]
    assert len(set(rows_B.tolist())) == 3
    assert pick(here_P, since_P, jnp.int32(10), 5)[0] is None


def test_sizes_fit_the_work_and_the_memory_of_a_chip():
    for (rows, tick_rows), jobs, expected in [
        ((0, 0), 1000, (384, 128)),
        ((0, 0), 192, (192, 64)),
        ((0, 0), 20, (20, 16)),
        ((0, 0), 3, (3, 3)),
        ((90, 0), 99, (90, 30)),
        ((10, 4), 99, (10, 4)),
        ((0, 4), 99, (12, 4)),
        ((500, 100), 200, (200, 100)),
    ]:
        assert fitted(EngineSize(rows=rows, tick_rows=tick_rows), jobs) == expected
    with compiling_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert fitted(EngineSize(), 1319) == (1319, 440)
        rows, tick_rows = fitted(EngineSize(), 1319, 150 * 2**20)
        assert rows == tick_rows == int(0.3 * 79 * 1024 / 150) == 161
        assert fitted(EngineSize(rows=700), 1319, 150 * 2**20) == (700, 256)
    with compiling_for("gpu", "a chip of tomorrow"):
        assert fitted(EngineSize(), 1319, 150 * 2**20)[0] == int(0.3 * 16 * 1024 / 150)
    with compiling_for("tpu", "TPU v5 lite"):
        assert fitted(EngineSize(), 1319, 2**40) == (1, 1)
    with pytest.raises(ValueError, match="rows is -1, but it must be at least 0"):
        EngineSize(rows=-1)


def layout_of(lengths, samples=1):
    size = EngineSize(rows=8, tick_rows=4)
    return Layout.of(np.asarray(lengths), samples, size, token_bytes=64, new=4)


def test_an_outlier_is_prefilled_apart():
    """63 prompts of 16 tokens and one of 600: as without it, and a prefill of its own."""

    def groups(lengths):
        made = layout_of(lengths).groups.values()
        return [(group.prompts, group.rows, group.slots) for group in made]

    assert groups([16] * 64) == [(32, 32, 16)] * 2
    assert groups([600, *[16] * 63]) == [(31, 32, 16), (32, 32, 16), (1, 1, 640)]
    # Ten of 60 tokens: eight fit a prefill, and a quarter of that is a size too.
    assert sorted(groups([60] * 10)) == [(2, 2, 64), (8, 8, 64)]
    # One of 33 tokens, which has 48 slots, joins those of 64 rather than have a call of its own.
    assert groups([33, *[60] * 7]) == [(8, 8, 64)]


def test_batches_of_all_sorts_share_few_programs():
    """Of many batches: three sizes a bucket of lengths, little padding, each prompt once."""
    for shortest, longest in ((43, 70), (72, 272), (1, 600)):
        rng = np.random.default_rng(0)
        programs, positions, tokens, buckets = set(), 0, 0, set()
        for _ in range(60):
            length_B = rng.integers(shortest, longest, 24)
            groups = layout_of(length_B, samples=8).groups
            counts = [group.prompts for group in groups.values()]
            assert list(groups) == np.cumsum([0, *counts])[:-1].tolist() and sum(counts) == 24
            for first, group in groups.items():
                assert 1 <= group.prompts <= group.rows
                assert np.sort(length_B)[first + group.prompts - 1] <= group.slots
            programs |= {(group.rows, group.slots) for group in groups.values()}
            buckets |= {group.slots for group in groups.values()}
            positions += sum(group.rows * group.slots for group in groups.values())
            tokens += int(length_B.sum())
        assert len(programs) <= 3 * len(buckets)
        assert 1 - tokens / positions < 0.16


def test_shards_of_unequal_numbers_of_prompts_have_room_for_the_longest(monkeypatch):
    """The last shard has one less, and what is its longest may be longer than all others."""
    monkeypatch.setattr(scheduling, "data_shards", lambda: 2)
    for lengths in ((5, 60, 100), (100, 5, 60), (9, 300, 20, 500, 40)):
        made, seen = layout_of(lengths), []
        for first, group in made.groups.items():
            index_ZB, length_ZB = made.group(first)
            assert length_ZB.max() <= group.slots
            seen += [(s, int(i)) for s, row in enumerate(index_ZB) for i in row if i < made.prompts]
        half = made.most_prompts
        assert sorted(s * half + i for s, i in seen) == list(range(len(lengths)))
        job_B, jobs = made.job_B, made.jobs_from(first_prompt=7)
        assert jobs.number_J[job_B].tolist() == [7 + i for i in range(len(lengths))]
        assert jobs.prompt_length_J[job_B].tolist() == list(lengths)
        of_job = made.by_job(np.asarray(lengths))
        assert of_job[job_B].tolist() == list(lengths) and of_job.sum() == sum(lengths)


def test_sizes_that_programs_are_compiled_for_are_few():
    """Of up to 512 prompts and 4,096 new tokens; what is padded costs a tick no time."""
    prompts = {n: scheduling.prompts_bucket(n, 1) for n in range(1, 513)}
    assert sorted(set(prompts.values()))[:8] == [1, 2, 4, 8, 16, 20, 24, 28]
    assert len(set(prompts.values())) == 25
    assert all(n <= padded <= max(16, 1.25 * n) for n, padded in prompts.items())
    # Eight completions of a prompt: 16 fill the rows that a tick has at least.
    assert [scheduling.prompts_bucket(n, 8) for n in (1, 2, 3, 5, 9, 24)] == [1, 2, 3, 5, 10, 24]
    columns = {n: scheduling.columns_bucket(n) for n in range(1, 4097)}
    assert len(set(columns.values())) == 16
    assert all(n <= padded <= max(128, n + 127, 1.25 * n) for n, padded in columns.items())
    for length in range(1, 3000):
        padded = cache.prompt_bucket(length)
        assert length <= padded <= max(length + 15, 1.25 * length)
        assert length <= cache.cache_bucket(length, 3000) <= max(128, 2 * length)
    assert len({cache.prompt_bucket(length) for length in range(1, 4097)}) < 32
    assert len({cache.cache_bucket(length, 3000) for length in range(1, 3001)}) <= 8
    assert cache.cache_bucket(100, 100) == 128 and cache.cache_bucket(200, 210) == 224
