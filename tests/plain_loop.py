"""The plain loop over a batch, which the engine replaced: the truth for it, and what it must beat.

All rows of a batch run in step: a layer runs while anybody needs it, and the batch ends with its
slowest row. Prompts are padded on the left, so that every row writes the same slot.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Bool, Float, Int, Key, PRNGKey
from jexit.model.attention import KeysValues
from jexit.model.block import Block
from jexit.model.cache import prompt_bucket
from jexit.model.exits import depth_log_prob
from jexit.model.layers import rope_table
from jexit.model.policies import Policy, Prescribed, Sample, law_settings
from jexit.model.transformer import Transformer, logits_of, run
from jexit.rollout.sampling import Sampling

TOKEN_DRAW = 0  # the draw of the token; 1 + e are the draws at the exits


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Rotated keys and values [L, B, K, S, H] of S slots; all rows fill the same slot at a time.

    The slots lie inside the heads, so that attention is a plain batched product for each head.
    """

    keys_LBKSH: Float[Array, "L B K S H"]
    values_LBKSH: Float[Array, "L B K S H"]

    @property
    def slots(self) -> int:
        return self.keys_LBKSH.shape[3]

    @classmethod
    def of_prompts(cls, kv: KeysValues, slots: int, samples: int) -> Cache:
        """The cache after a prefill with keys and values [L, P, T, K, H]: each prompt's repeated
        for its `samples` rollouts, rows of one prompt adjacent, with room for `slots` tokens."""
        by_head = (jnp.repeat(jnp.swapaxes(part, 2, 3), samples, axis=1) for part in kv)
        return cls(*by_head).grown(slots)

    def grown(self, slots: int) -> Cache:
        """The cache with room for `slots` tokens; the new slots hold zeros."""
        room = [(0, 0), (0, 0), (0, 0), (0, slots - self.slots), (0, 0)]
        return Cache(jnp.pad(self.keys_LBKSH, room), jnp.pad(self.values_LBKSH, room))

    def written(self, layer: Int[Array, ""], slot: Int[Array, ""], kv: KeysValues) -> Cache:
        """The cache with one layer's keys and values [B, 1, K, H] of the token at `slot`."""

        def write(part: Array, new: Array) -> Array:
            zero = jnp.zeros((), jnp.int32)
            new_1BK1H = jnp.swapaxes(new, 1, 2)[None].astype(part.dtype)
            return jax.lax.dynamic_update_slice(part, new_1BK1H, (layer, zero, zero, slot, zero))

        return Cache(write(self.keys_LBKSH, kv.keys), write(self.values_LBKSH, kv.values))

    def attend(
        self,
        layer: Int[Array, ""],
        q_BNH: Float[Array, "B N H"],
        mask_BS: Bool[Array, "B S"],
    ) -> Float[Array, "B N H"]:
        """softmax(q·k / sqrt(H)) · v of one query a row over one layer; the soft-max in float32.

        Every row must have a slot that `mask_BS` allows.
        """
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


