"""Calibration losses on arrays: target hazards, random draws of depths, and the exit loss.

A hazard is the probability that a token which reaches an exit leaves there.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jexit.axes import Array, Float, Int, PRNGKey
from jexit.model.exits import distribution_of_log_hazards


def target_log_hazards(
    kl_nats: Float[Array, "*A E"], sharpness: float
) -> tuple[Float[Array, "*A E"], Float[Array, "*A E"]]:
    """Returns (log h*, log(1 − h*)) of target hazards h* = 2·(1 − σ(k·KL)) = 1 − tanh(k·KL/2).

    `kl_nats` contains KL(π_L ‖ π_e) in nats, between the next-token distributions of the last layer
    and of exit e; k is `sharpness`. The computation is in log space: log h* = log 2 + log σ(−k·KL)
    and log(1 − h*) = log(1 − e^(−k·KL)) − log(1 + e^(−k·KL)). At KL = 0, h* is 1 and log(1 − h*) is
    −∞. Source: arXiv:2603.21376, calibration targets.
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
) -> Int[Array, "S *A"]:
    """Draws S = `samples` exit indices per token from the depth distribution of the target hazards.

    The result is int32 [S, ...], and index E means full depth. `leave` and `stay` are log h* and
    log(1 − h*) of the target hazards h* at the E exits. With probability `explore`, a draw is
    instead uniform over the E exits and full depth, so that the student also learns to finish at
    exits where the teacher could not.
    """
    log_probs = distribution_of_log_hazards(leave, stay)
    depth_key, flip_key, uniform_key = jax.random.split(key, 3)
    shape = (samples, *log_probs.shape[:-1])
    drawn = jax.random.categorical(depth_key, log_probs, shape=shape)
    uniform = jax.random.randint(uniform_key, shape, 0, log_probs.shape[-1])
    explored = jax.random.bernoulli(flip_key, explore, shape)
    return jnp.where(explored, uniform, drawn).astype(jnp.int32)


def leaving_cost(
    log_hazard: Float[Array, "*A"],
    log_rest: Float[Array, "*A"],
    kl_nats: Float[Array, "*A"],
    *,
    tolerance: float,
) -> Float[Array, "*A"]:
    """Returns −[log h + c/κ · log(1 − h)], c = min(KL, 2), of a hazard h and the KL of leaving.

    `log_hazard` is log h, `log_rest` is log(1 − h), `kl_nats` is KL(π_L ‖ π_e), and κ is
    `tolerance`, in nats. For inputs that a head cannot distinguish, the best h is κ/(κ + E[c]), so
    that h > ½ exactly where leaving costs less than κ on average. A cross-entropy to target hazards
    counts a KL of 2 nats hardly more than one of 0.1. The bound keeps rare tokens with a very large
    KL from dominating the gradient. At 2 nats, the token that all layers prefer is unlikely.
    """
    return -(log_hazard + jnp.clip(kl_nats, 0.0, 2.0) / tolerance * log_rest)


def expected_exit_loss(
    log_hazard: Float[Array, "*A E"],
    log_rest: Float[Array, "*A E"],
    target_leave: Float[Array, "*A E"],
    exit_index: Int[Array, "*A"],
) -> Float[Array, "*A"]:
    """Returns −[h* log h + (1 − h*) log(1 − h)], summed over the exits that a token reached.

    `log_hazard` is log h, `log_rest` is log(1 − h), and `target_leave` is log h*. The token reached
    the exits e ≤ `exit_index` and left at the last of them; index E means that it reached all and
    never left. Later exits do not count, because their inputs come from the continuation. With
    depths d drawn from the target hazards, this loss has the same expected value as −log
    P_student(d), with less noise. If depths are drawn otherwise (explored), each hazard is still
    compared with its own target.
    """
    exits = log_hazard.shape[-1]
    reached = jnp.arange(exits) <= exit_index[..., None]
    target = jnp.exp(target_leave)
    each = -(target * log_hazard + (1.0 - target) * log_rest)
    return jnp.sum(jnp.where(reached, each, 0.0), axis=-1)
