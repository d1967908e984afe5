"""Checks the implementations of each operation on this device against a float32 reference."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jexit.kernels import decode_attention, exit_kl, linear_kl, linear_logprob
from jexit.kernels.decode_attention.api import OPERATION as DECODE_ATTENTION
from jexit.kernels.dispatch import Operation, target
from jexit.kernels.exit_kl.api import OPERATION as EXIT_KL
from jexit.kernels.linear_kl.api import OPERATION as LINEAR_KL
from jexit.kernels.linear_kl.reference import DIRECTIONS
from jexit.kernels.linear_logprob.api import OPERATION as LINEAR_LOGPROB
from jexit.model.attention import PLATFORMS, KeysValues, attend

# Relative to the largest entry of an output: rounding, with room for another order of summation.
TOLERANCE = {"float32": 1e-4, "bfloat16": 2e-2}
NO_OTHER = "no setting avoids it, so install another release of jax, and report this"
HALF_ONLY = ("cudnn",)  # implementations that do not support float32
PORTABLE = "xla"
REPEATS = 5

Outputs = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The sizes of test inputs; `tokens` and `vocab` are not multiples of a kernel's tile size."""

    tokens: int
    width: int
    vocab: int
    exits: int
    slots: int  # slots of a cache, and positions of a text


SIZES = {"cpu": Sizes(67, 64, 2_049, 3, 192)}
ACCELERATOR = Sizes(531, 1_024, 50_257, 4, 1_024)


@dataclasses.dataclass(frozen=True)
class Check:
    """The result of checking one implementation of an operation in one dtype.

    `failure` is empty if the implementation is correct. `error` (the largest relative error of an
    output) and `seconds` (the median time of a call) are None if the implementation does not run.
    """

    operation: str
    implementation: str
    dtype: str
    remedy: str  # what avoids this implementation
    error: float | None  # the largest error, relative to the largest entry of the output
    seconds: float | None
    failure: str = ""


@dataclasses.dataclass(frozen=True)
class Case:
    """One operation to check, with the implementations to compare with its reference.

    `function(implementation, inputs)` returns the outputs and gradients by name, and
    `inputs(dtype)` makes the inputs. `setting`, such as config.model.kernels=xla, selects XLA's
    implementation.
    """

    operation: str
    implementations: tuple[str, ...]
    setting: str
    function: Callable[[str, Any], Outputs]
    inputs: Callable[[str], Any]  # takes a dtype


def checks() -> Iterator[Check]:
    """Yields a `Check` of each implementation that jexit may choose on this device, per dtype.

    Matrix products in float32 use full precision, because an accelerator's faster default has
    larger rounding errors than the tolerance allows.
    """
    for case in cases():
        for dtype in TOLERANCE:
            inputs = case.inputs(dtype)
            exact = jax.tree.map(_widened, inputs)
            with jax.default_matmul_precision("highest"):
                wanted = jax.jit(functools.partial(case.function, "reference"))(exact)
            precision = "highest" if dtype == "float32" else "default"
            for name in case.implementations:
                if name not in HALF_ONLY or dtype == "bfloat16":
                    with jax.default_matmul_precision(precision):
                        check = _check(case, name, dtype, inputs, wanted)
                    yield check


def _check(case: Case, name: str, dtype: str, inputs: Any, wanted: Outputs) -> Check:
    remedy = NO_OTHER if name == PORTABLE else f"set --{case.setting}"
    check = functools.partial(Check, case.operation, name, dtype, remedy)
    try:
        compiled = jax.jit(functools.partial(case.function, name)).lower(inputs).compile()
        found = jax.block_until_ready(compiled(inputs))
    except Exception as error:  # compilers and drivers raise many kinds
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        return check(None, None, f"it does not run ({first[:200]})")
    errors = {key: relative_error(found[key], wanted[key]) for key in wanted}
    worst = max(errors, key=lambda key: errors[key])
    failure = ""
    if np.isinf(errors[worst]):
        failure = f"{worst} is not finite at the entries where the reference is finite"
    elif errors[worst] > TOLERANCE[dtype]:
        failure = (
            f"{worst} differs from the reference by {errors[worst]:.1e}, but rounding explains at "
            f"most {TOLERANCE[dtype]:.0e}"
        )
    return check(errors[worst], seconds(lambda: compiled(inputs)), failure)


