"""The choice of tiles by chip, and what is picked when a TPU is compiled for."""

import jax
import jax.numpy as jnp
import pytest

from jexit.kernels import linear_logprob, tpu
from jexit.kernels.chips import CHIPS, UNKNOWN
from jexit.kernels.dispatch import compiling_for, target
from jexit.kernels.linear_kl import api as linear_kl
from jexit.kernels.tpu import Operands

KINDS = {
    "TPU v4": "v4",
    "TPU v5 lite": "v5e",
    "TPU v5": "v5",
    "TPU v6 lite": "v6e",
    "TPU v6e": "v6e",
    "TPU7x": "tpu7",
}


def operands(
    tokens=2048, width=2560, vocab=151_936, exits=0, dtype="bfloat16", head_dtype=None
) -> Operands:
    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, dtype)

    hidden = (shape(tokens, width),) + ((shape(exits, tokens, width),) if exits else ())
    return Operands(hidden, (jax.ShapeDtypeStruct((vocab, width), head_dtype or dtype),))


def test_chips_are_known_by_jaxs_names():
    for kind, name in KINDS.items():
        with compiling_for("tpu", kind):
            assert tpu.chip() == CHIPS[name]


def test_an_unknown_chip_is_taken_for_the_smallest():
    with compiling_for("tpu", "TPU v99"):
        assert tpu.chip() == UNKNOWN
    assert target().platform == "cpu"


def test_a_tile_of_the_head_meets_as_many_states_as_the_chip_needs():
    for kind in ["TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"]:
        for exits in [0, 7]:
            with compiling_for("tpu", kind):
                if exits and tpu.chip().vmem_mib < 32:
                    with pytest.raises(NotImplementedError, match="do not fit 16 MiB"):
                        tpu.choose_tile(operands(exits=exits))
                    continue
                tile = tpu.choose_tile(operands(exits=exits))
                assert tile.tokens % 128 == 0 and tile.vocab % 16 == 0
                assert tile.tokens * (exits + 1) >= tpu.chip().rows


def test_operands_of_two_types_take_the_room_of_the_wider_one():
    """Tempered hidden states are float32 over a head in bfloat16."""
    with compiling_for("tpu", "TPU v5"):
        wide = tpu.choose_tile(operands(width=5120, dtype="float32"), token_sums=1)
        for types in (("float32", "bfloat16"), ("bfloat16", "float32")):
            mixed = operands(width=5120, dtype=types[0], head_dtype=types[1])
            assert tpu.choose_tile(mixed, token_sums=1) == wide


def test_small_shapes_get_small_tiles():
    with compiling_for("tpu", "TPU v5"):
        assert tpu.choose_tile(operands(tokens=5, vocab=97)) == (128, 97)
        assert tpu.choose_tile(operands(tokens=200, vocab=2000)).tokens <= 256


def test_what_the_kernel_does_not_hold_goes_to_the_portable_version():
    with compiling_for("tpu", "TPU v4"):
        assert linear_kl.OPERATION.candidates("tpu") == ("pallas_tpu", "xla")
        wide = jax.ShapeDtypeStruct((128, 1 << 16), jnp.float32)
        head = jax.ShapeDtypeStruct((64, 1 << 16), jnp.float32)
        targets = jax.ShapeDtypeStruct((128,), jnp.int32)
        with pytest.raises(NotImplementedError, match="VMEM"):
            jax.eval_shape(
                lambda *a: linear_logprob(*a, implementation="pallas_tpu"), wide, head, targets
            )
        jaxpr = jax.make_jaxpr(linear_logprob)(wide, head, targets)
        assert "pallas_call" not in str(jaxpr)


@pytest.mark.parametrize(
    ("kind", "width", "dtype"),
    [("TPU v4", 2560, "float32"), ("TPU v4", 8192, "bfloat16"), ("TPU v5 lite", 2500, "bfloat16")],
)
def test_what_only_the_gradient_does_not_hold_goes_there_too(kind, width, dtype):
    """On a v4 the forward kernel fits and the gradient's does not; 2,500 is no multiple of 128."""

    def loss(h_ND, head_VD, targets_N):
        return linear_logprob(h_ND, head_VD, targets_N).logprob_N.sum()

    shapes = [jax.ShapeDtypeStruct(dims, dtype) for dims in ((2048, width), (151_936, width))]
    with compiling_for("tpu", kind):
        jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(
            *shapes, jax.ShapeDtypeStruct((2048,), jnp.int32)
        )
    assert "pallas_call" not in str(jaxpr)


def test_other_platforms_are_refused():
    with compiling_for("gpu", "NVIDIA H100"), pytest.raises(NotImplementedError, match="for TPUs"):
        linear_logprob(
            jnp.ones((4, 8)), jnp.ones((9, 8)), jnp.zeros(4, int), implementation="pallas_tpu"
        )