def _pytree(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Records:
    """What is kept of every generated token, with time first so that a step writes one row."""

    tokens_TB: Int[Array, "T B"]
    depths_TB: Int[Array, "T B"]
    logprobs_TB: Float[Array, "T B"]
    depth_logprobs_TB: Float[Array, "T B"]
    hazard_logits_TBE: Float[Array, "T B E"] | None


@_pytree
class Decoding:
    """A batch half way: `index` tokens a row are out, the last of them not yet run."""

    index: Int[Array, ""]
    token_B: Int[Array, "B"]
    finished_B: Bool[Array, "B"]
    length_B: Int[Array, "B"]
    cache: Cache
    records: Records


@_pytree
class Rows:
    """What stays as it is while a batch decodes."""

    keys_B: Key[Array, "B"]
    prompt_slots: Int[Array, ""]  # of every row, its padding on the left included
    pad_B: Int[Array, "B"]
    eos_N: Int[Array, "N"]


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "samples", "slots", "max_new_tokens", "adapters", "hazards"),
)
def prefill(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    eos_N: Int[Array, "N"],
    key: PRNGKey,
    first_prompt: Int[Array, ""],
    sampling: Sampling,
    *,
    samples: int,
    slots: int,
    max_new_tokens: int,
    adapters: bool,
    hazards: bool,
) -> tuple[Rows, Decoding]:
    """Runs left-padded prompts [B, T] at full depth and draws `samples` first tokens for each.

    Rows of one prompt are adjacent. A row's key comes from the seed, the prompt's index in the
    caller's whole list and the sample's index, whatever the batch.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    prompts, length = prompts_BT.shape
    pad_B = length - lengths_B
    slot_T = jnp.arange(length)
    result = run(
        model,
        prompts_BT,
        positions_BT=jnp.maximum(slot_T - pad_B[:, None], 0),
        valid_BT=slot_T >= pad_B[:, None],
        padding="left",
        adapters=adapters,
        keys_values=True,
    )
    logits_BV = logits_of(result.hidden_BTD[:, -1], model.head_VD)

    def row_keys(prompt: Array) -> Array:
        prompt_key = jax.random.fold_in(key, prompt)
        return jax.vmap(lambda sample: jax.random.fold_in(prompt_key, sample))(jnp.arange(samples))

    keys_B = jax.vmap(row_keys)(first_prompt + jnp.arange(prompts)).reshape(-1)
    rows = Rows(keys_B, jnp.asarray(length), jnp.repeat(pad_B, samples), eos_N)
    token_B, logprob_B = sampling.draw(
        jnp.repeat(logits_BV, samples, axis=0), _fold(_fold(keys_B, 0), TOKEN_DRAW)
    )
    batch = prompts * samples
    empty = jnp.zeros((max_new_tokens, batch), jnp.float32)
    exits = len(model.exit_layers)
    records = Records(
        tokens_TB=empty.astype(jnp.int32).at[0].set(token_B),
        depths_TB=empty.astype(jnp.int32).at[0].set(model.arch.layers),
        logprobs_TB=empty.at[0].set(logprob_B),
        depth_logprobs_TB=empty,
        hazard_logits_TBE=(
            jnp.full((max_new_tokens, batch, exits), jnp.nan, jnp.float32) if hazards else None
        ),
    )
    return rows, Decoding(
        index=jnp.ones((), jnp.int32),
        token_B=token_B,
        finished_B=_ends(token_B, eos_N),
        length_B=jnp.ones((batch,), jnp.int32),
        cache=Cache.of_prompts(result.keys_values, slots, samples),
        records=records,
    )


@functools.partial(
    jax.jit,
    static_argnames=("graphdef", "adapters", "hazards"),
    donate_argnames="state",
)
def decode(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    rows: Rows,
    state: Decoding,
    policy: Policy,
    sampling: Sampling,
    *,
    adapters: bool,
    hazards: bool,
) -> Decoding:
    """Generates until every row has ended, the records are full, or the cache is.

    The program depends on the size of the cache and not on that of the prompts.
    """
    model: Transformer = nnx.merge(graphdef, *states)
    room = state.cache.slots - rows.prompt_slots + 1
    last = jnp.minimum(state.records.tokens_TB.shape[0], room)

    def goes_on(state: Decoding) -> Array:
        return (state.index < last) & ~jnp.all(state.finished_B)

    def step(state: Decoding) -> Decoding:
        slot = rows.prompt_slots + state.index - 1
        keys_B = _fold(rows.keys_B, state.index)
        token_pass = _run_token(
            model,
            state,
            rows,
            policy.of(jnp.arange(state.token_B.shape[0]), state.index),
            keys_B,
            slot,
            adapters,
            hazards,
        )
        logits_BV = logits_of(model.final_norm(token_pass.h_BD), model.head_VD)
        token_B, logprob_B = sampling.draw(logits_BV, _fold(keys_B, TOKEN_DRAW))
        return _recorded(state, token_pass, token_B, logprob_B, rows.eos_N)

    return jax.lax.while_loop(goes_on, step, state)


@_pytree
class _Pass:
    """One token's way through the layers."""

    layer: Int[Array, ""]
    h_BD: Float[Array, "B D"]
    depth_B: Int[Array, "B"]
    hazard_logits_BE: Float[Array, "B E"] | None
    cache: Cache
    depth_logprob_B: Float[Array, "B"] | None = None


