"""What each halting policy decides, and with what probability."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.model.exits import depth_log_distribution
from jexit.model.policies import (
    Fixed,
    Full,
    Mixed,
    Policy,
    Prescribed,
    Sample,
    Threshold,
    policy_of,
)
from jexit.model.transformer import run

EXITS, LAYERS = (1, 2, 4), 5
DEPTHS = (*EXITS, LAYERS)
ROWS = 6000
run_jit = nnx.jit(run)


@pytest.fixture(scope="module")
def tokens_BT():
    return np.random.default_rng(0).integers(0, 31, (4, 11))


def test_policies_are_data():
    """A pytree that survives flattening, so that new numbers never recompile a step."""
    for policy, leaves in (
        (Full(), 0),
        (Fixed(2), 1),
        (Prescribed([[1, 2, 4]]), 1),
        (Sample(0.5, 0.1), 2),
        (Threshold(0.3), 1),
        (Mixed.of([Full(), Fixed(2), Sample(), Threshold(0.2)]), 5),
    ):
        values, structure = jax.tree.flatten(policy)
        again = jax.tree.unflatten(structure, [2 * value for value in values])
        assert type(again) is type(policy) and isinstance(policy, Policy) and len(values) == leaves
        for doubled, value in zip(jax.tree.leaves(again), values, strict=True):
            np.testing.assert_array_equal(doubled, 2 * value)


def test_names_are_read_back():
    for name in ("full", "sample", "threshold:0.25", "fixed:6"):
        assert policy_of(name).name == name
    assert policy_of("fixed:6") == Fixed(6) and policy_of("threshold:0.25") == Threshold(0.25)
    assert policy_of("sample", Sample(2.0, 0.1)) == Sample(2.0, 0.1)
    with pytest.raises(ValueError, match="policy 'shuffled' is not known; use"):
        policy_of("shuffled")


def test_given_depths_are_run(model, tokens_BT):
    full = jexit.forward(model, tokens_BT)
    assert full.depth_BT.dtype == jnp.int32 and (full.depth_BT == LAYERS).all()
    everywhere = jexit.forward(model, tokens_BT, policy=Prescribed(np.full((4, 11), LAYERS)))
    np.testing.assert_allclose(everywhere.logits_BTV, full.logits_BTV, atol=1e-6)
    depth_BT = np.random.default_rng(1).choice(DEPTHS, tokens_BT.shape)
    out = jexit.forward(model, tokens_BT, policy=Prescribed(depth_BT))
    np.testing.assert_array_equal(out.depth_BT, depth_BT)
    fixed = jexit.forward(model, tokens_BT, policy=Fixed(2))
    same = jexit.forward(model, tokens_BT, policy=Prescribed(np.full((4, 11), 2)))
    np.testing.assert_array_equal(fixed.depth_BT, 2)
    np.testing.assert_allclose(fixed.logits_BTV, same.logits_BTV, atol=1e-6)


def test_what_means_nothing_is_refused(model, tokens_BT):
    for policy, sentence in [
        (Prescribed(np.ones((4, 3))), r"shape \(4, 3\), but the tokens have shape \(4, 11\)"),
        (Prescribed(np.full((4, 11), 99)), r"depth 99, .* exits \(1, 2, 4\) or runs all 5"),
        (Prescribed(np.full((4, 11), 3)), "Prescribed has depth 3"),
        (Prescribed(99), "Prescribed has depth 99"),
        (Prescribed(0), "Prescribed has depth 0"),
        (Fixed(3), "Fixed has depth 3"),
        (Threshold(2.0), r"Threshold has hazard 2\.0"),
        (Threshold(float("nan")), "Threshold has hazard nan, .*; give the probability"),
        (Sample(0.0), r"Sample has temperature 0\.0, .* above 0"),
        (Sample(1.0, 2.0), r"min_hazard 2\.0, but it must be a probability"),
        (Sample(), "needs a PRNG key; pass key="),
        (Sample, "policy is the class Sample, but it must be an instance"),
        ("sample", "policy is 'sample', but it must be a policy; give"),
    ]:
        with pytest.raises(ValueError, match=sentence) as error:
            jexit.forward(model, tokens_BT, policy=policy)
        assert "\n" not in str(error.value)


def test_untrained_exits_are_warned_of(model, tokens_BT):
    fresh = nnx.clone(model)
    fresh.exits.b2[...] = jnp.full(len(EXITS), model.exit_head.bias)
    with pytest.warns(UserWarning, match=r"exit heads .* untrained, so threshold:0.5 hardly ever"):
        jexit.forward(fresh, tokens_BT, policy=Threshold(0.5))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jexit.forward(model, tokens_BT, policy=Threshold(0.5))
        jexit.forward(fresh, tokens_BT, policy=Full())


def test_sampled_depths_follow_the_law_that_scores_them(model):
    """χ² of 6,000 draws at one token, where every row has the same hazards."""
    tokens_BT = jnp.full((ROWS, 1), 7)
    # Beyond the exit that it takes, a row's own hazard logits are those of its frozen residual.
    z_E = jexit.forward(model, tokens_BT, policy=Full()).hazard_logits_BTE[0, 0]
    plain = np.exp(np.asarray(depth_log_distribution(z_E), np.float64))
    for temperature, floor in ((1.0, 0.0), (0.4, 0.0), (3.0, 0.25)):
        policy = Sample(temperature, floor)
        depth_B = jexit.forward(model, tokens_BT, policy=policy, key=jax.random.key(3)).depth_BT
        counts = np.asarray([(np.asarray(depth_B) == depth).sum() for depth in DEPTHS])
        assert counts.sum() == ROWS
        hazard_E = floor + (1 - floor) / (1 + np.exp(-np.asarray(z_E, np.float64) / temperature))
        stays_E = np.cumprod([1.0, *(1 - hazard_E)])
        law = np.append(hazard_E * stays_E[:-1], stays_E[-1])
        z_BE = jnp.broadcast_to(z_E, (len(DEPTHS), len(EXITS)))
        scored = policy.log_prob(jnp.asarray(DEPTHS), z_BE, DEPTHS)
        np.testing.assert_allclose(np.exp(scored), law, rtol=1e-4)
        assert ((counts - ROWS * law) ** 2 / (ROWS * law)).sum() < 21.1  # 99.99 %, 3 degrees
        # The check has power: the plain law would not have explained draws of another policy.
        if policy != Sample():
            assert ((counts - ROWS * plain) ** 2 / (ROWS * plain)).sum() > 100.0
    again = jexit.forward(model, tokens_BT, policy=policy, key=jax.random.key(3)).depth_BT
    np.testing.assert_array_equal(again, depth_B)
    other = jexit.forward(model, tokens_BT, policy=policy, key=jax.random.key(1)).depth_BT
    assert (np.asarray(other) != np.asarray(again)).mean() > 0.2


def test_threshold_leaves_at_the_first_exit_whose_hazard_exceeds_it(model):
    tokens_BT = np.random.default_rng(4).integers(0, 31, (30, 9))
    for hazard in (0.0, 0.2, 0.45, 0.7, 1.0):
        out = jexit.forward(model, tokens_BT, policy=Threshold(hazard))
        over_BTE = 1.0 / (1.0 + np.exp(-np.asarray(out.hazard_logits_BTE, np.float64))) > hazard
        first_BT = np.where(over_BTE.any(-1), over_BTE.argmax(-1), len(EXITS))
        np.testing.assert_array_equal(out.depth_BT, np.asarray(DEPTHS)[first_BT])
        depths = np.unique(out.depth_BT).tolist()
        assert depths == {0.0: [EXITS[0]], 1.0: [LAYERS]}.get(hazard, depths)
        assert hazard in (0.0, 1.0) or len(depths) > 1


def test_whoever_decides_the_rule_for_leaving_is_one(model, tokens_BT):
    """`layer < depth`, and prompts, to which the action mask is shut, never leave."""
    action_BT = np.arange(11) >= np.asarray([3, 11, 1, 7])[:, None]
    tokens_BT, key = jnp.asarray(tokens_BT), jax.random.key(5)
    full = run_jit(model, tokens_BT, policy=Full(), action_BT=jnp.asarray(action_BT), key=key)
    for policy in (Threshold(0.0), Sample(1.0, 0.999), Prescribed(jnp.full((4, 11), 2))):
        decided = jexit.forward(model, tokens_BT, policy=policy, key=key)
        prescribed = jexit.forward(model, tokens_BT, policy=Prescribed(decided.depth_BT))
        for name in ("logits_BTV", "hazard_logits_BTE"):
            np.testing.assert_allclose(getattr(prescribed, name), getattr(decided, name), atol=1e-5)
        out = run_jit(model, tokens_BT, policy=policy, action_BT=jnp.asarray(action_BT), key=key)
        depth_BT = np.asarray(out.depth_BT)
        assert (depth_BT[~action_BT] == LAYERS).all()
        assert (depth_BT[action_BT] < LAYERS).mean() > 0.9
        # What the prompt computes does not depend on the policy at all.
        np.testing.assert_allclose(
            np.asarray(out.hidden_BTD)[~action_BT],
            np.asarray(full.hidden_BTD)[~action_BT],
            atol=1e-5,
        )
