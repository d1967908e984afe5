"""Computes the log-likelihoods of given continuations under a halting policy."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Bool, Float, Int, PRNGKey
from jexit.errors import UserError
from jexit.model.policies import Full, Policy, Sample
from jexit.model.transformer import Transformer, logits_of, run
from jexit.steps.completions import (
    Completions,
    bucket_length,
    flat,
    pad_completions,
    token_logprobs,
)

# Vocabulary entries per step of the search for the most likely token.
_TILE = 2048

Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and of its continuation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """The log-probabilities (nats) and depths of a continuation's tokens.

    `greedy` is whether every token is the most likely one, given the tokens before it.
    """

    logprobs: list[float]
    depths: list[int]
    greedy: bool

    @property
    def total(self) -> float:
        return float(sum(self.logprobs))


class Scorer:
    """Computes the log-likelihoods of continuations under one policy, in batches of similar length.

    The policy decides after how many layers each position of the continuation leaves. As in
    decoding, every context position, including the last, runs every layer. The last continuation
    position needs no pass. Under `Full`, `Threshold` and `Prescribed`, the scores equal those that
    decoding would have recorded while generating the same text. As in `generate`, the depths of
    `Prescribed` have one row per pair, and column i is for the pass that produces token i of the
    continuation.

    Under `Sample`, depths d are drawn and a score is log π(y | d). Its mean over draws is a lower
    bound on the log-likelihood marginalised over depths, E_d log π(y | d) ≤ log E_d π(y | d)
    (Jensen). Draws depend on the seed and the pair's own tokens, but not on the batch.

    The full logits [tokens, vocabulary] are never stored.
    """

    def __init__(
        self,
        model: Transformer,
        *,
        policy: Policy = Full(),
        pad_id: int,
        seed: int = 0,
        batch_size: int = 16,
        max_length: int | None = None,
    ) -> None:
        most = model.arch.max_positions
        self.max_length = most if max_length is None else max_length
        if not 1 <= self.max_length <= most:
            raise UserError(
                f"max_length is {max_length}, but it must be at least 1 and at most {most}, the "
                "number of the model's positions; change it, or leave it out"
            )
        if batch_size < 1:
            raise UserError(
                f"batch_size is {batch_size}, but a batch needs at least 1 row; raise batch_size"
            )
        self._graphdef, *self._states = nnx.split(model)
        self._policy, self._pad_id = policy, pad_id
        self._key, self._batch_size = jax.random.key(seed), batch_size

    def fit(
        self, context: Sequence[int], continuation: Sequence[int]
    ) -> tuple[list[int], list[int]]:
        """Returns (context, continuation), with the context cut on the left so that both fit.

        A pair may have `max_length` + 1 tokens, because the last one is only predicted. Raises
        UserError if a part is empty or if the continuation leaves no room for a context.
        """
        if not context:
            raise UserError(
                "the context is empty, but it must have at least one token; begin it with the BOS "
                "token"
            )
        if not continuation:
            raise UserError(
                "the continuation is empty, but it must have at least one token; leave it out"
            )
        if len(continuation) > self.max_length:
            raise UserError(
                f"a continuation has {len(continuation)} tokens, but max_length is "
                f"{self.max_length}; shorten it, or split it and score the parts"
            )
        room = self.max_length + 1 - len(continuation)
        return [int(i) for i in context[-room:]], [int(i) for i in continuation]

    def batches(self, pairs: Sequence[Pair]) -> Iterator[dict[int, Score]]:
        """Yields the scores of one batch of pairs at a time, keyed by the indices in `pairs`.

        A pair contains the token ids of a context and its continuation. Raises the errors of `fit`.
        """
        fitted = [self.fit(*pair) for pair in pairs]
        self._policy.check_rows(len(fitted), max((len(pair[1]) for pair in fitted), default=0))
        shapes: dict[tuple[int, int], list[int]] = {}
        for index, (context, continuation) in enumerate(fitted):
            size = len(continuation)
            shape = (bucket_length(len(context) + size), bucket_length(size))
            shapes.setdefault(shape, []).append(index)
        for shape in sorted(shapes, reverse=True):
            for start in range(0, len(shapes[shape]), self._batch_size):
                chosen = shapes[shape][start : start + self._batch_size]
                yield self._scored(chosen, [fitted[index] for index in chosen], shape)

    def _scored(
        self, indices: list[int], pairs: list[tuple[list[int], list[int]]], shape: tuple[int, int]
    ) -> dict[int, Score]:
        # The last pair is repeated up to a power of two: few batch sizes mean few compilations.
        rows = min(self._batch_size, 1 << (len(pairs) - 1).bit_length())
        filler = rows - len(pairs)
        pairs = [*pairs, *pairs[-1:] * filler]
        batch = pad_completions(
            [pair[0] for pair in pairs], [pair[1] for pair in pairs], self._pad_id, shape
        )
        made = token_scores(
            self._graphdef,
            tuple(self._states),
            jax.tree.map(jnp.asarray, batch),
            self._policy_of([*indices, *indices[-1:] * filler], shape[1]),
            self._key,
        )
        logprob_BC, greedy_BC, depth_BC = jax.device_get(made)
        scores = {}
        for row, index in enumerate(indices):
            part = slice(0, len(pairs[row][1]))
            scores[index] = Score(
                logprobs=logprob_BC[row, part].tolist(),
                depths=depth_BC[row, part].tolist(),
                greedy=bool(greedy_BC[row, part].all()),
            )
        return scores

    def _policy_of(self, indices: list[int], width: int) -> Policy:
        def chosen(depth_BC: np.ndarray) -> np.ndarray:
            depth_BC = np.asarray(depth_BC, np.int32)[indices, :width]
            return np.pad(depth_BC, ((0, 0), (0, width - depth_BC.shape[1])), mode="edge")

        return self._policy.map_rows(chosen)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OwnDraws(Policy):
    """A policy that draws depths as `policy` does, but independently of how rows are batched.

    The draws of a row depend only on the random key, the row's hash in `name_B` (uint32) and the
    position. `OwnDraws.of` computes the hashes from the tokens of the rows.
    """

    reads_hazards: ClassVar[bool] = True

    policy: Sample
    name_B: Int[Array, "B"]

    @classmethod
    def of(cls, policy: Sample, rows: Completions) -> OwnDraws:
        weight_T = jnp.cumprod(jnp.full(rows.tokens_BT.shape[1], 2_654_435_761, jnp.uint32))
        ids_BT = jnp.where(rows.valid_BT, rows.tokens_BT + 1, 0).astype(jnp.uint32)
        return cls(policy, jnp.sum(ids_BT * weight_T, axis=1, dtype=jnp.uint32))

    def start(self, shape: tuple[int, ...], layers: int) -> Int[Array, "B T"]:
        return self.policy.start(shape, layers)

    def leaves(self, hazard_logits: Float[Array, "B T"], key: PRNGKey) -> Bool[Array, "B T"]:
        def at(name: Array, position: Array, z: Array) -> Array:
            own = jax.random.fold_in(jax.random.fold_in(key, name), position)
            return self.policy.leaves(z, own)

        positions = jnp.arange(hazard_logits.shape[1])
        along_row = jax.vmap(at, in_axes=(None, 0, 0))
        return jax.vmap(along_row, in_axes=(0, None, 0))(self.name_B, positions, hazard_logits)


@functools.partial(jax.jit, static_argnames="graphdef")
def token_scores(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    batch: Completions,
    policy: Policy,
    key: PRNGKey,
) -> tuple[Float[Array, "B C"], Bool[Array, "B C"], Int[Array, "B C"]]:
    """Scores the continuation tokens of a batch under `policy`.

    Returns the log-probability in nats, whether the token is the most likely one, and the depth of
    the pass that predicts it, each as [B, C].
    """
    model: Transformer = nnx.merge(graphdef, *states)
    if policy.draws:
        policy = OwnDraws.of(policy, batch)
    if not policy.reads_hazards:  # a depth for each token of the continuation
        policy = policy.map_rows(lambda part: batch.input_depths(part, model.arch.layers))
    result = run(
        model,
        batch.tokens_BT,
        policy=policy,
        **batch.layout,
        action_BT=batch.action_BT,
        key=key,
    )
    hidden_BCD = batch.window(result.hidden_BTD)
    tokens_BC = batch.completion_tokens_BC
    logprob_BC, _ = token_logprobs(model.head_VD, hidden_BCD, tokens_BC)
    likely_BC = most_likely(flat(hidden_BCD), model.head_VD).reshape(tokens_BC.shape)
    return logprob_BC, likely_BC == tokens_BC, batch.window(result.depth_BT)


def most_likely(h_ND: Float[Array, "N D"], head_VD: Float[Array, "V D"]) -> Int[Array, "N"]:
    """Returns the token argmax_v h · head_v of each row, found in tiles of the vocabulary.

    If several tokens have the same logit, the result is the one with the lowest id.
    """
    vocab = head_VD.shape[0]
    tile = min(_TILE, vocab)

    def look(number: Array, best: tuple[Array, Array]) -> tuple[Array, Array]:
        # The last tile ends with the vocabulary and may repeat some tokens, which is harmless.
        start = jnp.minimum(number * tile, vocab - tile)
        part_VD = jax.lax.dynamic_slice_in_dim(head_VD, start, tile)
        logits_NV = logits_of(h_ND, part_VD)
        top_N, index_N = jnp.max(logits_NV, axis=-1), jnp.argmax(logits_NV, axis=-1)
        better_N = top_N > best[0]
        return (
            jnp.where(better_N, top_N, best[0]),
            jnp.where(better_N, start + index_N, best[1]).astype(jnp.int32),
        )

    count = h_ND.shape[0]
    none = (jnp.full(count, -jnp.inf), jnp.zeros(count, jnp.int32))
    return jax.lax.fori_loop(0, -(-vocab // tile), look, none)[1]
