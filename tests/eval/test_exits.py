"""What exits say against whole soft-maxes, a completion at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import make_model

from jexit.eval import exits
from jexit.eval.hazards import Recorded
from jexit.model.exits import ExitSettings
from jexit.model.policies import Full, Prescribed
from jexit.model.transformer import logits_of, run
from jexit.steps.state import split_model

EXITS, LAYERS, VOCABULARY = (1, 2), 3, 31
PROMPTS = [[4, 9, 1], [7, 7, 20, 3, 2], [11], [30, 2]]
COMPLETIONS = [[5, 6, 7, 8, 1, 4], [9, 9], [1, 2, 3, 4, 5, 6, 7, 8], [12]]


@pytest.fixture(scope="module", params=["frozen", "linear"])
def model(request):
    model = make_model(
        VOCABULARY, head=ExitSettings(continuation=request.param), lora=None, tied=True
    )
    # Residuals that the layers change little: exits and last layer then agree on some tokens.
    for part in (model.blocks.attn.o, model.blocks.mlp.down):
        part.kernel[...] *= 0.1
    if request.param == "linear":
        model.blocks.continuation.update.kernel[...] *= 0.02
        model.blocks.continuation.update.bias[...] *= 0.02
    return model


@pytest.fixture(scope="module")
def recorded():
    return Recorded(PROMPTS, COMPLETIONS, [[LAYERS] * len(ids) for ids in COMPLETIONS], 0)


def logp(model, tokens, policy):
    out = run(model, tokens, policy=policy)
    return jax.nn.log_softmax(logits_of(out.hidden_BTD, model.head_VD))[0]


def test_exits_and_leaving_by_hand(model, recorded, monkeypatch):
    monkeypatch.setattr(exits, "CLOSE", 0.5)
    monkeypatch.setattr(exits, "THRESHOLDS", (0.5,))
    split = split_model(model, full=False)
    made = exits.exit_quality(split.decodable(split.trainable), EXITS, LAYERS, recorded)

    kls, same, depths, left_kls, left_same = [], [], [], [], []
    for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True):
        tokens = jnp.asarray([[*prompt, *ids]])
        full = logp(model, tokens, Full())
        # An exit's word at a position: that position alone leaves there.
        depth = np.full(tokens.shape, LAYERS)
        for place in range(len(prompt), len(prompt) + len(ids) - 1):
            kl_E, same_E = [], []
            for exit_layer in EXITS:
                alone = np.full(tokens.shape, LAYERS)
                alone[0, place] = exit_layer
                early = logp(model, tokens, Prescribed(alone))[place]
                kl_E.append(float(jnp.sum(jnp.exp(full[place]) * (full[place] - early))))
                same_E.append(int(early.argmax()) == int(full[place].argmax()))
            kls.append(kl_E)
            same.append(same_E)
            depth[0, place] = next(
                (layer for layer, kl in zip(EXITS, kl_E, strict=True) if kl < 0.5), LAYERS
            )
        early = logp(model, tokens, Prescribed(depth))
        for place in range(len(prompt), len(prompt) + len(ids) - 1):
            depths.append(depth[0, place])
            left_kls.append(float(jnp.sum(jnp.exp(full[place]) * (full[place] - early[place]))))
            left_same.append(int(early[place].argmax()) == int(full[place].argmax()))

    kls, depths = np.asarray(kls), np.asarray(depths)
    assert made["passes"] == len(kls) == sum(len(ids) - 1 for ids in COMPLETIONS)
    for index, entry in enumerate(made["exits"]):
        assert entry["exit"] == EXITS[index]
        assert entry["kl_nats"] == pytest.approx(kls[:, index].mean(), rel=1e-3)
        assert entry["same_token"] == pytest.approx(np.mean(same, 0)[index])
        assert entry["close"] == pytest.approx((kls[:, index] < 0.5).mean())
    (leaving,) = made["leaving"]
    assert len(set(depths)) > 1, "some leave and some do not"
    assert leaving["depth_fraction"] == pytest.approx(depths.mean() / LAYERS)
    assert leaving["kl_nats"] == pytest.approx(np.mean(left_kls), rel=1e-3)
    assert leaving["same_token"] == pytest.approx(np.mean(left_same))
    stayed = depths == LAYERS
    if stayed.any():
        assert leaving["same_token_full_depth"] == pytest.approx(
            np.mean(np.array(left_same)[stayed])
        )
