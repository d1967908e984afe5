"""RLOO by hand and by TRL's documented formula; rewards, weights and losses by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jexit.losses import rloo
from jexit.model.exits import depth_log_distribution, log_hazards


def test_rloo_equals_the_formula_that_trl_documents():
    # TRL lays rewards out as [rollouts, prompts] and takes
    # baseline = (sum over rollouts − own) / (rollouts − 1), advantage = reward − baseline.
    rng = np.random.default_rng(0)
    grouped = rng.normal(size=(5, 3)).astype(np.float32)
    baseline = (grouped.sum(0) - grouped) / (5 - 1)
    ours = rloo.group_advantages(jnp.asarray(grouped.T.reshape(-1)), 5, "rloo")
    np.testing.assert_allclose(ours, (grouped - baseline).T.reshape(-1), rtol=1e-5, atol=1e-6)


def test_advantages_by_hand():
    mean = np.array([0.75, -0.25, -0.25, -0.25])
    for kind, expected in (
        ("rloo", [1.0, -1 / 3, -1 / 3, -1 / 3]),
        ("group_mean", mean),
        ("group_mean_std", mean / (np.std([1, 0, 0, 0], ddof=1) + 1e-4)),
    ):
        found = rloo.group_advantages(jnp.array([1.0, 0.0, 0.0, 0.0]), 4, kind)
        np.testing.assert_allclose(found, expected, rtol=1e-5)
    with pytest.raises(ValueError, match="at least 2 rollouts per prompt, got 1"):
        rloo.group_advantages(jnp.ones(4), 1, "rloo")


def test_rows_left_out_are_absent_from_the_baseline():
    for kind in ["rloo", "group_mean", "group_mean_std"]:
        rewards = jnp.array([1.0, 0.0, 100.0, 3.0, 5.0, 7.0])
        keep = jnp.array([1, 1, 0, 1, 0, 0])
        kept = rloo.group_advantages(jnp.array([1.0, 0.0]), 2, kind)
        ours = rloo.group_advantages(rewards, 3, kind, keep)
        np.testing.assert_allclose(ours[:2], kept, rtol=1e-6)
        np.testing.assert_array_equal(
            ours[2:], 0.0
        )  # the second group's one survivor learns nothing


def test_rewards_by_hand():
    token = jnp.array([[1.0, 1.0, 1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
    action = jnp.array([[0.0, 1.0, 1.0, 0.0], [0.0, 0.0, 0.0, 0.0]])
    depth = jnp.array([[1.0, 0.5, 0.25, 9.0], [1.0, 9.0, 9.0, 9.0]])
    cost = rloo.depth_cost(depth, action, token, norm="mean", length_ref=10.0)
    # Row 0: depth mean over its two action positions 0.375; row 1 has none and counts as full.
    np.testing.assert_allclose(cost, [0.375, 1.0], rtol=1e-6)
    total = rloo.depth_cost(depth, action, token, norm="total", length_ref=10.0)
    np.testing.assert_allclose(total, [0.175, 0.1], rtol=1e-6)
    reward = rloo.rewards(
        jnp.array([1.0, 0.5]),
        cost,
        jnp.array([[0.2, 0.4, 0.6, np.nan], [1.0, np.nan, np.nan, np.nan]]),
        token,
        depth_coef=0.8,
        kl_coef=0.1,
        length_coef=0.5,
        length_ref=10.0,
    )
    np.testing.assert_allclose(reward.depth_J, [-0.3, -0.8], rtol=1e-6)
    np.testing.assert_allclose(reward.kl_J, [-0.04, -0.1], rtol=1e-6)
    np.testing.assert_allclose(reward.length_J, [-0.15, -0.05], rtol=1e-6)
    np.testing.assert_allclose(
        reward.total_J, [1 - 0.3 - 0.04 - 0.15, 0.5 - 0.8 - 0.1 - 0.05], rtol=1e-6
    )


def reward_with_filler(layers, norm, fillers, depth):
    """Of a right answer in five tokens at full depth with tokens of this depth after it."""
    depths = [layers] * 5 + [depth] * fillers
    tokens = jnp.ones((1, len(depths)))
    fraction = jnp.asarray([depths]) / layers
    cost = rloo.depth_cost(fraction, tokens.at[:, 0].set(0.0), tokens, norm=norm, length_ref=22.0)
    reward = rloo.rewards(
        jnp.ones(1), cost, jnp.zeros_like(tokens), tokens,
        depth_coef=2.0, kl_coef=0.0, length_coef=0.2, length_ref=22.0,
    )  # fmt: skip
    return float(reward.total_J[0])


def test_the_published_penalty_pays_for_filler_and_the_total_one_does_not():
    found = [reward_with_filler(8, "mean", fillers, 1) for fillers in (0, 4)]
    assert found == pytest.approx([-1.0455, -0.2068], abs=1e-4)
    for layers, depth in ((8, 1), (8, 8), (36, 1), (36, 18)):
        made = [reward_with_filler(layers, "total", fillers, depth) for fillers in range(5)]
        assert all(longer < shorter for shorter, longer in itertools.pairwise(made))


def test_loss_weights():
    token = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(rloo.loss_weights(token, "constant", 10), token / 20)
    np.testing.assert_allclose(
        rloo.loss_weights(token, "sequence", 10), token / jnp.array([[8.0], [4.0]])
    )
    np.testing.assert_allclose(rloo.loss_weights(token, "tokens", 10), token / 6)


def test_ppo_clips_the_gradient_beyond_the_trust_region():
    def loss(log_prob, advantage, clip=0.2):
        return rloo.policy_loss_terms(log_prob, jnp.zeros(()), advantage, clip=clip)

    gradient = jax.grad(loss)
    assert gradient(jnp.log(1.1), 1.0) == pytest.approx(-1.1, rel=1e-5)
    assert gradient(jnp.log(1.3), 1.0) == 0.0  # already pushed up far enough
    assert gradient(jnp.log(0.7), -1.0) == 0.0  # already pushed down far enough
    assert gradient(jnp.log(1.3), -1.0) == pytest.approx(1.3, rel=1e-5)  # wrong way: not clipped
    # On policy it is REINFORCE.
    assert gradient(0.0, 0.7) == pytest.approx(float(gradient(0.0, 0.7, None)), rel=1e-6)


def test_truncated_importance_weights():
    new, old = jnp.log(jnp.array([0.5, 0.2])), jnp.log(jnp.array([0.1, 0.4]))
    terms = rloo.policy_loss_terms(new, old, 1.0, clip=None, importance_cap=2.0)
    np.testing.assert_allclose(terms, [-np.log(0.5) * 2.0, -np.log(0.2) * 0.5], rtol=1e-5)


@pytest.mark.parametrize("name", ["k2", "k3"])
def test_what_a_kl_estimate_averages_to_and_descends(name):
    """Values and gradients over the student's own samples, against both directions of KL."""
    logits, teacher = jnp.array([0.9, -0.4, -0.5]), jnp.array([0.2, 0.5, 0.3])

    def kl_student_teacher(x):
        log_s = jax.nn.log_softmax(x)
        return jnp.sum(jnp.exp(log_s) * (log_s - jnp.log(teacher)))

    def kl_teacher_student(x):
        return jnp.sum(teacher * (jnp.log(teacher) - jax.nn.log_softmax(x)))

    def estimate(x, token):
        return getattr(rloo, name)(jax.nn.log_softmax(x)[token], jnp.log(teacher)[token])

    student = jax.nn.softmax(logits)
    values = jnp.stack([estimate(logits, token) for token in range(3)])
    gradients = jnp.stack([jax.grad(estimate)(logits, token) for token in range(3)])
    assert jnp.all(values >= 0)
    forward, backward = jax.grad(kl_student_teacher)(logits), jax.grad(kl_teacher_student)(logits)
    assert float(jnp.linalg.norm(forward - backward)) > 0.05
    wanted = {"k2": forward, "k3": backward}[name]
    np.testing.assert_allclose(student @ gradients, wanted, rtol=1e-4, atol=1e-6)
    if name == "k3":
        assert float(student @ values) == pytest.approx(float(kl_student_teacher(logits)), rel=1e-5)


