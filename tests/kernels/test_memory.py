"""What the compiled vocabulary ops hold in memory: never all logits, never a copy of the head."""

import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params

from jexit.kernels import exit_kl, linear_kl, linear_logprob

N, D, V, E = 512, 64, 32_768, 4
SHARE = 0.08  # of the logits that materialising holds: one [N, V] per set of hidden states
KL, LOGPROB = ((N, D), (V, D), (N, D)), ((N, D), (V, D), (N,))


def kl(student_ND: Any, head_VD: Any, teacher_ND: Any, direction: str = "jeffreys") -> Any:
    return linear_kl(student_ND, teacher_ND, head_VD, direction=direction)


def one_way(*arguments: Any) -> Any:
    return kl(*arguments, direction="student_teacher")


def logprob(*arguments: Any) -> Any:
    return linear_logprob(*arguments).logprob_N


def every_output(*arguments: Any) -> Any:
    return sum(linear_logprob(*arguments))


@pytest.mark.parametrize("argnums", [0, (0, 1)])
def test_products_have_the_models_dtype_at_any_temperature(argnums):
    """Accelerators multiply float32 in full precision many times slower than bfloat16."""

    def loss(h_ND: Any, head_VD: Any, other_ND: Any, targets_N: Any) -> Any:
        kl_N = linear_kl(h_ND, other_ND, head_VD, direction="jeffreys", temperature=0.7)
        return sum(linear_logprob(h_ND, head_VD, targets_N, temperature=0.7)).sum() + kl_N.sum()

    states = jax.ShapeDtypeStruct((N, D), jnp.bfloat16)
    head, targets = states.update(shape=(V, D)), jax.ShapeDtypeStruct((N,), jnp.int32)
    for function, least in ((loss, 2), (jax.grad(loss, argnums), 5)):
        found = list(products(jax.make_jaxpr(function)(states, head, states, targets).jaxpr))
        assert len(found) >= least
        assert {dtype.name for dtypes in found for dtype in dtypes} == {"bfloat16"}


def products(jaxpr: Any) -> Iterator[list[Any]]:
    """The dtypes of the operands of each matrix product, those in loops included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield [operand.aval.dtype for operand in equation.invars]
        for inner in jaxprs_in_params(equation.params):
            yield from products(inner)


def gradient(function: Callable[..., Any], argnums: Any) -> Callable[..., Any]:
    return jax.value_and_grad(lambda *arguments: function(*arguments).mean(), argnums)


# A function, the shapes of its operands, how many sets of logits materialising would hold.
CASES: list[tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]] = [
    (exit_kl, ((N, D), (E, N, D), (V, D)), E + 1),
    (kl, KL, 2),
    (gradient(kl, 0), KL, 2),
    (gradient(kl, (0, 1)), KL, 2),
    (linear_logprob, LOGPROB, 1),
    (gradient(every_output, 0), LOGPROB, 1),
    (gradient(logprob, (0, 1)), LOGPROB, 1),
]


def compiled(function: Callable[..., Any], shapes: Any, dtype: str = "float32") -> Any:
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else dtype) for shape in shapes
    ]
    return jax.jit(function).lower(*operands).compile()


@pytest.mark.parametrize("dtype", ["float32", pytest.param("bfloat16", marks=pytest.mark.slow)])
def test_temporaries_are_a_small_share_of_all_logits_and_no_buffer_holds_a_row_of_them(dtype):
    for function, shapes, sets in CASES:
        program = compiled(function, shapes, dtype)
        share = program.memory_analysis().temp_size_in_bytes / (4 * sets * N * V)
        assert share <= SHARE, f"{share:.1%} of all logits"
        found = set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", program.as_text()))
        assert f"{V},{D}" in found, "the text names no operand: it is not what it was"
        for shape in found:
            axes = [int(axis) for axis in shape.split(",")]
            assert V not in axes or axes in ([V, D], [D, V]), f"a buffer of [{shape}]"


def test_the_gradient_to_the_states_reads_the_head_once() -> None:
    """Nothing is recomputed: KL has 4 products with the head (2 for the logits, 2 for the gradient
    of one direction), log-probability 2, whose unused entropy costs none."""
    for function, shapes, sets, products in ((one_way, KL, 2, 4), (logprob, LOGPROB, 1, 2)):
        text = compiled(gradient(function, 0), shapes).as_text()
        tiles_by_size = re.findall(r"= f32\[([\d,]+)\]\{[\d,]*\} dot\(", text)
        assert tiles_by_size, "the text names no product: it is not what it was"
        # The first tile stands before the loop, so every product stands in the text twice.
        logits = [shape for shape in tiles_by_size if str(D) not in shape.split(",")]
        rows = [shape for shape in tiles_by_size if str(D) in shape.split(",")]
        assert len(logits) == 2 and len(rows) == 2 * (products - sets)
