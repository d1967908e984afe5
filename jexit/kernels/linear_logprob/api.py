"""The public op `linear_logprob`, which dispatches to one of several implementations."""

import jax
import jax.numpy as jnp

from jexit.errors import UserError
from jexit.kernels import shapes
from jexit.kernels.dispatch import ONLY_BY_NAME, Operation
from jexit.kernels.linear_logprob import pallas_gpu, pallas_tpu, reference, xla
from jexit.kernels.linear_logprob.reference import LinearLogprob

OPERATION = Operation("linear_logprob")
OPERATION.register("reference", reference.linear_logprob, platforms=ONLY_BY_NAME)
OPERATION.register("xla", xla.linear_logprob)
OPERATION.register("pallas_tpu", pallas_tpu.linear_logprob, platforms=("tpu",))
OPERATION.register("pallas_gpu", pallas_gpu.linear_logprob, platforms=("gpu",))


def linear_logprob(
    h_ND: jax.Array,
    head_VD: jax.Array,
    targets_N: jax.Array,
    *,
    temperature: float = 1.0,
    implementation: str | None = None,
) -> LinearLogprob:
    """Computes log-probabilities of targets, entropy and log-sum-exp under softmax(head · h / τ).

    With z = head · h / τ and p = softmax(z), the log-probability of target t is
    `log p_t = z_t − log Σ_v exp z_v`, and the entropy is `H = −Σ_v p_v log p_v`. All three outputs
    carry gradients to `h_ND` and `head_VD`. The gradient of the head is computed only if the head
    itself is differentiated.

    Args:
      h_ND: the final hidden states of N tokens [N, D], after the final norm.
      head_VD: the output head [V, D].
      targets_N: token ids [N]. An id that is not in the vocabulary gets log-probability −∞.
      temperature: τ, above 0; float32 logits are divided by it, as in the sampler.
      implementation: `None` (by platform), `"reference"`, `"xla"`, `"pallas_tpu"` or `"pallas_gpu"`
        (the last two are interpreted on a CPU, for tests).

    Returns:
      `LinearLogprob`: log-probability, entropy and log-sum-exp in nats, float32 [N].

    Raises:
      UserError: if shapes do not match or the implementation does not exist.
    """
    shapes.check_hidden("linear_logprob", "h_ND", h_ND, head_VD)
    shapes.check_same("linear_logprob", "targets_N", targets_N.shape, h_ND.shape[:1])
    if not jnp.issubdtype(targets_N.dtype, jnp.integer):
        raise UserError(
            f"linear_logprob: targets_N is {targets_N.dtype}, but it must be integer; cast it to "
            "int32"
        )
    # Narrow integers cannot count the vocabulary.
    return OPERATION(
        implementation, h_ND, head_VD, targets_N.astype(jnp.int32), temperature=temperature
    )
