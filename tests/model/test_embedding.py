"""Looking tokens up in a divided table is plain indexing, and puts nothing whole on a device."""

import re

import jax
import jax.numpy as jnp
import numpy as np

from jexit.dist import make_mesh, place_parameter, place_rows, use_mesh
from jexit.model.embedding import look_up

MESHES = [(8, 1, 1), (1, 8, 1), (1, 1, 8), (2, 2, 2), (1, 2, 4)]
TABLES = {"divides": (64, 16), "vocabulary whole": (63, 16), "width whole": (64, 15)}


def operands(vocab, width, shape):
    rng = np.random.default_rng(0)
    return jnp.asarray(rng.normal(size=(vocab, width))), rng.integers(vocab, size=shape)


def test_a_divided_table_gives_what_indexing_gives():
    """And gradients add up over rows and devices."""
    cases = [((8, 5), "divides", sizes) for sizes in MESHES]
    cases += [((8,), "width whole", (2, 2, 2)), ((6, 5), "vocabulary whole", (1, 2, 4))]
    for shape, table, sizes in cases:
        table_VD, tokens = operands(*TABLES[table], shape)
        weights = jnp.asarray(np.random.default_rng(1).normal(size=(*shape, table_VD.shape[1])))
        truth_VD = np.zeros(table_VD.shape)
        np.add.at(truth_VD, tokens, np.asarray(weights, np.float64))

        def weighted(table_VD, tokens, weights):
            found = look_up(table_VD, tokens)
            return jnp.sum(found * weights), found

        with use_mesh(make_mesh(*sizes)):
            placed = place_parameter("embed.embedding", table_VD), place_rows(tokens)
            gradient = jax.jit(jax.grad(weighted, has_aux=True))
            gradient_VD, found = gradient(*placed, place_rows(weights))
        np.testing.assert_array_equal(np.asarray(found), np.asarray(table_VD)[tokens])
        np.testing.assert_allclose(gradient_VD, truth_VD, rtol=1e-5, atol=1e-5)


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
