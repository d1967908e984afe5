"""The vocabulary ops in float64 numpy, gradients by hand, and inputs to try them on."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jexit.kernels import gpu, tpu
from jexit.kernels.dispatch import ONLY_BY_NAME, Operation
from tolerances import KERNEL, relative_error

CHIP_TILES = ("xla", "pallas_tpu", "pallas_gpu")  # the last two are interpreted
SMALL_TILES = tuple(f"{name}, small tiles" for name in CHIP_TILES)

SLOW = pytest.mark.slow
STREAMING = [*SMALL_TILES, *(pytest.param(name, marks=SLOW) for name in CHIP_TILES)]

with_chip_tiles = pytest.mark.parametrize("implementation", CHIP_TILES)
# Of a GPU's chunks of 2,048 entries, the largest along the vocabulary, more than two.
beyond_a_tile = pytest.mark.parametrize(
    ("tokens", "vocab"),
    [(3, 4_999), *(pytest.param(*size, marks=SLOW) for size in ((3, 151_936), (700, 2_500)))],
)
streaming = pytest.mark.parametrize("implementation", STREAMING)
every = pytest.mark.parametrize("implementation", ["reference", *STREAMING])


def register_small_tiles(operation: Operation, xla: Any, pallas_tpu: Any, pallas_gpu: Any) -> None:
    """Gives an op its implementations once more, with tiles too small for any case to fit one."""
    functions: tuple[Callable[..., Any], ...] = (
        partial(xla, chunk_tokens=4, chunk_vocab=32),
        partial(pallas_tpu, tile=tpu.TpuTile(tokens=4, vocab=32)),
        partial(pallas_gpu, tile=gpu.GpuTile(tokens=16, vocab=32, width=16)),
    )
    for name, function in zip(SMALL_TILES, functions, strict=True):
        operation.register(name, function, platforms=ONLY_BY_NAME)


def float64(array: Any) -> np.ndarray:
    """The very numbers that `array` holds, also in bfloat16."""
    return np.asarray(jnp.asarray(array).astype(jnp.float32), np.float64)


def log_softmax(z_NV: np.ndarray) -> np.ndarray:
    x_NV = z_NV - z_NV.max(-1, keepdims=True)
    return x_NV - np.log(np.exp(x_NV).sum(-1, keepdims=True))


def logits(h: Any, head_VD: Any) -> np.ndarray:
    return float64(h) @ float64(head_VD).T


def logsumexp(z_NV: np.ndarray) -> np.ndarray:
    max_N = z_NV.max(-1)
    return max_N + np.log(np.exp(z_NV - max_N[..., None]).sum(-1))


def kl(log_p: np.ndarray, log_q: np.ndarray) -> np.ndarray:
    return np.sum(np.exp(log_p) * (log_p - log_q), axis=-1)


def entropy(log_p: np.ndarray) -> np.ndarray:
    return -np.sum(np.exp(log_p) * log_p, axis=-1)


def normal(seed: int, *shape: int, dtype: str = "float32", scale: float = 1.0) -> jax.Array:
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return jnp.asarray(scale * values).astype(dtype)


class Extreme(NamedTuple):
    """Inputs whose logits are whole numbers from −10⁴ to 10⁴, exact in float32 and bfloat16.

    Rows 2i and 2i + 1 of the head differ in the last column alone, where every second student has
    a 0: its distribution is spread over two tokens at least, and so has a gradient.
    """

    student_ND: jax.Array
    teacher_ND: jax.Array
    head_VD: jax.Array


def extreme(dtype: str = "float32", tokens: int = 10, vocab: int = 70) -> Extreme:
    rng = np.random.default_rng(5)
    student_ND = rng.integers(-50, 51, (tokens, 5))
    teacher_ND = rng.integers(-50, 51, (tokens, 5))
    head_VD = rng.integers(-50, 51, (vocab, 5))
    head_VD[1::2, :4] = head_VD[::2, :4]
    head_VD[1::2, 4] = head_VD[::2, 4] - 3
    student_ND[:, 4] = np.arange(tokens) % 2
    teacher_ND[:, 4] = 1 - np.arange(tokens) % 3
    student_ND[0], head_VD[0, :4], head_VD[2, :4] = (50, 50, 50, 50, 0), 50, -50
    arrays = Extreme(*(jnp.asarray(a, dtype) for a in (student_ND, teacher_ND, head_VD)))
    largest = logits(arrays.student_ND, arrays.head_VD)[0]
    assert largest.max() == 10_000 and largest.min() == -10_000
    return arrays


def assert_close(found: Any, truth: np.ndarray, dtype: str, what: str = "") -> None:
    """Within the tolerance of the type of the inputs, and finite."""
    found = float64(found)
    assert found.shape == truth.shape
    assert np.isfinite(found).all(), f"{what} is not finite"
    error = relative_error(found, truth)
    assert error <= KERNEL[dtype], f"{what} is off by {error:.1e} of its largest entry"
