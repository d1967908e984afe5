"""Computes the residuals of decoded tokens, in one more forward pass at the recorded depths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.errors import UserError
from jexit.model.cache import prompt_bucket
from jexit.model.policies import Policy, Prescribed
from jexit.model.transformer import Transformer, run

POSITIONS = 4096  # of one pass


def residuals_of(
    model: Transformer,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    depths: Sequence[Sequence[int]],
    layers: tuple[int, ...],
    *,
    adapters: bool = True,
) -> list[np.ndarray]:
    """Returns, for each completion, the residuals [tokens, R, D] that enter the R layers `layers`.

    In `layers`, the number of layers means the residual after the last layer. Entry i along the
    first axis is for the pass that produced token i of the completion; the arrays are float32.
    Prompts run all layers, and completions run at `depths`, which has one entry per token (the
    first is ignored).
    """
    whole = model.arch.layers
    found: list[np.ndarray] = []
    lengths = [len(prompt) + len(ids) - 1 for prompt, ids in zip(prompts, completions, strict=True)]
    width = prompt_bucket(max(lengths))
    rows = max(1, min(len(prompts), POSITIONS // width))
    for first in range(0, len(prompts), rows):
        tokens_BT = np.zeros((rows, width), np.int32)
        depth_BT = np.full((rows, width), whole, np.int32)
        length_B = np.ones(rows, np.int32)
        here = range(first, min(first + rows, len(prompts)))
        for row, index in enumerate(here):
            prompt, length = prompts[index], lengths[index]
            tokens_BT[row, :length] = [*prompt, *completions[index][:-1]]
            depth_BT[row, len(prompt) : length] = depths[index][1:]
            length_B[row] = length
        kept_RBTD = _residuals(
            model, tokens_BT, length_B, Prescribed(depth_BT), layers=layers, adapters=adapters
        )
        for row, index in enumerate(here):
            part = slice(len(prompts[index]) - 1, lengths[index])
            found.append(np.moveaxis(np.asarray(kept_RBTD[:, row, part], np.float32), 0, 1))
    return found


@nnx.jit(static_argnames=("layers", "adapters"))
def _residuals(
    model: Transformer, tokens_BT: Any, length_B: Any, policy: Policy, *, layers: Any, adapters: Any
) -> Any:
    valid_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    return run(
        model,
        tokens_BT,
        policy=policy,
        valid_BT=valid_BT,
        adapters=adapters,
        residual_layers=layers,
    ).residual_RBTD


def checked_layers(layers: Any, most: int) -> tuple[int, ...]:
    """Returns `layers` as a tuple; raises UserError unless they increase strictly in 0 … `most`.

    `most` is the number of layers.
    """
    known = isinstance(layers, Sequence) and all(
        isinstance(layer, int | np.integer) and not isinstance(layer, bool) and 0 <= layer <= most
        for layer in layers
    )
    if not known or list(layers) != sorted(set(layers)):
        raise UserError(
            f"residuals is {layers}, but it must be layer numbers from 0 to {most} in rising "
            f"order; give a tuple such as (0, {most})"
        )
    return tuple(layers)
