"""`linear_kl` by tiles, on one device or a mesh; the backward pass recomputes the logits."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jexit.kernels.linear_kl import statistics
from jexit.kernels.linear_kl.statistics import FinishedKL
from jexit.kernels.shards import Shards


class TiledKL(NamedTuple):
    """The two functions that an implementation provides; each computes one device's share.

    Attributes:
      statistics: `(direction, h_student_ND, h_teacher_ND, head_VD, head_teacher_VD)` →
        `KLStatistics` [N].
      gradients: `(direction, h_student_ND, h_teacher_ND, head_VD, head_teacher_VD, finished, g_N,
        head_dtype)` → dh_ND in float32, and dhead_VD in `head_dtype`, or None if `head_dtype` is
        None. g_N is the derivative of the loss with respect to each token's KL; gradients of tokens
        with g = 0 must be 0.
    """

    statistics: Callable[..., statistics.KLStatistics]
    gradients: Callable[..., tuple[jax.Array, jax.Array | None]]


class _KLStatic(NamedTuple):
    tiled: TiledKL
    direction: str
    shards: Shards


def linear_kl(
    tiled: TiledKL,
    h_student_ND: jax.Array,
    h_teacher_ND: jax.Array,
    head_VD: jax.Array,
    head_teacher_VD: jax.Array | None,
    direction: str,
) -> jax.Array:
    """Implements `jexit.kernels.linear_kl` on one device or a mesh.

    `tiled` contains the two functions that run on each device: one computes softmax statistics over
    the device's part of the vocabulary, and the other computes gradients.
    """
    shards, tokens = Shards.current(head_VD.shape[0]), h_student_ND.shape[0]
    hidden = (shards.pad_tokens(h_student_ND), shards.pad_tokens(h_teacher_ND))
    static = _KLStatic(tiled, direction, shards)
    return _linear_kl(static, *hidden, head_VD, head_teacher_VD)[:tokens]


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_kl(static: _KLStatic, *arguments: Any) -> jax.Array:
    return _finished(static, *arguments).kl


def _finished(static: _KLStatic, *arguments: Any) -> FinishedKL:
    shards = static.shards

    def local(*arguments: Any) -> FinishedKL:
        total = static.tiled.statistics(static.direction, *arguments)
        return statistics.finish(shards.merged(total, lambda *pair: statistics.merge(*pair)[0]))

    specs = (shards.tokens, shards.tokens, shards.vocab, shards.vocab)
    return shards.run(local, arguments, specs, shards.tokens)


def _forward(static: _KLStatic, *arguments: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    """Returns the KL [N] of N tokens in nats, and the residuals for `_backward`.

    This is the forward rule of the custom VJP `_linear_kl`, with the KL in `static.direction`.
    Because of `symbolic_zeros`, each argument is a pair: `value` is the array, and `perturbed` is
    True if it is differentiated. The residuals are (arrays, statistics, whether the head is
    differentiated).
    """
    head_trains = arguments[2].perturbed
    values = tuple(None if pair is None else pair.value for pair in arguments)
    finished = _finished(static, *values)
    return finished.kl, (values, finished, head_trains)


def _backward(static: _KLStatic, residuals: tuple[Any, ...], g_N: jax.Array) -> tuple[Any, ...]:
    arguments, finished, head_trains = residuals
    h_student_ND, _, head_VD, _ = arguments
    shards = static.shards
    head_dtype = None
    if head_trains:  # devices' shares are summed in float32
        head_dtype = jnp.float32 if shards.token_axes else head_VD.dtype

    def local(*arguments: Any) -> tuple[jax.Array, jax.Array | None]:
        *operands, finished, g_N = arguments
        dh_ND, dhead_VD = static.tiled.gradients(
            static.direction, *operands, finished, g_N, head_dtype
        )
        dhead_VD = None if dhead_VD is None else shards.sum_over_tokens(dhead_VD)
        return shards.sum_over_vocab(dh_ND), dhead_VD

    # A row that the loss masks out must not bring in its NaN.
    h_student_ND = jnp.where((g_N != 0)[:, None], h_student_ND, 0)
    tokens, vocab = shards.tokens, shards.vocab
    dh_ND, dhead_VD = shards.run(
        local,
        (h_student_ND, *arguments[1:], finished, g_N),
        (tokens, tokens, vocab, vocab, tokens, tokens),
        (tokens, vocab),
    )
    dhead_VD = None if dhead_VD is None else dhead_VD.astype(head_VD.dtype)
    return dh_ND.astype(h_student_ND.dtype), None, dhead_VD, None


_linear_kl.defvjp(_forward, _backward, symbolic_zeros=True)
