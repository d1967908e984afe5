"""RLOO by hand and by TRL's documented formula; rewards, weights and losses by hand."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jexit.losses import rloo
from jexit.model.exits import depth_log_law, log_hazards

MEAN = {"norm": "mean", "length_ref": 1.0}


def test_rloo_by_hand():
    rewards = jnp.array([1.0, 0.0, 0.0, -1.0, 2.0, 2.0, 2.0, 2.0])
    # Group 1, row 0: 1 − mean(0, 0, −1) = 4/3; row 3: −1 − mean(1, 0, 0) = −4/3.
    expected = [4 / 3, 0.0, 0.0, -4 / 3, 0.0, 0.0, 0.0, 0.0]
    np.testing.assert_allclose(rloo.group_advantages(rewards, 4, "rloo"), expected, rtol=1e-6)


def test_rloo_equals_the_formula_that_trl_documents():
    # TRL lays rewards out as [rollouts, prompts] and takes
    # baseline = (sum over rollouts − own) / (rollouts − 1), advantage = reward − baseline.
    rng = np.random.default_rng(0)
    grouped = rng.normal(size=(5, 3)).astype(np.float32)
    baseline = (grouped.sum(0) - grouped) / (5 - 1)
    ours = rloo.group_advantages(jnp.asarray(grouped.T.reshape(-1)), 5, "rloo")
    np.testing.assert_allclose(ours, (grouped - baseline).T.reshape(-1), rtol=1e-5, atol=1e-6)


def test_group_mean_with_and_without_division():
    rewards = jnp.array([1.0, 0.0, 0.0, 0.0])
    np.testing.assert_allclose(
        rloo.group_advantages(rewards, 4, "group_mean"), [0.75, -0.25, -0.25, -0.25]
    )
    np.testing.assert_allclose(
        rloo.group_advantages(rewards, 4, "group_mean_std"),
        np.array([0.75, -0.25, -0.25, -0.25]) / (np.std([1, 0, 0, 0], ddof=1) + 1e-4),
        rtol=1e-5,
    )


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


def test_one_rollout_is_an_error():
    with pytest.raises(ValueError, match="at least 2 rollouts per prompt, got 1"):
        rloo.group_advantages(jnp.ones(4), 1, "rloo")


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
    return sum(depths), float(reward.total_J[0])


def test_the_published_penalty_pays_for_filler():
    (before, plain), (after, filled) = (reward_with_filler(8, "mean", n, 1) for n in (0, 4))
    assert (before, after) == (40, 44)
    assert (plain, filled) == pytest.approx((-1.0455, -0.2068), abs=1e-4)


def test_no_filler_raises_a_reward_under_the_total_penalty():
    for layers in [8, 36]:
        for depth in (1, layers // 2, layers):
            made = [reward_with_filler(layers, "total", fillers, depth)[1] for fillers in range(8)]
            assert all(longer < shorter for shorter, longer in itertools.pairwise(made))


def test_loss_weights():
    token = jnp.array([[1.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 0.0]])
    np.testing.assert_allclose(rloo.loss_weights(token, "constant", 10), token / 20)
    np.testing.assert_allclose(
        rloo.loss_weights(token, "sequence", 10), token / jnp.array([[8.0], [4.0]])
    )
    np.testing.assert_allclose(rloo.loss_weights(token, "tokens", 10), token / 6)


def test_ppo_clips_the_gradient_beyond_the_trust_region():
    def loss(log_prob, advantage):
        return rloo.policy_loss_terms(log_prob, jnp.zeros(()), advantage, clip=0.2)

    gradient = jax.grad(loss)
    assert gradient(jnp.log(1.1), 1.0) == pytest.approx(-1.1, rel=1e-5)
    assert gradient(jnp.log(1.3), 1.0) == 0.0  # already pushed up far enough
    assert gradient(jnp.log(0.7), -1.0) == 0.0  # already pushed down far enough
    assert gradient(jnp.log(1.3), -1.0) == pytest.approx(1.3, rel=1e-5)  # wrong way: not clipped


def test_on_policy_ppo_has_the_gradient_of_reinforce():
    def gradient(clip):
        return jax.grad(lambda x: rloo.policy_loss_terms(x, jnp.float32(-1.3), 0.7, clip=clip))(
            jnp.float32(-1.3)
        )

    assert float(gradient(0.2)) == pytest.approx(float(gradient(None)), rel=1e-6)


def test_truncated_importance_weights():
    terms = rloo.policy_loss_terms(
        jnp.log(jnp.array([0.5, 0.2])),
        jnp.log(jnp.array([0.1, 0.4])),
        1.0,
        clip=None,
        importance_cap=2.0,
    )
    np.testing.assert_allclose(
        terms, [-np.log(0.5) * 2.0, -np.log(0.2) * 0.5], rtol=1e-5
    )  # fmt: skip


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
    law = jnp.exp(depth_log_law(z))
    per_exit = jnp.stack(
        [rloo.reached_decision_entropy(*log_hazards(z), jnp.int32(e)) for e in range(4)]
    )
    assert float(law @ per_exit) == pytest.approx(float(entropy(jnp.log(law))), rel=1e-5)


def bonus_gradient(z):
    """Mean gradient of the bonus over depths drawn from the law of z, enumerated."""

    def term(z, e):
        entropy = rloo.reached_decision_entropy(*log_hazards(z), jnp.int32(e))
        return rloo.depth_entropy_bonus(entropy, depth_log_law(z)[e])

    law = jnp.exp(depth_log_law(z))
    return law @ jnp.stack([jax.grad(term)(z, e) for e in range(len(law))])


def test_the_depth_entropy_bonus_has_the_gradient_of_the_entropy():
    known = jnp.array([-0.5, 0.0, 0.0])
    np.testing.assert_allclose(bonus_gradient(known), [-0.127, -0.108, 0.0], atol=1e-3)
    for z in (known, jnp.array([0.3, -1.2, 2.0]), jnp.array([-3.0, 1.0])):
        truth = jax.grad(lambda z: entropy(depth_log_law(z)))(z)
        np.testing.assert_allclose(bonus_gradient(z), truth, rtol=1e-4, atol=1e-6)


def test_climbing_the_depth_entropy_bonus_ends_at_the_uniform_law():
    z, climb = jnp.array([-0.5, 0.0, 0.0]), jax.jit(lambda z: z + 2.0 * bonus_gradient(z))
    for _ in range(300):
        z = climb(z)
    np.testing.assert_allclose(jnp.exp(depth_log_law(z)), [0.25] * 4, atol=1e-3)


def test_a_completion_of_one_token_costs_its_full_depth_under_causal_credit_too():
    """Its only pass runs every layer; free of charge, ending at once would be rewarded."""
    depth_BC = jnp.asarray([[1.0, 0.0, 0.0], [1.0, 0.5, 0.25]])
    action_BC = jnp.asarray([[0.0, 0.0, 0.0], [0.0, 1.0, 1.0]])
    cost_BC = rloo.causal_depth_cost(depth_BC, action_BC, action_BC, 2, **MEAN)
    np.testing.assert_allclose(cost_BC[0], [1.0, 1.0, 1.0])
    # Its only neighbour has no action to compare with: nothing is taken off.
    np.testing.assert_allclose(cost_BC[1], [0.375, 0.375, 0.375])


def test_rows_of_one_length_are_charged_for_what_is_to_come():
    depth_BC = jnp.asarray([[1.0, 0.5, 0.25, 1.0], [1.0, 1.0, 0.5, 0.25]])
    action_BC = jnp.asarray([[0.0, 1.0, 1.0, 1.0]] * 2)
    cost_BC = rloo.causal_depth_cost(depth_BC, action_BC, action_BC, 2, **MEAN)
    to_go_BC = np.cumsum((depth_BC * action_BC)[:, ::-1], axis=1)[:, ::-1] / 3
    np.testing.assert_allclose(cost_BC, to_go_BC, rtol=1e-6)


def test_total_causal_credit_is_the_compute_to_come():
    depth_BC = jnp.asarray([[1.0, 0.5, 0.25, 0.0], [1.0, 1.0, 0.5, 0.25]])
    token_BC = jnp.asarray([[1.0, 1.0, 1.0, 0.0], [1.0, 1.0, 1.0, 1.0]])
    action_BC = token_BC.at[:, 0].set(0.0)
    cost_BC = rloo.causal_depth_cost(depth_BC, action_BC, token_BC, 2, norm="total", length_ref=8.0)
    to_go_BC = np.cumsum(np.asarray(depth_BC)[:, ::-1], axis=1)[:, ::-1] / 8.0
    np.testing.assert_allclose(cost_BC, to_go_BC, rtol=1e-6)


def test_causal_credit_has_the_gradient_of_the_reward_where_lengths_differ():
    """Every pair of texts of up to three tokens, each of which may end the text, enumerated.

    Two parameters: the logit of going on, and that of a shallow pass (0.3 of the layers).
    """
    texts = []  # (probability's parts, actions): per token (goes on, shallow or None)

    def grow(actions):
        for goes_on in (False, True):
            shallow_choices = (None,) if not actions else (False, True)
            for shallow in shallow_choices:
                longer = [*actions, (goes_on, shallow)]
                if goes_on and len(longer) < 3:
                    grow(longer)
                else:
                    texts.append(longer)

    grow([])

    def log_pi(parameters, actions):
        """Of each token's pair of decisions [3]; the last token's going on is not its choice."""
        terms = []
        for index, (goes_on, shallow) in enumerate(actions):
            on, low = parameters
            term = jax.nn.log_sigmoid(on if goes_on else -on) if index < 2 else 0.0
            if shallow is not None:
                term += jax.nn.log_sigmoid(low if shallow else -low)
            terms.append(term)
        return jnp.stack([jnp.asarray(term) for term in terms] + [jnp.zeros(())] * (3 - len(terms)))

    # A third token has no choice of going on: texts that differ in it only are one text.
    texts = [text for text in texts if len(text) < 3 or text[2][0]]
    parameters = jnp.asarray([0.3, -0.7])
    rows = [
        ([1.0] + [0.3 if low else 1.0 for _, low in text[1:]] + [0.0] * (3 - len(text)),
         [0.0] + [1.0] * (len(text) - 1) + [0.0] * (3 - len(text)))
        for text in texts
    ]  # fmt: skip
    depth, action = (jnp.asarray(part) for part in zip(*rows, strict=True))
    cost = jnp.where(action.sum(1) > 0, (depth * action).sum(1) / action.sum(1).clip(1), 1.0)
    log_p = [lambda p, t=text: log_pi(p, t).sum() for text in texts]
    assert sum(float(jnp.exp(f(parameters))) for f in log_p) == pytest.approx(1.0, abs=1e-6)
    truth = jax.grad(lambda p: -sum(jnp.exp(f(p)) * c for f, c in zip(log_p, cost, strict=True)))(
        parameters
    )

    probability = np.asarray([float(jnp.exp(f(parameters))) for f in log_p])
    gradient_of_terms = [jax.jacobian(log_pi)(parameters, text) for text in texts]  # [3, 2]
    found = np.zeros(2)
    for i in range(len(texts)):
        for j in range(len(texts)):
            pair = jnp.asarray([i, j])
            advantage = rloo.group_advantages(
                -rloo.causal_depth_cost(depth[pair], action[pair], action[pair], 2, **MEAN),
                2,
                "rloo",
            )
            mine = sum(advantage[0][t] * gradient_of_terms[i][t] for t in range(3))
            found += probability[i] * probability[j] * np.asarray(mine)
    np.testing.assert_allclose(found, truth, rtol=1e-4, atol=1e-6)
