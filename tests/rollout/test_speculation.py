"""Self-speculative decoding: what all layers decode, drafted by an exit."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

import jexit
from jexit.model.policies import Full, Speculate
from jexit.rollout import Request, rollout
from jexit.rollout.speculation import DRAFT, Speculation, accepted
from jexit.tasks import make_task
from tolerances import LOGPROBS

SETTINGS = {"eos_ids": (60,), "pad_id": 59}


def decoded(model, **settings):
    """Each completion's (tokens, log-probabilities), and the share that was accepted."""
    speculation = Speculation(model, Request(**SETTINGS | settings))
    made = [([], []) for _ in settings["prompts"]]
    while not speculation.ended:
        for added in speculation.turn():
            made[added.ticket][0].extend(added.tokens)
            made[added.ticket][1].extend(added.logprobs)
    return made, speculation


@pytest.mark.parametrize("layer", [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2)), 4])
@pytest.mark.parametrize("adapters", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_greedy_text_and_log_probabilities_are_those_of_all_layers(model, prompts, layer, adapters):
    settings = {"prompts": prompts, "max_new_tokens": 23, "temperature": 0.0, "key": 0}
    full = rollout(model, **SETTINGS | settings, adapters=adapters)
    made, speculation = decoded(model, **settings, adapters=adapters, policy=Speculate(layer))
    for row, (tokens, logprobs) in enumerate(made):
        assert tokens == full.completion(row)
        wanted = full.logprobs_BT[row, : len(tokens)]
        np.testing.assert_allclose(logprobs, wanted, 0, LOGPROBS)
    assert speculation.accepted < speculation.drafted
    assert speculation.accepted > 0 or layer < 4  # the exits of a random model say little


def test_samples_have_the_distribution_of_all_layers(model, prompts):
    """Frequencies of all triples of tokens, against their probabilities by enumeration."""
    count, settings = 3_000, {"temperature": 1.7, "top_k": 3, "max_new_tokens": 3}
    prompt = prompts[1]
    asked = {"prompts": [prompt] * count, "key": 11, "policy": Speculate(2), "eos_ids": ()}
    made, _ = decoded(model, **asked, **settings)
    found = [tuple(tokens) for tokens, _ in made]

    def kept(tokens):
        """The three likely next tokens after the prompt and `tokens`, with their probabilities."""
        whole = jnp.asarray([[*prompt, *tokens]])
        logits_V = np.asarray(jexit.forward(model, whole).logits_BTV[0, -1], np.float64) / 1.7
        best = np.argsort(logits_V)[-3:]
        weights = np.exp(logits_V[best] - logits_V[best].max())
        return dict(zip(best.tolist(), weights / weights.sum(), strict=True))

    wanted = {}
    for first, p1 in kept(()).items():
        for second, p2 in kept((first,)).items():
            for third, p3 in kept((first, second)).items():
                wanted[first, second, third] = p1 * p2 * p3
    assert set(found) <= set(wanted) and sum(wanted.values()) == pytest.approx(1.0)
    observed = np.asarray([found.count(triple) for triple in wanted])
    expected = count * np.asarray(list(wanted.values()))
    few = expected < 5  # merged: the test needs five of each
    if few.any():
        observed = np.append(observed[~few], observed[few].sum())
        expected = np.append(expected[~few], expected[few].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3
    for tokens, logprobs in made[:20]:
        for place, logprob in enumerate(logprobs):
            p = kept(tokens[:place])[tokens[place]]
            assert logprob == pytest.approx(np.log(p), abs=LOGPROBS)


def test_acceptance_by_hand():
    """Two drafts: the token after them has the distribution p, whatever q is."""
    p = jnp.asarray([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.2, 0.6]])
    q = jnp.asarray([[0.1, 0.6, 0.3], [0.8, 0.1, 0.1]])
    keys = jax.random.split(jax.random.key(0), 20_000)
    totals = np.zeros(3)
    for draft in itertools.product(range(3), repeat=2):
        chance = float(q[0, draft[0]] * q[1, draft[1]])
        shape = (len(keys), 1, 1)
        counts, rest = accepted(
            jnp.tile(p, shape), jnp.tile(q, shape), jnp.tile(jnp.asarray(draft), shape[:2]), keys
        )
        first = float(jnp.minimum(p[0, draft[0]] / q[0, draft[0]], 1.0))
        assert float(jnp.mean(counts > 0)) == pytest.approx(first, abs=0.02)
        for count, weights in zip(np.asarray(counts), np.asarray(rest), strict=True):
            share = chance / len(keys)
            totals += share * (np.eye(3)[draft[0]] if count else weights / weights.sum())
    np.testing.assert_allclose(totals, p[0], atol=0.01)


@pytest.mark.slow
def test_fifty_prompts_of_the_shipped_model():
    """Also streamed, with stop strings, a limit, and residuals."""
    model, tokenizer = jexit.load("jexit/assets/tiny-calibrated")
    tasks = make_task("sums"), make_task("word_problems")
    prompts = [tasks[i % 2].problem("test", i).prompt for i in range(50)]
    settings = {"max_new_tokens": 18, "stop": ["####", "\n\n"]}
    full = jexit.generate(model, tokenizer, prompts, **settings)
    assert full.acceptance is None and any(full.truncated) and not all(full.truncated)
    made = jexit.generate(
        model, tokenizer, prompts, policy="speculate:4", residuals=(8,), **settings
    )
    for name in ("texts", "tokens", "depths", "truncated"):
        assert getattr(made, name) == getattr(full, name), name
    assert 0.2 < made.acceptance <= 1.0
    assert [len(rows) for rows in made.residuals] == [len(tokens) for tokens in made.tokens]
    pieces = list(jexit.stream(model, tokenizer, prompts, policy=Speculate(4), **settings))
    for row, text in enumerate(made.texts):
        mine = [piece for piece in pieces if piece.index == row]
        assert "".join(piece.text for piece in mine) == text
        assert [token for piece in mine for token in piece.tokens] == made.tokens[row]
        assert [piece.finished for piece in mine].index(True) == len(mine) - 1
        assert max(len(piece.tokens) for piece in mine) <= DRAFT + 1


def test_elsewhere_it_is_full_depth(model, prompts):
    tokens_BT = jnp.asarray([prompts[1]])
    one, other = (jexit.forward(model, tokens_BT, policy=p) for p in (Full(), Speculate(2)))
    np.testing.assert_array_equal(one.logits_BTV, other.logits_BTV)
    settings = {"prompts": prompts, "max_new_tokens": 9, "temperature": 0.7, "key": 5}
    rows = [
        rollout(model, **SETTINGS | settings, policy=p).tokens_BT for p in (Full(), Speculate(2))
    ]
    np.testing.assert_array_equal(*rows)


def test_what_it_cannot_do_is_refused(model, prompts):
    base = {"prompts": prompts, "max_new_tokens": 4, "key": 0, **SETTINGS}
    for changed, said in [
        ({"policy": Speculate(3)}, "Speculate has layer 3, but tokens can be drafted only at the"),
        ({"policy": Speculate(5)}, r"the exits \(1, 2, 4\); give one of these"),
        ({"hazards": True}, "sets hazards=True, but the policy Speculate does not"),
        ({"samples_per_prompt": 2}, "sets samples_per_prompt=2"),
    ]:
        with pytest.raises(ValueError, match=said):
            Speculation(model, Request(**base | {"policy": Speculate(2)} | changed))
    tiny, tokenizer = jexit.load("jexit/assets/tiny-calibrated")
    for name, said in [("speculate", "speculate:N or fixed:N"), ("speculate:5", "has layer 5")]:
        with pytest.raises(ValueError, match=said):
            jexit.generate(tiny, tokenizer, ["sum 1"], policy=name)
