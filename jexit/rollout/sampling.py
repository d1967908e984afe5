"""Drawing tokens from logits, with the log-probability of what was drawn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jexit.axes import Array, Bool, Float, Int, Key, PRNGKey
from jexit.errors import UserError
from jexit.rollout.pool import Jobs

TOKEN_DRAW = 0  # of a pass: the draw of its token; 1 + e are the draws at the exits
SHARPEST = 1e-6  # the lowest temperature but 0; logits divided by less may overflow


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn; the flags are static, so an unused feature costs nothing.

    First the temperature, then truncation to the `top_k` most likely tokens, to the nucleus `top_p`
    of what is left, and to what has `min_p` of the most likely one's probability, as Hugging Face's
    `generate` does it.
    """

    temperature: Float[Array, ""] | float
    top_k: Int[Array, ""] | int
    top_p: Float[Array, ""] | float
    min_p: Float[Array, ""] | float
    greedy: bool = dataclasses.field(metadata={"static": True})
    truncations: tuple[str, ...] = dataclasses.field(metadata={"static": True})

    @classmethod
    def of(
        cls, temperature: float, top_p: float = 1.0, *, top_k: int = 0, min_p: float = 0.0
    ) -> Sampling:
        """Checks the settings; temperature 0 is greedy, and then nothing is truncated."""
        if not (temperature == 0.0 or SHARPEST <= temperature < float("inf")):
            raise UserError(
                f"temperature is {temperature}; give 0 (greedy) or at least {SHARPEST:g}, such as "
                "0.7"
            )
        if not 0.0 < top_p <= 1.0:
            raise UserError(
                f"top_p is {top_p}; it is the probability mass to keep, above 0 and at most 1"
            )
        if top_k != int(top_k) or top_k < 0:
            raise UserError(f"top_k is {top_k}; it is how many tokens to keep, or 0 for all")
        if not 0.0 <= min_p <= 1.0:
            raise UserError(
                f"min_p is {min_p}; it is a share of the most likely token's probability, from 0 "
                "to 1"
            )
        greedy = temperature == 0.0
        used = {"top_k": top_k > 0, "top_p": top_p < 1.0, "min_p": min_p > 0.0}
        return cls(
            temperature=1.0 if greedy else float(temperature),
            top_k=int(top_k),
            top_p=float(top_p),
            min_p=float(min_p),
            greedy=greedy,
            truncations=() if greedy else tuple(name for name, on in used.items() if on),
        )

    def at(self, row_B: Int[Array, "B"]) -> Sampling:
        """How those completions draw: like all others."""
        return self

    def distribution(self, logits: Float[Array, "*A V"]) -> Float[Array, "*A V"]:
        """Logits of what is drawn from, −inf where it has been truncated."""
        logits = logits.astype(jnp.float32)
        if not self.greedy:
            logits = logits / self.temperature
        for name in self.truncations:
            logits = TRUNCATIONS[name](logits, getattr(self, name))
        return logits

    def draw(
        self, logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"]
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """(tokens, log-probabilities) [B] under the distribution.

        Greedy takes the first of the largest logits and reports the untempered log-probability.
        """
        return _drawn(self.distribution(logits_BV), keys_B, self.greedy)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class MixedSampling:
    """Another way of drawing for each completion; one program serves them all."""

    rows: Sampling  # its numbers have a row each
    greedy_B: Bool[Array, "B"]

    @classmethod
    def of(cls, samplings: Sequence[Sampling], truncations: tuple[str, ...]) -> MixedSampling:
        """With these truncations in the program; a row that has not asked for one keeps all."""
        all_kept = {"top_k": np.int32(2**31 - 1), "top_p": np.float32(2.0), "min_p": np.float32(0)}
        limits = {
            name: np.asarray(
                [getattr(s, name) if name in s.truncations else kept for s in samplings], kept.dtype
            )
            for name, kept in all_kept.items()
        }
        temperature = np.asarray([s.temperature for s in samplings], np.float32)
        rows = Sampling(temperature, **limits, greedy=False, truncations=truncations)
        return cls(rows, np.asarray([s.greedy for s in samplings]))

    def at(self, row_B: Int[Array, "B"]) -> MixedSampling:
        return jax.tree.map(lambda part_B: jnp.asarray(part_B)[row_B], self)

    def draw(
        self, logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"]
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """As `Sampling.draw` for each row."""
        logits_BV = jax.vmap(Sampling.distribution)(self.rows, logits_BV)
        best, drawn = (_drawn(logits_BV, keys_B, greedy) for greedy in (True, False))
        return jax.tree.map(lambda a_B, b_B: jnp.where(self.greedy_B, a_B, b_B), best, drawn)


def _drawn(logits_BV: Array, keys_B: Array, greedy: bool) -> tuple[Array, Array]:
    """(tokens, log-probabilities) [B] of the soft-max."""
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    if greedy:
        token_B = _first(logits_BV == top_B1)
    weights_BV = jnp.exp(logits_BV - top_B1)
    if not greedy:
        token_B = draw_by_weight(weights_BV, keys_B)
    total_B = jnp.sum(weights_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - top_B1[:, 0] - jnp.log(total_B)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Draws:
    """How completions draw, and where they end; a key and a limit for all, or one a completion."""

    key: PRNGKey | Key[Array, "J"]
    eos_N: Int[Array, "N"]
    limit: Int[Array, ""] | Int[Array, "J"]  # tokens of a completion
    sampling: Sampling | MixedSampling

    def keys(self, jobs: Jobs, job_B: Int[Array, "B"], index_B: Int[Array, "B"]) -> Key[Array, "B"]:
        """A key for each token: of the seed, the prompt's number, the sample's and the token's."""
        numbers = jobs.number_J[job_B], jobs.sample_J[job_B], index_B
        if not jnp.ndim(self.key):
            return jax.vmap(lambda *row: functools.reduce(jax.random.fold_in, row, self.key))(
                *numbers
            )
        return functools.reduce(jax.vmap(jax.random.fold_in), numbers, self.key[job_B])

    def limit_at(self, job: Int[Array, "*A"]) -> Int[Array, "*A"]:
        return self.limit[job] if jnp.ndim(self.limit) else self.limit

    def ends(self, token_B: Int[Array, "B"]) -> Bool[Array, "B"]:
        return jnp.any(token_B[:, None] == self.eos_N, axis=-1)


def fold_in(keys_B: Key[Array, "B"], number: Array | int) -> Key[Array, "B"]:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, number)


def draw_by_weight(weights_BV: Float[Array, "B V"], keys_B: Key[Array, "B"]) -> Int[Array, "B"]:
    """Draws an index a row with probability weight / Σ weight; each row has its own key.

    By inverting the cumulative sum in two levels (a block of about √V entries, then an entry of
    it) with two uniform numbers a row; Gumbel noise would cost a random number and two logarithms
    for every entry of the vocabulary. Entries of weight 0 are never drawn.
    """
    batch, vocab = weights_BV.shape
    width = 1 << ((vocab - 1).bit_length() + 1) // 2
    blocks = -(-vocab // width)
    uniform_B2 = jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys_B)
    padded_BV = jnp.pad(weights_BV, ((0, 0), (0, blocks * width - vocab)))
    weights_BCW = padded_BV.reshape(batch, blocks, width)
    block_B = _invert(jnp.sum(weights_BCW, axis=-1), uniform_B2[:, 0])
    chosen_BW = jnp.take_along_axis(weights_BCW, block_B[:, None, None], axis=1)[:, 0]
    token_B = block_B * width + _invert(chosen_BW, uniform_B2[:, 1])
    return jnp.minimum(token_B, vocab - 1)  # weights that are no numbers end in the padding


def _invert(weights_BC: Array, uniform_B: Array) -> Array:
    """The first index of positive weight whose cumulative weight exceeds uniform · total."""
    entries = weights_BC.shape[-1]
    # A product with a triangle is one operation where a scan is a dozen.
    triangle_CC = jnp.triu(jnp.ones((entries, entries), weights_BC.dtype))
    sums_BC = jnp.dot(weights_BC, triangle_CC, precision=jax.lax.Precision.HIGHEST)
    # Rounding may leave the sums not quite monotonic. The two guards make sure that some entry
    # exceeds the target and that an entry of weight 0 is never the one.
    sums_BC = jnp.where(weights_BC > 0, sums_BC, 0.0)
    total_B1 = jnp.max(sums_BC, axis=-1, keepdims=True)
    target_B1 = jnp.minimum(uniform_B[:, None] * total_B1, total_B1 * (1.0 - 2.0**-23))
    return _first(sums_BC > target_B1)


def _first(true_BC: Array) -> Array:
    """The first true index of each row: two plain reductions, faster than one of pairs."""
    entries = true_BC.shape[-1]
    return jnp.min(jnp.where(true_BC, jnp.arange(entries), entries - 1), axis=-1).astype(jnp.int32)


def truncate_top_k(logits: Float[Array, "*A V"], top_k: Int[Array, ""] | int) -> Array:
    """Logits with −inf outside the `top_k` most likely tokens; those that tie with the last stay.

    Tokens whose probability rounds to 0 may stay too: they are never drawn.
    """
    return _truncate(logits, lambda kept, probs: jnp.sum(kept, axis=-1) >= top_k)


def truncate_top_p(logits: Float[Array, "*A V"], top_p: Float[Array, ""] | float) -> Array:
    """Logits with −inf outside the nucleus (arXiv:1904.09751).

    The nucleus is {p ≥ τ} with the largest τ for which Σ_{p ≥ τ} p ≥ top_p; tokens that tie at τ
    all stay.
    """
    return _truncate(logits, lambda kept, p: jnp.sum(jnp.where(kept, p, 0.0), axis=-1) >= top_p)


def truncate_min_p(logits: Float[Array, "*A V"], min_p: Float[Array, ""] | float) -> Array:
    """Logits with −inf where p < min_p · max p (arXiv:2407.01082)."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits >= least, logits, -jnp.inf)


# In the order in which they are applied.
TRUNCATIONS = {"top_k": truncate_top_k, "top_p": truncate_top_p, "min_p": truncate_min_p}


def _truncate(logits: Array, enough: Callable[[Array, Array], Array]) -> Array:
    """Keeps {p ≥ τ} with the largest τ that is `enough` (kept [..., V], p [..., V] → [...]).

    τ is found by bisection over the bits of the probabilities, which order as they do: 31 sums over
    the vocabulary instead of a sort.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    # Nothing may be enough, such as a mass that rounds to below 1: the bound 0 keeps everything.
    low = jnp.zeros(logits.shape[:-1], jnp.int32)
    high = jnp.max(bits, axis=-1) + 1

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        stays = enough(bits >= middle[..., None], probs)
        return jnp.where(stays, middle, low), jnp.where(stays, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where(bits >= low[..., None], logits, -jnp.inf)
