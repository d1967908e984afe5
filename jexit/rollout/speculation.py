"""Self-speculative decoding: an exit drafts tokens, and all layers verify them in one pass.

The distribution of the output is that of all layers (arXiv:2211.17192): a drafted token d is
accepted with probability min(1, p(d) / q(d)), where q is the exit's distribution and p that of all
layers; after the first rejection, a token is drawn from max(p − q, 0), normalised. The draft reuses
the layers below the exit, whose keys and values the verification needs anyway (LayerSkip,
arXiv:2404.16710).
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from jexit.axes import Array, Bool, Float, Int, Key
from jexit.dist import data_axes
from jexit.errors import UserError
from jexit.model.attention import KeysValues
from jexit.model.block import Block
from jexit.model.cache import Cache, cache_bucket, prompt_bucket
from jexit.model.exits import maps_to_end
from jexit.model.layers import rope_table
from jexit.model.policies import Speculate
from jexit.model.transformer import Transformer, logits_of, run
from jexit.rollout.engine import Decodable, Engine
from jexit.rollout.requests import Request
from jexit.rollout.results import Grown
from jexit.rollout.sampling import Sampling, draw_by_weight, fold_in
from jexit.rollout.weights import LayerWeights, at_layer, head_logits

DRAFT = 4  # tokens that an exit drafts before they are verified
# Numbers of a round's draws; drafted token i has the number i.
_ACCEPT, _REST = 1_000, 1_001


@struct.dataclass
class SpeculationState:
    """The state of a request's completions: KV cache, next input token and its cache slot."""

    cache: Cache
    token_B: Int[Array, "B"]
    slot_B: Int[Array, "B"]
    index_B: Int[Array, "B"]  # tokens drawn so far
    keys_B: Key[Array, "B"]


class Speculation:
    """Decodes one request with the policy `Speculate`, in rounds of drafting and verification.

    `drafted` and `accepted` count tokens of completions that had not ended. All prompts are decoded
    together, on one data shard. Raises UserError if the request is invalid, if the policy's layer
    is not an exit of the model, or if the mesh has several data shards.
    """

    def __init__(self, model: Transformer | Decodable, request: Request) -> None:
        self._engine = Engine(model, adapters=request.adapters, hazards=False)
        self.request, self.model = request, self._engine.model
        policy = request.policy
        assert isinstance(policy, Speculate)
        request.check(self.model)
        if data_axes():
            raise UserError(
                "the mesh has several data shards, but the policy Speculate decodes on one only; "
                "run one process per device, or use another policy"
            )
        wrong = {
            "hazards=True": request.hazards,
            f"total={request.total}": request.total is not None,
            "a forced prefix": request.forced is not None,
            f"samples_per_prompt={request.samples_per_prompt}": request.samples_per_prompt > 1,
        }
        for setting, given in wrong.items():
            if given:
                raise UserError(
                    f"the request sets {setting}, but the policy Speculate does not support it; "
                    "leave it out, or use another policy"
                )
        self._layer = policy.layer
        self._exit = self.model.exit_layers.index(policy.layer)
        self._eos = set(request.eos_ids)
        self.accepted = self.drafted = 0
        self._lengths = [0] * len(request.prompts)
        self._over = [False] * len(request.prompts)
        self._rows: SpeculationState | None = None

    @property
    def ended(self) -> bool:
        return all(self._over)

    def end(self, row: int) -> None:
        """Ends the completion of a row, so that `turn` returns no more of its tokens."""
        self._over[row] = True

    def turn(self) -> list[Grown]:
        """Prefills prompts in the first call, runs a round in later calls; returns new tokens.

        The list has one entry per completion that had not ended.
        """
        if self._rows is None:
            return self._began()
        engine, active_B = self._engine, ~np.asarray(self._over)
        self._rows, made = _round(
            engine.graphdef, engine.states, engine.layers, self._end_map, self._rows, active_B,
            self.request.sampling, layer=self._layer, adapters=engine.adapters,
        )  # fmt: skip
        token_BT, logprob_BT, count_B = jax.device_get(made)
        self.drafted += DRAFT * int(active_B.sum())
        self.accepted += int((count_B - 1)[active_B].sum())
        return self._news(token_BT, logprob_BT, count_B)

    def _began(self) -> list[Grown]:
        request = self.request
        prompts = request.prompts
        length_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
        width = prompt_bucket(int(length_B.max()))
        tokens_BT = np.full((len(prompts), width), request.pad_id, np.int32)
        for row, prompt in enumerate(prompts):
            tokens_BT[row, : len(prompt)] = prompt
        most = width + request.max_new_tokens + DRAFT
        number_B = request.first_prompt + np.arange(len(prompts), dtype=np.int32)
        self._rows, self._end_map, made = _prefilled(
            self._engine.graphdef, self._engine.states, tokens_BT, length_B, number_B,
            request.prng_key, request.sampling, slots=cache_bucket(most, most),
            exit_index=self._exit, adapters=request.adapters,
        )  # fmt: skip
        token_B, logprob_B = jax.device_get(made)
        return self._news(token_B[:, None], logprob_B[:, None], np.ones(len(prompts), np.int32))

    def _news(self, token_BT: Any, logprob_BT: Any, count_B: Any) -> list[Grown]:
        news = []
        for row, over in enumerate(self._over):
            if over:
                continue
            room = self.request.max_new_tokens - self._lengths[row]
            tokens = token_BT[row, : min(int(count_B[row]), room)].tolist()
            ends = [index for index, token in enumerate(tokens) if token in self._eos]
            tokens = tokens[: ends[0] + 1] if ends else tokens
            self._lengths[row] += len(tokens)
            self._over[row] = bool(ends) or len(tokens) == room
            news.append(
                Grown(
                    ticket=row,
                    tokens=tokens,
                    depths=[self.model.arch.layers] * len(tokens),
                    logprobs=logprob_BT[row, : len(tokens)].tolist(),
                    hazard_logits=[[math.nan] * len(self.model.exit_layers)] * len(tokens),
                    finished=self._over[row],
                )
            )
        return news


