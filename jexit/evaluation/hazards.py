"""Computes the hazards of completions and their calibration against target hazards.

A hazard is the probability that a token leaves at an exit that it reaches. The target hazard
follows from the KL between the exit's prediction and the last layer's.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Bool, Float, HiddenBTD, Int
from jexit.evaluation.replay import Recorded
from jexit.kernels import linear_kl
from jexit.model.exits import log_hazards
from jexit.model.policies import Prescribed, Sample
from jexit.model.transformer import Transformer, run
from jexit.results import ExitCalibration, HazardBin, HazardCalibration
from jexit.rollout import Decodable
from jexit.steps.completions import Completions, flat
from jexit.steps.targets import target_hazards

BINS = 10


def _decisions(
    student: Transformer, rows: Completions, depth_BC: Int[Array, "B C"], sample: Sample
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"], HiddenBTD]:
    """Runs `rows` through the student at the depths `depth_BC`.

    Returns the hazards, a mask of the exits that each token reached (none for a completion's first
    token), and the final hidden states [B, C, D]. `sample` gives the temperature and the lower
    bound of hazards.
    """
    result = run(
        student,
        rows.tokens_BT,
        policy=Prescribed(rows.input_depths(depth_BC, student.arch.layers)),
        **rows.layout,
        hazards=True,
    )
    log_hazard_BCE, _ = log_hazards(
        rows.window(result.hazard_logits_BTE),
        temperature=sample.temperature,
        min_hazard=sample.min_hazard,
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
    sample: Sample,
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"]]:
    """Returns the hazard of each token at each exit, and whether the token reached the exit.

    The tokens run at the depths `depth_BC`. `sample` gives the temperature and the lower bound of
    hazards. A completion's first token counts as reaching no exit, since no policy decides its
    depth.
    """
    return _decisions(nnx.merge(graphdef, *states), rows, depth_BC, sample)[:2]


@functools.partial(jax.jit, static_argnames=("student_def", "teacher_def", "target"))
def decisions_and_targets(
    student_def: nnx.GraphDef,
    student_states: tuple[nnx.State, ...],
    teacher_def: nnx.GraphDef,
    teacher_states: tuple[nnx.State, ...],
    rows: Completions,
    depth_BC: Int[Array, "B C"],
    sharpness: Float[Array, ""],
    sample: Sample,
    *,
    target: str,
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"], Float[Array, "B C E"], Float[Array, "B C"]]:
    """Returns the student's `decisions`, the target hazards, and KL(student ‖ teacher) in nats.

    The targets are those of calibration; see `target_hazards` for `target` and `sharpness`. The
    last output, [B, C], compares the next-token distribution of the student at the depths
    `depth_BC` with that of the teacher at full depth.
    """
    student = nnx.merge(student_def, *student_states)
    teacher = nnx.merge(teacher_def, *teacher_states)
    final_BCD, leave_BCE, _ = target_hazards(
        student, teacher, rows, target=target, sharpness=sharpness
    )
    hazard_BCE, asked_BCE, hidden_BCD = _decisions(student, rows, depth_BC, sample)
    kl_N = linear_kl(
        flat(hidden_BCD), flat(final_BCD), student.head_VD, head_teacher_VD=teacher.head_VD
    )
    return hazard_BCE, asked_BCE, jnp.exp(leave_BCE), kl_N.reshape(depth_BC.shape)


def reliability(hazard_N: np.ndarray, target_N: np.ndarray) -> tuple[float, tuple[HazardBin, ...]]:
    """Returns the expected calibration error (ECE) of hazards against targets, and the bins.

    ECE = Σ_b n_b / N · |mean hazard − mean target|, where bin b contains n_b of the N hazards. The
    bins have equal width, and empty ones are left out. ECE is NaN if there are no hazards. (Guo et
    al. 2017, arXiv:1706.04599, with a target probability instead of an outcome.)
    """
    which_N = np.minimum((hazard_N * BINS).astype(int), BINS - 1)
    table = []
    for number in range(BINS):
        inside_N = which_N == number
        if count := int(inside_N.sum()):
            table.append(
                HazardBin(
                    low=number / BINS,
                    high=(number + 1) / BINS,
                    hazard_mean=float(hazard_N[inside_N].mean()),
                    target_mean=float(target_N[inside_N].mean()),
                    positions=count,
                )
            )
    error = sum(part.positions * abs(part.hazard_mean - part.target_mean) for part in table)
    return (error / len(hazard_N) if len(hazard_N) else float("nan")), tuple(table)


def hazards_of(
    student: Decodable, recorded: Recorded, sample: Sample
) -> list[list[list[float | None]]]:
    """Returns the hazard of every token at each exit, and None at exits that were not reached.

    The lists are indexed by completion, token and exit. A completion's first token has only None,
    since no policy decides its depth. `student` is a model as (graphdef, *states). `sample` gives
    the temperature and the lower bound of hazards.
    """
    hazard_BCE, there_BCE = recorded.through(
        lambda rows, depth_BC: decisions(student[0], student[1:], rows, depth_BC, sample)
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
    student: Decodable,
    teacher: Decodable,
    exit_layers: Sequence[int],
    recorded: Recorded,
    sample: Sample,
    *,
    sharpness: float,
    target: str,
) -> HazardCalibration:
    """Measures how well the hazards of each exit match their targets, on one policy's completions.

    The field `ece` of the record is the mean of the errors of single exits, weighted by the number
    of tokens that reached each exit, so errors at different exits do not cancel. The record also
    contains the mean KL(student ‖ teacher) in nats over the passes that could leave early. See
    `decisions_and_targets` for `sharpness` and `target`.
    """
    hazard_BCE, there_BCE, target_BCE, kl_BC = recorded.through(
        lambda rows, depth_BC: decisions_and_targets(
            student[0], student[1:], teacher[0], teacher[1:], rows, depth_BC,
            jnp.float32(sharpness), sample, target=target,
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
