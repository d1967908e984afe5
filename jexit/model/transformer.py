"""The decoder: a `lax.scan` over stacked layers; a halting policy decides where tokens leave."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx, struct

from jexit.axes import (
    Array,
    DepthBT,
    ExitHiddenEBTD,
    Float,
    HazardLogitsBTE,
    HiddenBTD,
    Int,
    Key,
    LengthsB,
    LogitsBTV,
    MaskBT,
    PositionsBT,
    PRNGKey,
    SegmentBT,
    TokensBT,
)
from jexit.config import Execution, ExitSettings, LoRA
from jexit.dist import constrain
from jexit.errors import UserError
from jexit.kernels import tiles
from jexit.model.attention import KeysValues, attend
from jexit.model.block import Block
from jexit.model.embedding import Embedding
from jexit.model.exits import Continuation, ExitHeads, maps_to_end
from jexit.model.layers import RMSNorm, rope_table
from jexit.model.policies import Full, Policy, check_policy, warn_if_untrained
from jexit.presets import Architecture

REMAT_POLICIES = {
    "block": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.checkpoint_dots_with_no_batch_dims,
}


class Head(nnx.Module):
    """An output head [V, D] with its own weights, for models without tied embeddings."""

    def __init__(self, arch: Architecture, *, dtype: jnp.dtype, rngs: nnx.Rngs):
        shape = (arch.vocab_size, arch.width)
        self.kernel = nnx.Param(jax.random.normal(rngs.params(), shape, dtype) * 0.02)


class Transformer(nnx.Module):
    """A Qwen-family or Llama decoder with exit heads and, optionally, LoRA adapters.

    The module contains only parameters and settings; the functions `run` and `forward` compute with
    it. A token that leaves at exit ℓ, one of the sorted `exit_layers`, runs layers 0 … ℓ − 1.
    """

    def __init__(
        self,
        arch: Architecture,
        *,
        exit_layers: tuple[int, ...],
        exit_head: ExitSettings = ExitSettings(),
        lora: LoRA | None = None,
        dtype: jnp.dtype = jnp.float32,
        execution: Execution = Execution(),
        rngs: nnx.Rngs,
    ):
        self.arch = arch
        self.exit_layers = tuple(exit_layers)
        self.exit_head = exit_head
        self.lora = lora
        self.execution = execution
        self.embed = Embedding(arch, dtype=dtype, rngs=rngs)
        exit_head.check_width(arch.width)
        self.blocks = Block(arch, lora, exit_head, dtype=dtype, rngs=rngs)
        self.final_norm = RMSNorm(arch.width, eps=arch.rms_norm_eps, dtype=dtype)
        self.head = None if arch.tied else Head(arch, dtype=dtype, rngs=rngs)
        self.exits = ExitHeads(
            len(exit_layers), arch.width, exit_head, eps=arch.rms_norm_eps, rngs=rngs
        )

    @property
    def head_VD(self) -> Float[Array, "V D"]:
        return (self.embed.embedding if self.head is None else self.head.kernel)[...]

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the base weights, the residual, and the keys and values."""
        return self.embed.embedding.get_value().dtype


@struct.dataclass
class Run:
    """The results of `run`; results that were not requested are None.

    `hidden_BTD` is the output of the final norm; the logits are `hidden_BTD` · headᵀ. `depth_BT` is
    the number of layers that each token ran. `residual_RBTD` contains the residual that enters
    each of the R `residual_layers`, or, for layer L, the one after the last layer. In a layer that
    a token skips, the token's keys and values are computed from the residual that enters the layer.
    `hazard_logits_BTE` also contains logits for exits beyond a token's depth, where the token has
    already left; the distribution of depths ignores them.
    """

    hidden_BTD: HiddenBTD
    depth_BT: DepthBT
    hazard_logits_BTE: HazardLogitsBTE | None
    residual_RBTD: Float[Array, "R B T D"] | None
    keys_values: KeysValues | None  # [L, B, T, K, H] each
    observed: Any  # the results of `observe`


