"""What decoding has to give, from one teacher-forced pass over what it gave.

`forward` knows neither caches nor pools, and sees all tokens at once at the recorded depths. With
its logits and hazards, and the numbers that a request's key gives for every prompt, sample and
token, each token and each depth is drawn anew.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jexit.model.policies import Policy, Prescribed
from jexit.model.transformer import Transformer, forward
from jexit.rollout import Request, Rollouts
from tolerances import LOGPROBS

LENGTHS = (32, 64, 128)  # of a pass, against compilations


def assert_as_teacher_forced(model: Transformer, request: Request, made: Rollouts) -> None:
    """Tokens, depths and their log-probabilities, ends, padding and recorded hazards."""
    depths, samples = (*model.exit_layers, model.arch.layers), request.samples_per_prompt
    prompts = [prompt for prompt in request.prompts for _ in range(samples)]
    rows, width = made.tokens_BT.shape
    assert rows == len(prompts) and width == request.max_new_tokens
    start_B = np.asarray([len(prompt) for prompt in prompts])
    total = int((start_B + made.lengths_B).max())
    shape = (rows, next(length for length in LENGTHS if length >= total))
    tokens_BT, depth_BT = np.full(shape, request.pad_id), np.full(shape, depths[-1])
    for row, (start, new) in enumerate(zip(start_B, made.lengths_B, strict=True)):
        tokens_BT[row, : start + new] = prompts[row] + made.completion(row)
        depth_BT[row, start - 1 : start - 1 + new] = made.depths_BT[row, :new]
    out = forward(
        model, tokens_BT, start_B + made.lengths_B, policy=Prescribed(depth_BT),
        adapters=request.adapters,
    )  # fmt: skip
    # The pass that makes token c of a completion stands one position before it.
    pass_BC = np.minimum(start_B[:, None] - 1 + np.arange(width), shape[1] - 1)[..., None]
    logits_BCV = np.take_along_axis(np.asarray(out.logits_BTV), pass_BC, axis=1)
    z_BCE = np.take_along_axis(np.asarray(out.hazard_logits_BTE), pass_BC, axis=1)
    number_B, sample_B = np.divmod(np.arange(rows), samples)
    token_BC, logprob_BC, depth_BC, depth_logprob_BC = _drawn(
        request.policy, request.sampling, request.prng_key, number_B + request.first_prompt,
        sample_B, logits_BCV, z_BCE, depths=depths,
    )  # fmt: skip

    there_BC = np.arange(width) < made.lengths_B[:, None]
    for name, wanted_BC, padding in (
        ("tokens_BT", token_BC, request.pad_id),
        ("depths_BT", depth_BC, 0),
        ("logprobs_BT", logprob_BC, 0.0),
        ("depth_logprobs_BT", depth_logprob_BC, 0.0),
    ):
        if not hasattr(made, name):  # a running pool tells nobody
            continue
        wanted_BC = np.where(there_BC, wanted_BC, padding)
        tolerance = LOGPROBS if "logprob" in name else 0
        np.testing.assert_allclose(getattr(made, name), wanted_BC, 0, tolerance, err_msg=name)
    if request.hazards:  # which the prompt's pass does not read, nor one that has left before
        reached_BCE = np.asarray(depths[:-1]) <= made.depths_BT[..., None]
        reached_BCE &= there_BC[..., None] & (np.arange(width) > 0)[:, None]
        wanted_BCE = np.where(reached_BCE, z_BCE, np.nan)
        np.testing.assert_allclose(made.hazard_logits_BTE, wanted_BCE, 0, LOGPROBS)
    ends_BC = np.isin(token_BC, list(request.eos_ids)) & there_BC
    length_B = np.where(ends_BC.any(axis=1), ends_BC.argmax(axis=1) + 1, width)
    np.testing.assert_array_equal(made.lengths_B, length_B)
    np.testing.assert_array_equal(made.truncated_B, ~ends_BC.any(axis=1))


@functools.partial(jax.jit, static_argnames="depths")
def _drawn(
    policy: Policy,
    sampling: Any,
    key: Any,
    number_B: Any,
    sample_B: Any,
    logits_BCV: Any,
    z_BCE: Any,
    *,
    depths: tuple[int, ...],
) -> tuple[Any, ...]:
    """(tokens, log-probabilities, depths, log-probabilities of those), [B, C] each."""
    rows, width, exits = z_BCE.shape
    row_N, column_N = (index.reshape(-1) for index in jnp.mgrid[:rows, :width])
    fold = jax.vmap(jax.random.fold_in)
    keys_N = jnp.broadcast_to(key, rows * width)
    for numbers_N in (number_B[row_N], sample_B[row_N], column_N):
        keys_N = fold(keys_N, numbers_N)

    def draw_of(number: int) -> Any:
        return fold(keys_N, jnp.full(rows * width, number))

    token_N, logprob_N = sampling.draw(logits_BCV.reshape(rows * width, -1), draw_of(0))
    z_NE, policy = z_BCE.reshape(-1, exits), policy.at(row_N, column_N)
    depth_N = policy.start(row_N.shape, depths[-1])
    for index, layers in enumerate(depths[:-1]):
        leaves_N = policy.leaves_by_row(z_NE[:, index], draw_of(1 + index))
        depth_N = jnp.where(leaves_N & (layers < depth_N), layers, depth_N)
    free_N = column_N > 0
    depth_N = jnp.where(free_N, depth_N, depths[-1])
    depth_logprob_N = jnp.where(free_N, policy.log_prob(depth_N, z_NE, depths), 0.0)
    return tuple(
        values_N.reshape(rows, width) for values_N in (token_N, logprob_N, depth_N, depth_logprob_N)
    )
