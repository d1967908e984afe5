"""OpenAI's own client against the server, and its answers against `jexit.generate`."""

import concurrent.futures
import json

import numpy as np
import openai
import pytest

import jexit
from tolerances import LOGPROBS

PROMPTS = ["sum 37295", "sum 481", "sum 990417", "sum 12"]


@pytest.fixture(scope="module")
def client(served):
    return openai.OpenAI(base_url=f"{served.url}/v1", api_key=served.api_key, max_retries=0)


def ask(client, prompt, **settings):
    own = ("policy", "hazards", "top_k", "min_p")
    extra = {name: settings.pop(name) for name in own if name in settings}
    settings = {"temperature": 0, "max_tokens": 48} | settings
    messages = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
    return client.chat.completions.create(
        model="tiny", messages=messages, extra_body=extra, **settings
    )


@pytest.mark.parametrize(
    "policy",
    ["threshold:0.5", "speculate:4",
     *(pytest.param(name, marks=pytest.mark.slow) for name in ("full", "fixed:4"))],
)  # fmt: skip
def test_an_answer_is_what_generate_returns(client, loaded, policy, idle):
    model, tokenizer = loaded
    hazards = not policy.startswith("speculate")
    made = jexit.generate(
        model, tokenizer, PROMPTS, policy=policy,
        max_new_tokens=48, hazards=hazards,
    )  # fmt: skip
    for row, prompt in enumerate(PROMPTS):
        answer = ask(client, prompt, policy=policy, logprobs=True, hazards=hazards)
        (choice,) = answer.choices
        assert choice.message.content == made.texts[row] and choice.finish_reason == "stop"
        assert choice.depths == made.depths[row] and choice.layers_run == sum(made.depths[row])
        found = [entry.logprob for entry in choice.logprobs.content]
        np.testing.assert_allclose(found, made.logprobs[row], 0, LOGPROBS)
        entries = choice.logprobs.content
        assert [entry.token for entry in entries] == tokenizer.tokens(made.tokens[row])
        said = b"".join(bytes(entry.bytes) for entry in entries).decode()
        assert said == tokenizer.decode(made.tokens[row], keep_special=True)
        usage = answer.usage
        assert usage.completion_tokens == len(made.tokens[row]) and usage.layers_run == sum(
            made.depths[row]
        )
        asked = tokenizer.encode_prompt([{"role": "user", "content": prompt}])
        assert usage.prompt_tokens == len(asked)
        assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
        if policy == "threshold:0.5":
            hazard_TE = np.asarray(choice.hazards, float)
            with np.errstate(over="ignore"):
                wanted_TE = 1 / (1 + np.exp(-np.asarray(made.hazard_logits[row])))
            np.testing.assert_allclose(hazard_TE, wanted_TE, atol=1e-4)
    idle()


def test_a_stream_is_the_answer_in_parts(client):
    whole = ask(client, PROMPTS[2], policy="threshold:0.5", logprobs=True, n=2, seed=5,
                temperature=1.0)  # fmt: skip
    parts = list(
        ask(client, PROMPTS[2], policy="threshold:0.5", logprobs=True, n=2, seed=5, temperature=1.0,
            stream=True, stream_options={"include_usage": True})
    )  # fmt: skip
    assert len(parts) > 1 and parts[-1].usage == whole.usage and not parts[-1].choices
    assert len({part.id for part in parts}) == 1
    for wanted in whole.choices:
        mine = [c for part in parts for c in part.choices if c.index == wanted.index]
        assert "".join(c.delta.content for c in mine) == wanted.message.content
        assert [c.delta.role for c in mine] == ["assistant"] + [None] * (len(mine) - 1)
        assert [d for c in mine for d in c.depths] == wanted.depths
        assert [e for c in mine for e in c.logprobs.content] == wanted.logprobs.content
        ends = [c.finish_reason for c in mine]
        assert ends == [None] * (len(ends) - 1) + [wanted.finish_reason]
        assert mine[-1].layers_run == wanted.layers_run


def test_samples_differ_and_a_seed_repeats_them(client):
    drawn = [
        [c.message.content for c in ask(client, PROMPTS[2], n=6, seed=s, temperature=1.5).choices]
        for s in (7, 7, 8, -(2**63))
    ]
    assert drawn[0] == drawn[1] and drawn[0] != drawn[2]
    assert all(len(set(texts)) > 1 for texts in drawn)
    free = [ask(client, PROMPTS[2], temperature=1.5).choices[0].message.content for _ in range(6)]
    assert len(set(free)) > 1


def test_stop_strings_and_limits_end_a_choice(client):
    whole = ask(client, PROMPTS[2]).choices[0]
    stop = whole.message.content[6:8]
    cut = ask(client, PROMPTS[2], stop=[stop, "never"]).choices[0]
    assert cut.message.content == whole.message.content.partition(stop)[0]
    assert cut.finish_reason == "stop" and len(cut.depths) < len(whole.depths)
    streamed = ask(client, PROMPTS[2], stop=stop, stream=True)
    assert "".join(p.choices[0].delta.content for p in streamed) == cut.message.content
    short = ask(client, PROMPTS[2], max_completion_tokens=3).choices[0]
    assert len(short.depths) == 3 and short.finish_reason == "length"


