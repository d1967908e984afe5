"""What exits say against whole soft-maxes, a completion at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import make_model

from jexit.config import ExitSettings
from jexit.evaluation import exits
from jexit.evaluation.replay import Recorded
from jexit.model.policies import Prescribed
from jexit.model.transformer import logits_of, run
from jexit.steps.state import split_model

EXITS, LAYERS, VOCABULARY = (1, 2), 3, 31
# Nine tokens each, so that one program is enough to check them by hand.
PROMPTS = [[4, 9, 1], [7, 7, 20, 3, 2, 6, 5], [11], [30, 2, 8, 1, 9, 4, 13, 22]]
COMPLETIONS = [[5, 6, 7, 8, 1, 4], [9, 9], [1, 2, 3, 4, 5, 6, 7, 8], [12]]


def model_with(continuation):
    head = ExitSettings(continuation=continuation)
    model = make_model(VOCABULARY, head=head, lora=None, tied=True)
    # Residuals that the layers change little: exits and last layer then agree on some tokens.
    for part in (model.blocks.attn.o, model.blocks.mlp.down):
        part.kernel[...] *= 0.1
    if continuation == "linear":
        model.blocks.continuation.update.kernel[...] *= 0.02
        model.blocks.continuation.update.bias[...] *= 0.02
    return model


@pytest.mark.parametrize("continuation", [pytest.param("frozen", marks=pytest.mark.slow), "linear"])
def test_exits_and_leaving_by_hand(continuation, monkeypatch):
    monkeypatch.setattr(exits, "CLOSE", 0.5)
    monkeypatch.setattr(exits, "THRESHOLDS", (0.5,))
    model = model_with(continuation)
    recorded = Recorded(PROMPTS, COMPLETIONS, [[LAYERS] * len(ids) for ids in COMPLETIONS], 0)
    split = split_model(model, full=False)
    made = exits.exit_quality("full", split.decodable(split.trainable), EXITS, LAYERS, recorded)

    @jax.jit
    def logp(tokens, depth):
        hidden_BTD = run(model, tokens, policy=Prescribed(depth)).hidden_BTD
        return jax.nn.log_softmax(logits_of(hidden_BTD, model.head_VD))[0]

    def against(full, other, place):
        kl = float(jnp.sum(jnp.exp(full[place]) * (full[place] - other[place])))
        return kl, int(other[place].argmax()) == int(full[place].argmax())

    alone, depths, together = [], [], []
    for prompt, ids in zip(PROMPTS, COMPLETIONS, strict=True):
        tokens = jnp.asarray([[*prompt, *ids]])
        depth = np.full(tokens.shape, LAYERS)
        full = logp(tokens, depth)
        passes = range(len(prompt), len(prompt) + len(ids) - 1)
        for place in passes:
            # An exit's word at a position: that position alone leaves there.
            words = []
            for exit_layer in EXITS:
                leaves = np.full(tokens.shape, LAYERS)
                leaves[0, place] = exit_layer
                words.append(against(full, logp(tokens, leaves), place))
            alone.append(words)
            close = (layer for layer, (kl, _) in zip(EXITS, words, strict=True) if kl < 0.5)
            depth[0, place] = next(close, LAYERS)
            depths.append(depth[0, place])
        early = logp(tokens, depth)
        together += [against(full, early, place) for place in passes]

    alone_NEX, depth_N = np.array(alone), np.array(depths)
    left_kl_N, left_same_N = np.array(together).T
    assert made.passes == len(depths) == sum(len(ids) - 1 for ids in COMPLETIONS)
    for index, entry in enumerate(made.exits):
        assert entry.exit == EXITS[index]
        assert entry.kl_nats == pytest.approx(alone_NEX[:, index, 0].mean(), rel=1e-3)
        assert entry.same_token == pytest.approx(alone_NEX[:, index, 1].mean())
        assert entry.close == pytest.approx((alone_NEX[:, index, 0] < 0.5).mean())
    (leaving,) = made.leaving
    assert len(set(depths)) > 1, "some leave and some do not"
    assert leaving.depth_fraction == pytest.approx(depth_N.mean() / LAYERS)
    assert leaving.kl_nats == pytest.approx(np.mean(left_kl_N), rel=1e-3)
    assert leaving.same_token == pytest.approx(np.mean(left_same_N))
    stayed_N = depth_N == LAYERS
    assert stayed_N.any(), "some run all layers"
    assert leaving.same_token_full_depth == pytest.approx(left_same_N[stayed_N].mean())
