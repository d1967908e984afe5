"""Tests with linear probes whether residuals predict later tokens of the completion.

A probe reads, at an exit, the residual of the pass that produces token t, and predicts token t + k.
If the model uses depth to plan ahead, shallow residuals predict later tokens less well. A probe can
also succeed because of the token that the pass reads, so the control is the same probe on the
embedding of this token. (After Pal et al. 2023, arXiv:2311.04897, with ridge regression.)
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Bool, Float, Int
from jexit.evaluation.intervals import bootstrap_ratio_difference
from jexit.evaluation.replay import Recorded
from jexit.model.policies import Prescribed
from jexit.model.transformer import run
from jexit.results import Planning
from jexit.rollout import Decodable
from jexit.steps.completions import Completions

AHEAD = (1, 2, 3, 4)
MOST_POSITIONS = 32_768  # completions times the longest one, of which residuals are in memory
RIDGE = 1e-2  # relative to the number of passes, for features of unit variance


@functools.partial(jax.jit, static_argnames=("graphdef", "layers"))
def residuals_at(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    rows: Completions,
    depth_BC: Int[Array, "B C"],
    *,
    layers: tuple[int, ...],
) -> tuple[Float[Array, "B C R D"]]:
    """Returns the residuals that enter the R `layers`, in the passes that produce completions.

    The result is a tuple of one array, [B, C, R, D]. Layers count from 0; for an entry equal to the
    number of layers, the residual is that after the last layer. Each pass runs `depth_BC` layers.
    In the layers that it skips, its residual follows the model's continuation.
    """
    model = nnx.merge(graphdef, *states)
    policy = Prescribed(rows.input_depths(depth_BC, model.arch.layers))
    result = run(model, rows.tokens_BT, policy=policy, **rows.layout, residual_layers=layers)
    return (jnp.moveaxis(jax.vmap(rows.window)(result.residual_RBTD), 0, 2),)


def planning(
    policy: str, student: Decodable, exit_layers: Sequence[int], layers: int, recorded: Recorded
) -> list[Planning]:
    """Measures how well probes at each exit, and after the last layer, predict later tokens.

    `policy` is the name of the policy that produced `recorded`, and `student` the model as
    (graphdef, *states). Probes are fitted on every second completion and measured on the others. A
    distance (number of tokens ahead) is left out if either half has no pass for it.
    """
    recorded = _first(recorded)
    below = (0, *exit_layers, layers)
    (residual_BCRD,) = recorded.through(
        lambda rows, depth_BC: residuals_at(student[0], student[1:], rows, depth_BC, layers=below)
    )
    found = []
    for ahead in AHEAD:
        pairs = [
            (row, index, ids[index + ahead])
            for row, ids in enumerate(recorded.completions)
            for index in range(len(ids) - ahead)
        ]
        row_N, index_N, token_N = np.asarray(pairs, np.int64).reshape(-1, 3).T
        fits_N = row_N % 2 == 0
        if fits_N.all() or not fits_N.any():
            continue
        row_M = np.unique(row_N[~fits_N], return_inverse=True)[1]
        passes = np.bincount(row_M)
        hits_R = [
            np.bincount(row_M, probe(residual_BCRD[row_N, index_N, number], token_N, fits_N))
            for number in range(len(below))
        ]
        for layer, hits in zip(below[1:], hits_R[1:], strict=True):
            found.append(
                Planning(
                    policy=policy,
                    layer=layer,
                    ahead=ahead,
                    accuracy=float(hits.sum() / passes.sum()),
                    accuracy_embedding=float(hits_R[0].sum() / passes.sum()),
                    gain_ci95=bootstrap_ratio_difference((hits, passes), (hits_R[0], passes)),
                    passes=int(passes.sum()),
                )
            )
    return found


def probe(
    x_ND: np.ndarray, token_N: np.ndarray, fits_N: Bool[np.ndarray, "N"]
) -> Bool[np.ndarray, "M"]:
    """Fits a linear probe, and returns whether it predicts each of the tokens left out of the fit.

    The probe is the ridge regression of the one-hot tokens `token_N` on the standardised features
    `x_ND` and a bias. It is fitted on the rows in the mask `fits_N`, and never predicts a token
    that does not occur in these rows. The result [M] has an entry for each of the other rows, in
    order.
    """
    known_V, class_N = np.unique(token_N[fits_N], return_inverse=True)
    x_ND = x_ND.astype(np.float64)
    x_ND = (x_ND - x_ND[fits_N].mean(axis=0)) / (x_ND[fits_N].std(axis=0) + 1e-6)
    y_NV = np.eye(len(known_V))[class_N]
    fit_ND, bias_V = x_ND[fits_N], y_NV.mean(axis=0)
    gram_DD = fit_ND.T @ fit_ND + RIDGE * len(fit_ND) * np.eye(x_ND.shape[1])
    weights_DV = np.linalg.solve(gram_DD, fit_ND.T @ (y_NV - bias_V))
    return known_V[(x_ND[~fits_N] @ weights_DV + bias_V).argmax(axis=1)] == token_N[~fits_N]


def _first(recorded: Recorded) -> Recorded:
    """Returns the first completions that fit in `MOST_POSITIONS` padded tokens, at least two."""
    longest = np.maximum.accumulate([len(ids) for ids in recorded.completions])
    padded = longest * np.arange(1, len(longest) + 1)
    count = max(2, int(np.searchsorted(padded, MOST_POSITIONS, side="right")))
    return Recorded(
        recorded.prompts[:count],
        recorded.completions[:count],
        recorded.depths[:count],
        recorded.pad_id,
    )
