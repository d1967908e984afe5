"""`generate`: texts in and out, batches, and what lines up with what."""

import sys

import numpy as np
import pytest

from jexit.config import EngineSize
from jexit.loops.compilations import Compilations
from jexit.model.policies import Full, Prescribed, Sample
from jexit.rollout import generate, stream

generate_module = sys.modules["jexit.rollout.generate"]


class Letters:
    """A tokenizer of one id a letter, with a chat format that wraps the message in two marks."""

    eos_ids = frozenset({60, 7})
    pad_id = 60

    def encode_texts(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]

    def encode_prompts(self, texts):
        return [[50, *ids, 51] for ids in self.encode_texts(texts)]

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
def test_sizes_change_nothing(model, chat):
    settings = {"max_new_tokens": 10, "temperature": 1.0, "seed": 3, "chat": chat}
    depth_BT = np.random.default_rng(0).integers(1, 6, (5, 10))
    for policy in (Sample(), Prescribed(depth_BT)):
        whole = generate(model, Letters(), PROMPTS, policy=policy, **settings)
        parts = generate(
            model, Letters(), PROMPTS, policy=policy, size=EngineSize(rows=2), **settings
        )
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


def compilations(model, *calls):
    """What XLA compiles for calls, each a number of prompts and of new tokens."""
    compiled = Compilations()
    with compiled:
        for prompts, new in calls:
            made = generate(
                model, Letters(), (PROMPTS * 9)[:prompts], policy=Sample(), stop=["no such text"],
                max_new_tokens=new, temperature=1.0,
            )  # fmt: skip
            assert len(made.texts) == prompts
            assert max(map(len, made.tokens)) <= new
    return compiled.of_step()["compilations"]


def test_calls_of_like_size_share_their_programs(model):
    compilations(model, (5, 20), (8, 20))  # prompts are prefilled four at a time, or eight
    assert compilations(model, (6, 20), (7, 2), (5, 21), (8, 90)) == 0


@pytest.mark.slow
def test_calls_of_all_sorts_compile_little(model):
    """80 calls of up to 40 prompts and 120 new tokens: ten buckets of prompts, one of tokens."""
    rng = np.random.default_rng(0)
    assert compilations(model, *rng.integers((1, 2), (41, 121), (80, 2)).tolist()) < 80


@pytest.mark.parametrize(
    ("prompts", "settings", "sentence"),
    [
        ([], {}, "no prompts to complete; give"),
        ("abc", {}, "put it in brackets"),
        (["a", ""], {"chat": False}, "prompt 1 is empty; a prompt needs"),
        (["a" * 511], {}, "512 positions; shorten the prompt"),
        (
            ["a"],
            {"max_new_tokens": 0},
            "max_new_tokens is 0; it must be a whole number of at least 1",
        ),
        (["a"], {"temperature": -0.5}, "temperature is -0.5; give 0"),
        (["a"], {"temperature": float("nan")}, "temperature is nan"),
        (["a"], {"top_p": 0.0}, "top_p is 0.0; it is the probability mass"),
        (["a"], {"top_p": 1.5}, "top_p is 1.5"),
        (["a", "b", "c" * 506], {}, "prompt 2 has 508 tokens .* at most 4"),
        (["a", "b"], {"policy": Prescribed(np.ones((1, 10)))}, r"\(1, 10\) for 2 rows of up to 10"),
        (["a"], {"policy": Prescribed(np.ones((1, 9)))}, r"\(1, 9\) for 1 rows of up to 10"),
        (["a"], {"policy": Prescribed(np.ones(10))}, r"\(10,\) for 1 rows"),
    ],
)
def test_wrong_inputs_get_one_sentence(model, prompts, settings, sentence):
    with pytest.raises(ValueError, match=sentence) as error:
        generate(model, Letters(), prompts, **{"max_new_tokens": 10} | settings)
    assert "\n" not in str(error.value)


def spelled(ids):
    return "".join(chr(ord("a") + i % 26) for i in ids if i not in Letters.eos_ids)


class Spelling(Letters):
    """Decodes to one letter a token, so that stop strings cross tokens."""

    def decode(self, ids):
        return spelled(ids)


SETTINGS = {"max_new_tokens": 40, "temperature": 1.0, "seed": 5}


