"""Log-likelihoods of continuations: against decoding and enumeration.

test_harness_model.py holds them against the harness's own model for transformers.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.evaluation.loglikelihood import Scorer, most_likely, token_scores
from jexit.model.exits import depth_log_distribution
from jexit.model.policies import Full, Prescribed, Sample, Threshold
from jexit.rollout import rollout
from jexit.steps.completions import Completions
from small_runs import small_model
from tolerances import LOGPROBS

VOCAB, END = 61, 60


@pytest.fixture(scope="module")
def model():
    """Three layers with exits at 1 and 2 that leave often, and about half of the time each."""
    model = small_model(VOCAB)
    model.exits.b2[...] = jnp.asarray([-0.3, 0.2])
    model.embed.embedding[...] *= 2.0
    return model


@pytest.fixture(scope="module")
def pairs():
    rng = np.random.default_rng(0)
    sizes = [(3, 4), (1, 1), (15, 9), (5, 2), (2, 6), (12, 11), (8, 16)]  # two shapes to compile
    return [
        (rng.integers(0, END, context).tolist(), rng.integers(0, END, size).tolist())
        for context, size in sizes
    ]


def scored(model, pairs, **settings):
    """The score of each pair, in their order."""
    scores = {}
    for batch in Scorer(model, pad_id=END, **settings).batches(pairs):
        scores |= batch
    return [scores[index] for index in range(len(pairs))]


@pytest.mark.slow
def test_what_decoding_recorded(model, pairs):
    """test_harness_model.py has the same of thresholds and fixed depths, where text is greedy."""
    prompts = [context for context, _ in pairs]
    made = rollout(
        model, prompts, policy=Sample(), max_new_tokens=12, temperature=1.0, eos_ids=[END],
        pad_id=END, key=3,
    )  # fmt: skip
    decoded = [(prompt, made.completion(row)) for row, prompt in enumerate(prompts)]
    # The same depths, whatever drew them.
    policy = Prescribed(np.where(made.depths_BT > 0, made.depths_BT, 1))
    for row, score in enumerate(scored(model, decoded, policy=policy, batch_size=4)):
        length = made.lengths_B[row]
        assert score.depths == made.depths_BT[row, :length].tolist()
        assert score.depths[0] == 3
        np.testing.assert_allclose(score.logprobs, made.logprobs_BT[row, :length], atol=LOGPROBS)
    assert {1, 2, 3} <= set(made.depths_BT.ravel().tolist())


@pytest.mark.slow
def test_batches_change_nothing(model, pairs):
    order = [4, 0, 6, 2, 5, 1, 3]
    depths = np.random.default_rng(1).integers(1, 4, (len(pairs), 16)).astype(np.int32)
    for policy in (Sample(), Prescribed(depths)):
        whole = scored(model, pairs, policy=policy, batch_size=16)
        parts = scored(model, pairs, policy=policy, batch_size=3)
        for one, other in zip(whole, parts, strict=True):
            assert one.depths == other.depths and one.greedy == other.greedy
            np.testing.assert_allclose(one.logprobs, other.logprobs, atol=LOGPROBS)
        if isinstance(policy, Prescribed):
            policy = Prescribed(policy.depth_BT[order])
        moved = scored(model, [pairs[index] for index in order], policy=policy)
        assert [score.depths for score in moved] == [whole[index].depths for index in order]
    # Positions and rows draw for themselves, also where the texts are nearly the same.
    continuation = np.random.default_rng(4).integers(0, END, 60).tolist()
    pairs = [([number, 2], continuation) for number in range(8)]
    depths = [score.depths[1:] for score in scored(model, pairs, policy=Sample())]
    assert all(set(row) == {1, 2, 3} for row in depths)
    assert np.mean([np.equal(depths[0], row) for row in depths[1:]]) < 0.6


def test_sampled_depths_follow_the_law_and_the_seed(model):
    # Two tokens: one pass that may leave, so every outcome can be enumerated.
    pair = ([5, 17, 40], [9, 22])
    tokens_BT = jnp.asarray([[*pair[0], *pair[1]]])
    hazards = jexit.forward(model, tokens_BT, policy=Full()).hazard_logits_BTE[0, 3]
    law = np.exp(np.asarray(depth_log_distribution(hazards)))
    scores = {
        depth: scored(model, [pair], policy=Prescribed([[3, depth]]))[0] for depth in (1, 2, 3)
    }
    draws = [scored(model, [pair], policy=Sample(), seed=seed)[0] for seed in range(200)]
    seen = np.array([score.depths for score in draws])
    assert (seen[:, 0] == 3).all()
    for probability, depth in zip(law, (1, 2, 3), strict=True):
        share = (seen[:, 1] == depth).mean()
        assert abs(share - probability) < 4 * np.sqrt(probability * (1 - probability) / 200)
    totals = np.array([score.total for score in draws])
    np.testing.assert_allclose(totals, [scores[d].total for d in seen[:, 1]], atol=LOGPROBS)
    expected = sum(p * scores[d].total for p, d in zip(law, (1, 2, 3), strict=True))
    marginal = np.log(sum(p * np.exp(scores[d].total) for p, d in zip(law, (1, 2, 3), strict=True)))
    assert abs(totals.mean() - expected) < 4 * totals.std() / np.sqrt(200)
    assert expected < marginal
    assert scored(model, [pair], policy=Sample(), seed=7)[0].depths == draws[7].depths


def test_a_context_is_cut_from_the_left_and_what_cannot_be_scored_is_refused(model):
    rng = np.random.default_rng(5)
    context, continuation = rng.integers(0, END, 40).tolist(), rng.integers(0, END, 5).tolist()
    (cut,) = scored(model, [(context, continuation)], max_length=12)
    (whole,) = scored(model, [(context[-8:], continuation)])
    np.testing.assert_allclose(cut.logprobs, whole.logprobs, atol=LOGPROBS)
    most = model.arch.max_positions
    assert len(scored(model, [(context, [3] * most)])[0].logprobs) == most
    for pair, settings, sentence in (
        (([], [1]), {}, "the context is empty, but it must have at least one token"),
        (([1], []), {}, "the continuation is empty, but it must have at least one token"),
        (([1], [2] * 13), {"max_length": 12}, "a continuation has 13 tokens, but max_length is 12"),
        (([1], [2]), {"max_length": 0}, "max_length is 0"),
        (([1], [2]), {"max_length": 257}, "at most 256, the number of the model's positions"),
        (([1], [2]), {"batch_size": 0}, "batch_size is 0"),
        (
            ([1], [2] * 4),
            {"policy": Prescribed(np.ones((7, 3), np.int32))},
            r"shape \(7, 3\), but it needs the shape \(1, N\) with N of at least 4",
        ),
    ):
        with pytest.raises(ValueError, match=sentence):
            scored(model, [pair], **settings)


def test_the_most_likely_token():
    for vocab in (7, 2048, 2049):
        rng = np.random.default_rng(vocab)
        head_VD = rng.normal(size=(vocab, 6)).astype(np.float32)
        head_VD[vocab // 2] = head_VD[1]  # equals: the first one wins
        h_ND = np.concatenate([rng.normal(size=(40, 6)), 9 * head_VD[[1, vocab - 1, 0]]])
        logits_NV = h_ND.astype(np.float32) @ head_VD.T
        found = np.asarray(most_likely(jnp.asarray(h_ND, jnp.float32), jnp.asarray(head_VD)))
        np.testing.assert_array_equal(found, logits_NV.argmax(-1))


def test_no_buffer_holds_logits():
    vocab, rows, completion = 30_011, 6, 16
    graphdef, state = nnx.split(nnx.eval_shape(lambda: small_model(vocab)))

    def ids(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.int32)

    batch = Completions(*[ids(rows, 24)] * 3, *[ids(rows, completion)] * 4)
    lowered = token_scores.lower(graphdef, (state,), batch, Threshold(0.5), jax.random.key(0))
    shapes = {
        tuple(map(int, dims.split(",")))
        for dims in re.findall(r"\b(?:f32|pred|s32)\[([\d,]+)\]", lowered.compile().as_text())
    }
    assert (vocab, 16) in shapes, "the text names no head: it is not what it was"
    wide = {dims for dims in shapes if vocab in dims} - {(vocab, 16), (16, vocab), (1, vocab, 16)}
    assert not wide
