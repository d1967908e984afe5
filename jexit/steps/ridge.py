"""Fits the linear continuation by ridge regression, from sums over the teacher's tokens.

The continuation replaces each layer that a token skips with an affine map. One pass over the
trajectories accumulates the sums on the devices; the host solves for the maps in float64. The map
of layer m is fitted on the inputs that it will receive: the residuals at every exit up to m, with
equal weight per exit, after the maps of the layers from that exit to m. Let x be such an input, y
the residual of the same token at full depth after layer m, and u = y − x. Over positions whose pass
may leave early:

    A = argmin Σ |(u − ū) − (x − x̄) A|² + strength · n · Σ_d var(x_d) |A_d|²,   b = ū − x̄ A

The `strength` of the penalty is thus relative to the variance of each input. The fit uses the
strength from `STRENGTHS` that predicts held-back trajectories best. Every x is a linear function of
a residual at an exit, so the sums contain only the covariances of these residuals with the
residuals after later layers.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg
from flax import struct

from jexit.axes import Array, Float
from jexit.dist import constrain
from jexit.model.policies import Full
from jexit.model.transformer import run
from jexit.steps.completions import Completions
from jexit.steps.state import FixedParams, Params, SplitModel

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0, math.inf)
SMALLEST = 1e-12  # variance of an input, over the largest one, below which it counts as constant
ORIGINS = ("x_origin_ED", "v_origin_PD")  # fields of RidgeSums


@struct.dataclass
class RidgeSums:
    """Sums over tokens for the ridge fit: of residuals x at the exits and of displacements v.

    A pair P (see `pairs`) is an exit and a layer m that a token skips after it has left there. The
    displacement v = h_{m+1} − x of a pair is the change of the residual from the exit to the output
    of layer m at full depth. An origin near the mean is subtracted from all values, because float32
    sums would otherwise lose the differences between tokens. The origin is the mean of the first
    batch, or a copy of the origin of other sums (`cleared`).
    """

    count: Float[Array, ""]
    x_origin_ED: Float[Array, "E D"]
    v_origin_PD: Float[Array, "P D"]
    x_ED: Float[Array, "E D"]
    v_PD: Float[Array, "P D"]
    xx_EDD: Float[Array, "E D D"]
    xv_PDD: Float[Array, "P D D"]
    vv_PD: Float[Array, "P D"]

    @classmethod
    def zero(cls, exit_layers: tuple[int, ...], layers: int, width: int) -> RidgeSums:
        exits, count = len(exit_layers), len(pairs(exit_layers, layers))

        def vector(rows: int) -> Array:
            return jnp.zeros((rows, width))

        def matrix(rows: int) -> Array:
            return constrain(jnp.zeros((rows, width, width)), "LDF")

        # Separate arrays, because each is donated.
        return cls(
            count=jnp.zeros(()),
            x_origin_ED=vector(exits),
            v_origin_PD=vector(count),
            x_ED=vector(exits),
            v_PD=vector(count),
            xx_EDD=matrix(exits),
            xv_PDD=matrix(count),
            vv_PD=vector(count),
        )

    def cleared(self) -> RidgeSums:
        """Returns a copy in which all sums are zero and only the origins are kept."""
        return RidgeSums(
            **{
                f.name: (jnp.copy if f.name in ORIGINS else jnp.zeros_like)(getattr(self, f.name))
                for f in dataclasses.fields(RidgeSums)
            }
        )


def pairs(exit_layers: tuple[int, ...], layers: int) -> list[tuple[int, int]]:
    """Returns (exit index, layer) for each exit and each layer that a token leaving there skips.

    The pairs are sorted. `layers` is the number of layers.
    """
    return [(e, m) for e, first in enumerate(exit_layers) for m in range(first, layers)]


def make_sums_step(
    split: SplitModel,
) -> Callable[[RidgeSums, Params, FixedParams, Completions], RidgeSums]:
    """Returns the jitted step (sums, trainable, fixed, batch) → sums, which adds the batch.

    The model runs at full depth. Only tokens whose pass could leave early count.
    """
    model = split.student(split.trainable)
    exits = len(model.exit_layers)
    exit_P, layer_P = np.asarray(pairs(model.exit_layers, model.arch.layers), np.int32).T

    def product(left_BCD: Array, right_BCD: Array) -> Array:
        return jnp.einsum("BCd,BCD->dD", left_BCD, right_BCD, precision=jax.lax.Precision.HIGHEST)

    def step(
        sums: RidgeSums, trainable: Params, fixed: FixedParams, batch: Completions
    ) -> RidgeSums:
        weight_BC = batch.action_BC.astype(jnp.float32)
        count = jnp.sum(weight_BC)
        first = sums.count == 0.0

        def centred(values_BCD: Array, origin_D: Array) -> tuple[Array, Array]:
            """Returns (masked values − origin, origin).

            In the first batch, an origin of 0 is replaced by the mean of the values.
            """
            mean_D = jnp.einsum("BCD,BC->D", values_BCD, weight_BC) / jnp.maximum(count, 1.0)
            origin_D = jnp.where(first & ~jnp.any(origin_D), mean_D, origin_D)
            return (values_BCD - origin_D) * weight_BC[..., None], origin_D

        student = split.student(trainable, fixed)
        result = run(
            student,
            batch.tokens_BT,
            policy=Full(),
            **batch.layout,
            residual_layers=student.exit_layers,
            observe=lambda _, new_BTD, seen: batch.window(new_BTD),
        )
        residual_EBCD = jax.vmap(batch.window)(result.residual_RBTD).astype(jnp.float32)

        def at_exit(e: Array, sums: RidgeSums) -> RidgeSums:
            x_BCD, origin_D = centred(residual_EBCD[e], sums.x_origin_ED[e])
            return sums.replace(
                x_origin_ED=sums.x_origin_ED.at[e].set(origin_D),
                x_ED=sums.x_ED.at[e].add(jnp.sum(x_BCD, (0, 1))),
                xx_EDD=sums.xx_EDD.at[e].add(product(x_BCD, x_BCD)),
            )

        sums = jax.lax.fori_loop(0, exits, at_exit, sums)

        def of_pair(p: Array, sums: RidgeSums) -> RidgeSums:
            e = jnp.asarray(exit_P)[p]
            residual_BCD = residual_EBCD[e]
            x_BCD = (residual_BCD - sums.x_origin_ED[e]) * weight_BC[..., None]
            moved_BCD = result.observed[jnp.asarray(layer_P)[p]].astype(jnp.float32) - residual_BCD
            v_BCD, origin_D = centred(moved_BCD, sums.v_origin_PD[p])
            return sums.replace(
                v_origin_PD=sums.v_origin_PD.at[p].set(origin_D),
                v_PD=sums.v_PD.at[p].add(jnp.sum(v_BCD, (0, 1))),
                xv_PDD=sums.xv_PDD.at[p].add(product(x_BCD, v_BCD)),
                vv_PD=sums.vv_PD.at[p].add(jnp.sum(jnp.square(v_BCD), (0, 1))),
            )

        sums = jax.lax.fori_loop(0, len(exit_P), of_pair, sums)
        return sums.replace(count=sums.count + count)

    return jax.jit(step, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Moments:
    """The means and covariances of the inputs x and updates u of one layer's map, in float64.

    `uu_D` contains only the variances of u.
    """

    x_D: np.ndarray
    u_D: np.ndarray
    xx_DD: np.ndarray
    xu_DD: np.ndarray
    uu_D: np.ndarray

    @classmethod
    def mixed(cls, parts: list[Moments]) -> Moments:
        """Returns the moments of the mixture in which all `parts` have equal weight."""
        x_D = np.mean([part.x_D for part in parts], 0)
        u_D = np.mean([part.u_D for part in parts], 0)
        xx_DD, xu_DD, uu_D = 0.0, 0.0, 0.0
        for part in parts:  # covariances within the parts and between their means
            x, u = part.x_D - x_D, part.u_D - u_D
            xx_DD += (part.xx_DD + np.outer(x, x)) / len(parts)
            xu_DD += (part.xu_DD + np.outer(x, u)) / len(parts)
            uu_D += (part.uu_D + np.square(u)) / len(parts)
        return cls(x_D, u_D, xx_DD, xu_DD, uu_D)

    def ridge(self, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """Returns (A, b) of the ridge fit u ≈ x·A + b.

        The penalty `strength` is relative to the variance of each input; with an infinite one, A is
        0. So are the rows of A for inputs that are constant.
        """
        if math.isinf(strength):
            return np.zeros_like(self.xu_DD), self.u_D
        scale_D = np.sqrt(np.diag(self.xx_DD))
        scale_D = np.where(scale_D > math.sqrt(SMALLEST) * scale_D.max(), scale_D, np.inf)
        correlation_DD = self.xx_DD / scale_D[:, None] / scale_D
        correlation_DD[np.diag_indices(len(scale_D))] += strength
        a_DD = scipy.linalg.solve(
            correlation_DD, self.xu_DD / scale_D[:, None], assume_a="pos", overwrite_a=True
        )
        a_DD /= scale_D[:, None]
        return a_DD, self.u_D - self.x_D @ a_DD

    def unexplained(self, a_DD: np.ndarray, b_D: np.ndarray) -> float:
        """Returns the expected squared error of u ≈ x·A + b, over the variance of u.

        The ratio of the two is averaged over the D dimensions of u.
        """
        shift_D = self.u_D - self.x_D @ a_DD - b_D
        error_D = (
            self.uu_D
            - 2 * np.einsum("dD,dD->D", a_DD, self.xu_DD)
            + np.einsum("dD,dD->D", a_DD, self.xx_DD @ a_DD)
            + np.square(shift_D)
        )
        return float(np.mean(error_D / np.maximum(self.uu_D, np.finfo(np.float64).tiny)))


class Chain:
    """The maps of the layers fitted so far, composed for each exit into one map x ↦ x + x·Q + c."""

    def __init__(self, exits: int, width: int):
        self.q_EDD = np.zeros((exits, width, width))
        self.c_ED = np.zeros((exits, width))

    def moments(self, sums: RidgeSums, exit_index: int, pair: int) -> Moments:
        """Returns the moments of inputs x and updates u for fitting the next map at one exit.

        x is the output of the chain, and u is the full-depth residual of pair number `pair` (see
        `pairs`) minus x. `sums` must contain NumPy arrays.
        """
        n, e, p = float(sums.count), exit_index, pair
        q_DD, c_D = self.q_EDD[e], self.c_ED[e]
        x_D, v_D, xx_DD, xv_DD, vv_D = (
            np.asarray(part, np.float64) / n
            for part in (sums.x_ED[e], sums.v_PD[p], sums.xx_EDD[e], sums.xv_PDD[p], sums.vv_PD[p])
        )
        xx_DD, xv_DD = xx_DD - np.outer(x_D, x_D), xv_DD - np.outer(x_D, v_D)
        mean_D, xq_DD = x_D + sums.x_origin_ED[e], xx_DD @ q_DD
        moved_D = mean_D @ q_DD + c_D
        to_DD = q_DD.T + np.eye(len(mean_D))
        return Moments(
            x_D=mean_D + moved_D,
            u_D=v_D + sums.v_origin_PD[p] - moved_D,
            xx_DD=to_DD @ (xx_DD + xq_DD),
            xu_DD=to_DD @ (xv_DD - xq_DD),
            uu_D=vv_D - np.square(v_D) - np.einsum("dD,dD->D", q_DD, 2 * xv_DD - xq_DD),
        )

    def goes_on(self, exits: list[int], a_DD: np.ndarray, b_D: np.ndarray) -> None:
        """Appends one more layer's map, x ↦ x + x·A + b, for the exits with indices `exits`."""
        for e in exits:
            self.c_ED[e] += self.c_ED[e] @ a_DD + b_D
            self.q_EDD[e] += a_DD + self.q_EDD[e] @ a_DD


