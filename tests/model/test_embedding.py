"""Looking tokens up in a divided table is plain indexing, and puts nothing whole on a device."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jexit.dist import make_mesh, place_parameter, place_rows, use_mesh
from jexit.model.embedding import look_up

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
TABLES = {"divides": (64, 16), "vocabulary whole": (63, 16), "width whole": (64, 15)}


def operands(vocab, width, shape, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(vocab, width)), dtype), rng.integers(vocab, size=shape)


def test_a_divided_table_gives_what_indexing_gives():
    cases = [((8, 5), "divides", sizes) for sizes in MESHES]
    cases += [((8,), table, (2, 2, 2)) for table in TABLES]
    cases += [((6, 5), table, (1, 2, 4)) for table in TABLES]
    for shape, table, sizes in cases:
        table_VD, tokens = operands(*TABLES[table], shape, jnp.bfloat16)
        with use_mesh(make_mesh(*sizes)):
            placed = place_parameter("embed.embedding", table_VD), place_rows(tokens)
            found = jax.jit(look_up)(*placed)
        np.testing.assert_array_equal(np.asarray(found), np.asarray(table_VD)[tokens])


@pytest.mark.parametrize("sizes", MESHES, ids=str)
def test_gradients_add_up_over_rows_and_devices(sizes):
    table_VD, tokens_BT = operands(8, 16, (8, 5))  # every token several times
    weights_BTD = jnp.asarray(np.random.default_rng(1).normal(size=(8, 5, 16)), jnp.float32)
    truth_VD = np.zeros((8, 16))
    np.add.at(truth_VD, tokens_BT, np.asarray(weights_BTD, np.float64))

    def loss(weights_BTD, table_VD, tokens_BT):
        return jnp.sum(look_up(table_VD, tokens_BT) * weights_BTD)

    with use_mesh(make_mesh(*sizes)):
        placed = place_parameter("embed.embedding", table_VD), place_rows(tokens_BT)
        gradient_VD = jax.jit(jax.grad(loss, argnums=1))(place_rows(weights_BTD), *placed)
    np.testing.assert_allclose(gradient_VD, truth_VD, rtol=1e-6, atol=1e-6)


def test_no_device_holds_the_whole_result_or_the_whole_table():
    for sizes in MESHES:
        table_VD, tokens_BT = operands(64, 16, (8, 5))
        with use_mesh(make_mesh(*sizes)):
            placed = place_parameter("embed.embedding", table_VD), place_rows(tokens_BT)
            text = jax.jit(look_up).lower(*placed).compile().as_text()
        shapes = {tuple(map(int, m.split(","))) for m in re.findall(r"f32\[([\d,]+)\]", text)}
        largest = max(np.prod(shape) for shape in shapes)
        data, fsdp, tensor = sizes
        assert largest <= max(64 * 16 // (fsdp * tensor), 8 * 5 * 16 // (data * fsdp))
