"""Checks of the shapes and dtypes of arrays that callers pass to the ops."""

from typing import NoReturn

import jax
import jax.numpy as jnp

from jexit.errors import UserError


def _fail(op: str, message: str) -> NoReturn:
    raise UserError(f"{op}: {message}")


def check_hidden(
    op: str, name: str, h_ND: jax.Array, head_VD: jax.Array, head_name: str = "head_VD"
) -> None:
    """Raises UserError unless `h_ND` and `head_VD` are floating-point matrices of the same width.

    The head must also have at least one row. `op`, `name` and `head_name` name the op and the
    arrays in the error message.
    """
    for label, array in ((name, h_ND), (head_name, head_VD)):
        check_floats(op, label, array)
        if array.ndim != 2:
            _fail(
                op,
                f"{label} has shape {list(array.shape)}, but it must be a matrix; flatten batch "
                "and time into one axis",
            )
    if h_ND.shape[1] != head_VD.shape[1]:
        _fail(
            op,
            f"{name} has width {h_ND.shape[1]}, but {head_name} has width {head_VD.shape[1]}; pass "
            "the head as [vocabulary, width]",
        )
    if head_VD.shape[0] == 0:
        _fail(op, "the head has no rows, but each token of the vocabulary needs one; add them")


def check_floats(op: str, name: str, array: jax.Array) -> None:
    """Raises UserError, naming the op and the array, unless `array` has a floating-point dtype."""
    if not jnp.issubdtype(array.dtype, jnp.floating):
        _fail(op, f"{name} is {array.dtype}, but it must be floating-point; cast it to float32")


def check_same(op: str, name: str, shape: tuple[int, ...], expected: tuple[int, ...]) -> None:
    """Raises UserError, naming the op and the array, unless `shape` equals `expected`.

    `shape` is the shape of the array `name`, or the leading part of it that is compared.
    """
    if tuple(shape) != tuple(expected):
        _fail(
            op,
            f"{name} has shape {list(shape)}, but the other arrays require {list(expected)}; make "
            "the shapes match",
        )
