"""Hazards of completions, and how well they agree with what the exits' certainty asks for."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Bool, Float, HiddenBTD, Int
from jexit.evaluation.replay import Recorded
from jexit.kernels import exit_kl, linear_kl
from jexit.losses.sft import target_log_hazards
from jexit.model.exits import log_hazards
from jexit.model.policies import Full, Prescribed, Sample
from jexit.model.transformer import Transformer, exit_hidden_states, run
from jexit.results import ExitCalibration, HazardBin, HazardCalibration
from jexit.rollout import SplitModel
from jexit.steps.completions import Completions

BINS = 10


def _decisions(
    student: Transformer, rows: Completions, depth_BC: Int[Array, "B C"], law: Sample
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"], HiddenBTD]:
    """(hazards under `law`, which of them were asked for, final hidden states) of completions."""
    result = run(
        student,
        rows.tokens_BT,
        policy=Prescribed(rows.input_depths(depth_BC, student.arch.layers)),
        **rows.layout,
        hazards=True,
    )
    log_hazard_BCE, _ = log_hazards(
        rows.window(result.hazard_logits_BTE),
        temperature=law.temperature,
        min_hazard=law.min_hazard,
    )
    reached_BCE = jnp.asarray(student.exit_layers) <= depth_BC[..., None]
    hidden_BCD = rows.window(result.hidden_BTD)
    return jnp.exp(log_hazard_BCE), reached_BCE & rows.action_BC[..., None], hidden_BCD


@functools.partial(jax.jit, static_argnames="graphdef")
def decisions(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    rows: Completions,
    depth_BC: Int[Array, "B C"],
    law: Sample,
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"]]:
    """Hazards of a split model under the completions' own depths, and where there are such."""
    return _decisions(nnx.merge(graphdef, *states), rows, depth_BC, law)[:2]


