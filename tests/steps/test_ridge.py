"""The continuation's ridge fit against NumPy's least squares on the tokens themselves."""

import dataclasses
import math

import jax
import numpy as np
import pytest
from steps import toy

from jexit.model.policies import Full
from jexit.model.transformer import run
from jexit.steps.completions import pad_completions
from jexit.steps.ridge import (
    STRENGTHS,
    Chain,
    Moments,
    RidgeSums,
    factors,
    fit,
    make_sums_step,
    pairs,
    together,
)

LAYERS, EXITS, WIDTH = toy.LAYERS, toy.EXITS, 16


def batch_of(seed, rows=6):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 11, size=n).tolist() for n in rng.integers(1, 6, rows)]
    completions = [rng.integers(0, 11, size=n).tolist() for n in rng.integers(2, 12, rows)]
    return pad_completions(prompts, completions, 0, (24, 16))


SPLIT = toy.make_split(continuation="linear")


@jax.jit
def observed(trainable, frozen, batch):
    """Residuals [L, B, T, D] after every layer."""
    student = SPLIT.student(trainable, SPLIT.fixed._replace(frozen=frozen))
    return run(
        student,
        batch.tokens_BT,
        policy=Full(),
        **batch.layout,
        observe=lambda h_BTD, new_BTD, _: new_BTD,
    ).observed


def tokens(*batches, split=SPLIT):
    """Residuals [L, N, D] after every layer, of every action position, adapters and all."""
    found = []
    for batch in batches:
        seen = observed(split.trainable, split.fixed.frozen, batch)
        acts = np.asarray(batch.action_BC)
        found.append(np.stack([np.asarray(batch.window(part))[acts] for part in seen]))
    return np.concatenate(found, 1).astype(np.float64)


add = make_sums_step(SPLIT)


def summed(*batches, beside=None, split=SPLIT):
    sums = RidgeSums.zero(EXITS, LAYERS, WIDTH) if beside is None else beside.cleared()
    for batch in batches:
        sums = add(sums, split.trainable, split.fixed, batch)
    return sums


def close(found, truth, share=2e-3):
    """Within a share of the largest entry."""
    np.testing.assert_allclose(found, truth, atol=share * np.abs(truth).max())


def least_squares(x_ND, u_ND, strength):
    """Ridge regression as least squares with a row more for each dimension."""
    if math.isinf(strength):
        return np.zeros((x_ND.shape[1], u_ND.shape[1])), u_ND.mean(0)
    n, scale_D = len(x_ND), x_ND.std(0)
    left = np.concatenate([x_ND - x_ND.mean(0), np.diag(np.sqrt(strength * n) * scale_D)])
    right = np.concatenate([u_ND - u_ND.mean(0), np.zeros((x_ND.shape[1], u_ND.shape[1]))])
    a_DD = np.linalg.lstsq(left, right, rcond=None)[0]
    return a_DD, u_ND.mean(0) - x_ND.mean(0) @ a_DD


def chain_by_hand(h_LND, maps):
    """Inputs and updates [n, D] of each layer from the first exit on, the chain's states stacked.

    `maps` is given (layer, x, u) and returns the layer's (A, b).
    """
    chains, seen = [], {}
    for layer in range(EXITS[0], LAYERS):
        if layer in EXITS:
            chains.append(h_LND[layer - 1])
        x = np.concatenate(chains)
        u = np.concatenate([h_LND[layer]] * len(chains)) - x
        a_DD, b_D = maps(layer, x, u)
        seen[layer] = x, u
        chains = [h + h @ a_DD + b_D for h in chains]
    return seen


def share_left(x_ND, u_ND, a_DD, b_D):
    error = np.square(u_ND - x_ND @ a_DD - b_D).mean(0)
    return np.mean(error / u_ND.var(0))


@pytest.fixture(scope="module")
def parts():
    """Two batches, and the sums of each: those to fit on, those held back."""
    batches = batch_of(0, rows=8), batch_of(1, rows=8)
    sums = summed(batches[0])
    return *batches, *jax.device_get((sums, summed(batches[1], beside=sums)))