def seconds(run: Callable[[], Any], repeats: int = REPEATS) -> float:
    """Returns the median time of a call of `run` in seconds, until its outputs are ready.

    All of the `repeats` calls count. To leave out compilation, call `run` once beforehand.
    """
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times))


def relative_error(found: Any, wanted: Any) -> float:
    """Returns the largest error relative to the reference, max |found − wanted| / max |wanted|.

    Maxima are over all entries at which `wanted` is finite. Returns ∞ if the positions of the
    finite entries of `found` and `wanted` differ.
    """
    found, wanted = np.asarray(found, np.float64), np.asarray(wanted, np.float64)
    if not np.array_equal(np.isfinite(found), np.isfinite(wanted)):
        return float("inf")
    apart = np.abs(np.where(np.isfinite(wanted), found - wanted, 0.0))
    return float(apart.max() / max(np.abs(wanted[np.isfinite(wanted)]).max(), 1e-30))


def cases() -> list[Case]:
    """Returns the operations to check, with the implementations that jexit may choose here."""
    platform = target().platform
    sizes = SIZES.get(platform, ACCELERATOR)
    states, kernels = functools.partial(_states, sizes), "config.model.kernels=xla"

    def case(operation: Operation, function: Any, inputs: Any) -> Case:
        return Case(operation.name, operation.candidates(platform), kernels, function, inputs)

    attention = (PORTABLE, *(name for name, needs in PLATFORMS.items() if needs == platform))
    return [
        case(EXIT_KL, _exit_kl, states),
        case(LINEAR_KL, _linear_kl, states),
        case(LINEAR_LOGPROB, _linear_logprob, states),
        case(DECODE_ATTENTION, _decode_attention, functools.partial(_cache, sizes)),
        Case(
            "attention", attention, "config.model.attention=xla", _attention,
            functools.partial(_texts, sizes),
        ),
    ]  # fmt: skip


def _states(sizes: Sizes, dtype: str) -> Outputs:
    """Returns random hidden states [N, D] and [E, N, D], a head [V, D], and target tokens [N].

    N is the number of tokens, D the width, E the number of exits and V the size of the vocabulary.
    """
    shapes = {
        "h_ND": (sizes.tokens, sizes.width),
        "h_END": (sizes.exits, sizes.tokens, sizes.width),
    }
    made = {name: _normal(name, shape, dtype) for name, shape in shapes.items()}
    head_VD = 3.0 * sizes.width**-0.5 * _normal("head", (sizes.vocab, sizes.width), "float32")
    targets_N = jnp.arange(sizes.tokens) * 31 % sizes.vocab
    return made | {"head_VD": head_VD.astype(dtype), "targets_N": targets_N}


def _exit_kl(name: str, inputs: Outputs) -> Outputs:
    found = exit_kl(inputs["h_ND"], inputs["h_END"], inputs["head_VD"], implementation=name)
    return {"KL": found.kl_EN, "entropy": found.entropy_N, "log-sum-exp": found.logsumexp_N}


def _linear_kl(name: str, inputs: Outputs) -> Outputs:
    outputs = {}
    for direction in DIRECTIONS:
        kl = functools.partial(linear_kl, direction=direction, implementation=name)

        def loss(h_ND: Any, head_VD: Any, kl: Any = kl) -> tuple[Any, Any]:
            kl_N = kl(h_ND, inputs["h_END"][0], head_VD)
            return _weighted(kl_N), kl_N

        arguments = inputs["h_ND"], inputs["head_VD"]
        (states, head), kl_N = jax.grad(loss, (0, 1), has_aux=True)(*arguments)
        outputs |= {
            f"{direction} KL": kl_N,
            f"the gradient of {direction} KL to the states": states,
            f"the gradient of {direction} KL to the head": head,
        }
    return outputs


def _linear_logprob(name: str, inputs: Outputs) -> Outputs:
    def loss(h_ND: Any, head_VD: Any) -> tuple[Any, Any]:
        found = linear_logprob(h_ND, head_VD, inputs["targets_N"], implementation=name)
        return sum(map(_weighted, found)), found

    (states, head), found = jax.grad(loss, (0, 1), has_aux=True)(inputs["h_ND"], inputs["head_VD"])
    return found._asdict() | {
        "the gradient to the states": states,
        "the gradient to the head": head,
    }


