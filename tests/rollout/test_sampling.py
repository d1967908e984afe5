"""The sampler against enumeration: what it draws, and what it says that it drew."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jexit.rollout.sampling import Sampling, draw_by_weight, truncate_top_k, truncate_top_p

DRAWS = 40_000


def keys(count: int) -> jax.Array:
    return jax.random.split(jax.random.key(1), count)


def log_law(logits: np.ndarray, *settings: float, **more: float) -> np.ndarray:
    return np.asarray(jax.nn.log_softmax(Sampling.of(*settings, **more).law(jnp.asarray(logits))))


def nucleus_by_sorting(probs: np.ndarray, top_p: float) -> np.ndarray:
    """The smallest set of most probable tokens with mass of at least top_p, renormalised."""
    kept = np.zeros_like(probs)
    for token in np.argsort(-probs):
        if kept.sum() >= top_p:
            break
        kept[token] = probs[token]
    return kept / kept.sum()


@pytest.mark.parametrize("vocab", [1, 2, 5, 37, 64, 1000])
def test_frequencies_follow_the_weights(vocab):
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


@pytest.mark.parametrize("top_p", [1e-6, 0.3, 0.62, 0.9, 0.999])
def test_nucleus_equals_sorting(top_p):
    logits = np.random.default_rng(0).normal(size=(6, 200)).astype(np.float32) * 3
    kept = np.exp(log_law(logits, 1.3, top_p))
    for row, found in zip(logits, kept, strict=True):
        probs = np.exp(row.astype(np.float64) / 1.3)
        np.testing.assert_allclose(found, nucleus_by_sorting(probs / probs.sum(), top_p), atol=1e-6)


def test_nucleus_keeps_ties_and_the_whole_mass():
    logits = jnp.asarray([[1.0, 1.0, 1.0, -2.0], [0.0, -np.inf, 0.0, -np.inf]])
    kept = np.isfinite(np.asarray(truncate_top_p(logits, 0.5)))
    assert kept.tolist() == [[True, True, True, False], [True, False, True, False]]
    assert np.isfinite(np.asarray(truncate_top_p(logits[:1], 1.0))).all()


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_draws_follow_the_recorded_law(top_p):
    logits = np.random.default_rng(5).normal(size=12).astype(np.float32) * 2
    sampling = Sampling.of(0.7, top_p)
    token_B, logprob_B = sampling.draw(jnp.broadcast_to(logits, (DRAWS, 12)), keys(DRAWS))
    law = log_law(logits, 0.7, top_p)
    np.testing.assert_allclose(logprob_B, law[np.asarray(token_B)], atol=1e-5)
    expected = np.exp(law)
    found = np.bincount(np.asarray(token_B), minlength=12) / DRAWS
    assert np.all(np.abs(found - expected) <= 5 * np.sqrt(expected / DRAWS) + 1e-9)
    assert (expected == 0).any() == (top_p < 1.0)


def test_greedy_takes_the_first_largest_and_reports_the_plain_log_probability():
    logits = jnp.asarray([[0.0, 3.0, 3.0], [5.0, 1.0, 2.0]])
    token_B, logprob_B = Sampling.of(0.0, 0.5).draw(logits, keys(2))
    assert token_B.tolist() == [1, 0]
    np.testing.assert_allclose(logprob_B, jax.nn.log_softmax(logits)[jnp.arange(2), token_B])


def test_a_rows_draw_depends_on_its_key_alone():
    logits = jax.random.normal(jax.random.key(0), (9, 70))
    sampling = Sampling.of(1.0, 1.0)
    alone = [sampling.draw(logits[i : i + 1], keys(9)[i : i + 1])[0][0] for i in range(9)]
    assert sampling.draw(logits, keys(9))[0].tolist() == [int(token) for token in alone]


@pytest.mark.parametrize(
    "settings",
    [
        {"top_k": 5},
        {"top_k": 1},
        {"top_k": 1000},
        {"min_p": 0.1},
        {"min_p": 1.0},
        {"top_k": 20, "top_p": 0.8},
        {"top_p": 0.9, "min_p": 0.05},
        {"top_k": 30, "top_p": 0.7, "min_p": 0.2},
    ],
)
def test_the_law_is_hugging_faces(settings):
    """Each truncation, and all in their order, against the warpers of `generate`."""
    torch = pytest.importorskip("torch")
    from transformers.generation import logits_process

    logits = np.random.default_rng(3).normal(size=(8, 300)).astype(np.float32) * 3
    warpers = {
        "top_k": logits_process.TopKLogitsWarper,
        "top_p": logits_process.TopPLogitsWarper,
        "min_p": logits_process.MinPLogitsWarper,
    }
    scores = logits_process.TemperatureLogitsWarper(0.7)(None, torch.tensor(logits))
    for name, warper in warpers.items():
        if name in settings:
            scores = warper(settings[name])(None, scores)
    found = log_law(logits, 0.7, **settings)
    wanted = torch.log_softmax(scores, -1).numpy()
    np.testing.assert_array_equal(np.isfinite(found), np.isfinite(wanted))
    np.testing.assert_allclose(np.exp(found), np.exp(wanted), atol=1e-6)


def test_top_k_keeps_ties():
    logits = jnp.asarray([[3.0, 1.0, 1.0, 0.0]])
    kept = [int(np.isfinite(truncate_top_k(logits, k)).sum()) for k in (1, 2, 3, 4)]
    assert kept == [1, 3, 3, 4]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p"),
        ({"temperature": 1.0, "top_k": -1}, "top_k"),
        ({"temperature": 1.0, "min_p": 1.5}, "min_p"),
        ({"temperature": 1.0, "min_p": float("nan")}, "min_p"),
    ],
)
def test_settings_are_checked(settings, named):
    with pytest.raises(ValueError, match=f"^{named} is"):
        Sampling.of(**settings)


def test_weights_that_are_no_numbers_draw_a_token_of_the_vocabulary():
    keys_B = jax.random.split(jax.random.key(0), 50)
    drawn_B = draw_by_weight(jnp.full((50, 61), jnp.nan), keys_B)
    assert 0 <= int(drawn_B.min()) <= int(drawn_B.max()) < 61