@functools.partial(jax.jit, static_argnames=("graphdef", "slots", "exit_index", "adapters"))
def _prefilled(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    tokens_BT: Int[Array, "B T"],
    length_B: Int[Array, "B"],
    number_B: Int[Array, "B"],
    key: Array,
    sampling: Sampling,
    *,
    slots: int,
    exit_index: int,
    adapters: bool,
) -> tuple[SpeculationState, tuple[Array, Array] | None, tuple[Array, Array]]:
    """Prefills prompts; returns the rows, the exit's map to the last layer, and the first tokens.

    The last result is (tokens, log-probabilities). The map is None without a linear continuation.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    rows = tokens_BT.shape[0]
    valid_BT = jnp.arange(tokens_BT.shape[1]) < length_B[:, None]
    result = run(model, tokens_BT, valid_BT=valid_BT, adapters=adapters, keys_values=True)
    at_B1 = (length_B - 1)[:, None, None]
    last_BD = jnp.take_along_axis(result.hidden_BTD, at_B1, axis=1)[:, 0]
    keys_B = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(key, number_B)
    drawn_B = sampling.draw(logits_of(last_BD, model.head_VD), fold_in(keys_B, 0))
    cache = Cache.empty(model.arch, rows, slots, model.dtype)
    cache = cache.with_prompts(jnp.arange(rows), result.keys_values)
    end_map = None
    if model.blocks.continuation is not None:
        maps = maps_to_end(model.blocks.continuation, model.exit_layers, model.arch.layers)
        end_map = maps[0][exit_index], maps[1][exit_index]
    ones_B = jnp.ones(rows, jnp.int32)
    return SpeculationState(cache, drawn_B[0], length_B, ones_B, keys_B), end_map, drawn_B


@functools.partial(jax.jit, static_argnames=("graphdef", "layer", "adapters"), donate_argnums=4)
def _round(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    layers: LayerWeights | None,
    end_map: tuple[Array, Array] | None,
    rows: SpeculationState,
    active_B: Bool[Array, "B"],
    sampling: Sampling,
    *,
    layer: int,
    adapters: bool,
) -> tuple[SpeculationState, tuple[Array, Array, Array]]:
    """Drafts `DRAFT` tokens per row at exit `layer` and verifies them.

    Returns the rows and (tokens [B, T], log-probabilities [B, T], count [B]). The first `count`
    tokens of a row are new, the last of these drawn from all layers. Inactive rows do not change.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    stack = _Stack(model, layers, adapters)
    draw_keys_B = jax.vmap(jax.random.fold_in)(rows.keys_B, rows.index_B)

    def to_exit(token_B: Array, step: Array | int, cache: Cache) -> tuple[Array, Cache]:
        h_B1D = model.embed(token_B[:, None])
        return stack.through(h_B1D, (rows.slot_B + step)[:, None], cache, 0, layer)

    def draft(carry: tuple[Array, Cache], step: Array) -> tuple[tuple[Array, Cache], Any]:
        h_B1D, cache = to_exit(carry[0], step, carry[1])
        h_BD = h_B1D[:, 0]
        if end_map is not None:
            q_DD, c_D = (part.astype(h_BD.dtype) for part in end_map)
            h_BD = h_BD + h_BD @ q_DD + c_D
        weights_BV = _weights(sampling, head_logits(model.final_norm(h_BD), model.head_VD))
        token_B = draw_by_weight(weights_BV, fold_in(draw_keys_B, step))
        return (token_B, cache), (h_B1D[:, 0], token_B, weights_BV)

    (token_B, cache), drafted = jax.lax.scan(draft, (rows.token_B, rows.cache), jnp.arange(DRAFT))
    h_BUD, draft_BU, q_BUV = (jnp.moveaxis(part, 0, 1) for part in drafted)
    last_B1D, cache = to_exit(token_B, DRAFT, cache)
    h_BTD = jnp.concatenate([h_BUD, last_B1D], axis=1)
    slot_BT = rows.slot_B[:, None] + jnp.arange(DRAFT + 1)
    h_BTD, cache = stack.through(h_BTD, slot_BT, cache, layer, model.arch.layers)
    batch, chunk, width = h_BTD.shape
    flat_MD = model.final_norm(h_BTD).reshape(-1, width)
    logits_BTV = head_logits(flat_MD, model.head_VD).reshape(batch, chunk, -1)
    p_BTV = _weights(sampling, logits_BTV)
    count_B, rest_BV = accepted(p_BTV, q_BUV, draft_BU, fold_in(draw_keys_B, _ACCEPT))
    last_B = draw_by_weight(rest_BV, fold_in(draw_keys_B, _REST))
    padded_BT = jnp.pad(draft_BU, ((0, 0), (0, 1)))
    token_BT = jnp.where(jnp.arange(chunk) == count_B[:, None], last_B[:, None], padded_BT)
    scored_BTV = logits_BTV if sampling.greedy else sampling.distribution(logits_BTV)
    logprob_BT = jnp.take_along_axis(jax.nn.log_softmax(scored_BTV), token_BT[..., None], axis=-1)[
        ..., 0
    ]
    new_B = jnp.where(active_B, count_B + 1, 0)
    after = SpeculationState(
        cache,
        jnp.where(active_B, last_B, rows.token_B),
        rows.slot_B + new_B,
        rows.index_B + new_B,
        rows.keys_B,
    )
    return after, (token_BT, logprob_BT, count_B + 1)