def entropy(log_law):
    return -jnp.sum(jnp.exp(log_law) * log_law)


def test_decision_entropy_averages_to_the_entropy_of_the_law():
    z = jnp.array([0.3, -1.2, 2.0])
    law = jnp.exp(depth_log_distribution(z))
    per_exit = jnp.stack(
        [rloo.reached_decision_entropy(*log_hazards(z), jnp.int32(e)) for e in range(4)]
    )
    assert float(law @ per_exit) == pytest.approx(float(entropy(jnp.log(law))), rel=1e-5)


def bonus_gradient(z):
    """Mean gradient of the bonus over depths drawn from the law of z, enumerated."""

    def term(z, e):
        entropy = rloo.reached_decision_entropy(*log_hazards(z), jnp.int32(e))
        return rloo.depth_entropy_bonus(entropy, depth_log_distribution(z)[e])

    law = jnp.exp(depth_log_distribution(z))
    return law @ jnp.stack([jax.grad(term)(z, e) for e in range(len(law))])


def test_the_depth_entropy_bonus_has_the_gradient_of_the_entropy():
    known = jnp.array([-0.5, 0.0, 0.0])
    np.testing.assert_allclose(bonus_gradient(known), [-0.127, -0.108, 0.0], atol=1e-3)
    for z in (known, jnp.array([0.3, -1.2, 2.0]), jnp.array([-3.0, 1.0])):
        truth = jax.grad(lambda z: entropy(depth_log_distribution(z)))(z)
        np.testing.assert_allclose(bonus_gradient(z), truth, rtol=1e-4, atol=1e-6)