def _run_token(
    model: Transformer,
    state: Decoding,
    rows: Rows,
    policy: Policy,
    keys_B: Array,
    slot: Array,
    adapters: bool,
    hazards: bool,
) -> _Pass:
    """Runs each row's last token through as many layers as the policy says."""
    arch, exit_layers = model.arch, model.exit_layers
    layers, batch = arch.layers, state.token_B.shape[0]
    reads_hazards = hazards or policy.reads_hazards
    cos, sin = rope_table(arch, (slot - rows.pad_B)[:, None])
    slot_S = jnp.arange(state.cache.slots)
    mask_BS = (slot_S >= rows.pad_B[:, None]) & (slot_S <= slot)
    block_def, stacked = nnx.split(model.blocks)
    # One more entry: after the last layer there is no exit.
    exit_index_L = jnp.asarray([*model.exit_index_of_layer, -1])

    def block_of(layer: Array) -> Block:
        def pick(parameter: Array) -> Array:
            return jax.lax.dynamic_index_in_dim(parameter, layer, 0, keepdims=False)

        return nnx.merge(block_def, jax.tree.map(pick, stacked))

    def keys_values(block: Block, x_B1D: Array) -> KeysValues:
        return block.attn.keys_values(x_B1D, cos, sin, adapters=adapters, key=None)

    def someone_runs(at: _Pass) -> Array:
        return (at.layer < layers) & jnp.any(at.layer < at.depth_B)

    def run_layer(at: _Pass) -> _Pass:
        block = block_of(at.layer)
        h_B1D = at.h_BD[:, None]
        x_B1D = block.attn_norm(h_B1D)
        cache = at.cache.written(at.layer, slot, keys_values(block, x_B1D))
        q_B1NH = block.attn.queries(x_B1D, cos, sin, adapters=adapters, key=None)
        mixed_BNH = cache.attend(at.layer, q_B1NH[:, 0], mask_BS)
        new_BD = block.finish(h_B1D, mixed_BNH[:, None], adapters=adapters)[:, 0]
        h_BD = jnp.where((at.layer < at.depth_B)[:, None], new_BD, block.skipped(at.h_BD))
        after = dataclasses.replace(at, layer=at.layer + 1, h_BD=h_BD, cache=cache)
        return leave(after) if reads_hazards else after

    def leave(at: _Pass) -> _Pass:
        exit_index = exit_index_L[at.layer]

        def at_exit() -> tuple[Array, Array]:
            z_B = model.exits(at.h_BD, exit_index)
            exit_keys_B = _fold(keys_B, 1 + exit_index)
            leaves_B = jax.vmap(policy.leaves)(z_B, exit_keys_B) & (at.layer < at.depth_B)
            z_BE = jax.lax.dynamic_update_slice(
                at.hazard_logits_BE, z_B[:, None], (jnp.zeros((), jnp.int32), exit_index)
            )
            return jnp.where(leaves_B, at.layer, at.depth_B), z_BE

        depth_B, z_BE = jax.lax.cond(
            exit_index >= 0, at_exit, lambda: (at.depth_B, at.hazard_logits_BE)
        )
        return dataclasses.replace(at, depth_B=depth_B, hazard_logits_BE=z_BE)

    depth_B = policy.start((batch,), layers)
    start = _Pass(
        layer=jnp.zeros((), jnp.int32),
        h_BD=model.embed(state.token_B),
        depth_B=jnp.where(state.finished_B, 0, depth_B),  # nobody runs for rows that have ended
        # Exits that are not reached hold zeros in the loop: the law may read them, times nothing.
        hazard_logits_BE=jnp.zeros((batch, len(exit_layers))) if reads_hazards else None,
        cache=state.cache,
    )
    end = jax.lax.while_loop(someone_runs, run_layer, start)

    def fill(layer: Array, at: tuple[Array, Cache]) -> tuple[Array, Cache]:
        (h_BD, cache), block = at, block_of(layer)
        kv = keys_values(block, block.attn_norm(h_BD[:, None]))
        return block.skipped(h_BD), cache.written(layer, slot, kv)

    h_BD, cache = jax.lax.fori_loop(end.layer, layers, fill, (end.h_BD, end.cache))
    end = dataclasses.replace(end, h_BD=h_BD)
    depth_logprob_B = jnp.zeros((batch,))
    if isinstance(policy, Sample):
        depth_logprob_B = depth_log_prob(
            end.depth_B, end.hazard_logits_BE, exit_layers, layers, **law_settings(policy)
        )
    if hazards:
        reached_BE = jnp.asarray(exit_layers) <= end.depth_B[:, None]
        end = dataclasses.replace(
            end, hazard_logits_BE=jnp.where(reached_BE, end.hazard_logits_BE, jnp.nan)
        )
    return dataclasses.replace(end, cache=cache, depth_logprob_B=depth_logprob_B)


