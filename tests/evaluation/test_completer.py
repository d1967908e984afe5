"""Going on from forced prefixes."""

import dataclasses

import jax
import numpy as np
import pytest

import jexit
from jexit.config import TINY_CALIBRATED_PATH, EngineSize
from jexit.data.loader import encode_problems
from jexit.evaluation.completer import ModelCompleter
from jexit.evaluation.decoder import Decoder
from jexit.io.model_dir import load
from jexit.steps.state import split_model
from jexit.tasks import Problem
from tolerances import LOGPROBS


def completer_of(path):
    model, tokenizer = load(path)
    split = split_model(model, full=False)
    decoder = Decoder(
        parts=split.decodable(split.trainable), layers=model.arch.layers, tokenizer=tokenizer,
        size=EngineSize(), temperature=0.0, max_new_tokens=40, seed=0,
    )  # fmt: skip
    return ModelCompleter(decoder, "threshold:0.3", model.arch.max_positions)


@pytest.fixture(scope="module")
def completer():
    """The shipped model, whose text gives its tokens again."""
    return completer_of(TINY_CALIBRATED_PATH)


class Thinks:
    """A tokenizer whose prompts end in `<think>`."""

    def __init__(self, tokenizer):
        self._tokenizer = tokenizer

    def __getattr__(self, name):
        return getattr(self._tokenizer, name)

    def completion_text(self, ids):
        return "<think>\n" + self._tokenizer.decode(ids)


def test_a_completer_goes_on_as_decoding_would_have(completer):
    """From a completion's own first tokens on come its last ones, at the same depths."""
    decoder, tokenizer = completer.decoder, completer.decoder.tokenizer
    problems = [Problem(prompt=text, answer="") for text in ("sum 3729518", "sum by 3 48151")]
    policy = decoder.policy("threshold:0.3")
    whole, _ = decoder.decode(encode_problems(tokenizer, problems), policy, what="whole")
    begun = [tokenizer.decode(attempt.ids[:5]) for attempt in whole]
    replies = completer.complete(problems, begun, answer_only=False)
    assert len({depth for attempt in whole for depth in attempt.depths}) > 1
    for reply, attempt, text in zip(replies, whole, begun, strict=True):
        assert tokenizer.encode(text) == attempt.ids[:5]
        assert (text + reply.text).startswith(attempt.text)
        assert reply.depths[: len(attempt.ids) - 5] == attempt.depths[5:]
    # What the prompt has opened is not written again.
    thinks = dataclasses.replace(decoder, tokenizer=Thinks(tokenizer))
    thinking = dataclasses.replace(completer, decoder=thinks)
    assert (thinking.opening, completer.opening) == ("<think>\n", "")
    opened = ["<think>\n" + text for text in begun]
    assert thinking.complete(problems, opened, answer_only=False) == replies


def test_log_likelihoods_are_those_of_the_forward_pass(completer):
    """Of answers alone, after a prompt and a chain; of several problems as of each."""
    tokenizer = completer.decoder.tokenizer
    full = dataclasses.replace(completer, policy="full")
    problems = [Problem(prompt=text, answer="") for text in ("sum 3729518", "sum 481")]
    chains, answers = ["+029518####", "####"], ["5", "13"]
    found = full.log_likelihoods(problems, chains, answers)
    model, _ = load(TINY_CALIBRATED_PATH)
    for problem, chain, answer, value in zip(problems, chains, answers, found, strict=True):
        before = encode_problems(tokenizer, [problem])[0] + tokenizer.encode(chain)
        ids = before + tokenizer.encode(answer)
        logprob_TV = jax.nn.log_softmax(jexit.forward(model, [ids]).logits_BTV[0])
        wanted = sum(logprob_TV[at - 1, ids[at]] for at in range(len(before), len(ids)))
        np.testing.assert_allclose(value, wanted, rtol=0, atol=LOGPROBS)
    sampled = dataclasses.replace(completer, policy="sample")
    together = sampled.log_likelihoods(problems, chains, answers)
    alone = [
        sampled.log_likelihoods([problem], [chain], [answer])[0]
        for problem, chain, answer in zip(problems, chains, answers, strict=True)
    ]
    np.testing.assert_allclose(together, alone, rtol=0, atol=LOGPROBS)
    assert abs(together[0] - found[0]) > 100 * LOGPROBS
    tight = dataclasses.replace(full, positions=len(ids))
    none, second = tight.log_likelihoods(problems, chains, answers)
    assert none is None
    assert second == pytest.approx(found[1], abs=LOGPROBS)


@pytest.mark.slow
def test_replies_are_as_long_as_the_positions_that_are_left_allow(model_dir):
    """Prompts that differ in their room: whole, cut off, and none."""
    completer = completer_of(model_dir)
    tokenizer = completer.decoder.tokenizer
    problem = Problem(prompt="sum 3729518", answer="5")
    (asked,) = encode_problems(tokenizer, [problem])
    begun = ["", "3" * 200, "3" * 60]
    assert [len(ids) for ids in tokenizer.encode_batch(begun)] == [0, 200, 60]
    tight = dataclasses.replace(completer, policy="full", positions=len(asked) + 60 + 20)
    whole, none, cut = tight.complete([problem] * 3, begun, answer_only=False)
    assert none is None
    assert 0 < len(cut.depths) <= 20
    roomy = dataclasses.replace(completer, policy="full")
    there = roomy.complete([problem] * 2, [begun[0], begun[2]], answer_only=False)
    assert whole == there[0]
    assert len(there[1].depths) > 20, "without a limit it should write on"
    assert cut.depths == there[1].depths[: len(cut.depths)]
    assert there[1].text.startswith(cut.text)
    answers = tight.complete([problem] * 3, begun, answer_only=True)
    assert [answer is None for answer in answers] == [False, True, False]


def test_filler_has_as_many_tokens(completer):
    encode = completer.decoder.tokenizer.encode
    for text in ("", "+34+7####7", "Tom has 3 apples.\n3+4=7\n"):
        made = completer.filler(text)
        assert len(encode(made)) == len(encode(text))
        assert not any(character.isalnum() for character in made)
