"""RLOO on plain arrays: rewards with a depth penalty, advantages and policy losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.axes import Array, Bool, Float, Int
from jexit.errors import UserError
from jexit.losses.masked import masked_mean


class Reward(NamedTuple):
    """The total rewards of J rollouts, and the three penalties that they contain.

    total_J = verifier reward + depth_J + kl_J + length_J. The penalties include their coefficients
    and their minus signs.
    """

    total_J: Float[Array, "J"]
    depth_J: Float[Array, "J"]
    kl_J: Float[Array, "J"]
    length_J: Float[Array, "J"]


def depth_cost(
    depth_fraction_JW: Float[Array, "J W"],
    action_JW: Float[Array, "J W"],
    token_JW: Float[Array, "J W"],
    *,
    norm: str,
    length_ref: float,
) -> Float[Array, "J"]:
    """Returns the depth cost of each of J rollouts; the reward subtracts λ times this cost.

    `depth_fraction_JW` is depth/L of the pass that produced each of W token columns, with L the
    number of layers. `token_JW` is the mask of all generated tokens, and `action_JW` the mask of
    the tokens whose pass could leave early. `norm` selects the cost:

    - `mean` (arXiv:2603.21376): the mean of depth/L over `action_JW`, or 1 for a rollout of one
      token, for which `action_JW` is 0. Adding shallow tokens lowers this mean.
    - `total`: the sum of depth/L over `token_JW`, divided by `length_ref`, which measures the
      compute of the whole answer.
    """
    if norm == "total":
        return jnp.sum(depth_fraction_JW * token_JW, axis=1) / length_ref
    actions_J = jnp.sum(action_JW, axis=1)
    return jnp.where(actions_J > 0, masked_mean(depth_fraction_JW, action_JW, axis=1), 1.0)


def rewards(
    verifier_J: Float[Array, "J"],
    depth_cost_J: Float[Array, "J"],
    log_ratio_JW: Float[Array, "J W"],
    token_JW: Float[Array, "J W"],
    *,
    depth_coef: Array | float,
    kl_coef: Array | float,
    length_coef: Array | float,
    length_ref: float,
) -> Reward:
    """Returns R = verifier − λ·depth cost − β·KL − μ·T/T_ref of each rollout, and the penalties.

    λ is `depth_coef`, β `kl_coef`, μ `length_coef` and T_ref `length_ref`. T is the number of
    generated tokens, and KL is the mean of `log_ratio_JW` = log π_student − log π_teacher over
    these tokens. Because the policy determines T, the gradient of the KL penalty is not exactly β
    times that of a KL per token: it also favours lengths T at which the student happens to stay
    near the teacher.
    """
    kl_J = masked_mean(log_ratio_JW, token_JW, axis=1)
    parts = (
        -depth_coef * depth_cost_J,
        -kl_coef * kl_J,
        -length_coef * jnp.sum(token_JW, axis=1) / length_ref,
    )
    return Reward(verifier_J + sum(parts), *parts)


def group_advantages(
    rewards_J: Float[Array, "J *X"], rollouts: int, kind: str, keep_J: Array | None = None
) -> Float[Array, "J *X"]:
    """Returns the advantage of each row within its group, the `rollouts` adjacent rows of a prompt.

    `kind` selects the advantage A_i of row i with reward R_i:

    - `rloo` (arXiv:2402.14740): A_i = R_i − mean_{j≠i} R_j.
    - `group_mean`: A_i = R_i − mean_j R_j.
    - `group_mean_std` (arXiv:2402.03300): the advantage of `group_mean`, divided by the group's
      standard deviation (with n − 1) plus 1e-4.

    Rows with keep_J = 0 get advantage 0 and do not count in the group's means and deviations. If a
    group keeps only one row, this row also gets advantage 0. Advantages are separate for each index
    along the extra axes X. Raises UserError if `rollouts` is below 2.
    """
    if rollouts < 2:
        raise UserError(
            f"RLOO needs at least 2 rollouts per prompt, got {rollouts}; raise config.rl.rollouts"
        )
    grouped = rewards_J.reshape(-1, rollouts, *rewards_J.shape[1:])
    keep = jnp.ones(rewards_J.shape[0]) if keep_J is None else keep_J.astype(jnp.float32)
    keep = keep.reshape(-1, rollouts, *([1] * (rewards_J.ndim - 1)))
    kept = jnp.where(keep > 0, grouped, 0.0)
    count = jnp.sum(keep, axis=1, keepdims=True)
    total = jnp.sum(kept, axis=1, keepdims=True)
    if kind == "rloo":
        baseline = (total - kept) / jnp.maximum(count - 1.0, 1.0)
        advantage = jnp.where(count > 1, grouped - baseline, 0.0)
    else:
        mean = total / jnp.maximum(count, 1.0)
        advantage = grouped - mean
        if kind == "group_mean_std":
            squares = jnp.sum(keep * jnp.square(advantage), axis=1, keepdims=True)
            advantage /= jnp.sqrt(squares / jnp.maximum(count - 1.0, 1.0)) + 1e-4
    return jnp.where(keep > 0, advantage, 0.0).reshape(rewards_J.shape)


def causal_depth_cost(
    depth_fraction_JW: Float[Array, "J W"],
    action_JW: Float[Array, "J W"],
    token_JW: Float[Array, "J W"],
    rollouts: int,
    keep_J: Bool[Array, "J"] | None = None,
    *,
    norm: str,
    length_ref: float,
) -> Float[Array, "J W"]:
    """Returns the depth cost charged to each token: the rollout's cost minus earlier tokens' cost.

    The cost of token t is Σ_s d_s / n − Σ_{s<t} d_s / n̄, where d_s = depth/L of the pass that
    produced token s. If n = n̄, this is Σ_{s≥t} d_s / n: token t is charged for d_t and later
    depths only (causal credit).

    - `norm="total"`: n = n̄ = `length_ref`.
    - `norm="mean"`: s runs over the action positions (`action_JW`) of the rollout, and n is their
      number. n̄ is the mean of n over the other rollouts of the prompt, a group of `rollouts`
      adjacent rows, excluding rows where `keep_J` is 0; if there are none, nothing is subtracted.
      Dividing by n instead of n̄ would reward ending the text: n depends on tokens after t, so
      Σ_{s<t} d_s / n would not be a baseline.

    A rollout without action positions ran at full depth and costs 1, as in `depth_cost`.
    """
    total_J = depth_cost(depth_fraction_JW, action_JW, token_JW, norm=norm, length_ref=length_ref)
    spent_JW = depth_fraction_JW * (token_JW if norm == "total" else action_JW)
    before_JW = jnp.cumsum(spent_JW, axis=1) - spent_JW
    if norm == "total":
        return total_J[:, None] - before_JW / length_ref
    count_J = jnp.sum(action_JW, axis=1)
    keep_J = jnp.ones_like(count_J) if keep_J is None else keep_J.astype(jnp.float32)
    kept_PG, keep_PG = (x.reshape(-1, rollouts) for x in (keep_J * count_J, keep_J))
    others_J = (kept_PG.sum(1, keepdims=True) - kept_PG).ravel()
    others_J /= jnp.maximum((keep_PG.sum(1, keepdims=True) - keep_PG).ravel(), 1.0)
    usual_J1 = others_J[:, None]
    return total_J[:, None] - jnp.where(usual_J1 > 0, before_JW / jnp.maximum(usual_J1, 1e-6), 0.0)


def policy_loss_terms(
    log_prob_BC: Float[Array, "B C"],
    behaviour_BC: Float[Array, "B C"],
    advantage_BC: Float[Array, "B C"],
    *,
    clip: float | None,
    importance_cap: float = 0.0,
) -> Float[Array, "B C"]:
    """Returns the loss of each (token, depth) pair; the caller masks, weights and sums the losses.

    `log_prob_BC` is the log-probability log π of a pair under the current student, `behaviour_BC`
    is log π_behaviour, with which the pair was sampled, and `advantage_BC` is A. If `clip` is None,
    the loss is REINFORCE, −A · log π; an `importance_cap` above 0 weights it by min(π/π_behaviour,
    `importance_cap`), a factor without gradient. If `clip` is a number, the loss is that of PPO
    (arXiv:1707.06347), −min(r·A, clip(r, 1 ± `clip`)·A), with r = π/π_behaviour.
    """
    log_ratio = log_prob_BC - behaviour_BC
    if clip is None:
        loss = -advantage_BC * log_prob_BC
        if importance_cap > 0:
            ratio = jax.lax.stop_gradient(jnp.exp(log_ratio))
            loss *= jnp.minimum(ratio, importance_cap)
        return loss
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1.0 - clip, 1.0 + clip)
    return -jnp.minimum(ratio * advantage_BC, clipped * advantage_BC)


def loss_weights(
    token_JW: Float[Array, "J W"], kind: str, token_budget: int
) -> Float[Array, "J W"]:
    """Returns the weight w of each token in the loss Σ w·term; w is 0 where `token_JW` is 0.

    J is the number of rollouts, and T_i the number of tokens of rollout i in `token_JW`. `kind`
    selects w:

    - `constant` (the default of config.rl.norm): 1/(J·`token_budget`), which does not favour short
      answers (arXiv:2503.20783);
    - `sequence`: 1/(J·T_i);
    - `tokens`: 1/Σ_i T_i.
    """
    batch = token_JW.shape[0]
    lengths_J1 = jnp.maximum(jnp.sum(token_JW, axis=1, keepdims=True), 1.0)
    denominator = {
        "constant": batch * token_budget,
        "sequence": batch * lengths_J1,
        "tokens": jnp.maximum(jnp.sum(token_JW), 1.0),
    }[kind]
    return token_JW / denominator


def k2(log_student: Array, log_teacher: Array) -> Array:
    """Returns the KL estimate δ²/2 at sampled tokens, where δ = log s − log t.

    s and t are the probabilities of a token under student and teacher. Over tokens sampled from the
    student, the expected gradient of δ²/2 is the gradient of KL(s ‖ t): E[δ·∇log s] =
    ∇ Σ s·log(s/t). The expected value of δ²/2 agrees with KL(s ‖ t) only to second order (Schulman,
    "Approximating KL divergence").
    """
    return 0.5 * jnp.square(log_student - log_teacher)


def k3(log_student: Array, log_teacher: Array) -> Array:
    """Returns the KL estimate e^δ − δ − 1 ≥ 0 at sampled tokens, where δ = log t − log s.

    s and t are the probabilities of a token under student and teacher. Over tokens sampled from the
    student, the expected value is exactly KL(s ‖ t). The expected gradient, however, is the
    gradient of KL(t ‖ s): E[(1 − t/s)·∇log s] = −Σ t·∇log s (Schulman, "Approximating KL
    divergence").
    """
    delta = log_teacher - log_student
    return jnp.expm1(delta) - delta


def zero_spread_groups(verifier_J: Float[Array, "J"], rollouts: int) -> Float[Array, ""]:
    """Returns the fraction of groups whose verifier rewards are all equal, a scalar from 0 to 1.

    A group is `rollouts` adjacent rows, the rollouts of one prompt.
    """
    groups = verifier_J.reshape(-1, rollouts)
    return jnp.mean((jnp.max(groups, 1) == jnp.min(groups, 1)).astype(jnp.float32))


def reached_decision_entropy(
    log_hazard: Float[Array, "*A E"],
    log_rest: Float[Array, "*A E"],
    exit_index: Int[Array, "*A"],
) -> Float[Array, "*A"]:
    """Returns the entropy, in nats, of the leave/stay decisions at the exits that a token reached.

    `log_hazard` and `log_rest` are log h and log(1 − h) of the hazards h. The token reached the
    exits up to and including `exit_index` (E, the number of exits: all). Averaged over depths drawn
    from the policy, the result is the entropy of the distribution of depths (chain rule), although
    it does not use the hazards beyond the exit where the token left. The gradient of the result is
    incomplete, because the hazards also determine which exits are reached; `depth_entropy_bonus`
    adds the missing part.
    """
    leave, rest = jnp.exp(log_hazard), jnp.exp(log_rest)
    safe_rest = jnp.where(rest > 0, log_rest, 0.0)
    safe_leave = jnp.where(leave > 0, log_hazard, 0.0)
    entropy = -(leave * safe_leave + rest * safe_rest)
    reached = jnp.arange(log_hazard.shape[-1]) <= exit_index[..., None]
    return jnp.sum(jnp.where(reached, entropy, 0.0), axis=-1)


def depth_entropy_bonus(
    reached_entropy: Float[Array, "*A"], depth_logprob: Float[Array, "*A"]
) -> Float[Array, "*A"]:
    """Returns terms whose expected gradient is that of the entropy of the depth distribution P.

    `reached_entropy` is h, from `reached_decision_entropy`. `depth_logprob` is log P(d) of depths d
    drawn from P. ∇E_P[h] = E_P[∇h + h·∇log P(d)] is the sum of a pathwise part and a score-function
    part. The pathwise part alone would pull every hazard to ½.
    """
    return reached_entropy + jax.lax.stop_gradient(reached_entropy) * depth_logprob