def _recorded(
    state: Decoding, token_pass: _Pass, token_B: Array, logprob_B: Array, eos_N: Array
) -> Decoding:
    """The batch after one more token; rows that had ended get zeros."""
    running_B = ~state.finished_B

    def write(record: Array, new: Array) -> Array:
        return jax.lax.dynamic_update_index_in_dim(record, new, state.index, 0)

    kept = state.records
    z_TBE = kept.hazard_logits_TBE
    if z_TBE is not None:
        z_BE = jnp.where(running_B[:, None], token_pass.hazard_logits_BE, jnp.nan)
        z_TBE = write(z_TBE, z_BE)
    depth_logprob_B = jnp.where(running_B, token_pass.depth_logprob_B, 0.0)
    records = Records(
        tokens_TB=write(kept.tokens_TB, token_B),
        depths_TB=write(kept.depths_TB, token_pass.depth_B),
        logprobs_TB=write(kept.logprobs_TB, jnp.where(running_B, logprob_B, 0.0)),
        depth_logprobs_TB=write(kept.depth_logprobs_TB, depth_logprob_B),
        hazard_logits_TBE=z_TBE,
    )
    return Decoding(
        index=state.index + 1,
        token_B=token_B,
        finished_B=state.finished_B | _ends(token_B, eos_N),
        length_B=state.length_B + running_B,
        cache=token_pass.cache,
        records=records,
    )


def _ends(token_B: Array, eos_N: Array) -> Array:
    return jnp.any(token_B[:, None] == eos_N, axis=-1)


def _fold(keys_B: Array, number: Array | int) -> Array:
    return jax.vmap(jax.random.fold_in, in_axes=(0, None))(keys_B, number)


@dataclasses.dataclass(frozen=True)
class Made:
    """Completions, rows of one prompt adjacent, as `jexit.rollout.Rollouts` has them."""

    tokens_BT: np.ndarray
    depths_BT: np.ndarray
    logprobs_BT: np.ndarray
    depth_logprobs_BT: np.ndarray
    hazard_logits_BTE: np.ndarray | None
    lengths_B: np.ndarray


def plain(
    model: Transformer | tuple,
    prompts: list[list[int]],
    *,
    policy: Policy,
    max_new_tokens: int,
    eos_ids: Any = (),
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
    states = tuple(states)
    sampling = Sampling.of(temperature, top_p)
    width = prompt_bucket(max(map(len, prompts)))
    tokens_BT = np.full((len(prompts), width), pad_id, np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
    rows, state = prefill(
        graphdef,
        states,
        tokens_BT,
        np.asarray([len(prompt) for prompt in prompts], np.int32),
        np.asarray(sorted(eos_ids), np.int32),
        jax.random.key(key),
        np.int32(0),
        sampling,
        samples=samples_per_prompt,
        slots=prompt_bucket(width + max_new_tokens - 1),
        max_new_tokens=max_new_tokens,
        adapters=adapters,
        hazards=hazards,
    )
    if max_new_tokens > 1:
        if isinstance(policy, Prescribed):
            policy = Prescribed(jnp.asarray(policy.depth_BT)[:, :max_new_tokens])
        state = decode(
            graphdef, states, rows, state, policy, sampling, adapters=adapters, hazards=hazards
        )
    records, lengths_B = jax.device_get((state.records, state.length_B))
    beyond_BT = np.arange(max_new_tokens) >= lengths_B[:, None]
    z_TBE = records.hazard_logits_TBE
    return Made(
        tokens_BT=np.where(beyond_BT, np.int32(pad_id), records.tokens_TB.T),
        depths_BT=np.where(beyond_BT, 0, records.depths_TB.T),
        logprobs_BT=records.logprobs_TB.T,
        depth_logprobs_BT=records.depth_logprobs_TB.T,
        hazard_logits_BTE=None if z_TBE is None else np.moveaxis(z_TBE, 0, 1),
        lengths_B=lengths_B,
    )
