"""`generate` and `stream`: texts in and out, stop strings, and what lines up with what."""

import pytest

from jexit.loops.compilations import Compilations
from jexit.model.policies import Full, Sample, Threshold
from jexit.rollout import EngineSize, generate, rollout, stream, texts


class Letters:
    """A tokenizer of one id a letter, with a chat format that wraps the message in two marks."""

    eos_ids = frozenset({60, 7})
    pad_id = 60

    def encode_texts(self, texts):
        return [[ord(letter) - ord("a") for letter in text] for text in texts]

    def encode_prompts(self, texts):
        return [[50, *ids, 51] for ids in self.encode_texts(texts)]

    def decode(self, ids):
        """One letter a token, so that stop strings cross tokens."""
        return "".join(chr(ord("a") + i % 26) for i in ids if i not in self.eos_ids)


PROMPTS = ["abc", "defghij", "k", "lmno", "pq"]
SMALL = EngineSize(rows=3, tick_rows=2)
SETTINGS = {
    "policy": Sample(), "max_new_tokens": 40, "temperature": 1.0, "seed": 5, "size": SMALL
}  # fmt: skip


@pytest.fixture(scope="module")
def free(model):
    """Completions without stop strings."""
    return generate(model, Letters(), PROMPTS, hazards=True, **SETTINGS)


def test_lists_line_up_and_settings_count(model, free):
    for i in range(len(PROMPTS)):
        length = len(free.tokens[i])
        assert len(free.depths[i]) == len(free.logprobs[i]) == len(free.hazard_logits[i]) == length
        assert free.depths[i][0] == model.arch.layers
        assert free.texts[i] == Letters().decode(free.tokens[i])
        assert free.truncated[i] == (free.tokens[i][-1] not in Letters.eos_ids)
        assert isinstance(free.tokens[i][0], int) and isinstance(free.logprobs[i][0], float)

    def made(**settings):
        return generate(model, Letters(), PROMPTS, **SETTINGS | settings).texts

    assert made(seed=6) != free.texts
    assert made(chat=False) != free.texts
    greedy = generate(model, Letters(), PROMPTS, max_new_tokens=40, size=SMALL).texts
    assert greedy == made(seed=6, policy=Full(), temperature=0.0)


def test_what_generate_is_given_is_what_the_engine_decodes_with(model):
    """Truncated sampling, in rows of their own; the base model without its adapters."""
    asked = {"policy": Sample(1.5, 0.1), "max_new_tokens": 12, "temperature": 1.5}
    prompts = Letters().encode_prompts(PROMPTS)
    for settings in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.3}, {"adapters": False}):
        made = generate(model, Letters(), PROMPTS, seed=5, size=SMALL, **asked, **settings)
        wanted = rollout(
            model, prompts, key=5, size=SMALL, eos_ids=Letters.eos_ids, pad_id=60, **asked,
            **settings,
        )  # fmt: skip
        for row, length in enumerate(wanted.lengths_B):
            assert made.tokens[row] == wanted.completion(row), settings
            assert made.depths[row] == wanted.depths_BT[row, :length].tolist()
            assert made.logprobs[row] == wanted.logprobs_BT[row, :length].tolist()
            assert made.depth_logprobs[row] == wanted.depth_logprobs_BT[row, :length].tolist()
    greedy = generate(model, Letters(), PROMPTS, max_new_tokens=12, size=SMALL)
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        hot = {"temperature": 2.0, "max_new_tokens": 12, "size": SMALL}
        assert generate(model, Letters(), PROMPTS, **hot, **settings).tokens == greedy.tokens
    base = generate(model, Letters(), PROMPTS, max_new_tokens=12, size=SMALL, adapters=False)
    assert base.tokens != greedy.tokens


