"""The residuals of decoded tokens, against what decoding itself read from them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jexit
from jexit.model.transformer import logits_of
from jexit.rollout import residuals, rollout
from jexit.rollout.residuals import residuals_of
from tolerances import LOGITS, relative_error

EXITS = (1, 2, 4)
LAYERS = (0, 1, 2, 4, 5)


@pytest.fixture(
    scope="module",
    params=[True, pytest.param(False, marks=pytest.mark.slow)],
    ids=["student", "teacher"],
)
def made(request, model, prompts):
    return request.param, rollout(
        model, prompts, policy=jexit.Sample(2.0, 0.1), max_new_tokens=12, temperature=0.8,
        eos_ids=(60,), pad_id=59, key=3, hazards=True, adapters=request.param,
    )  # fmt: skip


def test_they_are_what_the_exits_and_the_output_head_read(model, made, monkeypatch):
    """Hazards at the exits that were reached, and the log-probabilities of the drawn tokens."""
    adapters, rollouts = made
    completions = [rollouts.completion(row) for row in range(rollouts.rows)]
    depths = [rollouts.depths_BT[row, : len(ids)] for row, ids in enumerate(completions)]
    assert len(set(np.concatenate(depths).tolist())) == 4, "tokens leave everywhere"
    asked = (model, rollouts.prompts, completions, depths, LAYERS)
    found = residuals_of(*asked, adapters=adapters)
    for row, (ids, kept_TRD) in enumerate(zip(completions, found, strict=True)):
        assert kept_TRD.shape == (len(ids), len(LAYERS), 24)
        for e, exit_layer in enumerate(EXITS):
            z_T = model.exits(jnp.asarray(kept_TRD[:, LAYERS.index(exit_layer)]), jnp.asarray(e))
            wanted_T = rollouts.hazard_logits_BTE[row, : len(ids), e]
            reached_T = np.isfinite(wanted_T)
            np.testing.assert_allclose(z_T[reached_T], wanted_T[reached_T], atol=LOGITS)
        logits_TV = logits_of(model.final_norm(jnp.asarray(kept_TRD[:, -1])), model.head_VD) / 0.8
        logprob_T = jax.nn.log_softmax(logits_TV)[np.arange(len(ids)), np.asarray(ids)]
        np.testing.assert_allclose(logprob_T, rollouts.logprobs_BT[row, : len(ids)], atol=LOGITS)
    monkeypatch.setattr(residuals, "POSITIONS", 20)  # a row at a time
    for one, other in zip(residuals_of(*asked, adapters=adapters), found, strict=True):
        assert relative_error(one, other) <= 1e-5


def test_generate_returns_those_that_are_asked_for():
    model, tokenizer = jexit.load("jexit/assets/tiny-calibrated")
    asked = {"policy": jexit.Threshold(0.5), "max_new_tokens": 24, "hazards": True}
    prompts = ["sum 37295", "sum 4815"]
    plain = jexit.generate(model, tokenizer, prompts, **asked)
    assert plain.residuals is None
    rich = jexit.generate(model, tokenizer, prompts, residuals=model.exit_layers, **asked)
    assert rich.texts == plain.texts and rich.depths == plain.depths
    for kept_TED, z_TE in zip(rich.residuals, rich.hazard_logits, strict=True):
        for e, z_T in enumerate(np.asarray(z_TE).T):
            reached_T = np.isfinite(z_T)
            found_T = model.exits(jnp.asarray(kept_TED[:, e]), jnp.asarray(e))
            np.testing.assert_allclose(found_T[reached_T], z_T[reached_T], atol=LOGITS)
        assert np.isfinite(z_TE).any()


@pytest.mark.parametrize("asked", [(5, 3), (2, 2), (-1,), (9,), (1.5,), ("1",), (True,), 3])
def test_layers_that_do_not_exist_are_refused(asked):
    model, tokenizer = jexit.load("jexit/assets/tiny-calibrated")
    with pytest.raises(ValueError, match=r"must be layer numbers from 0 to 8 in rising order"):
        jexit.generate(model, tokenizer, ["sum 12"], residuals=asked)