def accepted(
    p_BTV: Float[Array, "B T V"],
    q_BUV: Float[Array, "B U V"],
    draft_BU: Int[Array, "B U"],
    keys_B: Key[Array, "B"],
) -> tuple[Int[Array, "B"], Float[Array, "B V"]]:
    """Returns how many drafted tokens are accepted [B], and the next token's weights [B, V].

    The next token is drawn with probability weight / Σ weight. The U tokens `draft_BU` were drawn
    from the exit's distributions `q_BUV`; `p_BTV` are the distributions of all layers at the same
    positions and after the last draft (T = U + 1). (Leviathan et al., arXiv:2211.17192, algorithm
    1.)
    """
    drafted = draft_BU.shape[1]
    p_BU = jnp.take_along_axis(p_BTV[:, :-1], draft_BU[..., None], axis=-1)[..., 0]
    q_BU = jnp.take_along_axis(q_BUV, draft_BU[..., None], axis=-1)[..., 0]
    uniform_BU = jax.vmap(lambda key: jax.random.uniform(key, (drafted,)))(keys_B)
    accepts_BU = uniform_BU * q_BU < p_BU
    count_B = jnp.sum(jnp.cumprod(accepts_BU.astype(jnp.int32), axis=1), axis=1)
    at_B11 = count_B[:, None, None]
    p_BV = jnp.take_along_axis(p_BTV, at_B11, axis=1)[:, 0]
    # After the last draft nothing is left out.
    padded_BTV = jnp.pad(q_BUV, ((0, 0), (0, 1), (0, 0)))
    q_BV = jnp.take_along_axis(padded_BTV, at_B11, axis=1)[:, 0]
    rest_BV = jnp.maximum(p_BV - q_BV, 0.0)
    # p = q up to rounding, though a draft was rejected: what is left is p itself.
    empty_B1 = jnp.sum(rest_BV, axis=-1, keepdims=True) <= 0.0
    return count_B, jnp.where(empty_B1, p_BV, rest_BV)


