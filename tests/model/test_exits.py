"""The depth law against enumeration of every leave/stay sequence; the exit heads by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from jexit.model.exits import (
    ExitHeads,
    depth_log_law,
    depth_log_prob,
    depth_of_exit_index,
    exit_index_of_depth,
    law_of_log_hazards,
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
    for temperature, min_hazard in LAWS:
        for exits in [1, 2, 5]:
            z_AE = np.random.default_rng(exits).normal(0.0, 2.0, (6, exits))
            law = depth_log_law(jnp.asarray(z_AE), temperature=temperature, min_hazard=min_hazard)
            truth = [enumerated(hazards_of(z_E, temperature, min_hazard)) for z_E in z_AE]
            np.testing.assert_allclose(np.exp(law), truth, rtol=2e-5, atol=1e-7)


@settings(max_examples=100)
@given(
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=4, max_size=4),
    st.sampled_from(LAWS),
)
def test_law_sums_to_one_and_is_finite_whatever_the_logits(z_E, law):
    log_law = np.asarray(depth_log_law(jnp.asarray(z_E), temperature=law[0], min_hazard=law[1]))
    assert np.isfinite(log_law).all() and (log_law <= 0).all()
    assert np.exp(log_law.astype(np.float64)).sum() == pytest.approx(1.0, abs=1e-5)


def test_extreme_logits_keep_their_exact_log_probabilities():
    """No epsilon: the log-probability of an all but impossible exit is its logit."""
    law = depth_log_law(jnp.asarray([[-200.0, 300.0, -1e30], [1e30, 0.0, 0.0]]))
    np.testing.assert_allclose(law[0], [-200.0, 0.0, -300.0 - 1e30, -300.0], rtol=1e-6)
    np.testing.assert_allclose(law[1], [0.0, -1e30, -1e30, -1e30], rtol=1e-6)


@pytest.mark.parametrize(("temperature", "min_hazard"), LAWS)
def test_gradient_is_finite_at_extreme_logits_and_right_at_ordinary_ones(temperature, min_hazard):
    def log_prob(z_E, depth):
        return depth_log_prob(
            depth, z_E, EXIT_LAYERS, LAYERS, temperature=temperature, min_hazard=min_hazard
        )

    gradient = jax.vmap(jax.grad(log_prob), (0, None))
    extreme_AE = jnp.asarray([[1e4, -1e4, 80.0], [-1e4, -1e4, -1e4], [1e4, 1e4, 1e4], [0.0] * 3])
    for depth in (*EXIT_LAYERS, LAYERS):
        assert jnp.isfinite(gradient(extreme_AE, jnp.asarray(depth))).all()

    z_E = np.asarray([0.3, -1.2, 0.8])
    for index, depth in enumerate((*EXIT_LAYERS, LAYERS)):
        truth = []
        for step in 1e-5 * np.eye(3):
            up, down = (
                np.log(enumerated(hazards_of(z_E + sign * step, temperature, min_hazard))[index])
                for sign in (1, -1)
            )
            truth.append((up - down) / 2e-5)
        found = gradient(jnp.asarray(z_E)[None], jnp.asarray(depth))[0]
        assert relative_error(found, truth) <= GRADIENT


def test_hazard_near_one_still_passes_a_gradient():
    """log σ(−z) of a stay that was all but impossible has slope −1, where log(p + ε) has none."""
    slope = jax.grad(lambda z: depth_log_prob(jnp.asarray(9), z, (2,), 9))(jnp.asarray([60.0]))
    np.testing.assert_allclose(slope, [-1.0])


def test_depths_and_exit_indices_are_each_others_inverse():
    depth_A = jnp.asarray([2, 3, 7, 9])
    np.testing.assert_array_equal(exit_index_of_depth(depth_A, EXIT_LAYERS, LAYERS), range(4))
    index_A = jnp.arange(4)
    np.testing.assert_array_equal(depth_of_exit_index(index_A, EXIT_LAYERS, LAYERS), depth_A)


def test_log_prob_picks_the_depths_entry_of_the_law():
    z_ABE = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 3)))
    depth_AB = jnp.asarray([[2, 3, 7, 9], [9, 9, 2, 3]])
    law_ABE1 = np.asarray(depth_log_law(z_ABE, temperature=0.7, min_hazard=0.05))
    truth = np.take_along_axis(law_ABE1, np.asarray([[0, 1, 2, 3], [3, 3, 0, 1]])[..., None], -1)
    found = depth_log_prob(depth_AB, z_ABE, EXIT_LAYERS, LAYERS, temperature=0.7, min_hazard=0.05)
    np.testing.assert_array_equal(found, truth[..., 0])


def test_law_of_target_hazards_that_are_no_logits():
    """A target hazard of exactly 1 (an exit as good as the end) leaves nothing for later exits."""
    hazard_E = np.asarray([0.25, 1.0, 0.5])
    with np.errstate(divide="ignore"):
        law = law_of_log_hazards(jnp.log(hazard_E), jnp.asarray(np.log(1 - hazard_E)))
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


@pytest.mark.parametrize("norm", ["rms", "none"])
@pytest.mark.parametrize("kind", ["mlp", "linear"])
def test_head_and_its_gradient_are_the_formula_in_float32(kind, norm):
    """Whatever the residual's dtype; the gradient against central differences in float64."""
    heads = ExitHeads(3, 8, kind=kind, norm=norm, bias=-2.0, eps=1e-3, rngs=nnx.Rngs(0))
    rng = np.random.default_rng(0)
    graphdef, state = nnx.split(heads)
    state = jax.tree.map(lambda leaf: leaf + rng.normal(0.0, 0.5, leaf.shape), state)
    heads = nnx.merge(graphdef, jax.tree.map(lambda leaf: leaf.astype(jnp.float32), state))
    h = jnp.asarray(rng.normal(0.0, 2.0, (4, 5, 8)), jnp.bfloat16)
    names = ("scale", "w1", "b1", "w2", "b2")
    parameters = [
        None if getattr(heads, name) is None else np.asarray(getattr(heads, name)[...], np.float64)
        for name in names
    ]

    @jax.jit
    def of_index(state, index):
        def total(state):
            z = nnx.merge(graphdef, state)(h, index)
            return z.sum(), z

        return jax.value_and_grad(total, has_aux=True)(state)

    for index in range(3):
        (_, z), gradient = of_index(nnx.state(heads), index)
        assert z.dtype == jnp.float32
        np.testing.assert_allclose(
            z, head_by_hand(parameters, index, h, 1e-3), rtol=2e-5, atol=2e-5
        )
        for place, name in enumerate(names):
            if parameters[place] is None:
                continue
            step = np.zeros(parameters[place].shape)
            step[index] = rng.normal(size=step[index].shape)
            up, down = (
                head_by_hand(
                    [p if i != place else p + sign * 1e-6 * step for i, p in enumerate(parameters)],
                    index,
                    h,
                    1e-3,
                ).sum()
                for sign in (1, -1)
            )
            found = float(np.vdot(gradient[name][...], step))
            assert found == pytest.approx((up - down) / 2e-6, rel=GRADIENT, abs=1e-4), name


def test_fresh_head_almost_never_leaves():
    heads = ExitHeads(2, 16, rngs=nnx.Rngs(0))
    h = jax.random.normal(jax.random.key(0), (500, 16)) * 10.0
    for index in range(2):
        hazard = jax.nn.sigmoid(heads(h, jnp.asarray(index)))
        assert 0.005 < float(hazard.mean()) < 0.03 and float(hazard.max()) < 0.06
