"""Sampling of tokens from logits, with the log-probabilities of the drawn tokens."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jexit.axes import Array, Bool, Float, Int, Key, PRNGKey
from jexit.errors import UserError
from jexit.rollout.pool import Jobs

TOKEN_DRAW = 0  # number of a pass's token draw; 1 + e are the numbers of its draws at the exits
SHARPEST = 1e-6  # the lowest temperature above 0; logits divided by less may overflow


@struct.dataclass
class Sampling:
    """The settings for drawing tokens; static flags leave unused steps out of the compiled program.

    As in Hugging Face's `generate`, the logits are first divided by the temperature. Then tokens
    are truncated to the `top_k` most likely ones, to the nucleus of probability `top_p` among them,
    and to tokens with at least `min_p` times the probability of the most likely token.
    """

    temperature: Float[Array, ""] | float
    top_k: Int[Array, ""] | int
    top_p: Float[Array, ""] | float
    min_p: Float[Array, ""] | float
    greedy: bool = struct.field(pytree_node=False)
    truncations: tuple[str, ...] = struct.field(pytree_node=False)

    @classmethod
    def of(
        cls, temperature: float, top_p: float = 1.0, *, top_k: int = 0, min_p: float = 0.0
    ) -> Sampling:
        """Returns checked settings; temperature 0 means greedy decoding without truncation.

        With `top_k` 0, `top_p` 1 and `min_p` 0, every token is kept. Raises UserError for values
        out of range.
        """
        if not (temperature == 0.0 or SHARPEST <= temperature < float("inf")):
            raise UserError(
                f"temperature is {temperature}, but it must be 0 (greedy) or a finite number of at "
                f"least {SHARPEST:g}; give one such as 0.7"
            )
        if not 0.0 < top_p <= 1.0:
            raise UserError(
                f"top_p is {top_p}, but it must be above 0 and at most 1 (the probability mass to "
                "keep); set top_p=1 to keep every token"
            )
        if top_k != int(top_k) or top_k < 0:
            raise UserError(
                f"top_k is {top_k}, but it must be a whole number of at least 0 (the number of "
                "tokens to keep); set top_k=0 to keep every token"
            )
        if not 0.0 <= min_p <= 1.0:
            raise UserError(
                f"min_p is {min_p}, but it must be from 0 to 1 (a fraction of the most likely "
                "token's probability); set min_p=0 to keep every token"
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
        """Returns these settings, because all completions share them; see `MixedSampling.at`."""
        return self

    def distribution(self, logits: Float[Array, "*A V"]) -> Float[Array, "*A V"]:
        """Returns float32 logits whose softmax is the sampling distribution; −inf if truncated.

        Greedy settings leave the logits unchanged.
        """
        logits = logits.astype(jnp.float32)
        if not self.greedy:
            logits = logits / self.temperature
        for name in self.truncations:
            logits = TRUNCATIONS[name](logits, getattr(self, name))
        return logits

    def draw(
        self, logits_BV: Float[Array, "B V"], keys_B: Key[Array, "B"]
    ) -> tuple[Int[Array, "B"], Float[Array, "B"]]:
        """Draws one token per row and returns (tokens, log-probabilities), each [B].

        The log-probabilities are those of the drawn tokens under `distribution`. Greedy decoding
        takes the token with the largest logit (the lowest id, if several are equal), and computes
        the log-probability at temperature 1.
        """
        return _drawn(self.distribution(logits_BV), keys_B, self.greedy)


@struct.dataclass
class MixedSampling:
    """Sampling settings that may differ per completion; one compiled program serves them all."""

    rows: Sampling  # its numbers are arrays with one entry per completion
    greedy_B: Bool[Array, "B"]

    @classmethod
    def of(cls, samplings: Sequence[Sampling], truncations: tuple[str, ...]) -> MixedSampling:
        """Combines the settings of all completions for a program that applies `truncations`.

        A truncation that a completion does not use keeps all tokens of that completion.
        """
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
        """Draws each row's token with the settings of that row. See `Sampling.draw`."""
        logits_BV = jax.vmap(Sampling.distribution)(self.rows, logits_BV)
        best, drawn = (_drawn(logits_BV, keys_B, greedy) for greedy in (True, False))
        return jax.tree.map(lambda a_B, b_B: jnp.where(self.greedy_B, a_B, b_B), best, drawn)


def _drawn(logits_BV: Array, keys_B: Array, greedy: bool) -> tuple[Array, Array]:
    """Returns (tokens, log-probabilities) [B], drawn from softmax(logits), in nats.

    If `greedy`, takes the most likely token; if several are equally likely, the one with the lowest
    id.
    """
    top_B1 = jnp.max(logits_BV, axis=-1, keepdims=True)
    if greedy:
        token_B = _first(logits_BV == top_B1)
    weights_BV = jnp.exp(logits_BV - top_B1)
    if not greedy:
        token_B = draw_by_weight(weights_BV, keys_B)
    total_B = jnp.sum(weights_BV, axis=-1)
    chosen_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=-1)[:, 0]
    return token_B, chosen_B - top_B1[:, 0] - jnp.log(total_B)


