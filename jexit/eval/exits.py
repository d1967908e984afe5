"""What each exit says of a text, against the last layer, and what leaving early does to it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Bool, Float, HiddenBTD, Int
from jexit.eval.hazards import Recorded, SplitModel
from jexit.kernels import exit_kl
from jexit.model.policies import Full, Prescribed
from jexit.model.transformer import Transformer, exit_hidden_states, run
from jexit.steps.completions import Completions

CLOSE = 0.05  # nats; a token whose exit is so close to the last layer could leave there
THRESHOLDS = (0.05, 0.2)


def _against(
    final_BCD: HiddenBTD, other_EBCD: Float[Array, "E B C D"], head_VD: Array
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"]]:
    """(KL(final ‖ other) in nats, whether their greedy tokens are the same)."""
    shape = other_EBCD.shape
    found = exit_kl(
        final_BCD.reshape(-1, shape[-1]), other_EBCD.reshape(shape[0], -1, shape[-1]), head_VD
    )
    return tuple(
        jnp.moveaxis(part.reshape(shape[:3]), 0, -1) for part in (found.kl_EN, found.agree_EN)
    )


def _last_layer(model: Transformer, rows: Completions) -> Any:
    return run(model, rows.tokens_BT, policy=Full(), valid_BT=rows.valid_BT, exit_residual=True)


@functools.partial(jax.jit, static_argnames="graphdef")
def of_exits(
    graphdef: nnx.GraphDef, states: tuple[nnx.State, ...], rows: Completions
) -> tuple[Float[Array, "B C E"], Bool[Array, "B C E"]]:
    """KL(π_L ‖ π_e) in nats, and whether both have the same greedy token.

    All tokens before have run all layers.
    """
    model = nnx.merge(graphdef, *states)
    full = _last_layer(model, rows)
    residual_EBCD = jax.vmap(rows.window)(full.exit_residual_EBTD)
    exits_EBCD = exit_hidden_states(model, residual_EBCD, model.blocks.continuation)
    return _against(rows.window(full.hidden_BTD), exits_EBCD, model.head_VD)


@functools.partial(jax.jit, static_argnames="graphdef")
def under_depths(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    rows: Completions,
    depth_BC: Int[Array, "B C"],
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"]]:
    """The same of a text all of whose tokens run `depth_BC` layers, at once."""
    model = nnx.merge(graphdef, *states)
    depth_BT = rows.input_depths(depth_BC, model.arch.layers)
    early = run(model, rows.tokens_BT, policy=Prescribed(depth_BT), valid_BT=rows.valid_BT)
    kl_BCE, same_BCE = _against(
        rows.window(_last_layer(model, rows).hidden_BTD),
        rows.window(early.hidden_BTD)[None],
        model.head_VD,
    )
    return kl_BCE[..., 0], same_BCE[..., 0]


def exit_quality(
    student: SplitModel, exit_layers: Sequence[int], layers: int, recorded: Recorded
) -> dict[str, Any]:
    """How close each exit comes to the last layer over completions, and all exits together.

    `exits` has for each exit, over the passes that could leave: the mean KL(π_L ‖ π_e) in nats, the
    share of them with the same greedy token, and the share under `CLOSE` nats. `leaving` has for
    each threshold what happens when every token leaves at the first exit under it, all at once, the
    text given: depth, KL and agreement, and the agreement of the tokens that still run all layers,
    which read keys and values of those that have left.
    """
    kl_BCE, same_BCE = recorded.through(lambda rows, _: of_exits(student[0], student[1:], rows))
    lengths = [len(ids) for ids in recorded.completions]

    def passes(values_BCX: np.ndarray) -> np.ndarray:
        return np.concatenate([row[1:n] for row, n in zip(values_BCX, lengths, strict=True)])

    kl_NE, same_NE = passes(kl_BCE), passes(same_BCE)
    exits = [
        {
            "exit": int(layer),
            "kl_nats": float(kl_NE[:, index].mean()),
            "same_token": float(same_NE[:, index].mean()),
            "close": float((kl_NE[:, index] < CLOSE).mean()),
        }
        for index, layer in enumerate(exit_layers)
    ]
    leaving = []
    for threshold in THRESHOLDS:
        under_BCE = np.concatenate([kl_BCE < threshold, np.ones((*kl_BCE.shape[:2], 1), bool)], -1)
        depth_BC = np.asarray([*exit_layers, layers])[under_BCE.argmax(-1)]
        depths = [[layers, *row[1:n]] for row, n in zip(depth_BC.tolist(), lengths, strict=True)]
        left = Recorded(recorded.prompts, recorded.completions, depths, recorded.pad_id)
        kl_BC, kept_BC = left.through(
            lambda rows, depth_BC: under_depths(student[0], student[1:], rows, depth_BC)
        )
        kl_N, kept_N, depth_N = passes(kl_BC), passes(kept_BC), passes(depth_BC)
        stayed_N = depth_N == layers
        leaving.append(
            {
                "threshold_nats": threshold,
                "depth_fraction": float(depth_N.mean() / layers),
                "kl_nats": float(kl_N.mean()),
                "same_token": float(kept_N.mean()),
                "same_token_full_depth": float(kept_N[stayed_N].mean()) if stayed_N.any() else None,
            }
        )
    return {"passes": len(kl_NE), "exits": exits, "leaving": leaving}
