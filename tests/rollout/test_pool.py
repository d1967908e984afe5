"""The engine against the plain loop: the same tokens and depths, whatever the pool's size."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from plain_loop import Made, plain

from jexit.config import EngineSize
from jexit.kernels.dispatch import compiling_for
from jexit.model.policies import Full, Prescribed, Sample, Threshold
from jexit.rollout import Rollouts, engine, layout, rollout
from jexit.rollout.layout import fitted
from jexit.rollout.schedule import PATIENCE, Segments, choose, pick
from tolerances import LOGPROBS

LAYERS, PAD, COLUMNS = 5, 59, 14


def assert_same(made: Rollouts, plain: Made) -> None:
    np.testing.assert_array_equal(made.lengths_B, plain.lengths_B)
    np.testing.assert_array_equal(made.tokens_BT, plain.tokens_BT)
    np.testing.assert_array_equal(made.depths_BT, plain.depths_BT)
    np.testing.assert_allclose(made.logprobs_BT, plain.logprobs_BT, atol=LOGPROBS)
    np.testing.assert_allclose(made.depth_logprobs_BT, plain.depth_logprobs_BT, atol=LOGPROBS)
    if plain.hazard_logits_BTE is not None:
        np.testing.assert_allclose(
            made.hazard_logits_BTE, plain.hazard_logits_BTE, atol=LOGPROBS, equal_nan=True
        )


def ten_prompts() -> list[list[int]]:
    rng = np.random.default_rng(8)
    return [rng.integers(0, 60, length).tolist() for length in (3, 11, 6, 40, 1, 17, 2, 16, 9, 25)]


POLICIES = {
    "full": Full(),
    "sample": Sample(temperature=2.0, min_hazard=0.1),
    "threshold": Threshold(0.55),
    "prescribed": Prescribed(np.random.default_rng(1).integers(1, LAYERS + 1, (20, COLUMNS))),
}
ASKED = {
    "max_new_tokens": COLUMNS,
    "eos_ids": (60, 7, 12),
    "pad_id": PAD,
    "key": 4,
    "temperature": 0.9,
    "samples_per_prompt": 2,
}


@pytest.mark.parametrize("size", [(20, 4), (20, 20), (7, 3), (3, 3), (1, 1)])
@pytest.mark.parametrize("name", POLICIES)
def test_equals_the_plain_loop(model, name, size):
    """With as many rows as completions, with fewer, and with one."""
    asked = ASKED | {"policy": POLICIES[name], "top_p": 0.95, "hazards": name != "full"}
    wanted = plain(model, ten_prompts(), **asked)
    assert len(set(wanted.lengths_B.tolist())) > 4, "completions should end at different times"
    made = rollout(model, ten_prompts(), size=EngineSize(rows=size[0], places=size[1]), **asked)
    assert_same(made, wanted)
    assert made.efficiency.prefills == 10


@pytest.mark.parametrize("name", POLICIES)
def test_weights_that_stay_stacked_give_the_same(model, name, monkeypatch):
    """As on accelerators; on CPUs each layer's weights are arrays of their own."""
    asked = ASKED | {"policy": POLICIES[name], "size": EngineSize(rows=7, places=3)}
    apart = rollout(model, ten_prompts(), **asked)
    monkeypatch.setattr(engine, "on_cpu", lambda: False)
    stacked = rollout(model, ten_prompts(), **asked)
    np.testing.assert_array_equal(stacked.tokens_BT, apart.tokens_BT)
    np.testing.assert_array_equal(stacked.depths_BT, apart.depths_BT)
    np.testing.assert_allclose(stacked.logprobs_BT, apart.logprobs_BT, atol=LOGPROBS)


# One shape of everything, so that the examples share two programs.
@settings(max_examples=25)
@given(data=st.data())
def test_any_depths_and_ends(model, data):
    """Depths, prompts, sizes and end tokens at random: every token still comes out as it should."""
    lengths = data.draw(st.lists(st.integers(1, 16), min_size=8, max_size=8))
    seed = data.draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 60, length).tolist() for length in lengths]
    deepest = data.draw(st.integers(1, LAYERS))
    depths_BT = rng.integers(1, deepest + 1, (8, COLUMNS))
    eos_ids = data.draw(st.lists(st.integers(0, 60), min_size=3, max_size=3))
    size = data.draw(st.sampled_from([(8, 3), (5, 2), (8, 8)]))
    asked = {
        "policy": Prescribed(depths_BT),
        "max_new_tokens": COLUMNS,
        "eos_ids": eos_ids,
        "pad_id": PAD,
        "key": seed,
        # A draw at random may fall within rounding of the border between two tokens.
        "temperature": 0.0,
    }
    made = rollout(model, prompts, size=EngineSize(rows=size[0], places=size[1]), **asked)
    assert_same(made, plain(model, prompts, **asked))


