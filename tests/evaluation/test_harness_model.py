"""The model that lm-evaluation-harness sees, against the harness's own for transformers."""

import types

import numpy as np
import pytest

pytest.importorskip("lm_eval", reason="lm-eval is not installed; it comes with the extra eval")

from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

import jexit
from chat_templates import OPENED, SWITCHED, with_template
from jexit.evaluation.harness_model import JexitLM
from jexit.model.policies import Threshold
from jexit.rollout import generate
from small_runs import small_model
from tolerances import LOGITS, LOGPROBS

PAIRS = [
    ("abc def", " gh"),
    ("the cat", " sat on"),
    ("", "hello there"),
    ("a ", "b"),
    ("some words that go on for longer than the others do", " x1"),
    ("0 1 2", "3 4"),
]
TEXTS = ["abc", "a text that is longer than one window of forty eight positions " * 2, "x" * 120]


def requests(kind, arguments):
    return [
        Instance(request_type=kind, doc={}, arguments=entry, idx=index)
        for index, entry in enumerate(arguments)
    ]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The harness's model for transformers, and ours, on the same weights and tokenizer.

    Llama's tokenizer puts a begin token before texts, Qwen's does not.
    """
    torch = pytest.importorskip("torch")
    hf_models = pytest.importorskip("hf_models")
    huggingface = pytest.importorskip("lm_eval.models.huggingface")
    path = hf_models.save(tmp_path_factory.mktemp("hf"), hf_models.make_model("llama"))
    theirs = huggingface.HFLM(
        pretrained=str(path), device="cpu", dtype=torch.float32, batch_size=2, max_length=48
    )
    return theirs, JexitLM(str(path), dtype="float32", max_length=48, batch_size=4)


@pytest.fixture(scope="module")
def small():
    tokenizer = with_template(SWITCHED)
    model = small_model(tokenizer.vocab_size)
    model.embed.embedding[...] *= 2.0
    return model, tokenizer


def scores(lm, pairs=PAIRS):
    return lm.loglikelihood(requests("loglikelihood", pairs), disable_tqdm=True)


def test_log_likelihoods_are_those_of_transformers(both, monkeypatch):
    theirs, ours = both
    pairs = [*PAIRS, ("abcdefgh " * 12, "and more")]  # the last is cut from the left
    for (expected, greedy), (found, flag) in zip(
        scores(theirs, pairs), scores(ours, pairs), strict=True
    ):
        assert found == pytest.approx(expected, abs=10 * LOGITS)
        assert flag == greedy
    # Every token after one context: a single one is greedy.
    every = [(None, ours.tok_encode("abc def"), [token]) for token in range(67)]
    expected, found = (lm._loglikelihood_tokens(every, disable_tqdm=True) for lm in both)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert sum(greedy for _, greedy in found) == 1
    np.testing.assert_allclose([t for t, _ in found], [t for t, _ in expected], atol=LOGITS)

    # The harness gives a text that it has put a begin token before another one as its context.
    monkeypatch.setattr(theirs, "add_bos_token", False)
    arguments = requests("loglikelihood_rolling", [(text,) for text in TEXTS])
    assert [len(ours.tok_encode(text)) > 96 for text in TEXTS] == [False, True, True]  # windows
    expected, found = (lm.loglikelihood_rolling(arguments, True) for lm in both)
    np.testing.assert_allclose(found, expected, atol=20 * LOGITS)


def test_ids_and_greedy_texts_are_those_of_transformers(both):
    theirs, ours = both
    chat = [{"role": "user", "content": "abc"}]
    for text in ("abc def", theirs.apply_chat_template(chat), ours.apply_chat_template(chat)):
        for added in ({}, {"add_special_tokens": False}):
            assert ours.tok_encode(text, **added) == theirs.tok_encode(text, **added)
    settings = {"until": ["e", "7", "q", " "], "max_gen_toks": 12, "temperature": 0.0}
    asked = [
        ("0 1 2", settings),
        ("abc def", {"until": ["zz"], "max_gen_toks": 12}),
        ("words " * 30, {"until": ["zz"], "max_gen_toks": 12}),  # cut from the left
        ("x", settings),
    ]
    # Results come in the order of requests, whichever are decoded together.
    expected, found = (lm.generate_until(requests("generate_until", asked), True) for lm in both)
    assert found == expected and len(set(found)) == len(found)


def test_generated_texts_are_generates_and_scored_as_recorded(small):
    model, tokenizer = small
    prompts = ["sum 12", "Tom has", "1+2"]
    lm = JexitLM(model, tokenizer, policy="threshold:0.3")
    asked = [(text, {"until": [], "max_gen_toks": 8}) for text in prompts]
    texts = lm.generate_until(requests("generate_until", asked), disable_tqdm=True)
    made = generate(model, tokenizer, prompts, policy=Threshold(0.3), max_new_tokens=8, chat=False)
    assert texts == made.texts
    depth, tokens = sum(map(sum, made.depths)), sum(map(len, made.depths))
    info = lm.get_model_info()
    assert (info["policy"], info["tokens"]) == ("threshold:0.3", tokens)
    assert info["depth_mean"] == pytest.approx(depth / tokens)
    assert info["depth_fraction"] == pytest.approx(depth / tokens / 3)
    # The log-likelihood of what was generated is what was recorded.
    pairs = [
        (None, tokenizer.encode(text), ids) for text, ids in zip(prompts, made.tokens, strict=True)
    ]
    scored = lm._loglikelihood_tokens(pairs, disable_tqdm=True)
    for (total, greedy), logprobs in zip(scored, made.logprobs, strict=True):
        assert total == pytest.approx(sum(logprobs), abs=10 * LOGPROBS)
        assert greedy


@pytest.mark.slow
def test_policies_and_seeds_matter(small):
    def totals(**settings):
        return [total for total, _ in scores(JexitLM(*small, **settings))]

    full = totals()
    assert np.abs(np.array(totals(policy="fixed:1")) - full).max() > 0.01
    assert totals(policy="fixed:3") == pytest.approx(full, abs=LOGPROBS)
    sampled = totals(policy="sample", seed=1)
    other = totals(policy="sample", seed=1, batch_size=2)
    assert sampled == pytest.approx(other, abs=LOGPROBS)
    assert sampled != totals(policy="sample", seed=2)
    # Sharp hazards leave where they exceed a half, and a floor near 1 leaves everywhere.
    sharp = totals(policy="sample", hazard_temperature=1e-3)
    assert sharp == pytest.approx(totals(policy="threshold:0.5"), abs=LOGPROBS) != full
    first = totals(policy="sample", min_hazard=0.999999)
    assert first == pytest.approx(totals(policy="fixed:1"), abs=LOGPROBS)


def texts(small, settings, **options):
    """What is generated six times after one prompt."""
    lm = JexitLM(*small, **options)
    asked = [("sum 12", {"until": [], "max_gen_toks": 12, **settings})] * 6
    return lm.generate_until(requests("generate_until", asked), disable_tqdm=True)


@pytest.mark.slow
def test_sampled_tokens_follow_the_request(small):
    greedy = texts(small, {})
    assert len(set(greedy)) == 1
    assert texts(small, {"do_sample": False, "temperature": 1.0}) == greedy
    sampled = texts(small, {"temperature": 1.0})
    assert len(set(sampled)) > 1
    assert sampled == texts(small, {"do_sample": True})
    assert sampled != texts(small, {"temperature": 1.0}, seed=1)
    assert len(set(texts(small, {"temperature": 1.0, "top_k": 1}))) == 1
    # Settings that ask for nothing change nothing.
    nothing = {
        "num_beams": 1, "repetition_penalty": 1.0, "length_penalty": 1, "min_length": 0, "n": 1,
        "early_stopping": False, "use_cache": True, "presence_penalty": 0, "min_p": 0.0,
        "bad_words_ids": None, "thinking_budget": None, "top_k": None, "top_p": 1.0,
    }  # fmt: skip
    assert texts(small, {"temperature": 1.0, **nothing}) == sampled


def test_the_answer_is_what_follows_the_thought(small, monkeypatch):
    """Stop strings hold for it alone."""
    for context, made, answer in (
        ("sum 12", "one. two\n</think>\n\nseven. eight", "seven"),
        ("sum 12", "<think>\none. two", ""),
        ("sum 12<think>\n", "one. two", ""),
        ("sum 12<think>\n", "one. two\n</think>\n\nseven. eight", "seven"),
        ("sum 12", "seven. eight", "seven"),
    ):

        def stand_in(*args, stop, text=made, **settings):
            assert stop == (), "a thought may hold stop strings"
            return types.SimpleNamespace(texts=[text], depths=[[3]])

        monkeypatch.setattr("jexit.evaluation.harness_model.generate", stand_in)
        lm = JexitLM(*small, think_end_token="</think>", max_gen_toks=16)
        asked = requests("generate_until", [(context, {"until": ["."]})])
        assert lm.generate_until(asked, disable_tqdm=True) == [answer]


def test_chat_format_and_thinking(small):
    model, tokenizer = small
    history = [{"role": "user", "content": "sum 12"}]
    lm = JexitLM(model, with_template(SWITCHED), thinking="off")
    assert lm.apply_chat_template(history).endswith("<think>\n\n</think>\n\n")
    assert JexitLM(model, with_template(SWITCHED)).apply_chat_template(history) == (
        "<|user|>sum 12<|assistant|>"
    )
    opened = [*history, {"role": "assistant", "content": "+3"}]
    assert JexitLM(model, tokenizer).apply_chat_template(opened, False).endswith("<|assistant|>+3")
    assert lm.chat_template(True) == SWITCHED
    assert lm.tokenizer_name != JexitLM(model, with_template(SWITCHED)).tokenizer_name
    with pytest.raises(ValueError, match="has no switch"):
        JexitLM(model, with_template(OPENED), thinking="off")
    with pytest.raises(ValueError, match="has no chat template; omit --apply_chat_template"):
        JexitLM(model, with_template(None)).apply_chat_template(history)


def test_the_harness_knows_it_by_name():
    assert get_model("jexit") is JexitLM
    path = jexit.__path__[0] + "/assets/tiny-calibrated"
    lm = JexitLM.create_from_arg_string(
        f"pretrained={path},policy=threshold:0.5,seed=3", {"batch_size": "auto", "device": None}
    )
    assert (lm.policy, lm.seed, lm.batch_size, lm.max_length) == ("threshold:0.5", 3, 16, 1024)


def test_what_cannot_be_done_is_refused(small):
    for settings, sentence in (
        ({"policy": "fixed:4"}, "Fixed has depth 4, but a token of this model leaves at"),
        ({"policy": "shuffled"}, "policy 'shuffled' is not known"),
        ({"policy": "confidence:0.9"}, "policy 'confidence:0.9' is not known"),
        ({"device": "cuda:0"}, "JAX chooses its devices itself; omit device"),
        ({"max_length": 999}, "at most 256, the number of the model's positions"),
        ({"tokenizer": None}, "a model object was given without a tokenizer"),
    ):
        with pytest.raises(ValueError, match=sentence):
            JexitLM(small[0], **{"tokenizer": small[1]} | settings)
    for settings, sentence in (
        (
            {"max_gen_toks": 256},
            "no room for a context in .* 256 positions; lower it to at most 255",
        ),
        ({"num_beams": 4}, "sets 'num_beams' to 4 for generation, .* except as 1; override"),
        ({"bad_words_ids": [[3]]}, r"'bad_words_ids' to \[\[3\]\] for generation, which jexit"),
        ({"use_cache": True, "early_stopping": True}, "'early_stopping' to True for generation"),
    ):
        with pytest.raises(ValueError, match=sentence):
            texts(small, settings)
