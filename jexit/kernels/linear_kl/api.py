"""The public op `linear_kl`, which dispatches to one of several implementations."""

import jax

from jexit.errors import UserError
from jexit.kernels import shapes
from jexit.kernels.dispatch import ONLY_BY_NAME, Operation
from jexit.kernels.linear_kl import pallas_gpu, pallas_tpu, reference, xla
from jexit.kernels.linear_kl.reference import DIRECTIONS, STUDENT_TEACHER

OPERATION = Operation("linear_kl")
OPERATION.register("reference", reference.linear_kl, platforms=ONLY_BY_NAME)
OPERATION.register("xla", xla.linear_kl)
OPERATION.register("pallas_tpu", pallas_tpu.linear_kl, platforms=("tpu",))
OPERATION.register("pallas_gpu", pallas_gpu.linear_kl, platforms=("gpu",))


def linear_kl(
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    *,
    direction: str = STUDENT_TEACHER,
    head_teacher_VD: jax.Array | None = None,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> jax.Array:
    """Computes the KL between the student's and the teacher's next-token distributions, in nats.

    With p = softmax(head · h_student / τ) and q = softmax(head_teacher · h_teacher / τ),
    `student_teacher` is `KL(p ‖ q) = Σ_v p_v (log p_v − log q_v)`, `teacher_student` is
    `KL(q ‖ p)`, and `jeffreys` is the sum of both.

    Gradients flow to `h_student_ND` and to `head_VD` as the student's head. The teacher's
    distribution carries no gradient, even if student and teacher share the head. The gradient of
    the head is computed only if the head itself is differentiated.

    Args:
      h_student_ND: the student's final hidden states of N tokens [N, D], after the final norm.
      h_teacher_ND: the teacher's, for the same tokens; with a head of its own, D may differ.
      head_VD: the student's output head [V, D], which is also the teacher's by default.
      direction: `"student_teacher"`, `"teacher_student"` or `"jeffreys"`.
      head_teacher_VD: the teacher's own output head, for the same vocabulary (None: `head_VD`).
      temperature: τ, above 0; float32 logits are divided by it, as in the sampler.
      implementation: `None` (by platform), `"reference"`, `"xla"`, `"pallas_tpu"` or `"pallas_gpu"`
        (the last two are interpreted on a CPU, for tests).

    Returns:
      The KL of each token in nats, float32 [N].

    Raises:
      UserError: if shapes do not match, or the direction or implementation does not exist.

    Source: arXiv:2603.21376, calibration loss.
    """
    if direction not in DIRECTIONS:
        raise UserError(
            f"linear_kl has no direction {direction!r}; use one of {', '.join(DIRECTIONS)}"
        )
    shapes.check_hidden("linear_kl", "h_student_ND", h_student_ND, head_VD)
    if head_teacher_VD is None:
        shapes.check_same("linear_kl", "h_teacher_ND", h_teacher_ND.shape, h_student_ND.shape)
        shapes.check_floats("linear_kl", "h_teacher_ND", h_teacher_ND)
    else:
        shapes.check_hidden(
            "linear_kl", "h_teacher_ND", h_teacher_ND, head_teacher_VD, "head_teacher_VD"
        )
        shapes.check_same(
            "linear_kl", "h_teacher_ND", h_teacher_ND.shape[:1], h_student_ND.shape[:1]
        )
        shapes.check_same(
            "linear_kl", "head_teacher_VD", head_teacher_VD.shape[:1], head_VD.shape[:1]
        )
    h_teacher_ND, head_teacher_VD = jax.lax.stop_gradient((h_teacher_ND, head_teacher_VD))
    return OPERATION(
        implementation,
        h_student_ND,
        h_teacher_ND,
        head_VD,
        head_teacher_VD,
        direction=direction,
        temperature=temperature,
    )
