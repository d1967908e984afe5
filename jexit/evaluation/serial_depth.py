"""Computes the serial depth of a forward pass: the cost of the longest path in its jaxpr.

The *opaque* serial depth of a language model is the longest computation between two tokens of
readable text. It bounds what the model can work out without writing it down (Brown-Cohen et al.
2026, arXiv:2603.09786). For a token that leaves at an exit, it is the serial depth of the pass up
to this exit. The costs are those of the paper's program for JAX (google-deepmind/serial_depth).
Moving data costs 0, an element-wise operation 1, and a reduction or cumulative sum of n numbers
⌈log₂ n⌉. A matrix product with a contracted dimension of size n costs ⌈log₂ n⌉ + 1, and a scan its
length times the depth of its body.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core
from jax.sharding import AbstractMesh, use_abstract_mesh

from jexit.model.policies import Full
from jexit.model.transformer import Transformer, logits_of, run
from jexit.results import SerialDepth
from jexit.tasks import Attempt

_MOVES = {
    "broadcast_in_dim", "concatenate", "copy", "dynamic_slice", "dynamic_update_slice", "gather",
    "iota", "optimization_barrier", "pad", "reshape", "rev", "scatter", "sharding_constraint",
    "slice", "split", "squeeze", "stop_gradient", "transpose",
}  # fmt: skip
_REDUCTIONS = {
    "argmax", "argmin", "reduce_and", "reduce_max", "reduce_min", "reduce_or", "reduce_prod",
    "reduce_sum",
}  # fmt: skip
_CUMULATIVE = {"cummax", "cummin", "cumprod", "cumsum"}
_CALLS = {"jit": "jaxpr", "pjit": "jaxpr", "remat2": "jaxpr", "checkpoint": "jaxpr",
          "custom_jvp_call": "call_jaxpr", "custom_vjp_call": "call_jaxpr",
          "shard_map": "jaxpr"}  # fmt: skip


def serial_depth(jaxpr: core.Jaxpr, inputs: Sequence[int] | None = None) -> list[int]:
    """Returns the serial depth of each output of `jaxpr`, given that of each input (default: 0).

    Raises NotImplementedError for a loop of unknown length, and for an operation that contains a
    jaxpr but is neither a known call nor a known loop.
    """
    inputs = [0] * len(jaxpr.invars) if inputs is None else inputs
    depths: dict[Any, int] = dict(zip(jaxpr.invars, inputs, strict=True))

    def at(variable: Any) -> int:  # literals and constants have depth 0
        return 0 if isinstance(variable, core.Literal) else depths.get(variable, 0)

    for equation in jaxpr.eqns:
        before = [at(variable) for variable in equation.invars]
        depths.update(zip(equation.outvars, _after(equation, before), strict=True))
    return [at(variable) for variable in jaxpr.outvars]


def _after(equation: Any, before: Sequence[int]) -> list[int]:
    """Returns the depths of the outputs of an equation whose inputs have the depths `before`."""
    name, params, deepest = equation.primitive.name, equation.params, max(before, default=0)
    if name in _CALLS:
        return serial_depth(_open(params[_CALLS[name]]), before)
    if name == "cond":
        branches = [serial_depth(_open(branch), before[1:]) for branch in params["branches"]]
        return [max(before[0], *outputs) for outputs in zip(*branches, strict=True)]
    if name == "scan":
        # An iteration adds at most what one adds whose inputs are all as deep as the deepest.
        outputs = serial_depth(_open(params["jaxpr"]), [deepest] * len(before))
        carried = max((out - deepest for out in outputs), default=0)
        return [deepest + params["length"] * carried] * len(equation.outvars)
    if name == "while":
        raise NotImplementedError(
            "the program contains a loop of unknown length (while), so its serial depth is not "
            "known; use a scan, whose length is fixed, instead"
        )
    inside = jax.tree.leaves(list(params.values()))
    if any(isinstance(part, core.Jaxpr | core.ClosedJaxpr) for part in inside):
        raise NotImplementedError(
            f"the operation {name} contains a program, but the serial depth of such an operation "
            "is not known; add its rule to jexit.evaluation.serial_depth"
        )
    return [deepest + _cost(name, equation)] * len(equation.outvars)


def _cost(name: str, equation: Any) -> int:
    if name in _MOVES:
        return 0
    params = equation.params
    shape = equation.invars[0].aval.shape if equation.invars else ()
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        return _log2(math.prod(shape[axis] for axis in contracted)) + 1
    if name in _REDUCTIONS:
        return _log2(math.prod(shape[axis] for axis in params["axes"]))
    if name in _CUMULATIVE:
        return _log2(shape[params["axis"]])
    if name in ("sort", "top_k"):
        return _log2(shape[-1])
    return _log2(len(equation.invars) - 1) if name == "select_n" else 1


def _log2(count: int) -> int:
    return math.ceil(math.log2(max(count, 1)))


def _open(jaxpr: Any) -> core.Jaxpr:
    return jaxpr.jaxpr if hasattr(jaxpr, "jaxpr") else jaxpr


def depth_of_passes(model: Transformer, length: int) -> dict[int, int]:
    """Returns {layers: serial depth} of a pass over `length` tokens that runs so many layers.

    There is an entry for each exit and one for all layers. The pass goes from embedding to logits.
    A token that leaves early waits for the head of its exit. Meanwhile its residual goes through
    the linear continuation, if the model has one, as a single map.
    """
    return {
        layers: _depth_of_pass(model, layers, length)
        for layers in (*model.exit_layers, model.arch.layers)
    }


def _depth_of_pass(model: Transformer, layers: int, length: int) -> int:
    arch = dataclasses.replace(model.arch, layers=layers)
    execution = dataclasses.replace(model.execution, attention="xla", remat="none")

    def small() -> Transformer:
        return Transformer(
            arch, exit_layers=(), lora=model.lora, execution=execution, rngs=nnx.Rngs(0)
        )

    graphdef, *states = nnx.split(nnx.eval_shape(small))
    exits_def, exits_state = nnx.split(model.exits)

    def logits(states: Any, exits: Any, tokens_BT: Any, map_DD: Any, bias_D: Any) -> Any:
        part = nnx.merge(graphdef, *states)
        result = run(part, tokens_BT, policy=Full(), residual_layers=(layers,))
        if layers == model.arch.layers:
            return logits_of(result.hidden_BTD, part.head_VD)
        h_BTD = result.residual_RBTD[0]
        index = model.exit_layers.index(layers)
        leaves_BT = nnx.merge(exits_def, exits)(h_BTD, index) > 0
        if model.blocks.continuation is not None:
            h_BTD = h_BTD + h_BTD @ map_DD + bias_D
        logits_BTV = logits_of(part.final_norm(h_BTD), part.head_VD)
        return jnp.where(leaves_BT[..., None], logits_BTV, 0.0)

    width = arch.width
    inputs = (
        states,
        exits_state,
        jax.ShapeDtypeStruct((1, length), jnp.int32),
        jax.ShapeDtypeStruct((width, width), jnp.float32),
        jax.ShapeDtypeStruct((width,), jnp.float32),
    )
    inputs = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), inputs)
    with use_abstract_mesh(AbstractMesh((), ())):  # a mesh would add the operations of its layout
        closed = jax.make_jaxpr(logits)(*inputs)
    return max(serial_depth(closed.jaxpr))


def opaque_serial_depth(
    policy: str, model: Transformer, attempts: Sequence[Attempt], length: int
) -> SerialDepth:
    """Returns the mean opaque serial depth of the tokens of `attempts` at their depths.

    `length` is the number of tokens over which a pass attends. `policy` is the name of the policy
    under which the attempts were decoded. The mean is NaN without tokens.
    """
    by_depth: Mapping[int, int] = depth_of_passes(model, length)
    serial = [by_depth[depth] for made in attempts for depth in made.depths]
    return SerialDepth(
        policy=policy,
        length=length,
        by_depth={str(layers): depth for layers, depth in by_depth.items()},
        full=by_depth[model.arch.layers],
        mean=sum(serial) / len(serial) if serial else math.nan,
    )
