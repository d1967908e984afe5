"""The vocabulary ops on eight devices give what they give on one, gradients included."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from kernels import truth

from jexit.kernels import exit_kl, linear_kl, linear_logprob
from jexit.kernels.shards import Shards
from tolerances import KERNEL, relative_error

IMPLEMENTATIONS = ("xla", "pallas_tpu", "pallas_gpu")
MESHES = {
    "tokens and vocabulary": (2, 2, 2),
    "tokens": (4, 2, 1),
    "vocabulary": (1, 1, 8),
    "one axis of tokens": (1, 2, 4),
}
# Every implementation on the first mesh; the others are for the slow part.
CASES = [
    pytest.param(
        implementation,
        sizes,
        id=f"{implementation}, {name}",
        marks=[] if place == 0 else pytest.mark.slow,
    )
    for implementation in IMPLEMENTATIONS
    for place, (name, sizes) in enumerate(MESHES.items())
]
N, D, V, E = 22, 16, 1_032, 3  # tokens do not divide over four devices, the vocabulary over eight


def make_mesh(sizes: tuple[int, int, int]) -> jax.sharding.Mesh:
    devices = int(np.prod(sizes))
    return jax.make_mesh(
        sizes,
        ("data", "fsdp", "tensor"),
        axis_types=(AxisType.Auto,) * 3,
        devices=jax.devices()[:devices],
    )


def compare(function: Callable[..., Any], arguments: tuple, sizes: tuple[int, int, int]) -> Any:
    """Runs on one device and on the mesh, with the head's rows spread over `tensor`."""
    alone = jax.jit(function)(*arguments)
    mesh = make_mesh(sizes)
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, P("tensor" if len(array) == V else None)))
            for array in arguments
        ]
        compiled = jax.jit(function).lower(*placed).compile()
        spread = compiled(*placed)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        if one.dtype == bool:
            np.testing.assert_array_equal(one, many)
        else:
            error = relative_error(truth.float64(many), truth.float64(one))
            assert error <= KERNEL[str(arguments[0].dtype)]
    return compiled.as_text()


@pytest.fixture(scope="module")
def arrays() -> dict[str, jax.Array]:
    names = {"h_ND": (N, D), "other_ND": (N, D), "head_VD": (V, D), "exits_END": (E, N, D)}
    made = {name: truth.normal(i, *shape) for i, (name, shape) in enumerate(names.items())}
    targets_N = np.random.default_rng(0).integers(0, V, N)
    targets_N[:2] = -1, V  # nobody's
    return made | {"targets_N": jnp.asarray(targets_N)}


@pytest.mark.parametrize(("implementation", "sizes"), CASES)
def test_exit_kl(arrays, implementation, sizes):
    def function(h_ND, exits_END, head_VD):
        return exit_kl(h_ND, exits_END, head_VD, implementation=implementation)

    compare(function, (arrays["h_ND"], arrays["exits_END"], arrays["head_VD"]), sizes)


@pytest.mark.parametrize(("implementation", "sizes"), CASES)
@pytest.mark.parametrize("argnums", [0, (0, 2)], ids=["states", "states and head"])
def test_linear_kl(arrays, implementation, sizes, argnums):
    weights_N = jnp.arange(N) % 5  # some tokens are masked out

    def loss(h_ND, other_ND, head_VD):
        kl_N = linear_kl(
            h_ND, other_ND, head_VD, direction="jeffreys", implementation=implementation
        )
        return jnp.sum(weights_N * kl_N), kl_N

    function = jax.grad(loss, argnums, has_aux=True)
    compare(function, (arrays["h_ND"], arrays["other_ND"], arrays["head_VD"]), sizes)


@pytest.mark.parametrize(("implementation", "sizes"), CASES)
@pytest.mark.parametrize("argnums", [0, (0, 1)], ids=["states", "states and head"])
def test_linear_logprob(arrays, implementation, sizes, argnums):
    possible_N = (arrays["targets_N"] >= 0) & (arrays["targets_N"] < V)

    def loss(h_ND, head_VD, targets_N):
        out = linear_logprob(h_ND, head_VD, targets_N, implementation=implementation)
        logprob_N = jnp.where(possible_N, out.logprob_N, 0)
        return jnp.sum(logprob_N + 0.3 * out.entropy_N), (logprob_N, *out[1:])

    function = jax.grad(loss, argnums, has_aux=True)
    compare(function, (arrays["h_ND"], arrays["head_VD"], arrays["targets_N"]), sizes)


def test_no_device_gathers_the_head(arrays):
    """Only statistics and gradients travel: nothing with a whole vocabulary's worth of rows."""

    def loss(h_ND, other_ND, head_VD):
        return linear_kl(h_ND, other_ND, head_VD, implementation="xla").sum()

    arguments = (arrays["h_ND"], arrays["other_ND"], arrays["head_VD"])
    text = compare(jax.value_and_grad(loss, (0, 2)), arguments, (2, 2, 2))
    assert "all-gather" in text or "all-reduce" in text
    for line in text.splitlines():
        if "all-gather(" in line:
            assert f"[{V},{D}]" not in line, line


@pytest.mark.parametrize("sizes", [(1, 1, 8), (2, 1, 4)])
def test_a_vocabulary_that_does_not_divide_stays_whole(arrays, sizes):
    def loss(h_ND, other_ND, head_VD):
        return linear_kl(h_ND, other_ND, head_VD).sum()

    arguments = (arrays["h_ND"], arrays["other_ND"], arrays["head_VD"][:-1])
    compare(jax.value_and_grad(loss, (0, 2)), arguments, sizes)
    with jax.set_mesh(make_mesh(sizes)):
        assert Shards.current(V - 1).vocab_axis is None


def test_explicit_axes_are_refused(arrays):
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'data' is Explicit.*make_mesh"):
        linear_kl(arrays["h_ND"], arrays["other_ND"], arrays["head_VD"])


def test_on_axes_of_other_names_every_device_computes_all(arrays):
    mesh = jax.make_mesh((2, 4), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)

    def loss(h_ND, other_ND, head_VD):
        return linear_kl(h_ND, other_ND, head_VD, implementation="pallas_tpu").sum()

    arguments = (arrays["h_ND"], arrays["other_ND"], arrays["head_VD"])
    alone = jax.jit(jax.grad(loss, (0, 2)))(*arguments)
    with jax.set_mesh(mesh):
        spread = jax.jit(jax.grad(loss, (0, 2)))(*arguments)
    for one, many in zip(alone, spread, strict=True):
        np.testing.assert_allclose(many, one, rtol=1e-5, atol=1e-6)


def test_without_a_mesh_nothing_divides():
    assert Shards.current(V) == Shards()
    with jax.set_mesh(make_mesh((1, 1, 1))):
        assert not Shards.current(V).divides