@functools.partial(jax.jit, static_argnames=("student_def", "teacher_def", "target"))
def decisions_and_targets(
    student_def: nnx.GraphDef,
    student_states: tuple[nnx.State, ...],
    teacher_def: nnx.GraphDef,
    teacher_states: tuple[nnx.State, ...],
    rows: Completions,
    depth_BC: Int[Array, "B C"],
    sharpness: Float[Array, ""],
    law: Sample,
    *,
    target: str,
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"], Float[Array, "B C E"], Float[Array, "B C"]]:
    """`decisions` of the student, target hazards, and KL(student ‖ teacher) in nats.

    The targets are 1 − tanh(k·KL_e / 2), from the exits of the teacher or, with `target="student"`,
    from the student's at full depth (as `sft.target` has it). The KL is of the next token under the
    completions' own depths to that of the teacher.
    """
    student = nnx.merge(student_def, *student_states)
    teacher = nnx.merge(teacher_def, *teacher_states)
    taught = run(
        teacher, rows.tokens_BT, policy=Full(), **rows.layout, adapters=False,
        exit_residual=target == "teacher",
    )  # fmt: skip
    measured, speaker = taught, teacher
    if target == "student":
        measured = run(student, rows.tokens_BT, policy=Full(), **rows.layout, exit_residual=True)
        speaker = student
    final_BCD = rows.window(taught.hidden_BTD)
    exits_EBCD = exit_hidden_states(
        speaker, jax.vmap(rows.window)(measured.exit_residual_EBTD), student.blocks.continuation
    )
    shape = exits_EBCD.shape
    kl_EN = exit_kl(
        final_BCD.reshape(-1, shape[-1]),
        exits_EBCD.reshape(shape[0], -1, shape[-1]),
        speaker.head_VD,
    ).kl_EN
    kl_BCE = jnp.moveaxis(kl_EN.reshape(shape[:3]), 0, -1)
    leave_BCE, _ = target_log_hazards(kl_BCE, sharpness)
    hazard_BCE, asked_BCE, hidden_BCD = _decisions(student, rows, depth_BC, law)
    kl_BC = linear_kl(
        hidden_BCD.reshape(-1, shape[-1]), final_BCD.reshape(-1, shape[-1]), student.head_VD,
        head_teacher_VD=teacher.head_VD,
    ).reshape(depth_BC.shape)  # fmt: skip
    return hazard_BCE, asked_BCE, jnp.exp(leave_BCE), kl_BC


def reliability(
    hazard_N: np.ndarray, target_N: np.ndarray, bins: int = BINS
) -> tuple[float, tuple[HazardBin, ...]]:
    """(ECE, bins) of hazards against targets.

    ECE = Σ_b n_b / N · |mean hazard − mean target| over equal bins of the hazard; 0 is perfect.
    (Guo et al. 2017, arXiv:1706.04599, with a target probability where they have an outcome.) NaN
    without any position.
    """
    which_N = np.minimum((hazard_N * bins).astype(int), bins - 1)
    table = []
    for number in range(bins):
        inside_N = which_N == number
        if count := int(inside_N.sum()):
            table.append(
                HazardBin(
                    low=number / bins,
                    high=(number + 1) / bins,
                    hazard_mean=float(hazard_N[inside_N].mean()),
                    target_mean=float(target_N[inside_N].mean()),
                    positions=count,
                )
            )
    error = sum(part.positions * abs(part.hazard_mean - part.target_mean) for part in table)
    return (error / len(hazard_N) if len(hazard_N) else float("nan")), tuple(table)


def hazards_of(
    student: SplitModel, recorded: Recorded, law: Sample
) -> list[list[list[float | None]]]:
    """Hazards of every token's pass at each exit; None at exits that it did not ask.

    `law` has the temperature and the floor that turn a hazard logit into the probability of
    leaving (`Sample()`: σ(z)).
    """
    hazard_BCE, there_BCE = recorded.through(
        lambda rows, depth_BC: decisions(student[0], student[1:], rows, depth_BC, law)
    )
    return [
        [
            [float(h) if there else None for h, there in zip(*pair, strict=True)]
            for pair in zip(hazard_CE[: len(ids)], there_CE[: len(ids)], strict=True)
        ]
        for hazard_CE, there_CE, ids in zip(
            hazard_BCE, there_BCE, recorded.completions, strict=True
        )
    ]


def hazard_calibration(
    policy: str,
    student: SplitModel,
    teacher: SplitModel,
    exit_layers: Sequence[int],
    recorded: Recorded,
    law: Sample,
    *,
    sharpness: float,
    target: str,
) -> HazardCalibration:
    """Reliability of every exit's hazards over a policy's completions with their depths.

    `ece` of all exits together is the mean of theirs, weighted by their decisions: one exit that
    leaves too readily does not make up for another that leaves too seldom. With it comes the mean
    KL(student ‖ teacher) at those depths, over passes that could leave.
    """
    hazard_BCE, there_BCE, target_BCE, kl_BC = recorded.through(
        lambda rows, depth_BC: decisions_and_targets(
            student[0], student[1:], teacher[0], teacher[1:], rows, depth_BC,
            jnp.float32(sharpness), law, target=target,
        )
    )  # fmt: skip
    exits = []
    for number, layer in enumerate(exit_layers):
        there_BC = there_BCE[..., number]
        hazard_N, target_N = hazard_BCE[there_BC, number], target_BCE[there_BC, number]
        if len(hazard_N):
            ece, bins = reliability(hazard_N, target_N)
            exits.append(
                ExitCalibration(
                    exit=int(layer),
                    ece=ece,
                    positions=len(hazard_N),
                    hazard_mean=float(hazard_N.mean()),
                    target_mean=float(target_N.mean()),
                    bins=bins,
                )
            )
    weights = [entry.positions for entry in exits]
    kl_N = np.concatenate(
        [kl_C[1 : len(depths)] for kl_C, depths in zip(kl_BC, recorded.depths, strict=True)]
    )
    return HazardCalibration(
        policy=policy,
        sharpness=sharpness,
        target=target,
        ece=float(np.average([e.ece for e in exits], weights=weights)) if exits else float("nan"),
        kl_student_teacher_nats=float(kl_N.mean()) if kl_N.size else float("nan"),
        exits=tuple(exits),
    )
