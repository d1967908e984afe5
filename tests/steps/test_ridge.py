"""The continuation's ridge fit against NumPy's least squares on the tokens themselves."""

import dataclasses

import jax
import numpy as np
import pytest

from jexit.model.policies import Full
from jexit.model.transformer import run
from jexit.steps.completions import pad_completions
from jexit.steps.ridge import STRENGTHS, Moments, Sums, factors, fit, make_sums_step, together

LAYERS, WIDTH = 3, 16


def batch_of(seed, rows=6):
    rng = np.random.default_rng(seed)
    prompts = [rng.integers(0, 11, size=n).tolist() for n in rng.integers(1, 6, rows)]
    completions = [rng.integers(0, 11, size=n).tolist() for n in rng.integers(2, 12, rows)]
    return pad_completions(prompts, completions, 0, (24, 16))


@pytest.fixture(scope="module")
def split(make_split):
    return make_split(continuation="linear")


@pytest.fixture(scope="module")
def tokens(split):
    return lambda batch: tokens_of(split, batch)


def tokens_of(split, batch):
    """(inputs, updates) [L, N, D] of every action position of a batch, by the teacher's layers."""
    seen = run(
        split.teacher(split.trainable),
        batch.tokens_BT,
        policy=Full(),
        valid_BT=batch.valid_BT,
        adapters=False,
        observe=lambda h_BTD, new_BTD, _: (h_BTD, new_BTD),
        observed=np.zeros(LAYERS),
    ).observed
    acts = np.asarray(batch.action_BC)
    x, y = (
        np.stack([np.asarray(batch.window(part))[acts] for part in side]).astype(np.float64)
        for side in seen
    )
    return x, y - x


def summed(split, *batches, beside=None):
    add = make_sums_step(split)
    sums = Sums.zero(LAYERS, WIDTH) if beside is None else beside.beside()
    for batch in batches:
        sums = add(sums, split.trainable, split.fixed, batch)
    return sums


def least_squares(x_ND, u_ND, strength):
    """Ridge regression as least squares with a row more for each dimension."""
    n, scale_D = len(x_ND), x_ND.std(0)
    left = np.concatenate([x_ND - x_ND.mean(0), np.diag(np.sqrt(strength * n) * scale_D)])
    right = np.concatenate([u_ND - u_ND.mean(0), np.zeros((WIDTH, WIDTH))])
    a_DD = np.linalg.lstsq(left, right, rcond=None)[0]
    return a_DD, u_ND.mean(0) - x_ND.mean(0) @ a_DD


@pytest.mark.parametrize("strength", [1e-3, 0.1, 10.0])
def test_ridge_is_least_squares_on_the_tokens(split, tokens, strength):
    batches = [batch_of(seed) for seed in range(3)]
    x_LND, u_LND = (np.concatenate(part, 1) for part in zip(*map(tokens, batches), strict=True))
    sums = jax.device_get(summed(split, *batches))
    assert int(sums.count) == x_LND.shape[1]
    for layer in range(LAYERS):
        moments = Moments.of(sums, layer)
        a_DD, b_D = moments.ridge(strength)
        truth_DD, truth_D = least_squares(x_LND[layer], u_LND[layer], strength)
        np.testing.assert_allclose(a_DD, truth_DD, atol=1e-3 * np.abs(truth_DD).max())
        np.testing.assert_allclose(b_D, truth_D, atol=1e-3 * np.abs(truth_D).max())
        error = np.square(u_LND[layer] - x_LND[layer] @ a_DD - b_D).mean(0)
        share = np.mean(error / u_LND[layer].var(0))
        assert moments.unexplained(a_DD, b_D) == pytest.approx(share, rel=1e-3)


def test_held_back_tokens_choose_the_strength(split, tokens):
    seen, held = batch_of(0, rows=8), batch_of(1, rows=8)
    sums = summed(split, seen)
    held_back = summed(split, held, beside=sums)
    found = fit(*jax.device_get((sums, held_back)))
    x_LND, u_LND = tokens(seen)
    other_LND, update_LND = tokens(held)
    for layer in range(LAYERS):

        def unexplained(strength, layer=layer):
            a_DD, b_D = least_squares(x_LND[layer], u_LND[layer], strength)
            error = np.square(update_LND[layer] - other_LND[layer] @ a_DD - b_D).mean(0)
            return np.mean(error / update_LND[layer].var(0))

        assert found.strength_L[layer] == min(STRENGTHS, key=unexplained)
        best = unexplained(found.strength_L[layer])
        assert found.unexplained_L[layer] == pytest.approx(best, rel=1e-3)
        both_x, both_u = (
            np.concatenate([one[layer], other[layer]])
            for one, other in ((x_LND, other_LND), (u_LND, update_LND))
        )
        truth_DD, _ = least_squares(both_x, both_u, found.strength_L[layer])
        np.testing.assert_allclose(found.a_LDD[layer], truth_DD, atol=2e-3 * np.abs(truth_DD).max())


def test_large_means_cost_no_precision(split):
    """Residuals with a mean of thousands in some dimensions, as real models have them."""
    embedding = split.fixed.frozen["embed"]["embedding"]
    far = split.fixed.frozen | {"embed": {"embedding": embedding.at[:, 3].add(3e3)}}
    split = split._replace(fixed=split.fixed._replace(frozen=far))
    batch = batch_of(0)
    x_LND, u_LND = tokens_of(split, batch)
    sums = jax.device_get(summed(split, batch, batch_of(1)))
    x_LND, u_LND = (
        np.concatenate(part, 1)
        for part in zip((x_LND, u_LND), tokens_of(split, batch_of(1)), strict=True)
    )
    for layer in range(LAYERS):
        moments = Moments.of(sums, layer)
        for found, truth in (
            (moments.xx_DD, np.cov(x_LND[layer].T, bias=True)),
            (moments.uu_D, u_LND[layer].var(0)),
            (moments.x_D, x_LND[layer].mean(0)),
        ):
            np.testing.assert_allclose(found, truth, atol=2e-3 * np.median(np.abs(truth)) + 1e-4)


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


def test_sums_add_up(split):
    one, other = batch_of(0), batch_of(1)
    first = summed(split, one)
    parts = jax.device_get((first, summed(split, other, beside=first)))
    whole = jax.device_get(summed(split, one, other))
    for field in dataclasses.fields(Sums):
        found, truth = getattr(together(*parts), field.name), getattr(whole, field.name)
        np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-3)
