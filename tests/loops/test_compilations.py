"""Compilations are counted while entered; those of shapes seen before are recompilations."""

import jax
import jax.numpy as jnp

from jexit.loops.compilations import Compilations


def test_only_what_compiles_again_for_known_shapes_is_a_recompilation():
    def fresh():  # another function object each time: nothing cached
        return jax.jit(lambda x: jnp.tanh(x) * 3.25 + 1.0)

    def step(function, length):
        """What a loop does: says the shapes, computes inside, asks."""
        with counter:
            counter.shapes = length
            function(jnp.zeros(length)).block_until_ready()
        return counter.of_step()

    counter, function = Compilations(), fresh()
    for length in (5, 6):
        found = step(function, length)
        assert found["compilations"] >= 1 and found["recompilations"] == 0
        assert step(function, length) == {"compilations": 0, "recompilations": 0}
    found = step(fresh(), 6)
    assert found["recompilations"] == found["compilations"] >= 1
    fresh()(jnp.zeros(9)).block_until_ready()  # outside
    assert step(function, 6)["compilations"] == 0
