"""`linear_logprob` by tiles, on one device or a mesh; the backward pass recomputes the logits."""

import functools
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from jexit.kernels.linear_logprob import statistics
from jexit.kernels.linear_logprob.reference import LinearLogprob
from jexit.kernels.linear_logprob.statistics import FinishedLogprob
from jexit.kernels.shards import Shards


class TiledLogprob(NamedTuple):
    """The two functions that an implementation provides; each computes one device's share.

    Attributes:
      statistics: `(h_ND, head_VD, targets_N)` → `LogprobStatistics` [N]. Target 0 is the first row
        of the device's `head_VD`; targets may lie outside of this head.
      gradients: `(h_ND, head_VD, targets_N, finished, g, head_dtype)` → dh_ND in float32, and
        dhead_VD in `head_dtype`, or None if `head_dtype` is None. `g` contains the derivative of
        the loss with respect to each output, or None for an output that the loss does not use;
        gradients of tokens for which all of these are 0 must be 0.
    """

    statistics: Callable[..., statistics.LogprobStatistics]
    gradients: Callable[..., tuple[jax.Array, jax.Array | None]]


class _LogprobStatic(NamedTuple):
    tiled: TiledLogprob
    shards: Shards


def linear_logprob(
    tiled: TiledLogprob, h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array
) -> LinearLogprob:
    """Implements `jexit.kernels.linear_logprob` on one device or a mesh.

    `tiled` contains the two functions that compute one device's statistics and gradients.
    """
    shards, tokens = Shards.current(head_VD.shape[0]), h_ND.shape[0]
    out = _linear_logprob(
        _LogprobStatic(tiled, shards),
        shards.pad_tokens(h_ND),
        head_VD,
        shards.pad_tokens(targets_N),
    )
    return jax.tree.map(lambda array_N: array_N[:tokens], out)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _linear_logprob(
    static: _LogprobStatic, h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array
) -> LinearLogprob:
    return _finished(static, h_ND, head_VD, targets_N).out


def _finished(
    static: _LogprobStatic, h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array
) -> FinishedLogprob:
    shards = static.shards

    def local(h_ND: jax.Array, head_VD: jax.Array, targets_N: jax.Array) -> FinishedLogprob:
        start = shards.vocab_start(head_VD.shape[0])
        total = static.tiled.statistics(h_ND, head_VD, targets_N - start)
        return statistics.finish(shards.merged(total, lambda *pair: statistics.merge(*pair)[0]))

    specs = (shards.tokens, shards.vocab, shards.tokens)
    return shards.run(local, (h_ND, head_VD, targets_N), specs, shards.tokens)


def _forward(static: _LogprobStatic, *arguments: Any) -> tuple[LinearLogprob, tuple[Any, ...]]:
    """Returns the outputs for N tokens, [N] each, and the residuals for `_backward`.

    This is the forward rule of the custom VJP `_linear_logprob`. Because of `symbolic_zeros`, each
    argument is a pair: `value` is the array, and `perturbed` is True if it is differentiated. The
    residuals are (arrays, statistics, whether the head is differentiated).
    """
    values = tuple(pair.value for pair in arguments)
    finished = _finished(static, *values)
    return finished.out, (values, finished, arguments[1].perturbed)


def _backward(
    static: _LogprobStatic, residuals: tuple[Any, ...], g: LinearLogprob
) -> tuple[Any, ...]:
    (h_ND, head_VD, targets_N), finished, head_trains = residuals
    shards = static.shards
    g, live_N = used(g)
    head_dtype = None
    if head_trains:  # devices' shares are summed in float32
        head_dtype = jnp.float32 if shards.token_axes else head_VD.dtype

    def local(
        h_ND: jax.Array,
        head_VD: jax.Array,
        targets_N: jax.Array,
        finished: FinishedLogprob,
        g: LinearLogprob,
    ) -> tuple[jax.Array, jax.Array | None]:
        targets_N = targets_N - shards.vocab_start(head_VD.shape[0])
        dh_ND, dhead_VD = static.tiled.gradients(h_ND, head_VD, targets_N, finished, g, head_dtype)
        dhead_VD = None if dhead_VD is None else shards.sum_over_tokens(dhead_VD)
        return shards.sum_over_vocab(dh_ND), dhead_VD

    tokens, vocab = shards.tokens, shards.vocab
    dh_ND, dhead_VD = shards.run(
        local,
        # A row that the loss masks out must not bring in its NaN.
        (jnp.where(live_N[:, None], h_ND, 0), head_VD, targets_N, finished, g),
        (tokens, vocab, tokens, tokens, tokens),
        (tokens, vocab),
    )
    dhead_VD = None if dhead_VD is None else dhead_VD.astype(head_VD.dtype)
    return dh_ND.astype(h_ND.dtype), dhead_VD, None


_linear_logprob.defvjp(_forward, _backward, symbolic_zeros=True)


def used(g: LinearLogprob) -> tuple[LinearLogprob, jax.Array]:
    """Returns `g` with None for outputs that the loss does not use, and a mask of the used tokens.

    `g` contains the cotangents of the op's outputs.
    """
    g = LinearLogprob(*(None if isinstance(g_N, SymbolicZero) else g_N for g_N in g))
    return g, live(g)


def live(g: LinearLogprob) -> jax.Array:
    """Returns a mask [N] of the tokens for which the cotangent of at least one output is not 0."""
    return functools.reduce(jnp.logical_or, [g_N != 0 for g_N in g if g_N is not None])