@pytest.mark.parametrize("new", [9, 1])
def test_a_ring_of_prompts_smaller_than_the_list(model, monkeypatch, new):
    """Prompts are prefilled as others have begun, into their places."""
    monkeypatch.setitem(layout.PREFILL_TOKENS, "cpu", 64)  # groups of 4, of 2 and of 1
    asked = {
        "policy": Sample(),
        "max_new_tokens": new,
        "eos_ids": (60, 7),
        "pad_id": PAD,
        "key": 1,
        "samples_per_prompt": 3,
    }
    prompts = 3 * ten_prompts()
    made = rollout(model, prompts, size=EngineSize(rows=5, places=2), **asked)
    assert_same(made, plain(model, prompts, **asked))


def test_finished_rows_make_room_at_once(model):
    """Completions of many lengths over two rows: each takes the row that is free first."""
    prompts = [[5, token] for token in range(24)]
    asked = {"max_new_tokens": 40, "eos_ids": (60, 7, 12, 33), "pad_id": PAD, "key": 0}
    made = rollout(model, prompts, size=EngineSize(rows=2, places=2), **asked)
    assert made.lengths_B.min() < 4 and made.lengths_B.max() > 20
    busy = [0, 0]
    for length in made.lengths_B.tolist():
        # A tick a token, of which the prefill drew one; at least the tick that takes the row.
        busy[busy.index(min(busy))] += max(length - 1, 1)
    # And one for the last token of all, which nobody's next pass goes with.
    assert made.efficiency.ticks == max(busy) + 1


def at(segment_P, waits_P=None, since_P=None, tick=0, width=4, bounds=(0, 2, 4, 6), emission=3.0):
    segment_P = jnp.asarray(segment_P)
    waits_P = jnp.ones(segment_P.shape, bool) if waits_P is None else jnp.asarray(waits_P)
    since_P = jnp.zeros_like(segment_P) if since_P is None else jnp.asarray(since_P)
    return int(
        choose(Segments(bounds, emission), segment_P, waits_P, since_P, jnp.int32(tick), width)
    )


def test_the_least_waste_goes_first():
    assert at([0, 0, 0, 0, 1, 1, 2]) == 0, "the only one that fills the places"
    assert at([0, 0, 0, 0, 2, 2, 2, 2]) == 2, "the deepest of equals"
    assert at([0, 0, 0, 1, 1, 1]) == 1, "an emission costs more than two layers"
    assert at([0, 0, 0, 1, 1]) == 0, "5 · 1/3 is less than 2 · 2/2"
    assert at([0, 0, 0, 1, 1, 1, 1], waits_P=[1, 1, 1, 1, 0, 0, 0]) == 0


def test_nobody_waits_for_ever():
    """A single row against segments that always fill the places."""
    segment_P, since_P = [1, 0, 0, 0, 0], [0, 50, 50, 50, 50]
    assert at(segment_P, since_P=since_P, tick=3 * PATIENCE) == 0
    assert at(segment_P, since_P=since_P, tick=3 * PATIENCE + 1) == 1


def test_those_that_wait_longest_take_the_places():
    here_P = jnp.asarray([True, False, True, True, True])
    since_P = jnp.asarray([4, 0, 1, 9, 2])
    rows_B, here_B = pick(here_P, since_P, jnp.int32(10), 2)
    assert rows_B.tolist() == [2, 4] and here_B.all()
    rows_B, here_B = pick(here_P & (since_P < 3), since_P, jnp.int32(10), 3)
    assert sorted(np.asarray(rows_B)[np.asarray(here_B)].tolist()) == [2, 4]
    assert len(set(rows_B.tolist())) == 3
    assert pick(here_P, since_P, jnp.int32(10), 5)[0] is None


@pytest.mark.parametrize(
    ("size", "jobs", "expected"),
    [
        ((0, 0), 1000, (384, 128)),
        ((0, 0), 192, (192, 64)),
        ((0, 0), 20, (20, 16)),
        ((0, 0), 3, (3, 3)),
        ((90, 0), 99, (90, 30)),
        ((10, 4), 99, (10, 4)),
        ((0, 4), 99, (12, 4)),
        ((500, 100), 200, (200, 100)),
    ],
)
def test_sizes_fit_the_work(size, jobs, expected):
    assert fitted(EngineSize(rows=size[0], places=size[1]), jobs) == expected


def layout_of(lengths, samples=1):
    size = EngineSize(rows=8, places=4)
    return layout.Layout.of(np.asarray(lengths), samples, size, token_bytes=64, new=4)


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