def run(
    model: Transformer,
    tokens_BT: TokensBT,
    *,
    policy: Policy = Full(),
    positions_BT: PositionsBT | None = None,
    valid_BT: MaskBT | None = None,
    segment_BT: SegmentBT | None = None,
    branches: bool = False,
    action_BT: MaskBT | None = None,
    key: PRNGKey | Key[Array, "B"] | None = None,
    adapters: bool = True,
    dropout_key: PRNGKey | None = None,
    hazards: bool = False,
    residual_layers: tuple[int, ...] = (),
    observe: Callable[[HiddenBTD, HiddenBTD, Any], Any] | None = None,
    observed: Any = None,
    keys_values: bool = False,
) -> Run:
    """Runs the layers over sequences of token ids; `policy` decides how many layers a token runs.

    After a token has left, later layers still compute its keys and values, from a residual that
    stays as it was at the exit or continues linearly: h = where(layer < depth, block(h),
    continuation(h)).

    As in `attend`, `valid_BT` is False at padding, `segment_BT` numbers the texts packed into a
    row, and `branches` lets texts share a prefix. `positions_BT` (None: 0 … T − 1) must restart
    with each text. `action_BT` is True at positions that may leave early (None: all). If `key`
    contains one PRNG key per row, the random draws of a row depend only on the key of that row.
    `adapters=False` omits LoRA, as for the teacher. `dropout_key` draws the dropout of LoRA (None:
    no dropout).

    `hazards=True` returns the hazard logits even if the policy does not need them, and
    `keys_values=True` the keys and values of all layers.
    `residual_layers` are sorted layer numbers at which to return the residual: number ℓ means the
    residual that enters layer ℓ; L, the number of layers, means the residual after the last layer.
    `observe` is called at each layer with the layer's input, its output and its slice of `observed`
    [L, …]; the slices that it returns are stacked in the result. The attention implementation is
    `model.execution.attention`.
    """
    arch, execution = model.arch, model.execution
    batch, length = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
    cos, sin = rope_table(arch, positions_BT)
    mix = functools.partial(
        attend,
        valid_BT=valid_BT,
        segment_BT=segment_BT,
        branches=branches,
        implementation=execution.attention,
    )

    block_def, block_state = nnx.split(model.blocks)
    # Heads that decide nothing run after the scan, which would store their activations for every
    # layer. Where layers are recomputed it stores none, and the exits' residuals would be more.
    heads_in_scan = policy.reads_hazards or (hazards and execution.remat != "none")
    heads_follow = hazards and not heads_in_scan
    kept_layers = tuple(sorted({*residual_layers, *(model.exit_layers if heads_follow else ())}))
    by_row = key is not None and key.ndim == 1 and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    keys_L = None
    if key is not None:
        split = functools.partial(jax.random.split, num=arch.layers)
        keys_L = jax.vmap(split, out_axes=1)(key) if by_row else split(key)
    dropout_L = None if dropout_key is None else jax.random.split(dropout_key, arch.layers)

    def at_exit(h_BTD, depth_BT, exit_index, layer, layer_key):
        z_BT = model.exits(h_BTD, exit_index)
        leaves = jax.vmap(policy.leaves) if by_row else policy.leaves
        leaves_BT = leaves(z_BT, layer_key) & (depth_BT > layer)
        if action_BT is not None:
            leaves_BT &= action_BT
        return z_BT, jnp.where(leaves_BT, layer, depth_BT)

    def body(carry, xs):
        h_BTD, depth_BT, residual_RBTD = carry
        h_BTD = constrain(h_BTD, "B..")
        params, layer, exit_index, kept_index, layer_key, dropout, seen = xs
        z_BT = None
        if heads_in_scan:
            z_BT, depth_BT = jax.lax.cond(
                exit_index >= 0,
                lambda: at_exit(h_BTD, depth_BT, exit_index, layer, layer_key),
                lambda: (jnp.zeros((batch, length), jnp.float32), depth_BT),
            )
        if kept_layers:
            residual_RBTD = jax.lax.cond(
                kept_index >= 0,
                lambda: jax.lax.dynamic_update_index_in_dim(residual_RBTD, h_BTD, kept_index, 0),
                lambda: residual_RBTD,
            )
        block = nnx.merge(block_def, params)
        new_BTD, kv = block(h_BTD, cos, sin, mix, adapters=adapters, dropout_key=dropout)
        if observe is not None:
            seen = observe(h_BTD, new_BTD, seen)
        if policy.leaves_early:
            new_BTD = jnp.where((layer < depth_BT)[..., None], new_BTD, block.skipped(h_BTD))
        return (new_BTD, depth_BT, residual_RBTD), (z_BT, kv if keys_values else None, seen)

    if execution.remat != "none":
        # In a loop, nothing is recomputed in the forward pass, so no barrier has to separate both.
        unrolled = execution.scan_unroll >= arch.layers
        body = jax.checkpoint(body, policy=REMAT_POLICIES[execution.remat], prevent_cse=unrolled)

    h_BTD = constrain(model.embed(tokens_BT), "B..")
    kept = len(kept_layers)
    buffer = jnp.zeros((kept, *h_BTD.shape), h_BTD.dtype) if kept else None
    start_BT = policy.start((batch, length), arch.layers)
    if action_BT is not None:
        start_BT = jnp.where(action_BT, start_BT, arch.layers)
    xs = (
        block_state,
        jnp.arange(arch.layers),
        jnp.asarray(_index_of_layer(model.exit_layers, arch.layers)),
        jnp.asarray(_index_of_layer(kept_layers, arch.layers)),
        keys_L,
        dropout_L,
        observed,
    )
    carry = (h_BTD, start_BT, buffer)
    (h_BTD, depth_BT, buffer), (z_LBT, kv, observed) = jax.lax.scan(
        body, carry, xs, unroll=execution.scan_unroll
    )
    if arch.layers in residual_layers:
        buffer = buffer.at[-1].set(h_BTD)
    hazard_logits_BTE = None
    if heads_in_scan:
        hazard_logits_BTE = jnp.moveaxis(z_LBT[jnp.asarray(model.exit_layers)], 0, -1)
    elif heads_follow:
        at_exits = (buffer[kept_layers.index(layer)] for layer in model.exit_layers)
        z_E = [model.exits(h_BTD, jnp.int32(index)) for index, h_BTD in enumerate(at_exits)]
        hazard_logits_BTE = jnp.stack(z_E, -1) if z_E else jnp.zeros((batch, length, 0))
    residual_RBTD = buffer if residual_layers else None
    if residual_layers and residual_layers != kept_layers:
        residual_RBTD = buffer[jnp.asarray([kept_layers.index(r) for r in residual_layers])]
    final_BTD = model.final_norm(h_BTD)
    return Run(final_BTD, depth_BT, hazard_logits_BTE, residual_RBTD, kv, observed)


