"""The public op `exit_kl`, which dispatches to one of several implementations."""

import jax

from jexit.kernels import shapes
from jexit.kernels.dispatch import ONLY_BY_NAME, Operation
from jexit.kernels.exit_kl import pallas_gpu, pallas_tpu, reference, xla
from jexit.kernels.exit_kl.reference import ExitKL

OPERATION = Operation("exit_kl")
OPERATION.register("reference", reference.exit_kl, platforms=ONLY_BY_NAME)
OPERATION.register("xla", xla.exit_kl)
OPERATION.register("pallas_tpu", pallas_tpu.exit_kl, platforms=("tpu",))
OPERATION.register("pallas_gpu", pallas_gpu.exit_kl, platforms=("gpu",))


def exit_kl(
    h_final_ND: jax.Array,
    h_exits_END: jax.Array,
    head_VD: jax.Array,
    *,
    implementation: str | None = None,
) -> ExitKL:
    """Computes KL(final ‖ exit) in nats, from the last layer's distribution to each exit's.

    The distribution at an exit is the logit lens, the output head applied to the hidden state
    there: `KL_e = Σ_v p_v (log p_v − log p_e,v)`, with p = softmax(head · h_final) and p_e =
    softmax(head · h_e). The outputs carry no gradient.

    Args:
      h_final_ND: the last layer's hidden states of N tokens [N, D], after the final norm.
      h_exits_END: the hidden states at the E exits [E, N, D], also after the final norm.
      head_VD: the output head [V, D].
      implementation: `None` (by platform), `"reference"`, `"xla"`, `"pallas_tpu"` or `"pallas_gpu"`
        (the last two are interpreted on a CPU, for tests).

    Returns:
      `ExitKL`: KL in nats [E, N], entropy and log-sum-exp of the final distribution in nats [N],
      and whether the arg-max agrees [E, N].

    Raises:
      UserError: if shapes do not match or the implementation does not exist.

    Source: arXiv:2603.21376, calibration targets.
    """
    shapes.check_hidden("exit_kl", "h_final_ND", h_final_ND, head_VD)
    shapes.check_same(
        "exit_kl", "h_exits_END", h_exits_END.shape, (*h_exits_END.shape[:1], *h_final_ND.shape)
    )
    shapes.check_floats("exit_kl", "h_exits_END", h_exits_END)
    arguments = jax.lax.stop_gradient((h_final_ND, h_exits_END, head_VD))
    return OPERATION(implementation, *arguments)
