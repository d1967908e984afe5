"""The public op `decode_attention`, which dispatches to one of several implementations."""

import jax
import jax.numpy as jnp

from jexit.errors import UserError
from jexit.kernels import shapes
from jexit.kernels.decode_attention import pallas_gpu, pallas_tpu, reference, xla
from jexit.kernels.dispatch import ONLY_BY_NAME, Operation

OPERATION = Operation("decode_attention")
OPERATION.register("reference", reference.decode_attention, platforms=ONLY_BY_NAME)
OPERATION.register("xla", xla.decode_attention)
OPERATION.register("pallas_tpu", pallas_tpu.decode_attention, platforms=("tpu",))
OPERATION.register("pallas_gpu", pallas_gpu.decode_attention, platforms=("gpu",))


def decode_attention(
    q_BNH: jax.Array,
    keys_KLPSH: jax.Array,
    values_KLPSH: jax.Array,
    layer: jax.Array | int,
    rows_B: jax.Array | None,
    lengths_B: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Computes softmax(q·k / sqrt(H)) · v for one query per row, over the row's filled cache slots.

    The cache holds P sequences, one per row, with S slots each, one per token. All implementations
    but the reference read no further than the longest row that has a query, rounded up to whole
    blocks of slots. The softmax is computed in float32.

    Args:
      q_BNH: queries [B, N, H] after the rotary embedding; query heads that share a key/value head
        are adjacent.
      keys_KLPSH: keys [K, L, P, S, H] after the rotary embedding, for K heads, L layers, P rows.
      values_KLPSH: values, in the same layout.
      layer: the index of the layer whose keys and values are used.
      rows_B: the cache row of each query [B]; None if every row has one query, in order (B = P).
      lengths_B: the number of filled slots in the row of each query [B], at least 1.
      implementation: `None` (by platform), `"reference"`, `"xla"`, `"pallas_tpu"` or `"pallas_gpu"`
        (the last two are interpreted on a CPU, for tests).

    Returns:
      The attention output [B, N, H], in the queries' dtype.

    Raises:
      UserError: if shapes do not match or the implementation does not exist.
      NotImplementedError: if the named implementation does not support these shapes, this dtype or
        this platform.
    """
    name = "decode_attention"
    shapes.check_floats(name, "q_BNH", q_BNH)
    shapes.check_same(name, "values_KLPSH", values_KLPSH.shape, keys_KLPSH.shape)
    if q_BNH.ndim != 3 or keys_KLPSH.ndim != 5:
        raise UserError(
            f"{name}: q_BNH has shape {list(q_BNH.shape)} and keys_KLPSH {list(keys_KLPSH.shape)}, "
            "but they must be [rows, heads, width] and [heads, layers, rows, slots, width]; "
            "reshape them"
        )
    batch, heads, width = q_BNH.shape
    kv_heads, _, rows, _, kv_width = keys_KLPSH.shape
    if width != kv_width:
        raise UserError(
            f"{name}: query heads have width {width}, but key/value heads have width {kv_width}; "
            "make the widths equal"
        )
    if heads % kv_heads:
        raise UserError(
            f"{name}: {heads} query heads cannot be divided evenly among {kv_heads} key/value "
            f"heads; use a multiple of {kv_heads} query heads"
        )
    expected = (rows if rows_B is None else batch,)
    shapes.check_same(name, "q_BNH", q_BNH.shape[:1], expected)
    if rows_B is not None:
        shapes.check_same(name, "rows_B", rows_B.shape, (batch,))
    shapes.check_same(name, "lengths_B", lengths_B.shape, (batch,))
    layer = jnp.asarray(layer, jnp.int32)
    return OPERATION(implementation, q_BNH, keys_KLPSH, values_KLPSH, layer, rows_B, lengths_B)
