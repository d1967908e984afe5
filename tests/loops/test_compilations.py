"""Compilations are counted while entered; those of shapes seen before are recompilations."""

import jax
import jax.numpy as jnp

from jexit.loops.compilations import Compilations


def step(counter, function, length):
    """What a loop does: says the shapes, computes inside, asks."""
    with counter:
        counter.shapes = length
        function(jnp.zeros(length)).block_until_ready()
    return counter.of_step()


def fresh():
    return jax.jit(lambda x: jnp.tanh(x) * 3.25 + 1.0)


def test_a_new_length_is_no_recompilation_and_a_known_one_compiles_nothing():
    counter, function = Compilations(), fresh()
    for length in (5, 6):
        found = step(counter, function, length)
        assert found["compilations"] >= 1 and found["recompilations"] == 0
        assert step(counter, function, length) == {"compilations": 0, "recompilations": 0}


def test_what_compiles_again_for_known_shapes_is_a_recompilation():
    counter = Compilations()
    step(counter, fresh(), 7)
    found = step(counter, fresh(), 7)  # another function object: nothing cached
    assert found["recompilations"] == found["compilations"] >= 1


def test_what_is_compiled_outside_does_not_count():
    counter, function = Compilations(), fresh()
    step(counter, function, 8)
    fresh()(jnp.zeros(9)).block_until_ready()
    assert step(counter, function, 8)["compilations"] == 0
