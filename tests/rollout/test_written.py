"""Completions that go on from a beginning: as if that had been decoded in the same breath."""

import jax
import numpy as np
import pytest

from jexit.config import EngineSize
from jexit.model.policies import Full, Prescribed, Sample, Threshold
from jexit.model.transformer import forward
from jexit.rollout import rollout
from tolerances import LOGPROBS

LAYERS, COLUMNS, PAD = 5, 12, 59
ASKED = {"max_new_tokens": COLUMNS, "eos_ids": (), "pad_id": PAD, "key": 4, "temperature": 0.0}
DEPTH_BT = np.random.default_rng(1).integers(1, LAYERS + 1, (3, COLUMNS))
POLICIES = {"full": Full(), "threshold": Threshold(0.8), "prescribed": Prescribed(DEPTH_BT)}


@pytest.mark.parametrize("cuts", [(5, 1, 9), (0, 4, 4)])
@pytest.mark.parametrize("name", POLICIES)
def test_goes_on_as_if_it_had_never_stopped(model, prompts, name, cuts):
    whole = rollout(model, prompts, policy=POLICIES[name], hazards=True, **ASKED)
    assert name == "full" or len(set(whole.depths_BT[:, 1:].flat)) > 2
    begun = [prompts[i] + whole.tokens_BT[i, :cut].tolist() for i, cut in enumerate(cuts)]
    new = COLUMNS - max(cuts)
    made = rollout(
        model, begun, policy=POLICIES[name], hazards=True, written=cuts,
        size=EngineSize(rows=2, places=1), **ASKED | {"max_new_tokens": new},
    )  # fmt: skip
    for row, cut in enumerate(cuts):
        part = slice(cut, cut + new)
        np.testing.assert_array_equal(made.tokens_BT[row], whole.tokens_BT[row, part])
        np.testing.assert_array_equal(made.depths_BT[row], whole.depths_BT[row, part])
        np.testing.assert_allclose(
            made.logprobs_BT[row], whole.logprobs_BT[row, part], atol=LOGPROBS
        )
        np.testing.assert_allclose(
            made.hazard_logits_BTE[row],
            whole.hazard_logits_BTE[row, part],
            atol=LOGPROBS,
            equal_nan=True,
        )


def test_without_being_told_a_beginning_runs_all_layers(model, prompts):
    """The difference that `written` makes: other depths, so other keys and values."""
    asked = ASKED | {"max_new_tokens": 4, "policy": Threshold(0.55)}
    begun = [prompt + [5, 9, 2, 7] for prompt in prompts]
    plain = rollout(model, begun, **asked)
    told = rollout(model, begun, written=[4] * 3, **asked)
    np.testing.assert_array_equal(plain.depths_BT[:, 0], LAYERS)
    assert told.depths_BT[:, 0].min() < LAYERS
    assert np.abs(plain.logprobs_BT - told.logprobs_BT).max() > 100 * LOGPROBS


def test_draws_leave_as_often_as_the_hazards_say(model):
    """At the first exit, which no earlier token's depth has touched."""
    copies, begun = 400, [7, 3, 11, 30, 2]
    law = Sample(temperature=1.5, min_hazard=0.1)
    made = rollout(
        model, [begun] * copies, policy=law, written=[3] * copies, hazards=True,
        **ASKED | {"max_new_tokens": 1},
    )  # fmt: skip
    z = float(forward(model, np.asarray([begun])).hazard_logits_BTE[0, -1, 0])
    np.testing.assert_allclose(made.hazard_logits_BTE[:, 0, 0], z, atol=LOGPROBS)
    hazard = 0.1 + 0.9 / (1 + np.exp(-z / 1.5))
    left = made.depths_BT[:, 0] == 1
    assert abs(left.mean() - hazard) < 4 * np.sqrt(hazard * (1 - hazard) / copies)
    np.testing.assert_allclose(made.depth_logprobs_BT[left, 0], np.log(hazard), atol=LOGPROBS)
    assert (made.depth_logprobs_BT[~left, 0] < np.log1p(-hazard)).all()


def test_draws_depend_on_no_neighbour(model, prompts):
    begun = [prompt + [5, 9, 2, 7] for prompt in prompts]
    asked = ASKED | {"max_new_tokens": 5, "policy": Sample(), "temperature": 1.0}
    together = rollout(model, begun, written=[4, 2, 3], **asked)
    alone = rollout(model, begun[1:2], written=[2], first_prompt=1, **asked)
    np.testing.assert_array_equal(alone.tokens_BT[0], together.tokens_BT[1])
    np.testing.assert_array_equal(alone.depths_BT[0], together.depths_BT[1])


def test_divides_over_data_shards(model, prompts):
    from jexit.dist import make_mesh

    begun = [prompt + [5, 9, 2, 7] for prompt in prompts]
    asked = ASKED | {"policy": Prescribed(DEPTH_BT), "max_new_tokens": 6, "written": [4, 0, 3]}
    wanted = rollout(model, begun, **asked)
    with jax.set_mesh(make_mesh(data=2)):
        made = rollout(model, begun, **asked)
    np.testing.assert_array_equal(made.tokens_BT, wanted.tokens_BT)
    np.testing.assert_array_equal(made.depths_BT, wanted.depths_BT)


@pytest.mark.parametrize(
    ("written", "samples", "policy", "says"),
    [
        ([1], 1, Full(), "written has 1 numbers for 3 prompts"),
        ([0, 11, 0], 1, Full(), "prompt 1 has 11 tokens, of which 11 are said"),
        ([-1, 0, 0], 1, Full(), "a number from 0 to 2"),
        ([2, 2, 2], 1, Prescribed(DEPTH_BT), r"shape \(3, 12\) for 3 rows of up to 14 tokens"),
        ([2, 2, 2], 2, Prescribed(np.ones((6, 14), int)), "2 samples share one prefill"),
    ],
)
def test_refuses(model, prompts, written, samples, policy, says):
    with pytest.raises(ValueError, match=says):
        rollout(model, prompts, policy=policy, written=written, samples_per_prompt=samples, **ASKED)


def test_there_are_no_sequences_without_the_depths_of_beginnings(model, prompts):
    made = rollout(model, prompts, policy=Threshold(0.55), written=[1, 1, 1], **ASKED)
    with pytest.raises(ValueError, match="went on from given beginnings"):
        made.sequences()