@pytest.mark.slow
def test_calls_of_like_size_share_their_programs(model):
    compiled = Compilations()
    # Prompts are prefilled four at a time, or eight.
    for prompts, new in ((5, 20), (8, 20), (6, 20), (7, 2), (5, 21), (8, 90)):
        with compiled:
            made = generate(
                model, Letters(), (PROMPTS * 2)[:prompts], policy=Sample(), stop=["no such text"],
                max_new_tokens=new, temperature=1.0,
            )  # fmt: skip
        assert len(made.texts) == prompts and max(map(len, made.tokens)) <= new
        found = compiled.of_step()["compilations"]
        assert found == 0 or (prompts, new) in ((5, 20), (8, 20))


def test_stop_strings_end_a_completion(model, free, monkeypatch):
    """At the token that completes the first of them, whenever it is looked for."""
    stop = [free.texts[0][4:7], free.texts[1][9:11], free.texts[1][20:22]]
    for every in (1, 16):
        monkeypatch.setattr(texts, "STOP_EVERY", every)
        made = generate(model, Letters(), PROMPTS, stop=stop, **SETTINGS)
        for row, whole in enumerate(free.texts):
            at = min((whole.find(s) for s in stop if s in whole), default=len(whole))
            assert made.texts[row] == whole[:at]
            ends = [whole.find(s) + len(s) for s in stop if s in whole]
            if not ends:
                assert made.tokens[row] == free.tokens[row]
                continue
            assert Letters().decode(made.tokens[row]) == whole[: min(ends)]
            assert not made.truncated[row]
            length = len(made.tokens[row])
            assert len(made.depths[row]) == len(made.logprobs[row]) == length
            assert made.depths[row] == free.depths[row][:length]
        assert len(made.tokens[0]) <= 7
    # In the token of the prefill, whether or not completions have a row yet.
    made = generate(model, Letters(), PROMPTS, stop=sorted({t[:1] for t in free.texts}), **SETTINGS)
    assert made.texts == [""] * len(PROMPTS)
    assert [Letters().decode(t) for t in made.tokens] == [text[:1] for text in free.texts]


def test_pieces_make_the_whole(model, free):
    text = free.texts[1]
    # One token completes both, and the longer one begins before.
    for every, stop in ((1, []), (5, [text[9:12]]), (1, [text[9:12], text[8:12]])):
        whole = generate(model, Letters(), PROMPTS, stop=stop, **SETTINGS)
        pieces = list(stream(model, Letters(), PROMPTS, every=every, stop=stop, **SETTINGS))
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

    whole = generate(model, Bytes(), PROMPTS, **SETTINGS)
    pieces = list(stream(model, Bytes(), PROMPTS, every=1, **SETTINGS))
    for row in range(len(PROMPTS)):
        assert "".join(p.text for p in pieces if p.index == row) == whole.texts[row]


def test_wrong_inputs_get_one_sentence(model):
    message, spoken = [{"role": "user", "content": "a"}], [{"role": "assistant", "content": "b"}]
    for prompts, settings, sentence in [
        ("abc", {}, "put the string in brackets"),
        ([message], {"chat": False}, "prompt 0 is .*'role'.*, but .* it must be a string; give"),
        ([message + spoken], {}, "prompt 0 ends with .* 'assistant', but the last message must "),
        ([7], {}, "prompt 0 is 7, but it must be a text or a list of .*; give the text"),
        (["a", ""], {"chat": False}, "prompt 1 is empty, but a prompt needs"),
        (["a", "b", "c" * 506], {}, "prompt 2 has 508 tokens, .* at most 4"),
        (["a"], {"policy": Threshold(2.0)}, r"Threshold has hazard 2\.0, .* from 0 .* to 1"),
        (["a"], {"stop": "ab"}, "stop is 'ab', but it must be a list of non-empty strings"),
        (["a"], {"stop": ["a", ""]}, "must be a list of non-empty strings"),
    ]:
        with pytest.raises(ValueError, match=sentence) as error:
            generate(model, Letters(), prompts, **{"max_new_tokens": 10} | settings)
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match="every is 0"):
        stream(model, Letters(), ["a"], every=0)
    with pytest.raises(ValueError, match="stream returns no residuals"):
        stream(model, Letters(), ["a"], residuals=(1,))