@struct.dataclass
class Draws:
    """The settings that decide how completions draw their tokens and when they end.

    `key` and `limit` are either shared by all completions or have one entry per completion. `eos_N`
    contains the ids of the end-of-sequence tokens.
    """

    key: PRNGKey | Key[Array, "J"]
    eos_N: Int[Array, "N"]
    limit: Int[Array, ""] | Int[Array, "J"]  # most tokens per completion
    sampling: Sampling | MixedSampling

    def keys(self, jobs: Jobs, job_B: Int[Array, "B"], index_B: Int[Array, "B"]) -> Key[Array, "B"]:
        """Returns a PRNG key per token: the numbers of prompt, sample and token folded into `key`.

        Row b is for token `index_B[b]` of the completion `job_B[b]`.
        """
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
    """Draws one index per row with probability weight / Σ weight; each row has its own key.

    The cumulative sum is inverted in two levels (a block of about √V entries, then an entry of the
    block), which needs two uniform random numbers per row. The Gumbel trick would need one random
    number and two logarithms per vocabulary entry. Entries of weight 0 are never drawn.
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
    return jnp.minimum(token_B, vocab - 1)  # NaN weights would select an index in the padding


def _invert(weights_BC: Array, uniform_B: Array) -> Array:
    """Returns, per row, the first index whose cumulative weight exceeds uniform · total weight.

    The weight at this index is positive if any weight of the row is.
    """
    entries = weights_BC.shape[-1]
    # A product with a triangular matrix is one operation; a scan is a dozen.
    triangle_CC = jnp.triu(jnp.ones((entries, entries), weights_BC.dtype))
    sums_BC = jnp.dot(weights_BC, triangle_CC, precision=jax.lax.Precision.HIGHEST)
    # Rounding may leave the sums not quite monotonic. The two guards make sure that some entry
    # exceeds the target and that the first such entry never has weight 0.
    sums_BC = jnp.where(weights_BC > 0, sums_BC, 0.0)
    total_B1 = jnp.max(sums_BC, axis=-1, keepdims=True)
    target_B1 = jnp.minimum(uniform_B[:, None] * total_B1, total_B1 * (1.0 - 2.0**-23))
    return _first(sums_BC > target_B1)


def _first(true_BC: Array) -> Array:
    """Returns the index of the first True of each row, or the last index if the row has no True.

    A maximum followed by this minimum is faster than `argmax`, which reduces pairs of a value and
    an index.
    """
    entries = true_BC.shape[-1]
    return jnp.min(jnp.where(true_BC, jnp.arange(entries), entries - 1), axis=-1).astype(jnp.int32)


def truncate_top_k(logits: Float[Array, "*A V"], top_k: Int[Array, ""] | int) -> Array:
    """Returns the logits with −inf outside the `top_k` most likely tokens.

    Tokens that tie with the last of these are kept, too. Tokens whose probability rounds to 0 may
    also be kept, but they are never drawn.
    """
    return _truncate(logits, lambda kept, probs: jnp.sum(kept, axis=-1) >= top_k)


def truncate_top_p(logits: Float[Array, "*A V"], top_p: Float[Array, ""] | float) -> Array:
    """Returns the logits with −inf outside the nucleus (arXiv:1904.09751).

    The nucleus is {p ≥ τ} with the largest τ for which Σ_{p ≥ τ} p ≥ top_p.
    """
    return _truncate(logits, lambda kept, p: jnp.sum(jnp.where(kept, p, 0.0), axis=-1) >= top_p)


def truncate_min_p(logits: Float[Array, "*A V"], min_p: Float[Array, ""] | float) -> Array:
    """Returns logits with −inf where p = softmax(logits) < min_p · max p (arXiv:2407.01082)."""
    least = jnp.max(logits, axis=-1, keepdims=True) + jnp.log(min_p)
    return jnp.where(logits >= least, logits, -jnp.inf)


# In the order in which they are applied.
TRUNCATIONS = {"top_k": truncate_top_k, "top_p": truncate_top_p, "min_p": truncate_min_p}


def _truncate(logits: Array, enough: Callable[[Array, Array], Array]) -> Array:
    """Returns the logits with −inf outside {p ≥ τ}, for the largest τ that satisfies `enough`.

    `enough` maps the mask of kept tokens [..., V] and the probabilities [..., V] to booleans [...].
    τ is found by bisection over the bit patterns of the probabilities, because these integers are
    ordered like the probabilities. The bisection takes 31 sums over the vocabulary and no sort.
    """
    probs = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    bits = jax.lax.bitcast_convert_type(probs, jnp.int32)
    # If no τ is enough (the whole mass may round to below top_p), the bound 0 keeps all tokens.
    low = jnp.zeros(logits.shape[:-1], jnp.int32)
    high = jnp.max(bits, axis=-1) + 1

    def halve(_: int, bounds: tuple[Array, Array]) -> tuple[Array, Array]:
        low, high = bounds
        middle = low + (high - low) // 2
        stays = enough(bits >= middle[..., None], probs)
        return jnp.where(stays, middle, low), jnp.where(stays, high, middle)

    low, _ = jax.lax.fori_loop(0, 31, halve, (low, high))
    return jnp.where(bits >= low[..., None], logits, -jnp.inf)