@pytest.mark.parametrize("size", [EngineSize(), EngineSize(rows=2, places=1)])
def test_stop_strings_end_a_completion(model, size, monkeypatch):
    """At the token that completes the first of them, whenever it is looked for."""
    free = generate(model, Spelling(), PROMPTS, policy=Sample(), **SETTINGS)
    stop = [free.texts[0][4:7], free.texts[1][9:11], free.texts[1][20:22]]
    for every in (1, 16):
        monkeypatch.setattr(generate_module, "STOP_EVERY", every)
        made = generate(
            model, Spelling(), PROMPTS, policy=Sample(), stop=stop, size=size, **SETTINGS
        )
        for row, whole in enumerate(free.texts):
            at = min((whole.find(s) for s in stop if s in whole), default=len(whole))
            assert made.texts[row] == whole[:at]
            ends = [whole.find(s) + len(s) for s in stop if s in whole]
            if not ends:
                assert made.tokens[row] == free.tokens[row]
                continue
            assert spelled(made.tokens[row]) == whole[: min(ends)]
            assert not made.truncated[row]
            length = len(made.tokens[row])
            assert len(made.depths[row]) == len(made.logprobs[row]) == length
            assert made.depths[row] == free.depths[row][:length]
        assert len(made.tokens[0]) <= 7


@pytest.mark.parametrize("size", [EngineSize(), EngineSize(rows=1, places=1)])
def test_a_stop_string_in_the_token_of_the_prefill(model, size):
    """Completions end there whether or not they have a row yet."""
    free = generate(model, Spelling(), PROMPTS, policy=Sample(), **SETTINGS)
    stop = sorted({text[:1] for text in free.texts})
    made = generate(model, Spelling(), PROMPTS, policy=Sample(), stop=stop, size=size, **SETTINGS)
    assert made.texts == [""] * len(PROMPTS)
    assert [spelled(tokens) for tokens in made.tokens] == [text[:1] for text in free.texts]


@pytest.mark.parametrize("every", [1, 5])
@pytest.mark.parametrize("stops", [0, 1, 2])
def test_pieces_make_the_whole(model, every, stops):
    stop = []
    if stops:
        text = generate(model, Spelling(), PROMPTS, policy=Sample(), **SETTINGS).texts[1]
        # One token completes both, and the longer one begins before.
        stop = [text[9:12], text[8:12]][:stops]
    # Of one size, so that the same compiled programs make both: then they agree to the last bit,
    # which XLA does not promise of programs with other shapes.
    settings = {"policy": Sample(), "stop": stop, "size": EngineSize(rows=3, places=2)} | SETTINGS
    whole = generate(model, Spelling(), PROMPTS, **settings)
    pieces = list(stream(model, Spelling(), PROMPTS, every=every, **settings))
    assert len(pieces) > len(PROMPTS)
    for row in range(len(PROMPTS)):
        mine = [piece for piece in pieces if piece.index == row]
        assert "".join(piece.text for piece in mine) == whole.texts[row]
        for name in ("tokens", "depths", "logprobs"):
            joined = [value for piece in mine for value in getattr(piece, name)]
            assert joined == getattr(whole, name)[row]
        assert [piece.finished for piece in mine] == [False] * (len(mine) - 1) + [True]
        if every == 1:
            assert {len(piece.tokens) for piece in mine} == {1}


def test_unfinished_characters_wait(model):
    """A token may hold a part of a character: its text comes when the rest is there."""

    class Bytes(Letters):
        def decode(self, ids):
            raw = b"".join("é".encode()[i % 2 : i % 2 + 1] for i in ids)
            return raw.decode(errors="replace")

    settings = {"max_new_tokens": 12, "temperature": 1.0, "seed": 1}
    whole = generate(model, Bytes(), PROMPTS, **settings)
    pieces = list(stream(model, Bytes(), PROMPTS, every=1, **settings))
    for row in range(len(PROMPTS)):
        assert "".join(p.text for p in pieces if p.index == row) == whole.texts[row]


@pytest.mark.parametrize("stop", ["ab", ["a", ""]])
def test_wrong_stop_strings_are_refused(model, stop):
    with pytest.raises(ValueError, match=r"stop is .* give a list of strings, none of them empty"):
        generate(model, Letters(), ["a"], max_new_tokens=4, stop=stop)
    with pytest.raises(ValueError, match="every is 0"):
        stream(model, Letters(), ["a"], every=0)
