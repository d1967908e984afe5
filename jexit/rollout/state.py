"""What decoding carries: completions to make, their records, and the pool of those under way.

Arrays have their rows first, so that each data shard of a mesh holds its own: J completions, P rows
of the pool, one number a shard.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

from jexit.axes import Array, Bool, Float, Int
from jexit.model.cache import Cache

FREE = -1  # a row of the pool without a completion


def _pytree(cls: type) -> type:
    return jax.tree_util.register_dataclass(dataclasses.dataclass(frozen=True)(cls))


@_pytree
class Work:
    """The completions to make; those of one prompt are adjacent."""

    number_J: Int[Array, "J"]  # of the prompt in the caller's whole list
    sample_J: Int[Array, "J"]
    prompt_length_J: Int[Array, "J"]  # with what is written of the completion
    written_J: Int[Array, "J"]
    place_J: Int[Array, "J"]  # of the prompt among the prompts' keys and values
    order_J: Int[Array, "J"]  # completions in the order in which they start


@_pytree
class Records:
    """What is kept of every completion; T is no less than `max_new_tokens`."""

    tokens_JT: Int[Array, "J T"]
    depths_JT: Int[Array, "J T"]
    logprobs_JT: Float[Array, "J T"]
    depth_logprobs_JT: Float[Array, "J T"]
    hazard_logits_JTE: Float[Array, "J T E"] | None
    length_J: Int[Array, "J"]
    ended_J: Bool[Array, "J"]

    @classmethod
    def empty(cls, rows: int, columns: int, exits: int | None) -> Records:
        """`exits` None: hazards are not kept."""
        integers_JT = jnp.zeros((rows, columns), jnp.int32)
        floats_JT = jnp.zeros((rows, columns), jnp.float32)
        z_JTE = None if exits is None else jnp.full((rows, columns, exits), jnp.nan, jnp.float32)
        return cls(
            integers_JT,
            integers_JT,
            floats_JT,
            floats_JT,
            z_JTE,
            jnp.zeros(rows, jnp.int32),
            jnp.zeros(rows, bool),
        )


@_pytree
class Pool:
    """Completions under way, each with its last token somewhere on its way through the layers."""

    job_P: Int[Array, "P"]  # the completion, or FREE
    index_P: Int[Array, "P"]  # tokens that are out
    depth_P: Int[Array, "P"]
    segment_P: Int[Array, "P"]  # that the row waits for; at 0 it emits
    since_P: Int[Array, "P"]  # tick from which it waits
    h_PD: Float[Array, "P D"]
    hazard_logits_PE: Float[Array, "P E"]  # zeros at exits that were not reached
    cache: Cache
    tick: Int[Array, "1"]
    started: Int[Array, "1"]  # completions that have begun, of `Work.order_J`
    filled: Float[Array, "1"]  # places that ran, weighted by what a place costs, in layers
    places: Float[Array, "1"]  # likewise, that there were

    @classmethod
    def empty(cls, rows: int, width: int, exits: int, cache: Cache, shards: int) -> Pool:
        """Of all shards together, with free rows."""
        integers_P, one = jnp.zeros(rows, jnp.int32), jnp.zeros(shards, jnp.int32)
        return cls(
            job_P=integers_P + FREE,
            index_P=integers_P,
            depth_P=integers_P,
            segment_P=integers_P,
            since_P=integers_P,
            h_PD=jnp.zeros((rows, width), cache.keys_KLPSH.dtype),
            hazard_logits_PE=jnp.zeros((rows, exits), jnp.float32),
            cache=cache,
            tick=one,
            started=one,
            filled=one.astype(jnp.float32),
            places=one.astype(jnp.float32),
        )


@_pytree
class Progress:
    """What the host decides by, of every shard."""

    started: Int[Array, "shards"]
    under_way: Int[Array, "shards"]  # completions
    full: Bool[Array, "shards"]  # a row needs a larger cache
    filled: Float[Array, "shards"]
    places: Float[Array, "shards"]
    ticks: Int[Array, "shards"]
