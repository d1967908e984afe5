"""Every parameter has a rule, and axes are divided only where they divide."""

import jax
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from jexit.config import LoRA
from jexit.dist import constrain, make_mesh, place_parameter, place_rows, use_mesh
from jexit.dist.rules import PARAMETERS, parameter_axes, spec
from jexit.model.transformer import Transformer
from jexit.presets import PRESETS

TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
SCALES = ("attn_norm", "mlp_norm", "q_norm", "k_norm", "final_norm", "exits")


@pytest.mark.parametrize("name", ["qwen3-0.6b", "r1-distill-qwen-1.5b"])
def test_every_parameter_has_a_rule_that_fits_its_shape(name):
    arch = PRESETS[name].architecture
    model = nnx.eval_shape(
        lambda: Transformer(
            arch,
            exit_layers=(5, 10),
            lora=LoRA(rank=4, alpha=8.0, targets=TARGETS),
            rngs=nnx.Rngs(0),
        )
    )
    for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
        if path[-1] in ("scale", "b2"):  # a vector a layer, or a number an exit: whole everywhere
            assert path[-2] in SCALES
            continue
        assert tuple(path[-2:]) in PARAMETERS, path
        axes = parameter_axes(path, leaf.ndim)
        assert len(axes) == leaf.ndim and "." not in axes, path
        sizes = {"D": arch.width, "N": arch.query_heads, "K": arch.kv_heads, "H": arch.head_dim}
        sizes |= {"V": arch.vocab_size, "L": arch.layers, "R": 4}
        if path[0] != "exits":
            sizes["F"] = arch.mlp_width
        for letter, size in zip(axes, leaf.shape, strict=True):
            assert sizes.get(letter, size) == size, (path, axes, leaf.shape)


def test_an_axis_that_does_not_divide_stays_whole():
    mesh = make_mesh(1, 2, 4)
    assert spec("LDKH", (3, 32, 8, 16), mesh) == P(None, ("fsdp",), ("tensor",), None)
    assert spec("LDKH", (3, 32, 2, 16), mesh) == P(None, ("fsdp",), None, None)
    assert spec("LDKH", (3, 31, 2, 16), mesh) == P(None, None, None, None)
    assert spec("B.", (8, 5), make_mesh(2, 2, 2)) == P(("data", "fsdp"), None)
    assert spec("B.", (6, 5), make_mesh(2, 2, 2)) == P(None, None)


def test_a_parameter_is_never_whole_on_one_device():
    values = np.arange(3 * 8 * 4, dtype=np.float32).reshape(3, 8, 4)
    with use_mesh(make_mesh(1, 2, 4)):
        placed = place_parameter("blocks.mlp.up.kernel", values)
        assert {shard.data.shape for shard in placed.addressable_shards} == {(3, 4, 1)}
        np.testing.assert_array_equal(placed, values)
        rows = place_rows(np.arange(8))
        assert len(rows.sharding.device_set) == 8
        pinned = jax.jit(lambda x: constrain(x * 2, "B"))(rows)
        assert pinned.sharding.spec == P(("fsdp",))
    with use_mesh(make_mesh(1, 1, 1)):  # one device is left alone
        assert len(place_rows(np.arange(4)).sharding.device_set) == 1
        assert constrain(np.ones(3), "B").shape == (3,)
