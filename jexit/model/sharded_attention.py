"""Attention sharded over a mesh: rows over the data axes, heads over the tensor axis."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from jexit.axes import Array, CacheKLPSH, Float, MaskBT, SegmentBT
from jexit.dist.rules import divides, per_device, spec

# (queries [B, T, N, H], keys and values [B, S, K, H], segments [B, S] or None) → [B, T, N, H]
Attend = Callable[[Array, Array, Array, Array | None], Array]


def over_mesh(
    attend: Attend,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    segment_BS: MaskBT | SegmentBT | None,
) -> Float[Array, "B T N H"]:
    """Runs `attend` on each device of the current mesh, with the rows and heads of that device.

    Kernels that the compiler cannot shard by itself need this. If the number of key/value heads is
    not a multiple of the mesh axis `tensor`, every device has all key/value heads and selects those
    that its query heads use. Devices exchange no data, except to sum the gradients of shared
    key/value heads. `segment_BS` contains the number of each position's text, or is a mask that is
    False at padding; None means one text per row without padding.
    """
    if not divides():
        return attend(q_BTNH, k_BSKH, v_BSKH, segment_BS)
    q_spec, kv_spec = spec("B.N.", q_BTNH.shape), spec("B.K.", k_BSKH.shape)
    segment_spec = None if segment_BS is None else spec("B.", segment_BS.shape)
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    picks = q_spec[2] is not None and kv_spec[2] is None

    def local(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, segment_BS: Array | None) -> Array:
        if picks:
            count = q_BTNH.shape[2]
            first = jax.lax.axis_index(q_spec[2]) * count
            k_BSKH, v_BSKH = (own_heads(part, first, count, group) for part in (k_BSKH, v_BSKH))
        return attend(q_BTNH, k_BSKH, v_BSKH, segment_BS)

    in_specs = (q_spec, kv_spec, kv_spec, segment_spec)
    divided = per_device(local, in_specs=in_specs, out_specs=q_spec)
    return divided(q_BTNH, k_BSKH, v_BSKH, segment_BS)


def own_heads(
    part_BSKH: Float[Array, "B S K H"], first: Array, count: int, group: int
) -> Float[Array, "B S J H"]:
    """Returns the key/value heads that the query heads first … first + count − 1 attend to.

    `part_BSKH` are the keys or the values of all K heads, each of which serves `group` query heads.
    If all `count` query heads share one key/value head, returns that head alone (J = 1); otherwise
    returns one key/value head per query head (J = `count`).
    """
    if group % count == 0:
        return jax.lax.dynamic_slice_in_dim(part_BSKH, first // group, 1, axis=2)
    return jnp.take(part_BSKH, (first + jnp.arange(count)) // group, axis=2)


def cache_heads(query_heads: int, kv_heads: int) -> int:
    """Returns the number of key/value heads that a KV cache stores under the current mesh.

    The number is the least multiple of `kv_heads` that is a multiple of the size of the mesh axis
    `tensor` and divides `query_heads`. If it exceeds `kv_heads`, each head is stored several times,
    so that every device has the heads that its queries need. If there is no such number, the query
    heads cannot be sharded over `tensor` either, and the result is `kv_heads`.
    """
    mesh = jax.sharding.get_abstract_mesh()
    tensor = 1 if mesh.empty else mesh.shape.get("tensor", 1)
    fitting = (
        heads
        for heads in range(kv_heads, query_heads + 1, kv_heads)
        if heads % tensor == 0 and query_heads % heads == 0
    )
    return next(fitting, kv_heads)


def decode_over_mesh(
    attend: Callable[..., Array],
    q_BNH: Float[Array, "B N H"],
    keys_KLPSH: CacheKLPSH,
    values_KLPSH: CacheKLPSH,
    *rest: Array | None,
) -> Float[Array, "B N H"]:
    """Runs `attend` over a KV cache on each device, with that device's query and cache heads.

    `attend` has the arguments of `jexit.kernels.decode_attention`. The arguments in `rest` (layer,
    rows and lengths) are not sharded.
    """
    if not divides():
        return attend(q_BNH, keys_KLPSH, values_KLPSH, *rest)
    q_spec, kv_spec = spec(".N.", q_BNH.shape), spec("K....", keys_KLPSH.shape)
    in_specs = (q_spec, kv_spec, kv_spec, *(None if part is None else P() for part in rest))
    divided = per_device(attend, in_specs=in_specs, out_specs=q_spec)
    return divided(q_BNH, keys_KLPSH, values_KLPSH, *rest)


def over_heads(
    write: Callable[..., Array],
    part_KLPSH: CacheKLPSH,
    new_KBH: Float[Array, "K B H"],
    *rest: Array,
) -> CacheKLPSH:
    """Runs the cache update `write` on each device, for the heads of that device alone.

    `write(part, new, *rest)` returns the cache's keys or values `part` after writing `new`, one
    token for each of B rows. The arguments in `rest` are not sharded.
    """
    if not divides():
        return write(part_KLPSH, new_KBH, *rest)
    kv_spec = spec("K....", part_KLPSH.shape)
    in_specs = (kv_spec, spec("K..", new_KBH.shape), *(P() for _ in rest))
    return per_device(write, in_specs=in_specs, out_specs=kv_spec)(part_KLPSH, new_KBH, *rest)
