"""Probes on features whose knowledge of the future is known, and the residuals that they read."""

import dataclasses

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jexit
from jexit.evaluation.planning import AHEAD, planning, probe, residuals_at
from jexit.evaluation.replay import Recorded
from small_runs import ARCHITECTURE, random_model
from tolerances import LOGITS

RNG = np.random.default_rng(0)


def test_a_probe_finds_what_is_there_and_nothing_else():
    token_N = RNG.integers(10, 18, 3000)
    code_VD = RNG.normal(size=(18, 12))
    fits_N = np.arange(3000) % 2 == 0
    noise_ND = RNG.normal(size=(3000, 12))
    assert probe(code_VD[token_N] + 0.1 * noise_ND, token_N, fits_N).mean() > 0.99
    assert abs(probe(noise_ND, token_N, fits_N).mean() - 1 / 8) < 0.05
    # Scale and offset of a feature do not matter, and a token that was never seen is never found.
    shifted_ND = (code_VD[token_N] + 0.1 * noise_ND) * 1e-4 + 50.0
    assert probe(shifted_ND, token_N, fits_N).mean() > 0.99
    new_N = np.where(fits_N, token_N, 99)
    assert not probe(code_VD[token_N], new_N, fits_N).any()
    # In bfloat16, whose sums stop growing.
    coarse_ND = jnp.asarray(code_VD[token_N] + 1.0, jnp.bfloat16)
    assert probe(np.asarray(coarse_ND), token_N, fits_N).mean() > 0.99


def test_residuals_are_those_of_the_pass_that_produces_each_token():
    model = random_model(dataclasses.replace(ARCHITECTURE, vocab_size=64), 0.3, exit_layers=(1, 2))
    prompts = [[5, 6, 7], [8, 9, 10, 11, 12]]
    completions = [[13, 14, 15, 16], [17, 18]]
    depths = [[3, 1, 2, 3], [3, 2]]
    recorded = Recorded(prompts, completions, depths, 0)
    graphdef, *states = nnx.split(model)
    places = (0, 1, 2, 3)
    (found_BCRD,) = recorded.through(
        lambda rows, depth_BC: residuals_at(graphdef, tuple(states), rows, depth_BC, layers=places)
    )
    for row, (prompt, ids) in enumerate(zip(prompts, completions, strict=True)):
        depth_BT = np.full((1, len(prompt) + len(ids)), 3)
        depth_BT[0, len(prompt) : -1] = depths[row][1:]
        out = jexit.forward(
            model, [[*prompt, *ids]], policy=jexit.Prescribed(depth_BT), residuals=True
        )
        for place in range(len(ids)):
            wanted_RD = out.residual_LBTD[:, 0, len(prompt) - 1 + place]
            np.testing.assert_allclose(found_BCRD[row, place], wanted_RD, rtol=0, atol=LOGITS)


def test_chains_that_repeat_are_foreseen_and_random_ones_are_not():
    model = random_model(dataclasses.replace(ARCHITECTURE, vocab_size=64), 0.3, exit_layers=(1, 2))
    split = nnx.split(model)
    steps = np.arange(12)
    counting = [(((start + steps) % 6) + 20).tolist() for start in range(60)]
    rolled = RNG.integers(20, 26, (60, 12)).tolist()
    for completions, foreseen in ((counting, True), (rolled, False)):
        recorded = Recorded(
            [[1, 2]] * 60, completions, [[3, *RNG.choice([1, 2, 3], 11)] for _ in range(60)], 0
        )
        made = planning("sample", split, (1, 2), 3, recorded)
        assert [(m.ahead, m.layer) for m in made] == [(k, n) for k in AHEAD for n in (1, 2, 3)]
        for measure in made:
            assert measure.passes == 30 * (12 - measure.ahead)
            low, high = measure.gain_ci95
            gain = measure.accuracy - measure.accuracy_embedding
            assert low - 1e-9 <= gain <= high + 1e-9
            if foreseen:
                # All but the first pass, which reads the prompt, read a token of the sequence.
                certain = (11 - measure.ahead) / (12 - measure.ahead)
                assert certain <= measure.accuracy_embedding < certain + 0.1
                assert measure.accuracy > 0.4
            else:
                assert measure.accuracy < 0.35 and measure.accuracy_embedding < 0.35


def test_too_few_completions_have_no_probe():
    model = random_model(ARCHITECTURE, 0.1, exit_layers=(1, 2))
    recorded = Recorded([[1, 2]] * 2, [[3, 4], [5]], [[3, 3], [3]], 0)
    assert planning("full", nnx.split(model), (1, 2), 3, recorded) == []
