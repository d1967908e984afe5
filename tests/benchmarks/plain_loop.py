"""The plain loop over a batch, which the engine replaced and has to beat.

All rows of a batch run in step: a layer runs while any row needs it, and rows that have left are
masked. Prompts are padded on the left, so that every row writes the same slot.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jexit.axes import Array, Bool, Float, Int
from jexit.model.attention import KeysValues
from jexit.model.block import Block
from jexit.model.cache import prompt_bucket
from jexit.model.layers import rope_table
from jexit.model.policies import Policy
from jexit.model.transformer import Transformer, logits_of, run


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Rotated keys and values [L, B, K, S, H] of S slots; all rows fill the same slot at a time.

    The slots lie inside the heads, so that attention is a plain batched product for each head.
    """

    keys_LBKSH: Float[Array, "L B K S H"]
    values_LBKSH: Float[Array, "L B K S H"]

    @classmethod
    def of_prompts(cls, kv: KeysValues, room: int) -> Cache:
        """The prompts' keys and values [L, B, T, K, H], with `room` for more tokens."""
        by_head = (jnp.swapaxes(part, 2, 3) for part in kv)
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


@functools.partial(jax.jit, static_argnames=("graphdef", "columns"))
def complete(
    graphdef: nnx.GraphDef,
    states: tuple[nnx.State, ...],
    prompts_BT: Int[Array, "B T"],
    lengths_B: Int[Array, "B"],
    policy: Policy,
    *,
    columns: int,
) -> Int[Array, "B columns"]:
    """Completes left-padded prompts by the most likely tokens."""
    model: Transformer = nnx.merge(graphdef, *states)
    (rows, slots), layers = prompts_BT.shape, model.arch.layers
    pad_B, slot_T, slot_S = slots - lengths_B, jnp.arange(slots), jnp.arange(slots + columns - 1)
    block_def, stacked = nnx.split(model.blocks)

    def block_of(layer: Array) -> Block:
        return nnx.merge(block_def, jax.tree.map(lambda part: part[layer], stacked))

    def next_pass(index: Array, carry: tuple) -> tuple:
        """Runs each row's last token through the layers that the policy gives it."""
        tokens_BC, cache = carry
        slot = slots + index - 1
        depth_B = policy.at(jnp.arange(rows), index).start((rows,), layers)
        rope = rope_table(model.arch, (slot - pad_B)[:, None])
        mask_BS = (slot_S >= pad_B[:, None]) & (slot_S <= slot)

        def keys_values(block: Block, h_BD: Array) -> tuple[Array, KeysValues]:
            x_B1D = block.attn_norm(h_BD[:, None])
            return x_B1D, block.attn.keys_values(x_B1D, *rope, adapters=True, key=None)

        def run_layer(at: tuple) -> tuple:
            layer, h_BD, cache = at
            block = block_of(layer)
            x_B1D, kv = keys_values(block, h_BD)
            cache = cache.written(layer, slot, kv)
            q_B1NH = block.attn.queries(x_B1D, *rope, adapters=True, key=None)
            mixed_BNH = cache.attend(layer, q_B1NH[:, 0], mask_BS)
            new_BD = block.finish(h_BD[:, None], mixed_BNH[:, None], adapters=True)[:, 0]
            kept_BD = jnp.where((layer < depth_B)[:, None], new_BD, block.skipped(h_BD))
            return layer + 1, kept_BD, cache

        def fill(layer: Array, at: tuple) -> tuple:
            (h_BD, cache), block = at, block_of(layer)
            _, kv = keys_values(block, h_BD)
            return block.skipped(h_BD), cache.written(layer, slot, kv)

        start = jnp.zeros((), jnp.int32), model.embed(tokens_BC[:, index - 1]), cache
        ran, h_BD, cache = jax.lax.while_loop(lambda at: jnp.any(at[0] < depth_B), run_layer, start)
        h_BD, cache = jax.lax.fori_loop(ran, layers, fill, (h_BD, cache))
        logits_BV = logits_of(model.final_norm(h_BD), model.head_VD)
        return tokens_BC.at[:, index].set(jnp.argmax(logits_BV, axis=-1)), cache

    result = run(
        model,
        prompts_BT,
        positions_BT=jnp.maximum(slot_T - pad_B[:, None], 0),
        valid_BT=slot_T >= pad_B[:, None],
        keys_values=True,
    )
    logits_BV = logits_of(result.hidden_BTD[:, -1], model.head_VD)
    first_BC = jnp.zeros((rows, columns), jnp.int32).at[:, 0].set(jnp.argmax(logits_BV, axis=-1))
    carry = first_BC, Cache.of_prompts(result.keys_values, columns - 1)
    return jax.lax.fori_loop(1, columns, next_pass, carry)[0]


def plain(
    split: tuple, prompts: list[list[int]], *, policy: Policy, max_new_tokens: int
) -> np.ndarray:
    """The most likely tokens [B, T] of each prompt, all rows in step."""
    graphdef, *states = split
    width = prompt_bucket(max(map(len, prompts)))
    tokens_BT = np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        tokens_BT[row, width - len(prompt) :] = prompt
    lengths_B = np.asarray([len(prompt) for prompt in prompts], np.int32)
    made: Any = complete(
        graphdef, tuple(states), tokens_BT, lengths_B, policy, columns=max_new_tokens
    )
    return jax.device_get(made)
