"""Compares each exit's predictions with the last layer's, and measures the cost of early exits."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array
from jexit.evaluation.replay import Recorded
from jexit.model.exits import depth_of_exit_index
from jexit.model.policies import Prescribed
from jexit.model.transformer import run
from jexit.results import EarlyLeaving, ExitAgreement, ExitQuality
from jexit.rollout import Decodable
from jexit.steps.completions import Completions
from jexit.steps.targets import exits_against_last_layer, kl_and_agreement

CLOSE = 0.05  # nats; a token could leave at an exit whose KL to the last layer is below this
THRESHOLDS = (0.05, 0.2)


@functools.partial(jax.jit, static_argnames="graphdef")
def compare_exits(
    graphdef: nnx.GraphDef, states: tuple[nnx.State, ...], rows: Completions
) -> tuple[Array, ...]:
    """Compares the predictions at each exit with those after the last layer.

    `rows` contains B sequences with C completion tokens each, and the model has E exits. The first
    two outputs, [B, C, E], are KL(π_L ‖ π_e) in nats and whether π_L and π_e have the same most
    likely token. Here π_e is the next-token distribution at exit e, and π_L the one after the last
    layer, when all earlier tokens ran every layer. Three outputs [B, C] follow for each
    threshold in `THRESHOLDS`: depth, KL and agreement when every token leaves at the first exit
    whose KL is below the threshold.
    """
    model = nnx.merge(graphdef, *states)
    exit_layers, layers = model.exit_layers, model.arch.layers
    final_BCD, _, kl_BCE, same_BCE = exits_against_last_layer(
        model, rows, model.blocks.continuation
    )

    def leaving(threshold: float) -> tuple[Array, Array, Array]:
        under_BCE = jnp.pad(kl_BCE < threshold, ((0, 0), (0, 0), (0, 1)), constant_values=True)
        depth_BC = depth_of_exit_index(jnp.argmax(under_BCE, axis=-1), exit_layers, layers)
        policy = Prescribed(rows.input_depths(depth_BC, layers))
        early = run(model, rows.tokens_BT, policy=policy, **rows.layout)
        found = kl_and_agreement(final_BCD, rows.window(early.hidden_BTD)[None], model.head_VD)
        return depth_BC, *(part_BCE[..., 0] for part_BCE in found)

    return kl_BCE, same_BCE, *(part for threshold in THRESHOLDS for part in leaving(threshold))


def exit_quality(
    policy: str, student: Decodable, exit_layers: Sequence[int], layers: int, recorded: Recorded
) -> ExitQuality:
    """Measures how close each exit's predictions are to the last layer's, on given completions.

    `policy` is the name of the policy that produced `recorded`, and `student` the model as
    (graphdef, *states). The averages leave out the first token of each completion. The field
    `exits` of the result contains the agreement of each exit alone. The field `leaving` contains,
    for each threshold in `THRESHOLDS`, the agreement when every token leaves at the first exit
    whose KL is below the threshold. Tokens that run all layers then attend to keys and values of
    tokens that have left.
    """
    found = recorded.through(lambda rows, _: compare_exits(student[0], student[1:], rows))
    lengths = [len(ids) for ids in recorded.completions]

    def passes(values_BCX: np.ndarray) -> np.ndarray:
        return np.concatenate([row[1:n] for row, n in zip(values_BCX, lengths, strict=True)])

    kl_NE, same_NE, *rest = map(passes, found)
    exits = [
        ExitAgreement(
            exit=int(layer),
            kl_nats=float(kl_NE[:, index].mean()),
            same_token=float(same_NE[:, index].mean()),
            close=float((kl_NE[:, index] < CLOSE).mean()),
        )
        for index, layer in enumerate(exit_layers)
    ]
    leaving = []
    for threshold, depth_N, kl_N, kept_N in zip(
        THRESHOLDS, rest[0::3], rest[1::3], rest[2::3], strict=True
    ):
        stayed_N = depth_N == layers
        leaving.append(
            EarlyLeaving(
                threshold_nats=threshold,
                depth_fraction=float(depth_N.mean() / layers),
                kl_nats=float(kl_N.mean()),
                same_token=float(kept_N.mean()),
                same_token_full_depth=float(kept_N[stayed_N].mean())
                if stayed_N.any()
                else math.nan,
            )
        )
    return ExitQuality(policy=policy, passes=len(kl_NE), exits=tuple(exits), leaving=tuple(leaving))
