"""What the compiled vocabulary ops hold in memory: never all logits, never a copy of the head."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from jexit.kernels import exit_kl, linear_kl, linear_logprob

N, D, V, E = 512, 64, 32_768, 4
SHARE = 0.08  # of the logits that materialising holds: one [N, V] per set of hidden states

Case = tuple[Callable[..., Any], tuple[tuple[int, ...], ...], int]

KL = ((N, D), (V, D), (N, D))
LOGPROB = ((N, D), (V, D), (N,))


def kl(student_ND: Any, head_VD: Any, teacher_ND: Any, direction: str = "jeffreys") -> Any:
    return linear_kl(student_ND, teacher_ND, head_VD, direction=direction)


def logprob(*arguments: Any) -> Any:
    return linear_logprob(*arguments).logprob_N


def every_output(*arguments: Any) -> Any:
    return sum(linear_logprob(*arguments))


def gradient(function: Callable[..., Any], argnums: Any) -> Callable[..., Any]:
    return jax.value_and_grad(lambda *arguments: function(*arguments).mean(), argnums)


CASES: dict[str, Case] = {
    "exit_kl": (exit_kl, ((N, D), (E, N, D), (V, D)), E + 1),
    "linear_kl": (kl, KL, 2),
    "linear_kl to the states": (gradient(kl, 0), KL, 2),
    "linear_kl to the head": (gradient(kl, (0, 1)), KL, 2),
    "linear_logprob": (linear_logprob, LOGPROB, 1),
    "linear_logprob to the states": (gradient(logprob, 0), LOGPROB, 1),
    "every output to the states": (gradient(every_output, 0), LOGPROB, 1),
    "linear_logprob to the head": (gradient(logprob, (0, 1)), LOGPROB, 1),
}


def compile_case(case: str, dtype: str) -> tuple[Any, int]:
    function, shapes, sets = CASES[case]
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else dtype) for shape in shapes
    ]
    return jax.jit(function).lower(*operands).compile(), sets


def test_temporaries_are_a_small_share_of_all_logits() -> None:
    for dtype in ["float32", "bfloat16"]:
        for case in CASES:
            compiled, sets = compile_case(case, dtype)
            share = compiled.memory_analysis().temp_size_in_bytes / (4 * sets * N * V)
            assert share <= SHARE, f"{share:.1%} of all logits"


def test_no_buffer_holds_a_row_of_logits_for_every_token() -> None:
    for case in CASES:
        text = compile_case(case, "float32")[0].as_text()
        shapes = set(re.findall(r"\b[a-z]+\d+\[([\d,]+)\]", text))
        assert f"{V},{D}" in shapes, "the text names no operand: it is not what it was"
        for shape in shapes:
            axes = [int(axis) for axis in shape.split(",")]
            assert V not in axes or axes in ([V, D], [D, V]), f"a buffer of [{shape}]"


@pytest.mark.parametrize("case", ["linear_kl to the states", "linear_logprob to the states"])
def test_the_gradient_to_the_states_reads_the_head_once(case: str) -> None:
    """Nothing is recomputed: KL has 4 products with the head (2 for the logits, 2 for the gradient
    of one direction), log-probability 2, whose unused entropy costs none."""
    function, shapes, _ = CASES[case]
    products = 2
    if case.startswith("linear_kl"):
        function = gradient(lambda *a: kl(*a, direction="student_teacher"), 0)
        products = 4
    operands = [
        jax.ShapeDtypeStruct(shape, jnp.int32 if len(shape) == 1 else "float32") for shape in shapes
    ]
    traced = jax.jit(function).lower(*operands).compile().as_text()
    tiles_by_size = re.findall(r"= f32\[([\d,]+)\]\{[\d,]*\} dot\(", traced)
    assert tiles_by_size, "the text names no product: it is not what it was"
    # The first tile stands before the loop, so every product stands in the text twice.
    logits = [shape for shape in tiles_by_size if str(D) not in shape.split(",")]
    rows = [shape for shape in tiles_by_size if str(D) in shape.split(",")]
    sets = 1 if products == 2 else 2
    assert len(logits) == 2 and len(rows) == 2 * (products - sets)
