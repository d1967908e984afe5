"""What each halting policy decides, and with what probability."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.model.exits import depth_log_law
from jexit.model.policies import Full, Policy, Prescribed, Sample, Threshold, law_settings
from jexit.model.transformer import run

EXITS, LAYERS = (1, 2, 4), 5
DEPTHS = (*EXITS, LAYERS)
ROWS = 6000
run_jit = nnx.jit(run)


@pytest.fixture(scope="module")
def tokens_BT():
    return np.random.default_rng(0).integers(0, 31, (4, 11))


@pytest.fixture(scope="module")
def sampled_forward(model):
    """A compiled forward over many one-token rows; the policy's numbers do not recompile it."""
    tokens_BT = jnp.full((ROWS, 1), 7)

    def one_token(policy, key):
        return jexit.forward(model, tokens_BT, policy=policy, key=key)

    return one_token


def hazards_of(z, policy):
    sigmoid = 1.0 / (1.0 + np.exp(-np.asarray(z, np.float64) / policy.temperature))
    return policy.min_hazard + (1.0 - policy.min_hazard) * sigmoid


@pytest.mark.parametrize(
    "policy", [Full(), Prescribed(jnp.ones((2, 3), int)), Sample(0.5, 0.1), Threshold(0.3)]
)
def test_policies_are_data(policy):
    """A pytree that survives flattening, so that new numbers never recompile a step."""
    leaves, structure = jax.tree.flatten(policy)
    again = jax.tree.unflatten(structure, [2 * leaf for leaf in leaves])
    assert type(again) is type(policy) and isinstance(policy, Policy)
    for doubled, leaf in zip(jax.tree.leaves(again), leaves, strict=True):
        np.testing.assert_array_equal(doubled, 2 * leaf)
    assert len(leaves) == {Full: 0, Prescribed: 1, Sample: 2, Threshold: 1}[type(policy)]


def test_full_runs_every_layer(model, tokens_BT):
    out = jexit.forward(model, tokens_BT)
    np.testing.assert_array_equal(out.depth_BT, LAYERS)
    assert out.depth_BT.dtype == jnp.int32


def test_prescribed_is_obeyed_and_bounded_by_the_model(model, tokens_BT):
    depth_BT = np.random.default_rng(1).integers(1, LAYERS + 1, tokens_BT.shape)
    out = jexit.forward(model, tokens_BT, policy=Prescribed(depth_BT))
    np.testing.assert_array_equal(out.depth_BT, depth_BT)
    beyond_BT = np.where(depth_BT == LAYERS, 99, depth_BT)
    same = jexit.forward(model, tokens_BT, policy=Prescribed(beyond_BT))
    np.testing.assert_array_equal(same.depth_BT, depth_BT)
    np.testing.assert_array_equal(same.logits_BTV, out.logits_BTV)


def test_prescribed_of_another_shape_is_refused(model, tokens_BT):
    with pytest.raises(ValueError, match=r"shape \(4, 3\) for tokens of shape \(4, 11\)"):
        jexit.forward(model, tokens_BT, policy=Prescribed(jnp.ones((4, 3), int)))


def test_full_is_prescribing_every_layer(model, tokens_BT):
    full = jexit.forward(model, tokens_BT)
    everywhere = np.full(tokens_BT.shape, LAYERS)
    prescribed = jexit.forward(model, tokens_BT, policy=Prescribed(everywhere))
    np.testing.assert_allclose(prescribed.logits_BTV, full.logits_BTV, atol=1e-6)


def test_sample_needs_a_key(model, tokens_BT):
    with pytest.raises(ValueError, match="needs a PRNG key; pass key="):
        jexit.forward(model, tokens_BT, policy=Sample())


@pytest.mark.parametrize(
    "policy", [Sample(1.0, 0.0), Sample(0.4, 0.0), Sample(3.0, 0.0), Sample(1.0, 0.25)]
)
def test_sampled_depths_follow_the_law_that_scores_them(sampled_forward, policy):
    """χ² of 6,000 draws at one token, where every row has the same hazards."""
    out = sampled_forward(policy, jax.random.key(3))
    # Beyond the exit that it takes, a row's own hazard logits are those of its frozen residual.
    z_E = sampled_forward(Full(), None).hazard_logits_BTE[0, 0]
    law = np.exp(np.asarray(depth_log_law(z_E, **law_settings(policy)), np.float64))
    counts = np.asarray([(np.asarray(out.depth_BT) == depth).sum() for depth in DEPTHS])
    assert counts.sum() == ROWS
    chi_square = ((counts - ROWS * law) ** 2 / (ROWS * law)).sum()
    assert chi_square < 21.1  # 99.99 % of χ² with three degrees of freedom
    # The check has power: the plain law would not have explained draws of another policy.
    if (policy.temperature, policy.min_hazard) != (1.0, 0.0):
        plain = np.exp(np.asarray(depth_log_law(z_E), np.float64))
        assert ((counts - ROWS * plain) ** 2 / (ROWS * plain)).sum() > 100.0


