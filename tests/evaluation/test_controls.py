"""The two controls, on completions whose depths are known."""

import numpy as np

from jexit.evaluation.controls import compared, mean_depth, mixed, shuffled_depths
from jexit.tasks import Attempt, Verdict


def attempt(depths):
    return Attempt(ids=[], text="", depths=depths, truncated=False)


def stopped(exit, lengths):
    """Completions of these lengths that all leave at an exit of a model of 8 layers."""
    return [attempt([8, *[exit] * (n - 1)]) for n in lengths]


def deeper(made, deep):
    return sum(here is there for here, there in zip(made, deep, strict=True))


def test_a_mixture_of_two_exits_has_the_mean_asked_for_whatever_the_lengths():
    shallow, deep = stopped(2, [4] * 60), stopped(4, [4] * 60)
    assert (mean_depth(shallow), mean_depth(deep)) == (3.5, 5.0)
    made = mixed(shallow, deep, 4.5, seed=0)
    assert deeper(made, deep) == 40 and mean_depth(made) == 4.5
    assert all(m is s or m is d for m, s, d in zip(made, shallow, deep, strict=True))
    for mean, count in ((3.5, 0), (1.0, 0), (5.0, 60), (7.0, 60)):
        assert deeper(mixed(shallow, deep, mean, seed=0), deep) == count
    # Completions of a shallow exit ramble on, so that the first pass, which runs all layers, counts
    # less in them; and lengths differ between problems.
    rng = np.random.default_rng(0)
    shallow, deep = (stopped(exit, rng.integers(2, n, 200)) for exit, n in ((1, 50), (2, 12)))
    mean = (mean_depth(shallow) + mean_depth(deep)) / 2
    mixtures = [mixed(shallow, deep, mean, seed=seed) for seed in range(20)]
    # Half of what a completion of 50 tokens moves, of the 2,200 that half and half have.
    assert all(abs(mean_depth(made) - mean) < 0.5 * 53 / 2200 for made in mixtures)
    assert len({tuple(map(id, made)) for made in mixtures}) == 20  # seeds draw other problems
    assert mixed(shallow, deep, mean, seed=3) == mixtures[3]


def test_a_policy_and_its_control_are_paired_by_problem():
    """On the same problems alike: no interval is narrower than theirs."""
    rng = np.random.default_rng(0)
    judged = [
        Attempt(
            text="", ids=[0] * len(depths), depths=depths,
            verdict=Verdict(kind=kind, reward=0.0),
        )
        for depths, kind in (
            ([8, *rng.choice([1, 2, 4, 8], n).tolist()], ("strict", "wrong")[n % 2])
            for n in rng.integers(1, 12, 60)
        )
    ]  # fmt: skip
    order = rng.permutation(60)
    alike, apart = (
        compared("sample", "shuffled", judged, others, 8, 0)
        for others in (judged, [judged[place] for place in order])
    )
    for found in (alike, apart):
        assert (found.accuracy_difference, found.problems) == (0.0, 60)
        assert abs(found.depth_fraction_difference) < 1e-12
    for name in ("accuracy_difference_ci95", "depth_fraction_difference_ci95"):
        (low, high), (lower, higher) = getattr(alike, name), getattr(apart, name)
        assert high - low < 0.5 * (higher - lower), name


def test_shuffling_deals_out_the_same_depths():
    rng = np.random.default_rng(0)
    made = [attempt([8, *rng.choice([1, 2, 4, 8], n).tolist()]) for n in (5, 9, 2, 30)]
    deal_BT = shuffled_depths(made, 8, columns=40, seed=3)
    dealt = [deal_BT[row, 1 : len(c.depths)] for row, c in enumerate(made)]
    before = sorted(d for c in made for d in c.depths[1:])
    assert sorted(np.concatenate(dealt).tolist()) == before
    assert np.concatenate(dealt).tolist() != [d for c in made for d in c.depths[1:]]
    assert set(np.unique(deal_BT)) <= {1, 2, 4, 8}  # passes beyond draw from the same
    np.testing.assert_array_equal(deal_BT, shuffled_depths(made, 8, columns=40, seed=3))