def test_causal_credit_charges_for_what_is_to_come():
    """As it has to with completions of one length, which have their own mean."""
    depth_BC = jnp.asarray([[1.0, 0.5, 0.25, 1.0], [1.0, 1.0, 0.5, 0.25]])
    action_BC = jnp.asarray([[0.0, 1.0, 1.0, 1.0]] * 2)
    cost_BC = rloo.causal_depth_cost(depth_BC, action_BC, action_BC, 2, norm="mean", length_ref=1.0)
    to_go_BC = np.cumsum((depth_BC * action_BC)[:, ::-1], axis=1)[:, ::-1] / 3
    np.testing.assert_allclose(cost_BC, to_go_BC, rtol=1e-6)


def test_causal_credit_takes_off_what_was_spent_over_the_others_number_of_actions():
    """The own number depends on what comes later; one token costs full depth, as without credit."""
    depth_BC = jnp.asarray([[1.0, 0.5, 0.25, 0.0], [1.0, 1.0, 0.5, 0.25]])
    action_BC = jnp.asarray([[0.0, 1.0, 1.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    before_BC = np.array([[0.0, 0.0, 0.5, 0.75], [0.0, 0.0, 1.0, 1.5]])
    for action, expected in (
        (action_BC, np.array([[0.375], [1.75 / 3]]) - before_BC / np.array([[3.0], [2.0]])),
        (action_BC.at[1].set(0.0), [[0.375] * 4, [1.0] * 4]),  # nothing to compare with
    ):
        cost_BC = rloo.causal_depth_cost(depth_BC, action, action, 2, norm="mean", length_ref=1.0)
        np.testing.assert_allclose(cost_BC, expected, rtol=1e-6)


def test_total_causal_credit_is_the_compute_to_come():
    depth_BC = jnp.asarray([[1.0, 0.5, 0.25, 0.0], [1.0, 1.0, 0.5, 0.25]])
    token_BC = jnp.asarray([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    action_BC = token_BC.at[:, 0].set(0.0)
    cost_BC = rloo.causal_depth_cost(depth_BC, action_BC, token_BC, 2, norm="total", length_ref=8.0)
    to_go_BC = np.cumsum(np.asarray(depth_BC)[:, ::-1], axis=1)[:, ::-1] / 8.0
    np.testing.assert_allclose(cost_BC, to_go_BC, rtol=1e-6)