@dataclasses.dataclass(frozen=True)
class Fit:
    """The maps of all layers, with the ridge strength and held-out error of each fitted layer."""

    maps: tuple[np.ndarray, ...]  # A [L, D, D], or with a rank its factors [L, D, R], [L, R, D]
    b_LD: np.ndarray
    strength_L: list[float]
    unexplained_L: list[float]  # fraction of held-back variance, fitted without these tokens


def fit(
    sums: RidgeSums,
    held_back: RidgeSums,
    exit_layers: tuple[int, ...],
    layers: int,
    *,
    rank: int = 0,
) -> Fit:
    """Fits the map of every layer to the tokens of `sums` and `held_back` together.

    Layers below the first exit get zero maps. For each other layer, the strength is the one of
    `STRENGTHS` whose map, fitted to `sums` alone, leaves the smallest fraction of the variance in
    `held_back` unexplained. The lists in the result start at the layer of the first exit. With a
    `rank`, each map is the best product of two factors of this rank, and later maps are fitted to
    the outputs of the factored map. `sums` and `held_back` must contain NumPy arrays and each at
    least one token.
    """
    exits, width = sums.x_ED.shape
    both = together(sums, held_back)
    pair_of = {place: p for p, place in enumerate(pairs(exit_layers, layers))}
    shapes = [(width, rank), (rank, width)] if rank else [(width, width)]
    maps = tuple(np.zeros((layers, *shape), np.float32) for shape in shapes)
    b_LD = np.zeros((layers, width), np.float32)
    seen_chain, chain, strengths, errors = Chain(exits, width), Chain(exits, width), [], []
    for layer in range(exit_layers[0], layers):
        here = [e for e in range(exits) if exit_layers[e] <= layer]

        def moments(
            chain: Chain, of: RidgeSums, here: list[int] = here, layer: int = layer
        ) -> Moments:
            return Moments.mixed([chain.moments(of, e, pair_of[e, layer]) for e in here])

        def extend(chain: Chain, of: Moments, strength: float, here: list[int] = here) -> tuple:
            """Appends the layer's map to the chain; returns the factors of A (or A alone) and b."""
            a_DD, b_D = of.ridge(strength)
            found = factors(a_DD, of.xx_DD, rank) if rank else (a_DD,)
            if rank:
                a_DD = found[0] @ found[1]
                b_D = of.u_D - of.x_D @ a_DD
            chain.goes_on(here, a_DD, b_D)
            return found, b_D

        seen, unseen = moments(seen_chain, sums), moments(seen_chain, held_back)
        error, strength = min((unseen.unexplained(*seen.ridge(s)), s) for s in STRENGTHS)
        extend(seen_chain, seen, strength)
        found, b_LD[layer] = extend(chain, moments(chain, both), strength)
        for stacked, one in zip(maps, found, strict=True):
            stacked[layer] = one
        strengths.append(strength)
        errors.append(error)
    return Fit(maps, b_LD, strengths, errors)


def together(one: RidgeSums, other: RidgeSums) -> RidgeSums:
    """Returns the sums over the tokens of `one` and `other`, which must have the same origins."""
    return RidgeSums(
        **{
            f.name: getattr(one, f.name) + (0 if f.name in ORIGINS else getattr(other, f.name))
            for f in dataclasses.fields(RidgeSums)
        }
    )


def factors(a_DD: np.ndarray, xx_DD: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """Returns factors [D, R] · [R, D], R = `rank`, that best approximate the outputs of a map.

    `a_DD` is the map A, and `xx_DD` the covariance of its inputs x. The method is reduced-rank
    regression, with the leading right singular vectors of L'A, where L L' = cov(x).
    """
    variance_D = np.diag(xx_DD)
    jitter_D = 1e-6 * variance_D + SMALLEST * variance_D.max()
    left = scipy.linalg.cholesky(xx_DD + np.diag(jitter_D), lower=True)
    _, _, right = np.linalg.svd(left.T @ a_DD, full_matrices=False)
    basis_RD = right[:rank]
    return a_DD @ basis_RD.T, basis_RD