@pytest.mark.parametrize(("shortest", "longest"), [(43, 70), (72, 272), (1, 600)])
def test_batches_of_all_sorts_share_few_programs(shortest, longest):
    """Of two hundred batches: three sizes a bucket of lengths, little padding, each prompt once."""
    rng = np.random.default_rng(0)
    programs, positions, tokens, buckets = set(), 0, 0, set()
    for _ in range(200):
        length_B = rng.integers(shortest, longest, 24)
        groups = layout_of(length_B, samples=8).groups
        assert list(groups) == np.cumsum([0, *(g.prompts for g in groups.values())])[:-1].tolist()
        assert sum(group.prompts for group in groups.values()) == 24
        for first, group in groups.items():
            assert 1 <= group.prompts <= group.rows
            assert np.sort(length_B)[first + group.prompts - 1] <= group.slots
        programs |= {(group.rows, group.slots) for group in groups.values()}
        buckets |= {group.slots for group in groups.values()}
        positions += sum(group.rows * group.slots for group in groups.values())
        tokens += int(length_B.sum())
    assert len(programs) <= 3 * len(buckets)
    assert 1 - tokens / positions < 0.16


@pytest.mark.parametrize("lengths", [(5, 60, 100), (100, 5, 60), (9, 300, 20, 500, 40)])
def test_shards_of_unequal_numbers_of_prompts_have_room_for_the_longest(lengths, monkeypatch):
    """The last shard has one less, and what is its longest may be longer than all others."""
    monkeypatch.setattr(layout, "data_shards", lambda: 2)
    made, seen = layout_of(lengths), []
    for first, group in made.groups.items():
        index_SB, length_SB = made.group(first)
        assert length_SB.max() <= group.slots
        seen += [(s, int(i)) for s, row in enumerate(index_SB) for i in row if i < made.prompts]
    half = made.most_prompts
    assert sorted(s * half + i for s, i in seen) == list(range(len(lengths)))
    jobs, work = made.job_B, made.work(first_prompt=7)
    assert work.number_J[jobs].tolist() == [7 + i for i in range(len(lengths))]
    assert work.prompt_length_J[jobs].tolist() == list(lengths)
    of_job = made.by_job(np.asarray(lengths))
    assert of_job[jobs].tolist() == list(lengths) and of_job.sum() == sum(lengths)


def test_sizes_that_programs_are_compiled_for_are_few():
    """Of up to 512 prompts and 4,096 new tokens; what is padded costs a tick no time."""
    prompts = {n: layout.prompts_bucket(n, 1) for n in range(1, 513)}
    assert sorted(set(prompts.values()))[:8] == [1, 2, 4, 8, 16, 20, 24, 28]
    assert len(set(prompts.values())) == 25
    assert all(n <= padded <= max(16, 1.25 * n) for n, padded in prompts.items())
    # Eight completions of a prompt: 16 fill the places that a tick has at least.
    assert [layout.prompts_bucket(n, 8) for n in (1, 2, 3, 5, 9, 24)] == [1, 2, 3, 5, 10, 24]
    columns = {n: layout.columns_bucket(n) for n in range(1, 4097)}
    assert len(set(columns.values())) == 16
    assert all(n <= padded <= max(128, n + 127, 1.25 * n) for n, padded in columns.items())


@pytest.mark.parametrize("seed", range(4))
def test_prompts_of_any_lengths_are_prefilled_once(model, seed, monkeypatch):
    monkeypatch.setitem(layout.PREFILL_TOKENS, "cpu", 48)
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 60, n).tolist() for n in rng.integers(1, 50, 17)]
    asked = {"max_new_tokens": 5, "eos_ids": (60, 7), "pad_id": PAD, "key": 0}
    asked |= {"temperature": 0.0, "policy": Threshold(0.55)}
    made = rollout(model, prompts, size=EngineSize(rows=3, places=2), **asked)
    assert_same(made, plain(model, prompts, **asked))
    assert made.efficiency.prefills == 17


def test_rows_fit_the_memory_of_a_chip():
    """Those left to the engine; of 1,319 completions on a GPU."""
    with compiling_for("gpu", "NVIDIA H100 80GB HBM3"):
        assert fitted(EngineSize(), 1319) == (1319, 440)
        rows, places = fitted(EngineSize(), 1319, 150 * 2**20)
        assert rows == places == int(0.3 * 79 * 1024 / 150) == 161
        assert fitted(EngineSize(rows=700), 1319, 150 * 2**20) == (700, 256)
    with compiling_for("gpu", "NVIDIA L4"):
        assert fitted(EngineSize(), 1319, 150 * 2**20)[0] == int(0.3 * 22 * 1024 / 150)
    with compiling_for("gpu", "a chip of tomorrow"):
        assert fitted(EngineSize(), 1319, 150 * 2**20)[0] == int(0.3 * 16 * 1024 / 150)
    with compiling_for("tpu", "TPU v5 lite"):
        assert fitted(EngineSize(), 1319, 2**40) == (1, 1)


def test_a_size_below_zero_is_refused():
    with pytest.raises(ValueError, match="rows is -1; it must be at least 0"):
        EngineSize(rows=-1)
