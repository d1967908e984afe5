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

from jexit.dist import make_mesh
from jexit.kernels import exit_kl, linear_kl, linear_logprob
from jexit.kernels.shards import Shards
from tolerances import KERNEL, relative_error

MESHES = {
    "tokens and vocabulary": (2, 2, 2),
    "tokens": (4, 2, 1),
    "vocabulary": (1, 1, 8),
    "one axis of tokens": (1, 2, 4),
}
# XLA's implementation on the first mesh: what is divided is the same for all. The rest is slow.
CASES = [
    pytest.param(
        implementation,
        sizes,
        id=f"{implementation}, {name}",
        marks=[] if place == 0 and implementation == "xla" else pytest.mark.slow,
    )
    for implementation in truth.CHIP_TILES
    for place, (name, sizes) in enumerate(MESHES.items())
]
N, D, V, E = 22, 16, 1_032, 3  # tokens do not divide over four devices, the vocabulary over eight
H_ND, OTHER_ND = (truth.normal(i, N, D) for i in (0, 1))
HEAD_VD, EXITS_END = truth.normal(2, V, D), truth.normal(3, E, N, D)


def compare(function: Callable[..., Any], arguments: tuple, mesh: jax.sharding.Mesh) -> str:
    """Runs on one device and on the mesh, with the head's rows spread over `tensor`."""
    alone = jax.jit(function)(*arguments)
    divided = "tensor" if "tensor" in mesh.shape else None
    with jax.set_mesh(mesh):
        placed = [
            jax.device_put(array, NamedSharding(mesh, P(divided if len(array) == V else None)))
            for array in arguments
        ]
        compiled = jax.jit(function).lower(*placed).compile()
        spread = compiled(*placed)
    for one, many in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        if one.dtype == bool:
            np.testing.assert_array_equal(one, many)
        else:
            assert relative_error(truth.float64(many), truth.float64(one)) <= KERNEL["float32"]
    return compiled.as_text()


def kl_gradients(implementation: str | None = None) -> Callable[..., Any]:
    """KL both ways, with the gradients to the states alone and to states and head."""
    weights_N = jnp.arange(N) % 5  # some tokens are masked out

    def loss(h_ND: Any, head_VD: Any, other_ND: Any) -> Any:
        kl_N = linear_kl(
            h_ND, other_ND, head_VD, direction="jeffreys", implementation=implementation
        )
        return jnp.sum(weights_N * kl_N), kl_N

    return lambda *a: (
        jax.grad(loss, 0, has_aux=True)(*a),
        jax.grad(loss, (0, 1), has_aux=True)(*a),
    )


@pytest.mark.parametrize(("implementation", "sizes"), CASES)
def test_on_a_mesh_they_are_those_of_one_device(implementation, sizes):
    mesh = make_mesh(*sizes)
    targets_N = np.random.default_rng(0).integers(0, V, N)
    targets_N[:2] = -1, V  # nobody's
    possible_N = (targets_N >= 0) & (targets_N < V)

    def exits(h_ND, exits_END, head_VD):
        return exit_kl(h_ND, exits_END, head_VD, implementation=implementation)

    def logprob(h_ND, head_VD, targets_N):
        out = linear_logprob(h_ND, head_VD, targets_N, implementation=implementation)
        logprob_N = jnp.where(possible_N, out.logprob_N, 0)
        return jnp.sum(logprob_N + 0.3 * out.entropy_N), (logprob_N, *out[1:])

    compare(exits, (H_ND, EXITS_END, HEAD_VD), mesh)
    text = compare(kl_gradients(implementation), (H_ND, HEAD_VD, OTHER_ND), mesh)
    if (implementation, sizes) == ("xla", MESHES["tokens and vocabulary"]):
        # Only statistics and gradients travel: nothing with a whole vocabulary's worth of rows.
        assert "all-gather" in text or "all-reduce" in text
        for line in text.splitlines():
            assert "all-gather(" not in line or f"[{V},{D}]" not in line, line
    for argnums in (0, (0, 1)):
        gradients = jax.grad(logprob, argnums, has_aux=True)
        compare(gradients, (H_ND, HEAD_VD, jnp.asarray(targets_N)), mesh)


def test_what_does_not_divide_is_computed_whole():
    mesh = make_mesh(2, 1, 4)
    compare(kl_gradients(), (H_ND, HEAD_VD[:-1], OTHER_ND), mesh)
    with jax.set_mesh(mesh):
        assert Shards.current(V - 1).vocab_axis is None
    other = jax.make_mesh((2, 4), ("batch", "model"), axis_types=(AxisType.Auto,) * 2)
    compare(kl_gradients("pallas_tpu"), (H_ND, HEAD_VD, OTHER_ND), other)
    assert Shards.current(V) == Shards()
    with jax.set_mesh(make_mesh(1, 1, 1)):
        assert not Shards.current(V).divides


def test_explicit_axes_are_refused():
    mesh = jax.make_mesh((2, 4), ("data", "tensor"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh), pytest.raises(ValueError, match=r"'data' is Explicit.*make_mesh"):
        linear_kl(H_ND, OTHER_ND, HEAD_VD)
