"""Calibration losses: target hazards from KL divergences, draws of depths, and the exit loss."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jexit.axes import Array, Float, Int, PRNGKey
from jexit.model.exits import law_of_log_hazards


def target_log_hazards(
    kl_nats: Float[Array, "*A E"], sharpness: float
) -> tuple[Float[Array, "*A E"], Float[Array, "*A E"]]:
    """Returns (log h, log(1 − h)) of the target hazard h = 2·(1 − σ(k·KL)) = 1 − tanh(k·KL/2).

    KL is KL(π_L ‖ π_e) in nats, and k the sharpness. In log space, the first is
    log 2 + log σ(−k·KL), and the second log(1 − e^(−k·KL)) − log(1 + e^(−k·KL)). The second is −∞
    at KL = 0, where leaving is certain. Source: arXiv:2603.21376, calibration targets.
    """
    x = sharpness * jnp.maximum(kl_nats.astype(jnp.float32), 0.0)
    leave = jnp.log(2.0) + jax.nn.log_sigmoid(-x)
    stay = jnp.log(-jnp.expm1(-x)) - jnp.log1p(jnp.exp(-x))
    return leave, stay


def draw_exit_indices(
    key: PRNGKey,
    leave: Float[Array, "*A E"],
    stay: Float[Array, "*A E"],
    *,
    samples: int,
    explore: float,
) -> tuple[Int[Array, "S *A"], Array]:
    """Draws S exit indices per token from the law of the target hazards; index E is full depth.

    With probability `explore`, a draw is uniform over the E exits and full depth instead, so that
    the student also learns to finish at exits where the teacher could not. Returns the indices and
    a mask of the explored ones.
    """
    log_law = law_of_log_hazards(leave, stay)
    law_key, flip_key, uniform_key = jax.random.split(key, 3)
    shape = (samples, *log_law.shape[:-1])
    drawn = jax.random.categorical(law_key, log_law, shape=shape)
    uniform = jax.random.randint(uniform_key, shape, 0, log_law.shape[-1])
    explored = jax.random.bernoulli(flip_key, explore, shape)
    return jnp.where(explored, uniform, drawn).astype(jnp.int32), explored


def hazard_cross_entropy(
    log_hazard: Float[Array, "*A"],
    log_rest: Float[Array, "*A"],
    target_leave: Float[Array, "*A"],
    *,
    stay_weight: float = 1.0,
) -> Float[Array, "*A"]:
    """Returns −[h* log h + w (1 − h*) log(1 − h)] of a hazard h and its target h*.

    `target_leave` is log h*, and w is `stay_weight`. At w = 1, the best hazard is the mean of the
    targets that the head cannot distinguish. A larger w divides the odds of that hazard by w. This
    helps sampling, because a token can leave too early at each exit that it passes, so heads should
    leave only when they are certain.
    """
    target = jnp.exp(target_leave)
    return -(target * log_hazard + stay_weight * (1.0 - target) * log_rest)


def expected_exit_loss(
    log_hazard: Float[Array, "*A E"],
    log_rest: Float[Array, "*A E"],
    target_leave: Float[Array, "*A E"],
    exit_index: Int[Array, "*A"],
    *,
    stay_weight: float = 1.0,
) -> Float[Array, "*A"]:
    """Returns `hazard_cross_entropy` summed over the exits that a token reached, e ≤ index.

    With w = 1, its mean over depths drawn from the targets' law equals that of −log P_student(d),
    with less noise. When depths are explored, each hazard still has its own target. Exits beyond
    the token's own do not count, because their inputs come from the continuation.
    """
    exits = log_hazard.shape[-1]
    reached = jnp.arange(exits) <= exit_index[..., None]
    each = hazard_cross_entropy(log_hazard, log_rest, target_leave, stay_weight=stay_weight)
    return jnp.sum(jnp.where(reached, each, 0.0), axis=-1)