def _cache(sizes: Sizes, dtype: str) -> Outputs:
    """Returns random queries [7, 6, 64], and a key/value cache of 2 layers and 7 rows.

    Keys and values are [2, 2, 7, S, 64]: heads, layers, rows, slots, head dimension. The rows are
    filled to different lengths [7], from 1 to S slots.
    """
    rows, heads, width = 7, 2, 64
    shape = (heads, 2, rows, sizes.slots, width)
    return {
        "q_BNH": _normal("queries", (rows, 3 * heads, width), dtype),
        "keys": _normal("keys", shape, dtype),
        "values": _normal("values", shape, dtype),
        "lengths_B": 1 + jnp.arange(rows) * (sizes.slots - 1) // (rows - 1),
    }


def _decode_attention(name: str, inputs: Outputs) -> Outputs:
    queries, cache = inputs["q_BNH"], (inputs["keys"], inputs["values"])
    mixed = decode_attention(
        queries, *cache, 1, None, inputs["lengths_B"], implementation=name
    )  # fmt: skip
    return {"the output": mixed}


def _texts(sizes: Sizes, dtype: str) -> Outputs:
    """Returns random queries [2, T, 6, 64], and keys and values [2, T, 2, 64], of two sequences."""
    heads, width = 2, 64
    keys = (2, sizes.slots, heads, width)
    return {
        "q_BTNH": _normal("queries", (2, sizes.slots, 3 * heads, width), dtype),
        "k_BTKH": _normal("keys", keys, dtype),
        "v_BTKH": _normal("values", keys, dtype),
    }


def _attention(name: str, inputs: Outputs) -> Outputs:
    length = inputs["q_BTNH"].shape[1]
    valid_BT = jnp.arange(length) < jnp.array([[length], [length - length // 3]])

    def loss(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any) -> tuple[Any, Any]:
        if name == "reference":
            mixed = _attention_by_definition(q_BTNH, k_BTKH, v_BTKH)
        else:
            mixed = attend(q_BTNH, KeysValues(k_BTKH, v_BTKH), valid_BT, implementation=name)
        mixed = jnp.where(valid_BT[..., None, None], mixed, 0)
        return _weighted(mixed), mixed

    arguments = (inputs[part] for part in ("q_BTNH", "k_BTKH", "v_BTKH"))
    gradients, mixed = jax.grad(loss, (0, 1, 2), has_aux=True)(*arguments)
    return {"the output": mixed} | {
        f"the gradient to the {part}": gradient
        for part, gradient in zip(("queries", "keys", "values"), gradients, strict=True)
    }


def _attention_by_definition(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any) -> jax.Array:
    """Computes causal attention: softmax(q·k / sqrt(H)) · v over positions up to the query's own.

    Queries and the result are [B, T, N, H], keys and values [B, T, K, H]; N / K query heads share a
    key/value head. Padding needs no mask, because padding comes after all valid positions.
    """
    share = q_BTNH.shape[2] // k_BTKH.shape[2]
    k_BTNH, v_BTNH = (jnp.repeat(part, share, axis=2) for part in (k_BTKH, v_BTKH))
    scores_BNTS = jnp.einsum("BTNH,BSNH->BNTS", q_BTNH, k_BTNH) * q_BTNH.shape[-1] ** -0.5
    earlier_TS = jnp.tril(jnp.ones(scores_BNTS.shape[2:], bool))
    weights_BNTS = jax.nn.softmax(jnp.where(earlier_TS, scores_BNTS, -jnp.inf))
    return jnp.einsum("BNTS,BSNH->BTNH", weights_BNTS, v_BTNH)


def _weighted(values: jax.Array) -> jax.Array:
    """Returns the scalar sum of `values` (of any shape), each multiplied by a fixed random number.

    Gradients then differ between entries, so that a misplaced entry is noticed.
    """
    return jnp.vdot(_normal("weights", values.shape, "float32"), values.astype(jnp.float32))


def _normal(name: str, shape: tuple[int, ...], dtype: str) -> jax.Array:
    key = jax.random.key(sum(map(ord, name)))
    return jax.random.normal(key, shape, jnp.float32).astype(dtype)


def _widened(leaf: jax.Array) -> jax.Array:
    return leaf.astype(jnp.float32) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf
