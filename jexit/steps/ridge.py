"""Ridge regression of each layer's output on its input, from sums over the teacher's tokens.

One pass over the trajectories, the sums on device, the solution on the host in float64. For layer m
with input x and output y = x + u, over positions whose pass may leave:

    A = argmin Σ |(u − ū) − (x − x̄) A|² + strength · n · Σ_d var(x_d) |A_d|²,   b = ū − x̄ A

so that strength is in units of each input's variance. It is the one, of a few, that predicts
held-back trajectories best. Sources of linear maps between layers: arXiv:2303.08112,
arXiv:2303.09435.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import scipy.linalg

from jexit.axes import Array, Float
from jexit.dist import constrain
from jexit.model.policies import Full
from jexit.model.transformer import run
from jexit.steps.completions import Completions
from jexit.steps.state import Fixed, Params, SplitModel

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sums:
    """Sums over tokens of inputs x and updates u of every layer, both less an origin.

    The origin, about the mean, keeps float32 from losing what differs between tokens. It is the
    mean of the first batch, unless the sums begin with another's (`beside`).
    """

    count: Float[Array, ""]
    x_origin_LD: Float[Array, "L D"]
    u_origin_LD: Float[Array, "L D"]
    x_LD: Float[Array, "L D"]
    u_LD: Float[Array, "L D"]
    xx_LDD: Float[Array, "L D D"]
    xu_LDD: Float[Array, "L D D"]
    uu_LD: Float[Array, "L D"]

    @classmethod
    def zero(cls, layers: int, width: int) -> Sums:
        def vector() -> Array:
            return jnp.zeros((layers, width))

        def matrix() -> Array:
            return constrain(jnp.zeros((layers, width, width)), "LDF")

        # Arrays of their own, each to be donated.
        return cls(
            count=jnp.zeros(()),
            x_origin_LD=vector(),
            u_origin_LD=vector(),
            x_LD=vector(),
            u_LD=vector(),
            xx_LDD=matrix(),
            xu_LDD=matrix(),
            uu_LD=vector(),
        )

    def beside(self) -> Sums:
        """Sums of nothing, with the same origin."""
        origins = {name: jnp.copy(getattr(self, name)) for name in ("x_origin_LD", "u_origin_LD")}
        return dataclasses.replace(Sums.zero(*self.x_LD.shape), **origins)


def make_sums_step(split: SplitModel) -> Callable[[Sums, Params, Fixed, Completions], Sums]:
    """The jitted (sums, trainable, fixed, batch) → sums with the batch's tokens added."""

    def step(sums: Sums, trainable: Params, fixed: Fixed, batch: Completions) -> Sums:
        teacher = split.teacher(trainable, fixed)
        weight_BC = batch.action_BC.astype(jnp.float32)
        count = jnp.sum(weight_BC)
        first = ~jnp.any(sums.x_origin_LD)

        def of_layer(h_BTD: Array, new_BTD: Array, sums_l: dict[str, Array]) -> dict[str, Array]:
            x_BCD = batch.window(h_BTD).astype(jnp.float32)
            u_BCD = batch.window(new_BTD).astype(jnp.float32) - x_BCD

            def centred(values_BCD: Array, origin_D: Array) -> tuple[Array, Array]:
                mean_D = jnp.einsum("BCD,BC->D", values_BCD, weight_BC) / jnp.maximum(count, 1.0)
                origin_D = jnp.where(first, mean_D, origin_D)
                return (values_BCD - origin_D) * weight_BC[..., None], origin_D

            x_BCD, x_origin_D = centred(x_BCD, sums_l["x_origin_LD"])
            u_BCD, u_origin_D = centred(u_BCD, sums_l["u_origin_LD"])

            def product(left_BCD: Array, right_BCD: Array) -> Array:
                return jnp.einsum(
                    "BCd,BCD->dD", left_BCD, right_BCD, precision=jax.lax.Precision.HIGHEST
                )

            return {
                "x_origin_LD": x_origin_D,
                "u_origin_LD": u_origin_D,
                "x_LD": sums_l["x_LD"] + jnp.sum(x_BCD, (0, 1)),
                "u_LD": sums_l["u_LD"] + jnp.sum(u_BCD, (0, 1)),
                "xx_LDD": sums_l["xx_LDD"] + product(x_BCD, x_BCD),
                "xu_LDD": sums_l["xu_LDD"] + product(x_BCD, u_BCD),
                "uu_LD": sums_l["uu_LD"] + jnp.sum(jnp.square(u_BCD), (0, 1)),
            }

        by_layer = {f.name: getattr(sums, f.name) for f in dataclasses.fields(sums)}
        del by_layer["count"]
        result = run(
            teacher,
            batch.tokens_BT,
            policy=Full(),
            valid_BT=batch.valid_BT,
            adapters=False,
            observe=of_layer,
            observed=by_layer,
        )
        return Sums(count=sums.count + count, **result.observed)

    return jax.jit(step, donate_argnums=0)


