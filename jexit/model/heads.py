"""Attention divided over a mesh: rows over the data axes, heads over the tensor axis."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jexit.axes import Array, Float, MaskBT
from jexit.dist.rules import spec

# (queries [B, T, N, H], keys and values [B, S, K, H], valid [B, S] or None) → [B, T, N, H]
Attend = Callable[[Array, Array, Array, Array | None], Array]


def over_mesh(
    attend: Attend,
    q_BTNH: Float[Array, "B T N H"],
    k_BSKH: Float[Array, "B S K H"],
    v_BSKH: Float[Array, "B S K H"],
    valid_BS: MaskBT | None,
) -> Float[Array, "B T N H"]:
    """`attend` on each device of the mesh that is set, with that device's rows and heads.

    For kernels that the compiler cannot divide by itself. Arrays lie as `jexit.dist.rules` has
    them: key/value heads that do not divide over `tensor` are whole on every device, which then
    picks those of its own query heads. Nothing travels, except the sum of their gradients.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty or mesh.size == 1:
        return attend(q_BTNH, k_BSKH, v_BSKH, valid_BS)
    q_spec, kv_spec = spec("B.N.", q_BTNH.shape), spec("B.K.", k_BSKH.shape)
    valid_spec = None if valid_BS is None else spec("B.", valid_BS.shape)
    group = q_BTNH.shape[2] // k_BSKH.shape[2]
    picks = q_spec[2] is not None and kv_spec[2] is None

    def local(q_BTNH: Array, k_BSKH: Array, v_BSKH: Array, valid_BS: Array | None) -> Array:
        if picks:
            count = q_BTNH.shape[2]
            first = jax.lax.axis_index(q_spec[2]) * count
            k_BSKH, v_BSKH = (own_heads(part, first, count, group) for part in (k_BSKH, v_BSKH))
        return attend(q_BTNH, k_BSKH, v_BSKH, valid_BS)

    divided = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, valid_spec),
        out_specs=q_spec,
        check_vma=False,
    )
    return divided(q_BTNH, k_BSKH, v_BSKH, valid_BS)


def own_heads(
    part_BSKH: Float[Array, "B S K H"], first: Array, count: int, group: int
) -> Float[Array, "B S J H"]:
    """Key/value heads of the query heads first … first + count − 1, of which `group` share one.

    One head where all of them share it; otherwise one for each query head.
    """
    if group % count == 0:
        return jax.lax.dynamic_slice_in_dim(part_BSKH, first // group, 1, axis=2)
    return jnp.take(part_BSKH, (first + jnp.arange(count)) // group, axis=2)
