"""`generate`: texts in and out, batches, and what lines up with what."""

import numpy as np
import pytest

from jexit.model.policies import Full, Prescribed, Sample
from jexit.rollout import engine, generate


class Letters:
    """A tokenizer of one id a letter, with a chat format that wraps the message in two marks."""

    eos_ids = frozenset({60, 7})
    pad_id = 60

    def encode_batch(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]

    def encode_prompts(self, texts):
        return [[50, *ids, 51] for ids in self.encode_batch(texts)]

    def decode(self, ids):
        return " ".join(str(i) for i in ids if i not in self.eos_ids)


PROMPTS = ["abc", "defghij", "k", "lmno", "pq"]


def test_lists_line_up(model):
    gen = generate(model, Letters(), PROMPTS, policy=Sample(), max_new_tokens=10, hazards=True)
    for i in range(len(PROMPTS)):
        length = len(gen.tokens[i])
        assert len(gen.depths[i]) == len(gen.logprobs[i]) == len(gen.hazard_logits[i]) == length
        assert gen.depths[i][0] == model.arch.layers
        assert gen.texts[i] == Letters().decode(gen.tokens[i])
        assert gen.truncated[i] == (gen.tokens[i][-1] not in Letters.eos_ids)
        assert isinstance(gen.tokens[i][0], int)
        assert isinstance(gen.logprobs[i][0], float)


@pytest.mark.parametrize("chat", [True, False])
def test_batches_change_nothing(model, chat):
    settings = {"max_new_tokens": 10, "temperature": 1.0, "seed": 3, "chat": chat}
    depth_BT = np.random.default_rng(0).integers(1, 6, (5, 10))
    for policy in (Sample(), Prescribed(depth_BT)):
        whole = generate(model, Letters(), PROMPTS, policy=policy, **settings)
        parts = generate(model, Letters(), PROMPTS, policy=policy, batch_size=2, **settings)
        assert whole.tokens == parts.tokens
        assert whole.depths == parts.depths
        assert len(parts.texts) == 5


def test_chat_and_seed_matter(model):
    def texts(**settings):
        return generate(model, Letters(), PROMPTS, max_new_tokens=10, **settings).texts

    assert texts() == texts(seed=1), "greedy by default"
    assert texts() != texts(chat=False)
    assert texts(temperature=1.0, seed=0) != texts(temperature=1.0, seed=1)
    assert texts(policy=Full()) == texts()


def test_every_prompt_is_checked_before_the_first_runs(model, monkeypatch):
    monkeypatch.setattr(engine, "rollout", None)
    with pytest.raises(ValueError, match=r"prompt 2 has 508 tokens .* at most 4"):
        generate(model, Letters(), ["a", "b", "c" * 506], max_new_tokens=10, batch_size=1)


@pytest.mark.parametrize(
    ("prompts", "settings", "sentence"),
    [
        ([], {}, "no prompts to complete; give"),
        ("abc", {}, "put it in brackets"),
        (["a", ""], {"chat": False}, "prompt 1 is empty; a prompt needs"),
        (["a" * 511], {}, "512 positions; shorten the prompt"),
        (["a"], {"max_new_tokens": 0}, "max_new_tokens is 0; it must be at least 1"),
        (["a"], {"temperature": -0.5}, "temperature is -0.5; it must be 0"),
        (["a"], {"temperature": float("nan")}, "temperature is nan"),
        (["a"], {"top_p": 0.0}, "top_p is 0.0; it is the probability mass"),
        (["a"], {"top_p": 1.5}, "top_p is 1.5"),
        (["a"], {"batch_size": 0}, "batch_size is 0; it must be at least 1"),
        (["a", "b"], {"policy": Prescribed(np.ones((1, 10)))}, r"\(1, 10\) for 2 rows of up to 10"),
        (["a"], {"policy": Prescribed(np.ones((1, 9)))}, r"\(1, 9\) for 1 rows of up to 10"),
        (["a"], {"policy": Prescribed(np.ones(10))}, r"\(10,\) for 1 rows"),
    ],
)
def test_wrong_inputs_get_one_sentence(model, prompts, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        generate(model, Letters(), prompts, **{"max_new_tokens": 10} | settings)
    assert "\n" not in str(error.value)
