"""The choice of tiles by chip, and what is picked when a TPU is compiled for."""

import jax
import jax.numpy as jnp
import pytest

from jexit.kernels import linear_logprob, tpu
from jexit.kernels.chips import CHIPS, UNKNOWN
from jexit.kernels.dispatch import compiling_for, target
from jexit.kernels.linear_kl import api as linear_kl
from jexit.kernels.tpu import TpuOperands


def operands(
    tokens=2048, width=2560, vocab=151_936, exits=0, dtype="bfloat16", head_dtype=None
) -> TpuOperands:
    def shape(*dims):
        return jax.ShapeDtypeStruct(dims, dtype)

    hidden = (shape(tokens, width),) + ((shape(exits, tokens, width),) if exits else ())
    return TpuOperands(hidden, (jax.ShapeDtypeStruct((vocab, width), head_dtype or dtype),))


def test_chips_are_known_by_jaxs_names():
    for kind, name in (
        ("TPU v4", "v4"),
        ("TPU v5 lite", "v5e"),
        ("TPU v5", "v5"),
        ("TPU v6 lite", "v6e"),
        ("TPU7x", "tpu7"),
    ):
        with compiling_for("tpu", kind):
            assert tpu.chip() == CHIPS[name]
    with compiling_for("tpu", "TPU v99"):  # taken for the smallest
        assert tpu.chip() == UNKNOWN
    assert target().platform == "cpu"


def test_a_tile_of_the_head_meets_as_many_states_as_the_chip_needs():
    for kind in ("TPU v4", "TPU v5 lite", "TPU v5", "TPU v6 lite"):
        for exits in (0, 7):
            with compiling_for("tpu", kind):
                if exits and tpu.chip().vmem_mib < 32:
                    with pytest.raises(NotImplementedError, match="do not fit 16 MiB"):
                        tpu.choose_tile(operands(exits=exits))
                    continue
                tile = tpu.choose_tile(operands(exits=exits))
                assert tile.tokens % 128 == 0 and tile.vocab % 16 == 0
                assert tile.tokens * (exits + 1) >= tpu.chip().rows
    with compiling_for("tpu", "TPU v5"):
        assert tpu.choose_tile(operands(tokens=5, vocab=97)) == (128, 97)
        assert tpu.choose_tile(operands(tokens=200, vocab=2000)).tokens <= 256
        # Tempered hidden states are float32 over a head in bfloat16: they take the wider's room.
        wide = tpu.choose_tile(operands(width=5120, dtype="float32"), token_sums=1)
        for types in (("float32", "bfloat16"), ("bfloat16", "float32")):
            mixed = operands(width=5120, dtype=types[0], head_dtype=types[1])
            assert tpu.choose_tile(mixed, token_sums=1) == wide


def test_what_a_kernel_or_its_gradient_does_not_hold_goes_to_the_portable_version():
    """On a v4 the forward kernel fits and the gradient's does not; 2,500 is no multiple of 128."""

    def loss(h_ND, head_VD, targets_N):
        return linear_logprob(h_ND, head_VD, targets_N).logprob_N.sum()

    for kind, width, dtype in (
        ("TPU v4", 1 << 16, "float32"),
        ("TPU v4", 2560, "float32"),
        ("TPU v4", 8192, "bfloat16"),
        ("TPU v5 lite", 2500, "bfloat16"),
    ):
        shapes = [jax.ShapeDtypeStruct(dims, dtype) for dims in ((2048, width), (151_936, width))]
        with compiling_for("tpu", kind):
            assert linear_kl.OPERATION.candidates("tpu") == ("pallas_tpu", "xla")
            jaxpr = jax.make_jaxpr(jax.grad(loss, (0, 1)))(
                *shapes, jax.ShapeDtypeStruct((2048,), jnp.int32)
            )
        assert "pallas_call" not in str(jaxpr)


def test_what_it_cannot_compute_a_named_kernel_refuses():
    for platform, kind, width, message in (
        ("gpu", "NVIDIA H100", 8, "for TPUs"),
        ("tpu", "TPU v4", 1 << 16, "VMEM"),
    ):
        shapes = [jax.ShapeDtypeStruct(dims, jnp.float32) for dims in ((4, width), (9, width))]
        with compiling_for(platform, kind), pytest.raises(NotImplementedError, match=message):
            jax.eval_shape(
                lambda *a: linear_logprob(*a, implementation="pallas_tpu"),
                *shapes,
                jax.ShapeDtypeStruct((4,), jnp.int32),
            )
