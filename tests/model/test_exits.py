"""The depth law against enumeration of every leave/stay sequence; the exit heads by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jexit.config import ExitSettings
from jexit.model.exits import (
    ExitHeads,
    depth_log_distribution,
    depth_log_prob,
    depth_of_exit_index,
    distribution_of_log_hazards,
    exit_index_of_depth,
)
from tolerances import GRADIENT, relative_error

EXIT_LAYERS, LAYERS = (2, 3, 7), 9
LAWS = [(1.0, 0.0), (0.5, 0.0), (2.0, 0.0), (1.0, 0.1), (1.7, 0.3)]


def hazards_of(z_E, temperature, min_hazard):
    """Hazards in float64: min + (1 − min)·σ(z / temperature)."""
    return min_hazard + (1 - min_hazard) / (1 + np.exp(-np.asarray(z_E, np.float64) / temperature))


def enumerated(hazard_E):
    """P(exit e) and P(never): every sequence of leave/stay decisions, summed by first leave."""
    exits = len(hazard_E)
    law = np.zeros(exits + 1)
    for decisions in itertools.product((False, True), repeat=exits):
        probability = np.prod(
            [h if leave else 1 - h for h, leave in zip(hazard_E, decisions, strict=True)]
        )
        law[decisions.index(True) if any(decisions) else exits] += probability
    return law


def test_law_is_the_sum_over_every_leave_stay_sequence():
    law_of = jax.jit(
        lambda z, law: depth_log_distribution(z, temperature=law[0], min_hazard=law[1])
    )
    for law in LAWS:
        for exits in (1, 2, 5):
            z_AE = np.random.default_rng(exits).normal(0.0, 2.0, (6, exits))
            truth = [enumerated(hazards_of(z_E, *law)) for z_E in z_AE]
            found = np.exp(law_of(jnp.asarray(z_AE), law))
            np.testing.assert_allclose(found, truth, rtol=2e-5, atol=1e-7)


@settings(max_examples=100)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4),
    st.sampled_from(LAWS),
)
def test_law_sums_to_one_and_is_finite_whatever_the_logits(z_E, law):
    log_law = np.asarray(
        depth_log_distribution(jnp.asarray(z_E), temperature=law[0], min_hazard=law[1])
    )
    assert np.isfinite(log_law).all() and (log_law <= 0).all()
    assert np.exp(log_law.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)


def test_extreme_logits_keep_their_exact_log_probabilities():
    """No epsilon: the log-probability of an all but impossible exit is its logit."""
    law = depth_log_distribution(jnp.asarray([[-200.0, 300.0, -1e30], [1e30, 0.0, 0.0]]))
    np.testing.assert_allclose(law[0], [-200.0, 0.0, -300.0 - 1e30, -300.0], rtol=1e-6)
    np.testing.assert_allclose(law[1], [0.0, -1e30, -1e30, -1e30], rtol=1e-6)


def log_prob(z_E, depth, temperature=1.0, min_hazard=0.0):
    return depth_log_prob(
        depth, z_E, EXIT_LAYERS, LAYERS, temperature=temperature, min_hazard=min_hazard
    )


def test_gradient_is_finite_at_extreme_logits_and_right_at_ordinary_ones():
    z_E = np.asarray([0.3, -1.2, 0.8])
    extreme_AE = jnp.asarray([[1e4, -1e4, 80.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], z_E])
    gradient = jax.jit(jax.vmap(jax.grad(log_prob), (0, None, None, None)))
    for law in LAWS:
        for index, depth in enumerate((*EXIT_LAYERS, LAYERS)):
            found_AE = gradient(extreme_AE, jnp.asarray(depth), *law)
            assert jnp.isfinite(found_AE).all()
            truth = []
            for step in 1e-5 * np.eye(3):
                up, down = (
                    np.log(enumerated(hazards_of(z_E + sign * step, *law))[index])
                    for sign in (1, -1)
                )
                truth.append((up - down) / 2e-5)
            assert relative_error(found_AE[-1], truth) <= GRADIENT
    # log σ(−z) of a stay that was all but impossible has slope −1, where log(p + ε) has none.
    slope = jax.grad(lambda z: depth_log_prob(jnp.asarray(9), z, (2,), 9))(jnp.asarray([60.0]))
    np.testing.assert_allclose(slope, [-1.0])


def test_depths_and_exit_indices_are_inverse():
    index_AB = np.asarray([[0, 1, 2, 3], [3, 3, 0, 1]])
    depth_AB = np.asarray([*EXIT_LAYERS, LAYERS])[index_AB]
    np.testing.assert_array_equal(exit_index_of_depth(depth_AB, EXIT_LAYERS, LAYERS), index_AB)
    np.testing.assert_array_equal(depth_of_exit_index(index_AB, EXIT_LAYERS, LAYERS), depth_AB)


def test_law_of_target_hazards_that_are_no_logits():
    """A target hazard of exactly 1 (an exit as good as the end) leaves nothing for later exits."""
    hazard_E = np.asarray([0.25, 1.0, 0.5])
    with np.errstate(divide="ignore"):
        law = distribution_of_log_hazards(jnp.log(hazard_E), jnp.asarray(np.log(1 - hazard_E)))
    np.testing.assert_allclose(np.exp(law), enumerated(hazard_E), atol=1e-7)


def head_by_hand(parameters, index, h, eps):
    """z = w2 · relu(W1 · norm(h) + b1) + b2 in float64, its parts left out where they are None."""
    scale, w1, b1, w2, b2 = (None if p is None else p[index] for p in parameters)
    x = np.asarray(h, np.float64)
    if scale is not None:
        x = x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * scale
    if w1 is not None:
        x = np.maximum(x @ w1 + b1, 0.0)
    return x @ w2 + b2


def test_head_is_the_formula_in_float32():
    """Whatever the residual's dtype."""
    for kind, norm in (("mlp", "rms"), ("linear", "none")):
        settings = ExitSettings(kind=kind, norm=norm, bias=-2.0)
        heads = ExitHeads(3, 8, settings, eps=1e-3, rngs=nnx.Rngs(0))
        rng = np.random.default_rng(0)
        graphdef, state = nnx.split(heads)
        state = jax.tree.map(
            lambda leaf, rng=rng: leaf + rng.normal(0.0, 0.5, leaf.shape).astype(np.float32), state
        )
        heads = nnx.merge(graphdef, state)
        h = jnp.asarray(rng.normal(0.0, 2.0, (4, 5, 8)), jnp.bfloat16)
        parameters = [
            None if part is None else np.asarray(part[...], np.float64)
            for part in (heads.scale, heads.w1, heads.b1, heads.w2, heads.b2)
        ]
        for index in range(3):
            z, truth = heads(h, index), head_by_hand(parameters, index, h, 1e-3)
            assert z.dtype == jnp.float32
            np.testing.assert_allclose(z, truth, rtol=2e-5, atol=2e-5)


def test_fresh_head_almost_never_leaves():
    heads = ExitHeads(2, 16, rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(0), (500, 16)) * 10.0
    for index in range(2):
        hazard = jax.nn.sigmoid(heads(h, jnp.asarray(index)))
        assert 0.005 < float(hazard.mean()) < 0.03 and float(hazard.max()) < 0.06