def test_conversations_and_parts_of_messages(client, loaded):
    model, tokenizer = loaded
    talk = [{"role": "user", "content": "sum 12"}, {"role": "assistant", "content": "+3####3"},
            {"role": "user", "content": "sum 37"}]  # fmt: skip
    (wanted,) = jexit.generate(model, tokenizer, [talk], max_new_tokens=48).texts
    assert ask(client, talk).choices[0].message.content == wanted
    split = [{"role": "user", "content": [{"type": "text", "text": "sum "},
                                          {"type": "text", "text": "481"}]}]  # fmt: skip
    whole = ask(client, "sum 481").choices[0].message.content
    assert ask(client, split).choices[0].message.content == whole


@pytest.mark.slow
def test_truncated_sampling_of_one_token_is_greedy(client):
    for field in ({"top_k": 1}, {"min_p": 1.0}):
        for prompt in PROMPTS[:2]:
            greedy = ask(client, prompt).choices[0].message.content
            hot = ask(client, prompt, temperature=2.0, seed=3, **field)
            assert hot.choices[0].message.content == greedy, field
    assert ask(client, prompt, temperature=2.0, seed=3, top_p=1e-6).choices[0].message.content == (
        greedy
    )
    free = {ask(client, prompt, temperature=2.0, seed=n).choices[0].message.content for n in (3, 4)}
    assert free != {greedy}


def test_plain_completions_take_texts_and_token_ids(client, loaded):
    model, tokenizer = loaded
    texts = ["sum 12\n", "sum 481\n"]
    made = jexit.generate(model, tokenizer, texts, max_new_tokens=16, chat=False)
    ids = tokenizer.encode_texts(texts)
    settings = {"model": "tiny", "max_tokens": 16, "temperature": 0, "logprobs": 0}
    for prompt in (texts, ids):
        found = client.completions.create(prompt=prompt, n=2, **settings)
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        for choice in found.choices:
            row = choice.index // 2
            assert choice.text == made.texts[row] and choice.depths == made.depths[row]
            assert choice.logprobs.tokens == tokenizer.tokens(made.tokens[row])
            for token, at in zip(choice.logprobs.tokens, choice.logprobs.text_offset, strict=True):
                end = token in tokenizer.tokens(tokenizer.eos_ids)
                assert at == len(choice.text) if end else choice.text[at:].startswith(token)
            np.testing.assert_allclose(
                choice.logprobs.token_logprobs, made.logprobs[row], 0, LOGPROBS
            )
    parts = list(client.completions.create(prompt=texts[1], stream=True, **settings))
    assert "".join(part.choices[0].text for part in parts) == made.texts[1]
    offsets = [at for part in parts for at in part.choices[0].logprobs.text_offset]
    assert offsets == found.choices[2].logprobs.text_offset


def test_many_clients_with_settings_of_their_own_share_the_pool(client, loaded, idle):
    """More than rows at once; each gets what it gets alone."""
    asked = [
        {"prompt": PROMPTS[i % 4], "policy": ["full", "threshold:0.5", "fixed:3", "sample"][i % 3],
         "temperature": [0, 1.2][i % 2], "seed": i, "max_tokens": 8 + i}
        for i in range(24)
    ]  # fmt: skip
    alone = [ask(client, **dict(each)).choices[0] for each in asked]
    with concurrent.futures.ThreadPoolExecutor(24) as threads:
        together = list(threads.map(lambda each: ask(client, **dict(each)).choices[0], asked))
    for one, other in zip(alone, together, strict=True):
        assert (one.message.content, one.depths) == (other.message.content, other.depths)
    idle()


def test_what_the_client_raises(client, served):
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; use 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=[{"role": "user", "content": "x"}])
    with pytest.raises(openai.BadRequestError, match=r"temperature is -1\.0, but it must be"):
        ask(client, "sum 1", temperature=-1.0)
    with pytest.raises(openai.BadRequestError, match="'tools' is not a field that this server"):
        ask(client, "sum 1", tools=[{"type": "function", "function": {"name": "f"}}])
    other = openai.OpenAI(base_url=f"{served.url}/v1", api_key="another", max_retries=0)
    with pytest.raises(openai.AuthenticationError, match="the API key is wrong or missing"):
        other.models.list()
    (model,) = client.models.list().data
    assert (model.id, model.layers, model.exit_layers) == ("tiny", 8, [1, 2, 3, 4, 6])
    assert json.dumps(model.model_dump()) and client.models.retrieve("tiny") == model
    with pytest.raises(openai.NotFoundError, match="'gpt-4' is not served here; use 'tiny'"):
        client.models.retrieve("gpt-4")


@pytest.mark.slow
def test_lm_evals_client_gets_the_same(served, loaded, monkeypatch):
    """`lm_eval --model local-chat-completions`, a class of its own."""
    completions = pytest.importorskip("lm_eval.models.openai_completions")
    from lm_eval.api.instance import Instance

    monkeypatch.setenv("OPENAI_API_KEY", served.api_key)
    client = completions.LocalChatCompletion(
        base_url=f"{served.url}/v1/chat/completions", model="tiny", num_concurrent=3, max_retries=1
    )
    asked = [
        Instance(
            "generate_until",
            {},
            (client.apply_chat_template([{"role": "user", "content": prompt}]),
             {"max_gen_toks": 48, "temperature": 0.0, "until": ["###"]}),
            number,
        )
        for number, prompt in enumerate(PROMPTS)
    ]  # fmt: skip
    made = jexit.generate(*loaded, PROMPTS, max_new_tokens=48, stop=["###"])
    assert client.generate_until(asked, disable_tqdm=True) == made.texts
