"""Calibration targets and the exit loss against plain formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jexit.losses import sft
from jexit.model.exits import depth_log_prob, distribution_of_log_hazards, log_hazards


def test_target_hazards():
    kl = np.array([0.0, 1e-4, 0.1, 1.0, 5.0, 40.0])
    for sharpness in (0.5, 1.0, 3.0):
        leave, stay = sft.target_log_hazards(jnp.asarray(kl), sharpness)
        hazard = 2 / (1 + np.exp(sharpness * kl))  # 1 − tanh(k·kl/2), without its cancellation
        np.testing.assert_allclose(np.exp(np.float64(leave)), hazard, rtol=1e-5, atol=1e-30)
        np.testing.assert_allclose(np.exp(np.float64(stay)), 1 - hazard, rtol=1e-4, atol=1e-7)
    assert leave[0] == 0.0 and stay[0] == -np.inf  # certain where the exit agrees exactly
    assert np.isfinite(leave[-1]) and leave[-1] < -100  # no floor: log space keeps its slope


def test_drawn_depths_follow_the_law_and_exploration_is_uniform():
    kl = jnp.array([0.4, 2.0])
    leave, stay = sft.target_log_hazards(kl, 1.0)
    law = np.exp(np.asarray(distribution_of_log_hazards(leave, stay)))
    for explore in (0.0, 0.5, 1.0):
        drawn = sft.draw_exit_indices(
            jax.random.key(0), leave, stay, samples=40_000, explore=explore
        )
        share = np.bincount(np.asarray(drawn), minlength=3) / 40_000
        np.testing.assert_allclose(share, (1 - explore) * law + explore / 3, atol=0.01)


def test_expected_exit_loss_is_the_mean_of_the_sampled_one():
    z = jnp.array([0.3, -1.0, 0.8])
    leave, stay = sft.target_log_hazards(jnp.array([1.5, 0.7, 0.2]), 1.0)
    law = np.exp(np.asarray(distribution_of_log_hazards(leave, stay)))

    def losses(z):
        expected = [sft.expected_exit_loss(*log_hazards(z), leave, jnp.int32(e)) for e in range(4)]
        sampled = [-depth_log_prob(jnp.int32(d), z, (2, 4, 6), 8) for d in (2, 4, 6, 8)]
        return law @ jnp.stack(expected), law @ jnp.stack(sampled)

    expected, sampled = losses(z)
    assert float(expected) == pytest.approx(float(sampled), rel=1e-5)
    gradients = [jax.grad(lambda z, i=i: losses(z)[i])(z) for i in range(2)]
    np.testing.assert_allclose(*gradients, rtol=1e-5, atol=1e-6)


def test_the_best_hazard_is_a_half_where_leaving_costs_the_tolerance():
    """Over inputs that a head cannot tell apart the best hazard is μ/(μ + E[KL]), KL up to 2."""
    kl = jnp.array([0.001, 0.02, 0.3, 7.0])
    for tolerance, mean in ((0.05, (0.001 + 0.02 + 0.3 + 2.0) / 4), (0.58025, 0.58025)):

        def loss(z, tolerance=tolerance):
            return sft.leaving_cost(*log_hazards(z), kl, tolerance=tolerance).mean()

        hazard = tolerance / (tolerance + mean)
        best = jnp.log(hazard / (1 - hazard))
        assert abs(float(jax.grad(loss)(best))) < 1e-6
        assert all(float(loss(best + step)) > float(loss(best)) for step in (-0.1, 0.1))
    assert hazard == 0.5


def test_exits_beyond_the_own_one_do_not_count():
    leave, _ = sft.target_log_hazards(jnp.array([1.5, 0.7, 0.2]), 1.0)
    gradient = jax.grad(lambda z: sft.expected_exit_loss(*log_hazards(z), leave, jnp.int32(1)))(
        jnp.zeros(3)
    )
    assert gradient[2] == 0.0 and gradient[0] != 0.0 and gradient[1] != 0.0