def _index_of_layer(chosen: tuple[int, ...], layers: int) -> Int[np.ndarray, "L"]:
    """Returns the index in `chosen` of each layer 0 … `layers` − 1, int32 [L]; −1 if it is absent.

    `chosen` may also contain `layers`, which has no entry in the result.
    """
    index_L = np.full(layers + 1, -1, np.int32)
    index_L[list(chosen)] = np.arange(len(chosen))
    return index_L[:layers]


def exit_hidden_states(
    model: Transformer, residual_EBTD: ExitHiddenEBTD, continuation: Continuation | None
) -> ExitHiddenEBTD:
    """Returns the hidden states that enter the output head for tokens that leave at each exit.

    They are the residuals at the E exits, mapped to the end of the last layer by `continuation` and
    then normalised by the final norm; the shape stays [E, B, T, D]. The continuation may be the
    student's even if the residuals are the teacher's. If `continuation` is None, the final norm is
    applied to the residuals directly (logit lens).
    """
    if continuation is not None:
        q_EDD, c_ED = maps_to_end(continuation, model.exit_layers, model.arch.layers)
        dtype = residual_EBTD.dtype
        update_EBTD = jnp.einsum("EBTd,EdD->EBTD", residual_EBTD, q_EDD.astype(dtype))
        residual_EBTD += update_EBTD + c_ED.astype(dtype)[:, None, None]
    return model.final_norm(residual_EBTD)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Output:
    """The results of `forward`: float32 logits and hazard logits, and int32 depths in layers.

    `residual_LBTD`, unless None, contains in the model's dtype the residual that enters each layer
    and, at index L (the number of layers), the residual after the last layer.
    """

    logits_BTV: LogitsBTV
    depth_BT: DepthBT
    hazard_logits_BTE: HazardLogitsBTE
    residual_LBTD: Float[Array, "L+1 B T D"] | None = None