def test_held_back_tokens_choose_the_strength_of_what_is_fitted_on_all(parts):
    """Each map on what the ones before lead to; with a rank, factored ones."""
    seen, held, *sums = parts
    found, factored = (fit(*sums, EXITS, LAYERS, **rank) for rank in ({}, {"rank": 2}))
    chosen = dict(zip(range(EXITS[0], LAYERS), found.strength_L, strict=True))
    of_seen = {}

    def of_those_seen(layer, x_ND, u_ND):
        of_seen[layer] = least_squares(x_ND, u_ND, chosen[layer])
        return of_seen[layer]

    inputs = chain_by_hand(tokens(seen), of_those_seen)
    unseen = chain_by_hand(tokens(held), lambda layer, x, u: of_seen[layer])
    for index, layer in enumerate(chosen):

        def unexplained(strength, layer=layer):
            return share_left(*unseen[layer], *least_squares(*inputs[layer], strength))

        assert chosen[layer] == min(STRENGTHS, key=unexplained)
        assert found.unexplained_L[index] == pytest.approx(unexplained(chosen[layer]), rel=1e-3)

    def whole(layer, x_ND, u_ND):
        truth_DD, truth_D = least_squares(x_ND, u_ND, chosen[layer])
        close(found.maps[0][layer], truth_DD)
        close(found.b_LD[layer], truth_D)
        return truth_DD, truth_D

    def of_rank_two(layer, x_ND, u_ND):
        strength = factored.strength_L[layer - EXITS[0]]
        left, right = factors(least_squares(x_ND, u_ND, strength)[0], np.cov(x_ND.T, bias=True), 2)
        truth_DD = left @ right
        truth_D = u_ND.mean(0) - x_ND.mean(0) @ truth_DD
        close(factored.maps[0][layer] @ factored.maps[1][layer], truth_DD, 5e-3)
        close(factored.b_LD[layer], truth_D, 5e-3)
        return truth_DD, truth_D

    for compare in (whole, of_rank_two):
        chain_by_hand(tokens(seen, held), compare)
    assert not np.any(found.maps[0][: EXITS[0]])


def test_sums_add_up(parts):
    seen, held, *sums = parts
    whole, both = jax.device_get(summed(seen, held)), together(*sums)
    for field in dataclasses.fields(RidgeSums):
        found, truth = getattr(both, field.name), getattr(whole, field.name)
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-3)


def test_large_means_cost_no_precision():
    """Residuals with a mean of thousands in some dimensions, as real models have them."""
    embedding = SPLIT.fixed.frozen["embed"]["embedding"]
    far = SPLIT.fixed.frozen | {"embed": {"embedding": embedding.at[:, 3].add(3e3)}}
    split = SPLIT._replace(fixed=SPLIT.fixed._replace(frozen=far))
    batches = [batch_of(0), batch_of(1)]
    sums = jax.device_get(summed(*batches, split=split))
    h_LND = tokens(*batches, split=split)
    for pair, (exit_index, layer) in enumerate(pairs(EXITS, LAYERS)):
        moments = Chain(len(EXITS), WIDTH).moments(sums, exit_index, pair)
        x_ND = h_LND[EXITS[exit_index] - 1]
        u_ND = h_LND[layer] - x_ND
        for found, truth in (
            (moments.xx_DD, np.cov(x_ND.T, bias=True)),
            (moments.xu_DD, (x_ND - x_ND.mean(0)).T @ (u_ND - u_ND.mean(0)) / len(x_ND)),
            (moments.uu_D, u_ND.var(0)),
            (moments.x_D, x_ND.mean(0)),
        ):
            np.testing.assert_allclose(found, truth, atol=2e-3 * np.median(np.abs(truth)) + 1e-4)


def test_inputs_that_are_constant_or_say_nothing_have_no_map():
    """A dead dimension is none of a real fit's faults; without a relation no map is the best."""
    rng = np.random.default_rng(0)
    x_ND, u_ND = rng.normal(size=(300, 6)), rng.normal(size=(300, 5))
    x_ND[:, 2] = 1e3
    mean, cov = x_ND.mean(0), np.cov(x_ND.T, bias=True)
    cross_DD = (x_ND - mean).T @ (u_ND - u_ND.mean(0)) / len(x_ND)
    moments = Moments(mean, u_ND.mean(0), cov, cross_DD, u_ND.var(0))
    a_DD, b_D = moments.ridge(1e-4)
    assert np.isfinite(a_DD).all() and not a_DD[2].any()
    truth_DD, truth_D = least_squares(np.delete(x_ND, 2, 1), u_ND, 1e-4)
    close(np.delete(a_DD, 2, 0), truth_DD)
    np.testing.assert_allclose(b_D, truth_D, atol=1e-9)
    none_DD, mean_D = moments.ridge(math.inf)
    assert not none_DD.any() and moments.unexplained(none_DD, mean_D) == pytest.approx(1.0)
    left, right = factors(a_DD, cov, 2)
    assert np.isfinite(left).all() and np.isfinite(right).all()


def test_factors_are_the_best_of_their_rank():
    """No other product of that rank predicts better: against gradient-free perturbations, and the
    map itself at full rank."""
    rng = np.random.default_rng(0)
    x_ND = rng.normal(size=(400, 8)) @ rng.normal(size=(8, 8))
    cov_DD, a_DD = np.cov(x_ND.T, bias=True), rng.normal(size=(8, 8))

    def error(product_DD):
        return np.trace((product_DD - a_DD).T @ cov_DD @ (product_DD - a_DD))

    whole = factors(a_DD, cov_DD, 8)
    np.testing.assert_allclose(whole[0] @ whole[1], a_DD, atol=1e-8)
    left, right = factors(a_DD, cov_DD, 3)
    best = error(left @ right)
    u, s, v = np.linalg.svd(a_DD)
    assert best < error(u[:, :3] * s[:3] @ v[:3])  # the best without a look at the inputs
    for _ in range(50):
        other = (left + 0.05 * rng.normal(size=left.shape)) @ (
            right + 0.05 * rng.normal(size=right.shape)
        )
        assert best <= error(other) + 1e-9
