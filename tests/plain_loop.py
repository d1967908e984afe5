"""The plain loop over a batch, which the engine replaced: the truth for it, and what it must beat.

All rows of a batch run in step: a layer runs while anybody needs it, and the batch ends with its
slowest row. Prompts are padded on the left, so that every row writes the same slot.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Bool, Float, Int, Key, PRNGKey
from jexit.model.attention import KeysValues
from jexit.model.block import Block
from jexit.model.cache import prompt_bucket
from jexit.model.layers import rope_table
from jexit.model.policies import Policy
from jexit.model.transformer import Transformer, logits_of, run
from jexit.rollout.sampling import Sampling

TOKEN_DRAW = 0  # the draw of the token; 1 + e are the draws at the exits


def pytree(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@pytree
class Made:
    """Completions, rows of one prompt adjacent, as `jexit.rollout.Rollouts` has them."""

    tokens_BT: Int[Array, "B T"]
    depths_BT: Int[Array, "B T"]
    logprobs_BT: Float[Array, "B T"]
    depth_logprobs_BT: Float[Array, "B T"]
    hazard_logits_BTE: Float[Array, "B T E"]  # NaN at exits that were not reached
    lengths_B: Int[Array, "B"]


@pytree
class Cache:
    """Rotated keys and values [L, B, K, S, H] of S slots; all rows fill the same slot at a time.

    The slots lie inside the heads, so that attention is a plain batched product for each head.
    """

    keys_LBKSH: Float[Array, "L B K S H"]
    values_LBKSH: Float[Array, "L B K S H"]

    @classmethod
    def of_prompts(cls, kv: KeysValues, room: int, samples: int) -> Cache:
        """Each prompt's keys and values [L, P, T, K, H] for its samples; `room` for more tokens."""
        by_head = (jnp.repeat(jnp.swapaxes(part, 2, 3), samples, axis=1) for part in kv)
        return cls(*(jnp.pad(part, [*[(0, 0)] * 3, (0, room), (0, 0)]) for part in by_head))

    def written(self, layer: Int[Array, ""], slot: Int[Array, ""], kv: KeysValues) -> Cache:
        """The cache with one layer's keys and values [B, 1, K, H] of the token at `slot`."""

        def write(part: Array, new: Array) -> Array:
            zero = jnp.zeros((), jnp.int32)
            new_1BK1H = jnp.swapaxes(new, 1, 2)[None].astype(part.dtype)
            return jax.lax.dynamic_update_slice(part, new_1BK1H, (layer, zero, zero, slot, zero))

        return Cache(write(self.keys_LBKSH, kv.keys), write(self.values_LBKSH, kv.values))

    def attend(
        self, layer: Int[Array, ""], q_BNH: Float[Array, "B N H"], mask_BS: Bool[Array, "B S"]
    ) -> Float[Array, "B N H"]:
        """softmax(q·k / sqrt(H)) · v of one query a row over one layer; the soft-max in float32."""
        keys_BKSH, values_BKSH = (
            jax.lax.dynamic_index_in_dim(part, layer, 0, keepdims=False)
            for part in (self.keys_LBKSH, self.values_LBKSH)
        )
        batch, heads, width = q_BNH.shape
        kv_heads = keys_BKSH.shape[1]
        # Query heads of one key/value head are adjacent; G here counts them.
        q_BKGH = q_BNH.reshape(batch, kv_heads, heads // kv_heads, width) * width**-0.5
        scores_BKGS = jnp.einsum(
            "BKGH,BKSH->BKGS", q_BKGH, keys_BKSH, preferred_element_type=jnp.float32
        )
        scores_BKGS = jnp.where(mask_BS[:, None, None], scores_BKGS, -jnp.inf)
        weights_BKGS = jax.nn.softmax(scores_BKGS, axis=-1).astype(values_BKSH.dtype)
        return jnp.einsum("BKGS,BKSH->BKGH", weights_BKGS, values_BKSH).reshape(q_BNH.shape)


@pytree
class Pass:
    """One token's way through the layers."""

    layer: Int[Array, ""]
    h_BD: Float[Array, "B D"]
    depth_B: Int[Array, "B"]
    hazard_logits_BE: Float[Array, "B E"]  # zeros at exits that are not reached
    cache: Cache


@dataclasses.dataclass(frozen=True)
class Loop:
    """What stays as it is while a batch decodes."""

    model: Transformer
    policy: Policy
    prompt_slots: int  # of every row, its padding on the left included
    pad_B: Int[Array, "B"]
    adapters: bool
    reads_hazards: bool

    def run_token(
        self, token_B: Array, finished_B: Array, cache: Cache, index: Array, keys_B: Array
    ) -> Pass:
        """Runs each row's last token through as many layers as the policy says."""
        model, slot = self.model, self.prompt_slots + index - 1
        layers, exit_layers = model.arch.layers, model.exit_layers
        policy = self.policy.at(jnp.arange(token_B.shape[0]), index)
        rope = rope_table(model.arch, (slot - self.pad_B)[:, None])
        slot_S = jnp.arange(cache.keys_LBKSH.shape[3])
        mask_BS = (slot_S >= self.pad_B[:, None]) & (slot_S <= slot)
        block_def, stacked = nnx.split(model.blocks)
        # One more entry: after the last layer there is no exit.
        exit_index_L = jnp.asarray([*model.exit_index_of_layer, -1])

        def block_of(layer: Array) -> Block:
            return nnx.merge(block_def, jax.tree.map(lambda part: part[layer], stacked))

        def keys_values(block: Block, x_B1D: Array) -> KeysValues:
            return block.attn.keys_values(x_B1D, *rope, adapters=self.adapters, key=None)

        def someone_runs(at: Pass) -> Array:
            return (at.layer < layers) & jnp.any(at.layer < at.depth_B)

        def run_layer(at: Pass) -> Pass:
            block, h_B1D = block_of(at.layer), at.h_BD[:, None]
            x_B1D = block.attn_norm(h_B1D)
            cache = at.cache.written(at.layer, slot, keys_values(block, x_B1D))
            q_B1NH = block.attn.queries(x_B1D, *rope, adapters=self.adapters, key=None)
            mixed_BNH = cache.attend(at.layer, q_B1NH[:, 0], mask_BS)
            new_BD = block.finish(h_B1D, mixed_BNH[:, None], adapters=self.adapters)[:, 0]
            h_BD = jnp.where((at.layer < at.depth_B)[:, None], new_BD, block.skipped(at.h_BD))
            after = dataclasses.replace(at, layer=at.layer + 1, h_BD=h_BD, cache=cache)
            return leave(after) if self.reads_hazards else after

        def leave(at: Pass) -> Pass:
            exit_index = exit_index_L[at.layer]
            z_B = model.exits(at.h_BD, exit_index)
            leaves_B = policy.leaves_by_row(z_B, fold(keys_B, 1 + exit_index))
            leaves_B &= (at.layer < at.depth_B) & (exit_index >= 0)
            z_BE = at.hazard_logits_BE.at[:, exit_index].set(z_B)
            return dataclasses.replace(
                at,
                depth_B=jnp.where(leaves_B, at.layer, at.depth_B),
                hazard_logits_BE=jnp.where(exit_index >= 0, z_BE, at.hazard_logits_BE),
            )

        depth_B = policy.start(token_B.shape, layers)
        start = Pass(
            layer=jnp.zeros((), jnp.int32),
            h_BD=model.embed(token_B),
            depth_B=jnp.where(finished_B, 0, depth_B),  # nobody runs for rows that have ended
            hazard_logits_BE=jnp.zeros((token_B.shape[0], len(exit_layers))),
            cache=cache,
        )
        end = jax.lax.while_loop(someone_runs, run_layer, start)

        def fill(layer: Array, at: tuple[Array, Cache]) -> tuple[Array, Cache]:
            (h_BD, cache), block = at, block_of(layer)
            kv = keys_values(block, block.attn_norm(h_BD[:, None]))
            return block.skipped(h_BD), cache.written(layer, slot, kv)

        h_BD, cache = jax.lax.fori_loop(end.layer, layers, fill, (end.h_BD, end.cache))
        return dataclasses.replace(end, h_BD=h_BD, cache=cache)


@functools.partial(
    jax.jit, static_argnames=("graphdef", "samples", "columns", "adapters", "hazards")
)
def complete(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    eos_N: Int[Array, "N"],
    key: PRNGKey,
    sampling: Sampling,
    policy: Policy,
    *,
    samples: int,
    columns: int,
    adapters: bool,
    hazards: bool,
) -> Made:
    """Completes left-padded prompts [B, T], `samples` times each, up to `columns` tokens.

    A row's key comes from the seed, the prompt's index and the sample's index.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    count, slots = prompts_BT.shape
    pad_B, slot_T = slots - lengths_B, jnp.arange(slots)
    result = run(
        model,
        prompts_BT,
        positions_BT=jnp.maximum(slot_T - pad_B[:, None], 0),
        valid_BT=slot_T >= pad_B[:, None],
        padding="left",
        adapters=adapters,
        keys_values=True,
    )
    loop = Loop(
        model, policy, slots, jnp.repeat(pad_B, samples), adapters, hazards or policy.reads_hazards
    )
    batch, depths = count * samples, (*model.exit_layers, model.arch.layers)
    prompt_B, sample_B = jnp.divmod(jnp.arange(batch), samples)
    keys_B = jax.vmap(lambda *row: functools.reduce(jax.random.fold_in, row, key))(
        prompt_B, sample_B
    )
    logits_BV = logits_of(jnp.repeat(result.hidden_BTD[:, -1], samples, axis=0), model.head_VD)
    token_B, logprob_B = sampling.draw(logits_BV, fold(fold(keys_B, 0), TOKEN_DRAW))
    empty_BT = jnp.zeros((batch, columns))
    first = Made(
        tokens_BT=empty_BT.astype(jnp.int32).at[:, 0].set(token_B),
        depths_BT=empty_BT.astype(jnp.int32).at[:, 0].set(model.arch.layers),
        logprobs_BT=empty_BT.at[:, 0].set(logprob_B),
        depth_logprobs_BT=empty_BT,
        hazard_logits_BTE=jnp.full((batch, columns, len(depths) - 1), jnp.nan),
        lengths_B=jnp.ones(batch, jnp.int32),
    )

    def goes_on(state: tuple) -> Array:
        index, _, finished_B, *_ = state
        return (index < columns) & ~jnp.all(finished_B)

    def step(state: tuple) -> tuple:
        index, token_B, finished_B, cache, made = state
        token_keys_B = fold(keys_B, index)
        at = loop.run_token(token_B, finished_B, cache, index, token_keys_B)
        logits_BV = logits_of(model.final_norm(at.h_BD), model.head_VD)
        token_B, logprob_B = sampling.draw(logits_BV, fold(token_keys_B, TOKEN_DRAW))
        token_policy = policy.at(jnp.arange(batch), index)
        reached_BE = jnp.asarray(depths[:-1]) <= at.depth_B[:, None]

        def kept(record: Array, new: Array) -> Array:
            return record.at[:, index].set(
                jnp.where(finished_B.reshape(-1, *[1] * (new.ndim - 1)), record[:, index], new)
            )

        made = Made(
            tokens_BT=kept(made.tokens_BT, token_B),
            depths_BT=kept(made.depths_BT, at.depth_B),
            logprobs_BT=kept(made.logprobs_BT, logprob_B),
            depth_logprobs_BT=kept(
                made.depth_logprobs_BT,
                token_policy.log_prob(at.depth_B, at.hazard_logits_BE, depths),
            ),
            hazard_logits_BTE=kept(
                made.hazard_logits_BTE, jnp.where(reached_BE, at.hazard_logits_BE, jnp.nan)
            ),
            lengths_B=made.lengths_B + ~finished_B,
        )
        return index + 1, token_B, finished_B | ends(token_B), at.cache, made

    def ends(token_B: Array) -> Array:
        return jnp.any(token_B[:, None] == eos_N, axis=-1)

    cache = Cache.of_prompts(result.keys_values, columns - 1, samples)
    state = (jnp.ones((), jnp.int32), token_B, ends(token_B), cache, first)
    return jax.lax.while_loop(goes_on, step, state)[-1]


def fold(keys_B: Key[Array, "B"], number: Array | int) -> Key[Array, "B"]:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, number)


def plain(
    model: Transformer | tuple,
    prompts: list[list[int]],
    *,
    policy: Policy,
    max_new_tokens: int,
    eos_ids: Sequence[int] = (),
    pad_id: int = 0,
    key: int = 0,
    temperature: float = 1.0,
    top_p: float = 1.0,
    samples_per_prompt: int = 1,
    adapters: bool = True,
    hazards: bool = False,
) -> Made:
    """What `jexit.rollout.rollout` is asked for, all rows in step."""
    graphdef, *states = nnx.split(model) if isinstance(model, nnx.Module) else model
    width = prompt_bucket(max(map(len, prompts)))
    tokens_BT = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
    made: Any = complete(
        graphdef,
        tuple(states),
        tokens_BT,
        np.asarray([len(prompt) for prompt in prompts], np.int32),
        np.asarray(sorted(eos_ids), np.int32),
        jax.random.key(key),
        Sampling.of(temperature, top_p),
        policy,
        samples=samples_per_prompt,
        columns=max_new_tokens,
        adapters=adapters,
        hazards=hazards,
    )
    made = jax.device_get(made)
    beyond_BT = np.arange(max_new_tokens) >= made.lengths_B[:, None]
    return dataclasses.replace(made, tokens_BT=np.where(beyond_BT, pad_id, made.tokens_BT))
