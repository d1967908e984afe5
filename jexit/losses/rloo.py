"""Rewards with a depth penalty, advantages within groups, and policy-gradient losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.axes import Array, Bool, Float, Int
from jexit.errors import UserError
from jexit.losses.masked import masked_mean


class Reward(NamedTuple):
    """The reward of each rollout and its parts, each [J]; parts are already signed and weighted."""

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
    """Returns the depth cost of each rollout, which the depth penalty λ multiplies.

    `mean` (arXiv:2603.21376): the mean of depth/L over action positions (`action_JW`), the passes
    that could have left. A completion of one token has no action position and counts as full depth.
    Shallow filler lowers this mean. `total`: Σ depth/L over all generated tokens (`token_JW`),
    divided by T_ref. This is the compute of the answer, which additional tokens cannot lower.
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
    """Computes R = verifier − λ·depth cost − β·mean(log π_student − log π_teacher) − μ·T/T_ref.

    The KL mean runs over all T generated tokens (`token_JW`). Because the policy determines T, the
    gradient of that term is not exactly β times the gradient of a KL per token. It also favours
    lengths over which the policy happens to stay near the teacher.
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
    """Returns advantages within groups of `rollouts` adjacent rows, separately along extra axes.

    `rloo` (arXiv:2402.14740): A_i = R_i − mean_{j≠i} R_j. `group_mean`: A_i = R_i − mean_j R_j.
    `group_mean_std` (arXiv:2402.03300): the advantage of `group_mean`, divided by the group's
    standard deviation (with n − 1) plus 1e-4. Rows with keep_J = 0 get advantage 0 and do not count
    in the baselines of other rows. If only one row of a group counts, it gets 0.

    Raises UserError if `rollouts` is below 2, because every advantage would be 0.
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
    """Returns a row's depth cost minus the part before each token, Σ_s d_s / n − Σ_{s<t} d_s / n̄.

    This is causal credit: token t (whose own pass has depth_t) is charged only for the depths at
    and after it. With `norm="total"`, n = n̄ = T_ref, and the difference is exactly
    Σ_{s≥t} d_s / T_ref. With `mean`, n is the row's number of action positions, and n̄ is the mean
    number in the prompt's other rows. The row's own n depends on its later tokens, so
    Σ_{s<t} d_s / n would not be a baseline and would reward ending the text. If all rows are
    equally long, the difference is Σ_{s≥t} d_s / n. A row without action positions ran at full
    depth and costs 1, as in `depth_cost`.
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
    """Returns the loss of each pair (token, depth); the caller masks, sums and normalises it.

    If `clip` is None, the loss is REINFORCE, −A · log π, optionally weighted by the truncated ratio
    min(π/π_behaviour, cap) with its gradient stopped. Otherwise it is PPO (arXiv:1707.06347),
    −min(r·A, clip(r, 1 ± clip)·A), with r = π/π_behaviour.
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
    """Returns the weights w of the tokens, so that loss = Σ w·term.

    w is 1/(J·budget) for `constant`, 1/(J·T_i) for `sequence` and 1/ΣT for `tokens`. The constant,
    which is the default, does not favour short answers (arXiv:2503.20783).
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
    """Returns ½·δ² at a sampled token, δ = log s/t; its mean gradient is that of KL(s ‖ t).

    Here s is the student and t the teacher. Over tokens that the student itself sampled,
    E[δ·∇log s] = ∇ Σ s·log(s/t). The mean value is not that KL but agrees with it to second order
    (Schulman, "Approximating KL divergence").
    """
    return 0.5 * jnp.square(log_student - log_teacher)


def k3(log_student: Array, log_teacher: Array) -> Array:
    """Returns e^δ − δ − 1 ≥ 0 at a sampled token, δ = log t/s; its mean value is KL(s ‖ t).

    Here s is the student and t the teacher. The mean gradient over the student's own samples is
    that of the other direction, KL(t ‖ s): E[(1 − t/s)·∇log s] = −Σ t·∇log s (Schulman,
    "Approximating KL divergence").
    """
    delta = log_teacher - log_student
    return jnp.expm1(delta) - delta


def zero_spread_groups(verifier_J: Float[Array, "J"], rollouts: int) -> Float[Array, ""]:
    """Returns the share of groups with equal task rewards, which teach nothing about the answer."""
    groups = verifier_J.reshape(-1, rollouts)
    return jnp.mean((jnp.max(groups, 1) == jnp.min(groups, 1)).astype(jnp.float32))


def reached_decision_entropy(
    log_hazard: Float[Array, "*A E"],
    log_rest: Float[Array, "*A E"],
    exit_index: Int[Array, "*A"],
) -> Float[Array, "*A"]:
    """Returns the entropy of the leave/stay decisions at the exits that were reached, in nats.

    Its mean over the policy's own depths is the entropy of the depth law (chain rule). Unlike the
    latter, it does not need hazards beyond the token's own exit. Its gradient is only a part of the
    gradient of the law's entropy, because the hazards also determine which exits are reached (see
    `depth_entropy_bonus`).
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
    """Returns a term whose gradient, on average over depths, is that of the depth law's entropy.

    The depths must be the policy's own. With h = `reached_decision_entropy`, ∇E_P[h] =
    E_P[∇h + h·∇log P(d)], a pathwise part plus a score-function part. The pathwise part alone would
    pull every hazard to ½.
    """
    return reached_entropy + jax.lax.stop_gradient(reached_entropy) * depth_logprob
