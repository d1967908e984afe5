"""Which of a pool's sequences run next: those that wait at the segment where least is wasted.

The exits cut the stack into segments. A tick runs one segment for as many sequences as it has
places for; the weights of its layers are read once for all of them. Segment 0 begins with emission:
a sequence that has left, or has run the last segment, emits its token and goes on with that through
segment 0 in the same tick, for nobody leaves before the first exit.
"""

from __future__ import annotations

import dataclasses
from itertools import pairwise

import jax
import jax.numpy as jnp
import numpy as np

from jexit.axes import Array, Bool, Int
from jexit.model.policies import Full, Policy
from jexit.presets import Architecture

# A sequence that has waited for more ticks than this times the segments is overdue: the oldest of
# these goes next, however few wait with it.
PATIENCE = 4


@dataclasses.dataclass(frozen=True)
class Segments:
    """Layers `bounds[s]` … `bounds[s + 1]` − 1 are segment s."""

    bounds: tuple[int, ...]
    emission: float  # what an emission costs, in layers

    @classmethod
    def of(
        cls, arch: Architecture, exit_layers: tuple[int, ...], policy: Policy, *, hazards: bool
    ) -> Segments:
        """Of the exits; one segment of all layers where nobody leaves and nobody reads hazards."""
        inner = exit_layers if hazards or not isinstance(policy, Full) else ()
        heads = 2 * arch.head_dim * (arch.query_heads + arch.kv_heads)
        layer = arch.width * (heads + 3 * arch.mlp_width)
        return cls((0, *inner, arch.layers), arch.vocab_size * arch.width / layer)

    @property
    def count(self) -> int:
        return len(self.bounds) - 1

    @property
    def starts_S(self) -> Array:
        return jnp.asarray(self.bounds[:-1], jnp.int32)

    @property
    def ends_S(self) -> Array:
        return jnp.asarray(self.bounds[1:], jnp.int32)

    @property
    def costs_S(self) -> np.ndarray:
        """Of a tick at each segment, in layers."""
        layers = [end - start for start, end in pairwise(self.bounds)]
        return np.asarray([layers[0] + self.emission, *layers[1:]], np.float32)


def choose(
    segments: Segments,
    segment_P: Int[Array, "P"],
    waits_P: Bool[Array, "P"],
    since_P: Int[Array, "P"],
    tick: Int[Array, ""],
    width: int,
) -> Int[Array, ""]:
    """The segment to run for `width` places, among the rows that wait.

    A tick with n of W places filled wastes cost · (W − n) / n for each of its n. The least waste
    goes first, the deepest of several; but a row that has waited for too long goes before.
    """
    count = segments.count
    if count == 1:
        return jnp.zeros((), jnp.int32)
    at_SP = (segment_P == jnp.arange(count)[:, None]) & waits_P
    filled_S = jnp.minimum(jnp.sum(at_SP, axis=1), width).astype(jnp.float32)
    waste_S = segments.costs_S * (width - filled_S) / filled_S
    waste_S = jnp.where(filled_S > 0, waste_S, jnp.inf)
    least = count - 1 - jnp.argmin(waste_S[::-1])
    age_P = jnp.where(waits_P, tick - since_P, -1)
    oldest = jnp.argmax(age_P)
    overdue = age_P[oldest] > PATIENCE * count
    return jnp.where(overdue, segment_P[oldest], least).astype(jnp.int32)


def pick(
    here_P: Bool[Array, "P"], since_P: Int[Array, "P"], tick: Int[Array, ""], width: int
) -> tuple[Int[Array, "B"] | None, Bool[Array, "B"]]:
    """(the rows that take the places, which of them belong there), those that waited longest first.

    None instead of rows when there is a place for each.
    """
    if width == here_P.shape[0]:
        return None, here_P
    priority_P = jnp.where(here_P, tick - since_P + 1, 0)
    priority_B, rows_B = jax.lax.top_k(priority_P, width)
    return rows_B.astype(jnp.int32), priority_B > 0