def test_sampled_decisions_at_every_exit_follow_their_hazards(model):
    """Over whole sequences, where the hazards depend on who left before."""
    tokens_BT = np.random.default_rng(2).integers(0, 31, (600, 8))
    policy = Sample(0.8, 0.05)
    out = jexit.forward(model, tokens_BT, policy=policy, key=jax.random.key(0))
    depth_BT = np.asarray(out.depth_BT)
    assert set(np.unique(depth_BT)) == set(DEPTHS)
    hazard_BTE = hazards_of(out.hazard_logits_BTE, policy)
    for index, exit_layer in enumerate(EXITS):
        reached = depth_BT >= exit_layer
        p = hazard_BTE[..., index][reached]
        left = (depth_BT == exit_layer)[reached]
        score = (left - p).sum() / np.sqrt((p * (1.0 - p)).sum())
        assert abs(score) < 4.0
        # Who leaves goes with the token's own hazard, not with the mean.
        high = p > np.median(p)
        assert left[high].mean() > left[~high].mean() + 0.05


def test_sampled_draws_depend_on_the_key_alone(sampled_forward):
    first = np.asarray(sampled_forward(Sample(), jax.random.key(0)).depth_BT)
    other = np.asarray(sampled_forward(Sample(), jax.random.key(1)).depth_BT)
    again = np.asarray(sampled_forward(Sample(), jax.random.key(0)).depth_BT)
    np.testing.assert_array_equal(first, again)
    assert (first != other).mean() > 0.2


@pytest.mark.parametrize("hazard", [0.2, 0.45, 0.7])
def test_threshold_leaves_at_the_first_exit_whose_hazard_reaches_it(model, hazard):
    tokens_BT = np.random.default_rng(4).integers(0, 31, (30, 9))
    out = jexit.forward(model, tokens_BT, policy=Threshold(hazard))
    reaches_BTE = 1.0 / (1.0 + np.exp(-np.asarray(out.hazard_logits_BTE, np.float64))) > hazard
    first_BT = np.where(reaches_BTE.any(-1), reaches_BTE.argmax(-1), len(EXITS))
    np.testing.assert_array_equal(out.depth_BT, np.asarray(DEPTHS)[first_BT])
    assert len(np.unique(out.depth_BT)) > 1


def test_threshold_out_of_reach_is_full_depth_and_zero_is_the_first_exit(model, tokens_BT):
    np.testing.assert_array_equal(
        jexit.forward(model, tokens_BT, policy=Threshold(1.0)).depth_BT, LAYERS
    )
    np.testing.assert_array_equal(
        jexit.forward(model, tokens_BT, policy=Threshold(0.0)).depth_BT, EXITS[0]
    )


@pytest.mark.parametrize(
    "policy", [Threshold(0.0), Sample(1.0, 0.999), Prescribed(jnp.full((4, 11), 2))]
)
def test_deciding_on_the_way_equals_prescribing_the_depths_that_came_out(model, tokens_BT, policy):
    """One rule for freezing, `layer < depth`, whoever decided the depth."""
    decided = jexit.forward(model, tokens_BT, policy=policy, key=jax.random.key(5))
    prescribed = jexit.forward(model, tokens_BT, policy=Prescribed(decided.depth_BT))
    np.testing.assert_allclose(prescribed.logits_BTV, decided.logits_BTV, atol=1e-5)
    np.testing.assert_allclose(prescribed.hazard_logits_BTE, decided.hazard_logits_BTE, atol=1e-5)


@pytest.mark.parametrize(
    "policy", [Threshold(0.0), Sample(1.0, 0.999), Prescribed(jnp.full((4, 11), 2))]
)
def test_prompt_positions_never_leave(model, tokens_BT, policy):
    prompt_B = np.asarray([3, 11, 1, 7])
    action_BT = np.arange(11) >= prompt_B[:, None]

    def hidden(policy):
        return run_jit(
            model,
            jnp.asarray(tokens_BT),
            policy=policy,
            action_BT=jnp.asarray(action_BT),
            key=jax.random.key(0),
        )

    out, full = hidden(policy), hidden(Full())
    depth_BT = np.asarray(out.depth_BT)
    assert (depth_BT[~action_BT] == LAYERS).all()
    assert (depth_BT[action_BT] < LAYERS).mean() > 0.9
    # What the prompt computes does not depend on the policy at all.
    np.testing.assert_allclose(
        np.asarray(out.hidden_BTD)[~action_BT], np.asarray(full.hidden_BTD)[~action_BT], atol=1e-5
    )