def forward(
    model: Transformer,
    tokens_BT: TokensBT,
    lengths_B: LengthsB | None = None,
    *,
    policy: Policy = Full(),
    adapters: bool = True,
    key: PRNGKey | None = None,
    residuals: bool = False,
) -> Output:
    """Returns the logits, depths and hazard logits of right-padded sequences under a policy.

    Input: token ids [B, T] and lengths [B] (None: all are T). Output: logits [B, T, V], depths
    [B, T] and hazard logits [B, T, E] at the E exits. Entry t is for the pass at input position t,
    which predicts token t + 1; at padding it has no meaning. `adapters=False` omits LoRA; with the
    policy `Full` this is the teacher. The policy `Sample` needs a PRNG `key`. `residuals` adds the
    residual before each of the L layers and after the last one; from the exit on, the residual of a
    token that has left follows the model's continuation. For long sequences and a large vocabulary,
    use `run` with the ops of `jexit.kernels`, which never store all logits.

    In `forward` every position may leave early, but in `generate` prompts always run all layers. To
    score a prompt and its completion as `generate` ran them, prescribe L on the prompt and the
    recorded depths after the prompt, in a NumPy array `depth_BT`: `depth_BT[:] = L`, then
    `depth_BT[i, len(prompt) + t] = gen.depths[i][t + 1]` for t ≥ 0, where `len(prompt)` counts
    tokens, and `policy=Prescribed(depth_BT)`. To let a policy choose new depths for given
    completions only, exclude the prompts with `run(..., action_BT=positions_T >=
    prompt_lengths_B[:, None])`, where `positions_T` is 0 … T − 1.

    Raises UserError for tokens outside the vocabulary, more positions than the model has, lengths
    that do not match the tokens, and a policy that is not valid for this model.
    """
    tokens_BT = jnp.asarray(tokens_BT)
    lengths_B = None if lengths_B is None else jnp.asarray(lengths_B)
    _check_input(model.arch, tokens_BT, lengths_B)
    check_policy(policy, (*model.exit_layers, model.arch.layers))
    warn_if_untrained(policy, model)
    layers = tuple(range(model.arch.layers + 1)) if residuals else ()
    return _forward(
        model, tokens_BT, lengths_B, policy, key, adapters=adapters, residual_layers=layers
    )


def _check_input(arch: Architecture, tokens_BT: TokensBT, lengths_B: LengthsB | None) -> None:
    if tokens_BT.ndim != 2 or 0 in tokens_BT.shape:
        raise UserError(
            f"tokens have shape {tokens_BT.shape}, but forward needs [batch, length], both at "
            "least 1; give one row per sequence, each with at least one token"
        )
    batch, length = tokens_BT.shape
    if length > arch.max_positions:
        raise UserError(
            f"tokens have length {length}, but the model has only {arch.max_positions} positions; "
            "shorten the sequences or split them"
        )
    if lengths_B is not None and lengths_B.shape != (batch,):
        raise UserError(
            f"lengths have shape {lengths_B.shape}, but they must have shape ({batch},); give one "
            "length per sequence"
        )
    if not isinstance(tokens_BT, jax.core.Tracer):
        low, high = int(tokens_BT.min()), int(tokens_BT.max())
        if low < 0 or high >= arch.vocab_size:
            raise UserError(
                f"tokens contain {low if low < 0 else high}, but the model's tokens are 0 to "
                f"{arch.vocab_size - 1}; use the tokenizer that belongs to the model"
            )
    if lengths_B is not None and not isinstance(lengths_B, jax.core.Tracer):
        low, high = int(lengths_B.min()), int(lengths_B.max())
        if low < 1 or high > length:
            raise UserError(
                f"lengths contain {low if low < 1 else high}, but the tokens have length {length}; "
                f"give lengths from 1 to {length}"
            )


@nnx.jit(static_argnames=("adapters", "residual_layers"))
def _forward(model, tokens_BT, lengths_B, policy, key, *, adapters, residual_layers):
    valid_BT = None
    if lengths_B is not None:
        valid_BT = jnp.arange(tokens_BT.shape[1]) < lengths_B[:, None]
    result = run(
        model,
        tokens_BT,
        policy=policy,
        valid_BT=valid_BT,
        key=key,
        adapters=adapters,
        hazards=True,
        residual_layers=residual_layers,
    )
    logits_BTV = logits_of(result.hidden_BTD, model.head_VD)
    return Output(logits_BTV, result.depth_BT, result.hazard_logits_BTE, result.residual_RBTD)


def logits_of(hidden: Float[Array, "*A D"], head_VD: Float[Array, "V D"]) -> Array:
    """Returns the float32 logits hidden · headᵀ [..., V], computed by `jexit.kernels.tiles`."""
    return tiles.logits(hidden, head_VD)
