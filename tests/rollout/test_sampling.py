"""The sampler against enumeration: what it draws, and what it says that it drew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jexit.rollout.sampling import (
    MixedSampling,
    Sampling,
    draw_by_weight,
    truncate_top_k,
    truncate_top_p,
)

DRAWS = 40_000


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), count)


def log_probs(logits: np.ndarray, *settings: float, **more: float) -> np.ndarray:
    sampling = Sampling.of(*settings, **more)
    return np.asarray(jax.nn.log_softmax(sampling.distribution(jnp.asarray(logits))))


def test_frequencies_follow_the_weights():
    for vocab in (1, 2, 37, 1000):
        rng = np.random.default_rng(vocab)
        weights = rng.gamma(0.3, size=vocab).astype(np.float32)
        weights[::3] *= vocab > 2
        weights[vocab // 2] += 0.1
        rows = jnp.broadcast_to(weights, (DRAWS, vocab))
        drawn = np.asarray(jax.jit(draw_by_weight)(rows, keys(DRAWS)))
        assert np.all(weights[drawn] > 0)
        found = np.bincount(drawn, minlength=vocab)
        expected = DRAWS * weights.astype(np.float64) / weights.sum(dtype=np.float64)
        # Pearson's statistic, entries that are expected fewer than 5 times taken together.
        rare = expected < 5
        found = np.append(found[~rare], found[rare].sum())
        expected = np.append(expected[~rare], expected[rare].sum())
        kept = expected > 0
        statistic = np.sum((found[kept] - expected[kept]) ** 2 / expected[kept])
        freedom = kept.sum() - 1
        assert statistic <= freedom + 5 * np.sqrt(2 * freedom) + 1e-6
    drawn_B = draw_by_weight(jnp.full((50, 61), jnp.nan), keys(50))
    assert 0 <= int(drawn_B.min()) <= int(drawn_B.max()) < 61, "weights that are no numbers"


def test_draws_follow_the_recorded_distribution():
    logits = np.random.default_rng(5).normal(size=12).astype(np.float32) * 2
    for top_p in (1.0, 0.8):
        sampling = Sampling.of(0.7, top_p)
        token_B, logprob_B = sampling.draw(jnp.broadcast_to(logits, (DRAWS, 12)), keys(DRAWS))
        recorded = log_probs(logits, 0.7, top_p)
        np.testing.assert_allclose(logprob_B, recorded[np.asarray(token_B)], atol=1e-5)
        expected = np.exp(recorded)
        found = np.bincount(np.asarray(token_B), minlength=12) / DRAWS
        assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected / DRAWS) + 1e-9)
        assert (expected == 0).any() == (top_p < 1.0)


def test_greedy_takes_the_first_largest_and_reports_the_plain_log_probability():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    token_B, logprob_B = Sampling.of(0.0, 0.5).draw(logits, keys(2))
    assert token_B.tolist() == [1, 0]
    np.testing.assert_allclose(logprob_B, jax.nn.log_softmax(logits)[jnp.arange(2), token_B])


def test_a_rows_draw_depends_on_its_key_and_settings_alone():
    logits = jax.random.normal(jax.random.key(0), (9, 70)) * 3
    samplings = [Sampling.of(0.0), Sampling.of(0.6, 0.7), Sampling.of(1.3, top_k=4, min_p=0.1)] * 3
    alone = [s.draw(logits[i : i + 1], keys(9)[i : i + 1]) for i, s in enumerate(samplings)]
    mixed = MixedSampling.of(samplings, ("top_k", "top_p", "min_p"))
    order = jnp.asarray([4, 0, 8, 1, 7, 2, 6, 3, 5])
    token_B, logprob_B = mixed.at(order).draw(logits[order], keys(9)[order])
    for row, index in enumerate(order.tolist()):
        assert int(token_B[row]) == int(alone[index][0][0])
        np.testing.assert_allclose(logprob_B[row], alone[index][1][0], atol=1e-5)


def test_truncation_is_hugging_faces():
    """Each truncation, and all in their order, against the warpers of `generate`."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    logits = np.random.default_rng(3).normal(size=(8, 300)).astype(np.float32) * 3
    warpers = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    for settings in (
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"top_p": 1e-6},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8},
        {"top_p": 0.9, "min_p": 0.05},
        {"top_k": 30, "top_p": 0.7, "min_p": 0.2},
    ):
        scores = logits_process.TemperatureLogitsWarper(0.7)(None, torch.tensor(logits))
        for name, warper in warpers.items():
            if name in settings:
                scores = warper(settings[name])(None, scores)
        found, wanted = log_probs(logits, 0.7, **settings), torch.log_softmax(scores, -1).numpy()
        np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
        np.testing.assert_allclose(np.exp(found), np.exp(wanted), atol=1e-6)


def test_truncation_keeps_ties_and_the_whole_mass():
    logits = jnp.asarray([[1.0, 1.0, 1.0, -2.0], [0.0, -np.inf, 0.0, -np.inf]])
    kept = np.isfinite(np.asarray(truncate_top_p(logits, 0.5)))
    assert kept.tolist() == [[True, True, True, False], [True, False, True, False]]
    assert np.isfinite(np.asarray(truncate_top_p(logits[:1], 1.0))).all()
    logits = jnp.asarray([[3.0, 1.0, 1.0, 0.0]])
    kept = [int(np.isfinite(truncate_top_k(logits, k)).sum()) for k in (1, 2, 3, 4)]
    assert kept == [1, 3, 3, 4]


def test_settings_are_checked():
    for settings, sentence in [
        ({"temperature": -0.5}, "temperature is -0.5, but it must be 0"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p is 0.0, but it must be above 0"),
        ({"temperature": 1.0, "top_p": 1.5}, "top_p is 1.5"),
        ({"temperature": 1.0, "top_k": -1}, "top_k is -1"),
        ({"temperature": 1.0, "min_p": float("nan")}, "min_p is nan"),
    ]:
        with pytest.raises(ValueError, match=f"^{sentence}"):
            Sampling.of(**settings)
