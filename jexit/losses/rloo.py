"""Rewards with a depth penalty, advantages within groups, and policy-gradient losses."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.axes import Array, Bool, Float, Int
from jexit.errors import UserError
from jexit.losses.masked import masked_mean


class Reward(NamedTuple):
    """Reward of each rollout and its parts, each [J] (already signed and weighted)."""

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
    """What the depth penalty λ is charged on.

    `mean` (arXiv:2603.21376): mean depth/L over action positions (`action_JW`), the passes that
    could have left; a completion of one token has none and counts as full depth. Shallow filler
    lowers it. `total`: Σ depth/L over all generated tokens (`token_JW`), divided by T_ref: the
    compute of the answer, which no further token lowers.
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
    """R = verifier − λ·depth cost − β·mean(log π_student − log π_teacher) − μ·T/T_ref.

    The KL mean runs over all T generated tokens (`token_JW`). As T is the policy's own, β times
    the gradient of that term is not exactly β times the gradient of a KL a token: it also favours
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
    """Advantages within groups of `rollouts` adjacent rows; extra axes are treated one by one.

    `rloo` (arXiv:2402.14740): A_i = R_i − mean_{j≠i} R_j. `group_mean`: R_i − mean_j R_j.
    `group_mean_std` (arXiv:2402.03300): that, divided by the group's standard deviation (n − 1)
    plus 1e-4. Rows with keep_J = 0 take no part: advantage 0, and absent from others' baselines;
    a row that is left alone gets 0.

    Raises UserError for fewer than two rollouts: they would teach nothing.
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
    """The depth cost of a row less what was spent before each token, Σ_s d_s / n − Σ_{s<t} d_s / n̄.

    For causal credit: token t (whose own pass has depth_t) is charged for depths at and after it.
    Under `norm="total"` n = n̄ = T_ref, and the difference is exactly Σ_{s≥t} d_s / T_ref. Under
    `mean` n is the row's number of action positions, n̄ the mean number of the prompt's other rows:
    the row's own n depends on what it does later, so that Σ_{s<t} d_s / n is no baseline and would
    reward ending the text. Where all rows are equally long this is Σ_{s≥t} d_s / n. A row without
    action positions ran at full depth and costs 1, as in `depth_cost`.
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
    """Loss of each action pair (token, depth), to be masked, summed and normalised by the caller.

    clip None: REINFORCE, −A · log π, optionally weighted by the truncated ratio
    min(π/π_behaviour, cap) with its gradient stopped. Otherwise PPO (arXiv:1707.06347):
    −min(r·A, clip(r, 1 ± clip)·A) with r = π/π_behaviour.
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
    """Weights w with loss = Σ w·term: `constant` 1/(J·budget), `sequence` 1/(J·T_i), `tokens` 1/ΣT.

    The constant does not favour short answers (arXiv:2503.20783); it is the default.
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
    """½·δ² at a sampled token, δ = log s/t: its mean gradient is that of KL(student ‖ teacher).

    Over tokens that the student itself sampled, E[δ·∇log s] = ∇ Σ s·log(s/t). Its mean value is
    not that KL but agrees with it to second order (Schulman, "Approximating KL divergence").
    """
    return 0.5 * jnp.square(log_student - log_teacher)


def k3(log_student: Array, log_teacher: Array) -> Array:
    """e^δ − δ − 1 ≥ 0 at a sampled token, δ = log t/s: its mean value is KL(student ‖ teacher).

    Its mean gradient over the student's own samples is that of KL(teacher ‖ student), the other
    direction: E[(1 − t/s)·∇log s] = −Σ t·∇log s (Schulman, "Approximating KL divergence").
    """
    delta = log_teacher - log_student
    return jnp.expm1(delta) - delta


def zero_spread_groups(verifier_J: Float[Array, "J"], rollouts: int) -> Float[Array, ""]:
    """Share of groups whose task rewards are all equal: they teach nothing about the answer."""
    groups = verifier_J.reshape(-1, rollouts)
    return jnp.mean((jnp.max(groups, 1) == jnp.min(groups, 1)).astype(jnp.float32))


def reached_decision_entropy(
    log_hazard: Float[Array, "*A E"],
    log_rest: Float[Array, "*A E"],
    exit_index: Int[Array, "*A"],
) -> Float[Array, "*A"]:
    """Entropy of the leave/stay decisions at the exits reached, nats.

    Its mean over the policy's own depths is the entropy of the depth law (chain rule), and unlike
    that it reads no hazard beyond the token's own exit. Its gradient is only a part of the
    entropy's: which exits are reached depends on the hazards too (`depth_entropy_bonus`).
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
    """A term whose mean gradient over the policy's own depths is that of the depth law's entropy.

    With h = `reached_decision_entropy`: ∇E_P[h] = E_P[∇h + h·∇log P(d)], the pathwise and the score
    part. The first alone pulls every hazard to ½.
    """
    return reached_entropy + jax.lax.stop_gradient(reached_entropy) * depth_logprob
