"""Keys and values of the tokens so far, for decoding one token at a time."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jexit.axes import Array, Bool, CacheLBKSH, Float, Int
from jexit.dist import constrain
from jexit.model.attention import KeysValues

SMALLEST_CACHE = 64
SMALLEST_PROMPT = 16


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
    """Rotated keys and values [L, B, K, S, H] of S slots; all rows fill the same slot at a time.

    The slots lie inside the heads, so that attention is a plain batched product for each head.
    """

    keys_LBKSH: CacheLBKSH
    values_LBKSH: CacheLBKSH

    @property
    def slots(self) -> int:
        return self.keys_LBKSH.shape[3]

    @classmethod
    def of_prompts(cls, kv: KeysValues, slots: int, samples: int) -> Cache:
        """The cache after a prefill with keys and values [L, P, T, K, H]: each prompt's repeated
        for its `samples` rollouts, rows of one prompt adjacent, with room for `slots` tokens."""
        by_head = (jnp.repeat(jnp.swapaxes(part, 2, 3), samples, axis=1) for part in kv)
        return cls(*(constrain(part, ".BK..") for part in by_head)).grown(slots)

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


def prompt_bucket(length: int) -> int:
    """The padded length of a prompt: four sizes an octave, so padding stays under a quarter."""
    quantum = max(SMALLEST_PROMPT, (1 << length.bit_length()) >> 3)
    return -(-length // quantum) * quantum


def cache_bucket(used: int, most: int) -> int:
    """Slots of a cache that must hold `used` tokens now and may come to hold `most`.

    Sizes double from one bucket to the next, so attention never runs over more than about twice the
    tokens that are there, at few compilations; the last bucket is what is needed at all.
    """
    bucket = max(SMALLEST_CACHE, 1 << (used - 1).bit_length())
    return min(bucket, prompt_bucket(most))