def _weights(sampling: Sampling, logits: Float[Array, "*A V"]) -> Float[Array, "*A V"]:
    """Returns the probability [..., V] of drawing each token; one-hot for greedy decoding."""
    if sampling.greedy:
        return jax.nn.one_hot(jnp.argmax(logits, axis=-1), logits.shape[-1])
    return jax.nn.softmax(sampling.distribution(logits))


@dataclasses.dataclass(frozen=True)
class _Stack:
    """Runs layers for several tokens per row, and stores their keys and values in a cache."""

    model: Transformer
    layers: LayerWeights | None
    adapters: bool

    def through(
        self, h_BTD: Array, slot_BT: Int[Array, "B T"], cache: Cache, first: int, end: int
    ) -> tuple[Array, Cache]:
        """Runs layers `first` … `end` − 1 on T tokens per row; returns residuals and the cache.

        `slot_BT` are the tokens' cache slots, which are also their positions in the sequence.
        """
        batch, chunk, _ = h_BTD.shape
        rope = rope_table(self.model.arch, slot_BT)
        rows_B = jnp.arange(batch, dtype=jnp.int32)

        def inputs(block: Block, h_BTD: Array) -> tuple[Array, KeysValues]:
            x_BTD = block.attn_norm(h_BTD)
            settings = {"adapters": self.adapters, "key": None}
            kv = block.attn.keys_values(x_BTD, *rope, **settings)
            return block.attn.queries(x_BTD, *rope, **settings), kv

        def output(block: Block, h_BTD: Array, mixed_BTNH: Array) -> Array:
            return block.finish(h_BTD, mixed_BTNH, adapters=self.adapters)

        def one(layer: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            h_BTD, cache = carry
            q_BTNH, kv = at_layer(layer, self.model.blocks, self.layers, inputs, h_BTD)
            for index in range(chunk):
                part = KeysValues(*(values[:, index : index + 1] for values in kv))
                cache = cache.written(layer, rows_B, slot_BT[:, index], part)
            q_MNH = q_BTNH.reshape(batch * chunk, *q_BTNH.shape[2:])
            length_M = jnp.minimum(slot_BT.reshape(-1) + 1, cache.slots)
            mixed_MNH = cache.attend(layer, jnp.repeat(rows_B, chunk), q_MNH, length_M)
            mixed_BTNH = mixed_MNH.reshape(q_BTNH.shape)
            return at_layer(layer, self.model.blocks, self.layers, output, h_BTD, mixed_BTNH), cache

        return jax.lax.fori_loop(first, end, one, (h_BTD, cache))
