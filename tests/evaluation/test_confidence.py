"""Exits that leave where their own prediction is certain enough."""

import dataclasses

import jax
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.config import ExitSettings
from jexit.evaluation.confidence import confident
from jexit.model.exits import maps_to_end
from jexit.model.policies import Threshold
from jexit.rollout import Request, rollout
from small_runs import ARCHITECTURE, random_model
from teacher_forcing import assert_as_teacher_forced
from tolerances import LOGITS

TOKENS_BT = np.random.default_rng(0).integers(0, 60, (3, 12))


@pytest.fixture(scope="module", params=[pytest.param("frozen", marks=pytest.mark.slow), "linear"])
def model(request):
    head = ExitSettings(continuation=request.param)
    arch = dataclasses.replace(ARCHITECTURE, tied=request.param == "frozen")
    return random_model(arch, 0.3, exit_layers=(1, 2), exit_head=head)


def test_hazards_are_the_largest_probabilities_of_the_exits(model):
    plain = jexit.forward(model, TOKENS_BT, residuals=True)
    found = jexit.forward(nnx.merge(*confident(nnx.split(model))), TOKENS_BT)
    np.testing.assert_array_equal(found.logits_BTV, plain.logits_BTV)
    for index, layer in enumerate(model.exit_layers):
        h_BTD = np.asarray(plain.residual_LBTD[layer])
        if model.blocks.continuation is not None:
            maps = maps_to_end(model.blocks.continuation, model.exit_layers, model.arch.layers)
            q_DD, c_D = (np.asarray(part[index]) for part in maps)
            h_BTD = h_BTD + h_BTD @ q_DD + c_D
        p_BTV = jax.nn.softmax(np.asarray(model.final_norm(h_BTD)) @ np.asarray(model.head_VD).T)
        p_BT = np.asarray(p_BTV).max(axis=-1)
        wanted = np.log(p_BT) - np.log1p(-p_BT)
        np.testing.assert_allclose(found.hazard_logits_BTE[..., index], wanted, rtol=0, atol=LOGITS)
    assert np.abs(found.hazard_logits_BTE - plain.hazard_logits_BTE).max() > 1.0


def test_decoding_leaves_at_the_first_exit_over_the_threshold(model):
    parts = confident(nnx.split(model))
    hazard_BTE = jexit.forward(nnx.merge(*parts), TOKENS_BT).hazard_logits_BTE
    middle = float(jax.nn.sigmoid(np.median(hazard_BTE)))
    request = Request(
        prompts=TOKENS_BT.tolist(), policy=Threshold(middle), temperature=0.0, hazards=True,
        max_new_tokens=12, eos_ids=(63,), pad_id=62, key=0,
    )  # fmt: skip
    fields = {f.name: getattr(request, f.name) for f in dataclasses.fields(request)}
    made = rollout(parts, **fields)
    assert len(set(made.depths_BT[:, 1:].ravel().tolist()) - {0}) > 1
    assert_as_teacher_forced(nnx.merge(*parts), request, made)
