"""Exit heads, the linear continuation of tokens after an exit, and the distribution of depths.

The hazard of an exit is the probability that a token which reaches the exit leaves there. The
hazards determine the distribution of depths, which only `distribution_of_log_hazards` computes.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Float, Int
from jexit.config import ExitSettings
from jexit.model.layers import rms_norm
from jexit.model.lora import StackedLinear


class ExitParam(nnx.Param):
    """A parameter of an exit head: float32, trained with a separate learning rate."""


class ContinuationParam(ExitParam):
    """A parameter of the linear continuation: float32, trained with a separate learning rate."""


class Continuation(nnx.Module):
    """The linear map h ← h · (I + A_m) + b_m that replaces layer m for a token that has left.

    A and b start at zero, so before training the residual stays as it was at the exit. The float32
    parameters of all layers are stacked: b [L, D], and either A [L, D, D] or, with rank R > 0, the
    factors [L, D, R] and [L, R, D] of A. The methods expect the parameters of one layer, without
    the axis L. Linear maps between layers follow arXiv:2303.08112 and arXiv:2303.09435.
    """

    def __init__(self, layers: int, width: int, *, rank: int, rngs: nnx.Rngs):
        linear = functools.partial(
            StackedLinear, layers, param=ContinuationParam, dtype=jnp.float32, rngs=rngs
        )
        self.reduce = linear((width,), (rank,)) if rank else None
        self.update = linear((rank or width,), (width,), use_bias=True)
        self.update.kernel[...] = jnp.zeros_like(self.update.kernel[...])

    def __call__(self, h: Float[Array, "*A D"]) -> Float[Array, "*A D"]:
        """Returns the residual [..., D] after one skipped layer, in the dtype of `h`."""
        return h + self.update(h if self.reduce is None else self.reduce(h))

    def after(
        self, next_DD: Float[Array, "D D"], next_D: Float[Array, "D"]
    ) -> tuple[Float[Array, "D D"], Float[Array, "D"]]:
        """Composes this layer's map with the map h ↦ h · (I + next_DD) + next_D of later layers.

        Returns (Q', c') such that the composed map is h ↦ h · (I + Q') + c'. With Q = `next_DD` and
        c = `next_D`, Q' = A + Q + A·Q and c' = b·(I + Q) + c.
        """
        product = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
        b_D, a = self.update.bias[...], self.update.kernel[...]
        aq = product(a, next_DD)
        if self.reduce is not None:
            a, aq = (product(self.reduce.kernel[...], factor) for factor in (a, aq))
        return a + next_DD + aq, b_D + product(b_D, next_DD) + next_D


def maps_to_end(
    continuation: Continuation, exit_layers: tuple[int, ...], layers: int
) -> tuple[Float[Array, "E D D"], Float[Array, "E D"]]:
    """Composes the maps of all layers that a token skips after leaving at exit e, for each e.

    Returns float32 (Q [E, D, D], c [E, D]) such that h · (I + Q_e) + c_e is the residual after the
    last layer of a token that left at exit e with the residual h. `layers` is the number of layers.
    """
    graphdef, stacked = nnx.split(continuation)
    index_L = np.full(layers, len(exit_layers), np.int32)  # without an exit: outside, so dropped
    index_L[list(exit_layers)] = np.arange(len(exit_layers))
    width = continuation.update.bias[...].shape[-1]

    def one(carry: tuple, xs: tuple) -> tuple[tuple, None]:
        q_DD, c_D, q_EDD, c_ED = carry
        params, index = xs
        q_DD, c_D = nnx.merge(graphdef, params).after(q_DD, c_D)
        q_EDD = q_EDD.at[index].set(q_DD, mode="drop")
        return (q_DD, c_D, q_EDD, c_ED.at[index].set(c_D, mode="drop")), None

    exits, vector, matrix = len(exit_layers), (width,), (width, width)
    none = tuple(jnp.zeros(shape) for shape in (matrix, vector, (exits, *matrix), (exits, *vector)))
    first = exit_layers[0]  # no token skips the layers below
    skipped = jax.tree.map(lambda leaf: leaf[first:], stacked)
    (_, _, q_EDD, c_ED), _ = jax.lax.scan(
        one, none, (skipped, jnp.asarray(index_L[first:])), reverse=True
    )
    return q_EDD, c_ED


class ExitHeads(nnx.Module):
    """The exit heads: each of the E heads maps the residual h to a hazard logit z.

    Parameters and arithmetic are float32; accelerators multiply in their default precision, with
    float32 sums, since a head in full precision would take as long as a layer.

    With kind "mlp", z = w2 · relu(W1 · norm(h) + b1) + b2; otherwise the head is linear, z = w2 ·
    norm(h) + b2. Here norm is an RMS norm with a scale per exit, or the identity. The bias b2
    starts low, so that tokens almost never leave at an untrained head. With the setting `detached`,
    losses on hazards train only the heads, because no gradient flows from a head into the residual
    that it reads. Source: arXiv:2603.21376.
    """

    def __init__(
        self,
        exits: int,
        width: int,
        head: ExitSettings = ExitSettings(),
        *,
        eps: float = 1e-6,
        rngs: nnx.Rngs,
    ):
        self.kind, self.norm, self.eps, self.detached = head.kind, head.norm, eps, head.detached
        self.scale = ExitParam(jnp.ones((exits, width))) if head.norm == "rms" else None
        hidden = 2 * width if head.kind == "mlp" else width
        if head.kind == "mlp":
            init = jax.random.normal(rngs.params(), (exits, width, hidden))
            self.w1 = ExitParam(init * width**-0.5)
            self.b1 = ExitParam(jnp.zeros((exits, hidden)))
        else:
            self.w1 = self.b1 = None
        self.w2 = ExitParam(jax.random.normal(rngs.params(), (exits, hidden)) * 0.1 * hidden**-0.5)
        self.b2 = ExitParam(jnp.full((exits,), head.bias))

    def __call__(self, h: Float[Array, "*A D"], exit_index: Int[Array, ""]) -> Float[Array, "*A"]:
        """Returns float32 hazard logits z [...] at exit `exit_index`, from residuals h [..., D]."""

        def pick(parameter: ExitParam) -> Array:
            return jax.lax.dynamic_index_in_dim(parameter[...], exit_index, 0, keepdims=False)

        x = h.astype(jnp.float32)
        if self.detached:
            x = jax.lax.stop_gradient(x)
        if self.scale is not None:
            x = rms_norm(x, pick(self.scale), self.eps)
        if self.w1 is not None:
            x = jax.nn.relu(x @ pick(self.w1) + pick(self.b1))
        return x @ pick(self.w2) + pick(self.b2)


def log_hazards(
    hazard_logits: Float[Array, "*A E"],
    *,
    temperature: Float[Array, ""] | float = 1.0,
    min_hazard: Float[Array, ""] | float = 0.0,
) -> tuple[Float[Array, "*A E"], Float[Array, "*A E"]]:
    """Returns (log hazard, log(1 − hazard)), where hazard = m + (1 − m)·σ(z / temperature).

    Here z is `hazard_logits`, and m is `min_hazard`, the lowest possible hazard. An m above 0 makes
    sampling explore every exit. With m = 0 and temperature 1 the hazard is σ(z). The computation is
    in log space and differentiable everywhere.
    """
    z = hazard_logits.astype(jnp.float32) / temperature
    log_rest = jnp.log1p(-jnp.asarray(min_hazard, jnp.float32))
    log_floor = jnp.log(jnp.asarray(min_hazard, jnp.float32))
    leave = jnp.logaddexp(log_floor, log_rest + jax.nn.log_sigmoid(z))
    return leave, log_rest + jax.nn.log_sigmoid(-z)


def depth_log_distribution(
    hazard_logits: Float[Array, "*A E"], **hazards: Float[Array, ""] | float
) -> Float[Array, "*A E1"]:
    """Returns log-probabilities [..., E + 1] of leaving at each of E exits and, last, at none.

    log P(e) = log hazard_e + Σ_{j<e} log(1 − hazard_j);  log P(E) = Σ_j log(1 − hazard_j).
    The keyword arguments `hazards` are passed to `log_hazards`.
    """
    return distribution_of_log_hazards(*log_hazards(hazard_logits, **hazards))


def distribution_of_log_hazards(
    leave: Float[Array, "*A E"], stay: Float[Array, "*A E"]
) -> Float[Array, "*A E1"]:
    """Computes `depth_log_distribution` [..., E + 1] from log hazards instead of hazard logits.

    `leave` is log hazard and `stay` is log(1 − hazard), both [..., E].
    """
    stayed = jnp.cumsum(stay, axis=-1)
    before = jnp.concatenate([jnp.zeros_like(stayed[..., :1]), stayed[..., :-1]], axis=-1)
    return jnp.concatenate([leave + before, stayed[..., -1:]], axis=-1)


def exit_index_of_depth(
    depth: Int[Array, "*A"], exit_layers: tuple[int, ...], layers: int
) -> Int[Array, "*A"]:
    """Returns the exit index of each depth in layers; full depth has index E, the number of exits.

    A depth between two exits gets the index of the deeper one.
    """
    return jnp.searchsorted(jnp.asarray((*exit_layers, layers)), depth).astype(jnp.int32)


def depth_of_exit_index(
    exit_index: Int[Array, "*A"], exit_layers: tuple[int, ...], layers: int
) -> Int[Array, "*A"]:
    """Returns the depth in layers of each exit index; E, the number of exits, is full depth."""
    return jnp.asarray(np.asarray((*exit_layers, layers), np.int32))[exit_index]


def depth_log_prob(
    depth: Int[Array, "*A"],
    hazard_logits: Float[Array, "*A E"],
    exit_layers: tuple[int, ...],
    layers: int,
    **hazards: Float[Array, ""] | float,
) -> Float[Array, "*A"]:
    """Returns the log-probability of each depth in layers, under `depth_log_distribution`.

    `layers` is the number of layers, and `hazards` are keyword arguments of `log_hazards`.
    """
    log_probs = depth_log_distribution(hazard_logits, **hazards)
    index = exit_index_of_depth(depth, exit_layers, layers)
    return jnp.take_along_axis(log_probs, index[..., None], axis=-1)[..., 0]
