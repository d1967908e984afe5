"""Compares every exit with the last layer, and computes the target hazards that follow.

Calibration and evaluation use the same code, so hazards are measured against the targets from which
they were learned. Only the heads of a lens phase have another optimum (`losses.sft.leaving_cost`).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from jexit.axes import Array, Bool, Float
from jexit.kernels import exit_kl
from jexit.losses.sft import target_log_hazards
from jexit.model.exits import Continuation
from jexit.model.policies import Full
from jexit.model.transformer import Transformer, exit_hidden_states, run
from jexit.steps.completions import Completions, flat


class ExitComparison(NamedTuple):
    """The next-token distributions π_e at E exits, compared with π_L after the last layer."""

    final_BCD: Array  # hidden states after the last layer and the final norm
    residual_EBCD: Array  # residuals at the exits
    kl_BCE: Float[Array, "B C E"]  # KL(π_L ‖ π_e) in nats
    agree_BCE: Bool[Array, "B C E"]  # whether π_L and π_e have the same most likely token


def exits_against_last_layer(
    model: Transformer,
    rows: Completions,
    continuation: Continuation | None,
    *,
    final_BCD: Array | None = None,
    adapters: bool = True,
) -> ExitComparison:
    """Runs `rows` at full depth, and compares every exit of `model` with the last layer.

    The distribution at an exit is computed after `continuation` (see `exit_hidden_states`). If
    `final_BCD` is given, these hidden states of another model replace those after the last layer of
    `model`.
    """
    full = run(
        model,
        rows.tokens_BT,
        policy=Full(),
        **rows.layout,
        adapters=adapters,
        residual_layers=model.exit_layers,
    )
    if final_BCD is None:
        final_BCD = rows.window(full.hidden_BTD)
    residual_EBCD = jax.vmap(rows.window)(full.residual_RBTD)
    hidden_EBCD = exit_hidden_states(model, residual_EBCD, continuation)
    return ExitComparison(
        final_BCD, residual_EBCD, *kl_and_agreement(final_BCD, hidden_EBCD, model.head_VD)
    )


def kl_and_agreement(
    final_BCD: Array, other_EBCD: Array, head_VD: Array
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"]]:
    """Compares the next-token distribution of `final_BCD` with the E distributions of `other_EBCD`.

    Returns KL(final ‖ other) in nats, and whether both have the same most likely token, each as
    [B, C, E]. The output head `head_VD` turns the hidden states, [B, C, D] and [E, B, C, D], into
    logits.
    """
    found = exit_kl(flat(final_BCD), jax.vmap(flat)(other_EBCD), head_VD)
    kl_EBC, agree_EBC = (
        part_EN.reshape(other_EBCD.shape[:3]) for part_EN in (found.kl_EN, found.agree_EN)
    )
    return jnp.moveaxis(kl_EBC, 0, -1), jnp.moveaxis(agree_EBC, 0, -1)


def target_hazards(
    student: Transformer,
    teacher: Transformer,
    rows: Completions,
    *,
    target: str,
    sharpness: Float[Array, ""] | float,
) -> tuple[Array, Float[Array, "B C E"], Float[Array, "B C E"]]:
    """Returns the teacher's final hidden states [B, C, D], and log h* and log(1 − h*), [B, C, E].

    The target hazard at exit e is h* = 1 − tanh(k·KL_e / 2), where k is `sharpness` and KL_e is
    KL(distribution after the last layer ‖ distribution at exit e). `target` is `"teacher"` if both
    are the teacher's; `"student"` if the last layer is the teacher's and the exits are the
    student's at full depth; and `"own"` if both are the student's. No gradient flows through the
    results.
    """
    continuation = student.blocks.continuation
    if target == "teacher":
        found = exits_against_last_layer(teacher, rows, continuation, adapters=False)
        final_BCD = found.final_BCD
    else:
        taught = run(teacher, rows.tokens_BT, policy=Full(), **rows.layout, adapters=False)
        final_BCD = rows.window(taught.hidden_BTD)
        last_BCD = final_BCD if target == "student" else None
        found = exits_against_last_layer(student, rows, continuation, final_BCD=last_BCD)
    leave_BCE, stay_BCE = target_log_hazards(found.kl_BCE, sharpness)
    return jax.lax.stop_gradient((final_BCD, leave_BCE, stay_BCE))