@dataclasses.dataclass(frozen=True)
class Moments:
    """One layer's means and covariances of inputs and updates, in float64."""

    x_D: np.ndarray
    u_D: np.ndarray
    xx_DD: np.ndarray
    xu_DD: np.ndarray
    uu_D: np.ndarray

    @classmethod
    def of(cls, sums: Sums, layer: int) -> Moments:
        """`sums` as NumPy arrays."""
        n = float(sums.count)
        x_D, u_D, xx_DD, xu_DD, uu_D = (
            np.asarray(part[layer], np.float64) / n
            for part in (sums.x_LD, sums.u_LD, sums.xx_LDD, sums.xu_LDD, sums.uu_LD)
        )
        return cls(
            x_D=x_D + sums.x_origin_LD[layer],
            u_D=u_D + sums.u_origin_LD[layer],
            xx_DD=xx_DD - np.outer(x_D, x_D),
            xu_DD=xu_DD - np.outer(x_D, u_D),
            uu_D=uu_D - np.square(u_D),
        )

    def ridge(self, strength: float) -> tuple[np.ndarray, np.ndarray]:
        """(A, b) of the update x·A + b."""
        scale_D = np.sqrt(np.maximum(np.diag(self.xx_DD), np.finfo(np.float64).tiny))
        correlation_DD = self.xx_DD / scale_D[:, None] / scale_D
        correlation_DD[np.diag_indices(len(scale_D))] += strength
        a_DD = scipy.linalg.solve(
            correlation_DD, self.xu_DD / scale_D[:, None], assume_a="pos", overwrite_a=True
        )
        a_DD /= scale_D[:, None]
        return a_DD, self.u_D - self.x_D @ a_DD

    def unexplained(self, a_DD: np.ndarray, b_D: np.ndarray) -> float:
        """Mean over dimensions of the squared error of u ≈ x·A + b over the variance of u."""
        shift_D = self.u_D - self.x_D @ a_DD - b_D
        error_D = (
            self.uu_D
            - 2 * np.einsum("dD,dD->D", a_DD, self.xu_DD)
            + np.einsum("dD,dD->D", a_DD, self.xx_DD @ a_DD)
            + np.square(shift_D)
        )
        return float(np.mean(error_D / np.maximum(self.uu_D, np.finfo(np.float64).tiny)))


@dataclasses.dataclass(frozen=True)
class Fit:
    """The maps of all layers, and how each does on what was held back."""

    a_LDD: np.ndarray
    b_LD: np.ndarray
    strength_L: list[float]
    unexplained_L: list[float]  # share of the held-back updates' variance, before all is fitted


def fit(sums: Sums, held_back: Sums) -> Fit:
    """Ridge maps of every layer from `sums` and `held_back` together.

    The strength is that of `STRENGTHS` whose map from `sums` alone leaves the least of the
    held-back variance unexplained. Both are NumPy arrays with tokens in them.
    """
    maps, biases, strengths, errors = [], [], [], []
    both = together(sums, held_back)
    for layer in range(sums.x_LD.shape[0]):
        seen, unseen = Moments.of(sums, layer), Moments.of(held_back, layer)
        error, strength = min((unseen.unexplained(*seen.ridge(s)), s) for s in STRENGTHS)
        a_DD, b_D = Moments.of(both, layer).ridge(strength)
        maps.append(a_DD.astype(np.float32))
        biases.append(b_D.astype(np.float32))
        strengths.append(strength)
        errors.append(error)
    return Fit(np.stack(maps), np.stack(biases), strengths, errors)


def together(one: Sums, other: Sums) -> Sums:
    """Sums of the tokens of both, which have the same origin."""
    origins = {"x_origin_LD", "u_origin_LD"}
    return Sums(
        **{
            f.name: getattr(one, f.name) + (0 if f.name in origins else getattr(other, f.name))
            for f in dataclasses.fields(Sums)
        }
    )


def factors(a_DD: np.ndarray, xx_DD: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best factors [D, R] · [R, D] of a map for inputs with this covariance.

    Reduced-rank regression: the leading right singular vectors of L'A, with L L' = cov(x).
    """
    left = scipy.linalg.cholesky(xx_DD + 1e-6 * np.diag(np.diag(xx_DD)), lower=True)
    _, _, right = np.linalg.svd(left.T @ a_DD, full_matrices=False)
    basis_RD = right[:rank]
    return a_DD @ basis_RD.T, basis_RD
