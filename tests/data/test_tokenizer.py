"""Text to ids and back, chat formats, begin and end tokens."""

import itertools
import json
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chat_templates import (
    BEGIN,
    BEGINNING,
    DEFAULT_SYSTEM,
    OPENED,
    SWITCHED,
    TINY,
    with_begin_token,
    with_template,
)
from jexit.data.tokenizer import Tokenizer
from jexit.errors import MissingFile, UserError
from jexit.tasks import make_task
from jexit.tasks.base import turns

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
TOKENIZER = Tokenizer.load(TINY)
PROMPT = "<|user|>sum 37<|assistant|>"
SHOWN = [*turns([("sum 12", "+3####3")]), {"role": "user", "content": "sum 37"}]
TURNS = "<|user|>sum 12<|assistant|>+3####3<|end|>"


@pytest.fixture
def directory(tmp_path):
    """A model directory with the tiny tokenizer and nothing else."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY / name, tmp_path / name)
    return tmp_path


@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(alphabet="+# 019sum\n"))
@example("Zürich, 東京 \U0001f600 \x00\r\n\t  ++++++ ##### <|end|><|pad|>")
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text)
    assert all(0 <= i < 512 for i in ids)
    assert TOKENIZER.decode(ids, keep_special=True) == text


def test_the_bytes_of_tokens_are_those_of_the_text():
    text = "naïve 日本 🙂 ####9"
    ids = TOKENIZER.encode(text)
    assert "\ufffd" in TOKENIZER.tokens(ids)
    assert b"".join(map(TOKENIZER.token_bytes, ids)) == text.encode()


def test_digits_signs_and_marks_are_single_tokens():
    for tokens in (
        ["sum", " by", " ", "3", " ", *"37295184"],
        ["1", "+", "2", "++", "3", "+++", "4", "++++", "5", "####", "6"],
        ["7", "\n", "####", " ", "7"],
    ):
        assert TOKENIZER.tokens(TOKENIZER.encode("".join(tokens))) == tokens
    assert TOKENIZER.tokens([0, 1, 2, 3]) == ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.eos_ids) == (0, 3, {3})
    assert TOKENIZER.vocab_size == 512
    assert TOKENIZER.decode([*TOKENIZER.encode("####4"), 3, 0, 0]) == "####4"


def test_many_texts_are_encoded_as_each_is_and_fit_56_tokens():
    texts = ["sum 123", "", "Tom has 3 apples.", "é+"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.encode_batch([]) == []
    for task in (make_task("sums", steps="mixed"), make_task("word_problems")):
        problems = [task.problem("train", index) for index in range(1000)]
        prompts = TOKENIZER.encode_prompts([problem.prompt for problem in problems])
        completions = TOKENIZER.encode_batch([problem.completion for problem in problems])
        lengths = [len(p) + len(c) + 1 for p, c in zip(prompts, completions, strict=True)]
        assert 40 < max(lengths) <= 56


def test_the_library_loads_it_beside_a_qwen3_config(directory):
    transformers = pytest.importorskip("transformers")
    (directory / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    )
    text = "sum by 3 372+++1####1 Zürich"
    loaded = transformers.AutoTokenizer.from_pretrained(str(directory))
    assert loaded(text)["input_ids"] == TOKENIZER.encode(text)
    messages = [{"role": "user", "content": "sum 37"}, {"role": "assistant", "content": "####0"}]
    assert loaded.apply_chat_template(messages, tokenize=False) == PROMPT + "####0<|end|>"


def test_end_tokens_are_a_set(directory):
    # Qwen3's generation_config.json lists two, its config.json one of them; Llama 3.2's lists three
    # in both. PAD may be one too.
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 400]}))
    (directory / "config.json").write_text(json.dumps({"eos_token_id": [401, 402, 3]}))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.eos_ids == {3, 400, 401, 402}
    assert tokenizer.pad_id == tokenizer.eos_id == 3
    del settings["eos_token"], settings["chat_template"]
    (directory / "chat_template.jinja").unlink()
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode_prompt("sum 37") == tokenizer.encode("sum 37")  # plain text
    (directory / "generation_config.json").unlink(), (directory / "config.json").unlink()
    with pytest.raises(UserError, match="does not define an end-of-sequence token"):
        Tokenizer.load(directory)


def test_saved_files_are_the_same_bytes(directory, tmp_path):
    target = tmp_path / "copy"
    Tokenizer.load(directory).save(target)
    for name in TOKENIZER_FILES:
        assert (target / name).read_bytes() == (directory / name).read_bytes()
    Tokenizer.load(target).save(target)  # onto itself: nothing to do, nothing lost
    assert Tokenizer.load(target).encode("sum 12") == TOKENIZER.encode("sum 12")
    Tokenizer(TOKENIZER.backend).save(tmp_path / "made")  # without a directory of its own
    again = Tokenizer.load(tmp_path / "made")
    assert again.encode_prompt("sum 12") == TOKENIZER.encode_prompt("sum 12")


def test_missing_and_broken_files(directory):
    with pytest.raises(MissingFile, match=r"no model directory at .*config.model.path"):
        Tokenizer.load(directory / "nowhere")
    (directory / "generation_config.json").write_text("[3")
    with pytest.raises(UserError, match=r"generation_config\.json"):
        Tokenizer.load(directory)
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"contains no tokenizer .*copy the checkpoint's"):
        Tokenizer.load(directory)


def test_templates_think_as_they_are_told_or_have_no_switch():
    tokenizer = with_template(SWITCHED)
    assert tokenizer.thinking == "auto" and tokenizer.chat_text("sum 37") == PROMPT
    tokenizer.thinking = "off"
    assert tokenizer.chat_text("sum 37") == PROMPT + "<think>\n\n</think>\n\n"
    assert not tokenizer.opens_thinking
    ids = tokenizer.encode(tokenizer.chat_text("sum 37"))
    assert [tokenizer.encode_prompt("sum 37")] == tokenizer.encode_prompts(["sum 37"]) == [ids]
    tokenizer.thinking = "on"
    assert tokenizer.chat_text("sum 37") == PROMPT
    with pytest.raises(UserError, match="thinking is 'yes', but it must be one of auto, on, off"):
        tokenizer.thinking = "yes"
    for template, value in itertools.product([OPENED, DEFAULT_SYSTEM, None], ["on", "off"]):
        tokenizer = with_template(template)
        said = f"thinking is '{value}'.*has no switch.*thinking=auto"
        with pytest.raises(UserError, match=said):
            tokenizer.thinking = value
        assert tokenizer.thinking == "auto"


def test_a_template_that_opens_the_thought_itself():
    tokenizer = with_template(OPENED)
    assert tokenizer.chat_text("sum 37") == PROMPT + "<think>\n"
    assert tokenizer.opens_thinking
    ids = [*tokenizer.encode("3+7\n</think>\n\n####0"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "3+7\n</think>\n\n####0"
    assert tokenizer.completion_text(ids) == "<think>\n3+7\n</think>\n\n####0"
    other = with_template(SWITCHED)
    assert other.completion_text(ids) == other.decode(ids)


def test_a_system_message_needs_a_template_that_shows_it():
    leaves_out = "{% for turn in messages if turn.role != 'system' %}{{ turn.content }}{% endfor %}"
    refuses = "{{ raise_exception('System role not supported') }}"
    for template in (
        None,
        leaves_out,
        "{% if messages[0].role == 'system' %}" + refuses + "{% endif %}",
    ):
        tokenizer = with_template(template)
        with pytest.raises(UserError, match=r"'Add\.' cannot be .*set config\.task\.system=''"):
            tokenizer.system = "Add."
        tokenizer.system = ""
        assert tokenizer.system == ""


def test_worked_examples_are_earlier_turns():
    for template, system in ((SWITCHED, ""), (DEFAULT_SYSTEM, "<|system|>Add well.")):
        tokenizer = with_template(template)
        assert tokenizer.chat_text("sum 37") == system + PROMPT
        assert tokenizer.chat_text(SHOWN) == system + TURNS + PROMPT
        assert tokenizer.encode_prompts([SHOWN, "sum 4"]) == [
            tokenizer.encode_prompt(SHOWN),
            tokenizer.encode_prompt("sum 4"),
        ]
    assert with_template(None).chat_text(SHOWN) == "sum 12\n+3####3\n\nsum 37"


def test_a_begin_token_comes_once_before_whole_texts(tmp_path):
    made = with_begin_token(BEGINNING)
    made.save(tmp_path)
    for llama in (made, Tokenizer.load(tmp_path)):
        assert llama.begin_id == llama.backend.bos_token_id
        # From a template that writes it, also when a caller has rendered it.
        ids = llama.encode_prompt(SHOWN)
        text = f"{BEGIN}{TURNS}{PROMPT}"
        assert llama.decode(ids, keep_special=True) == llama.chat_text(SHOWN) == text
        assert ids.count(llama.begin_id) == 1
        assert llama.encode_texts([text]) == llama.encode_prompts([SHOWN]) == [ids]
        # An answer does not begin.
        answer = llama.encode("+3####3")
        assert llama.encode_batch(["+3####3", ""]) == [answer, []]
        assert llama.encode_texts(["+3####3", ""]) == [[llama.begin_id, *answer], [llama.begin_id]]
    # Without a template a prompt begins as the tokenizer has it.
    plain = with_begin_token(None)
    alone = plain.encode_prompt("sum 37")
    assert alone == plain.backend.encode("sum 37") and alone[0] == plain.begin_id
    assert plain.encode_prompt(f"{BEGIN}sum 37") == alone
    assert plain.encode_prompt(SHOWN).count(plain.begin_id) == 1
    # A template that writes none has the say.
    other = with_begin_token(SWITCHED)
    assert other.begin_id not in other.encode_prompt("sum 37")
    # SmolLM2's names one for its chat template and puts none before texts.
    named = with_template(None)
    named.backend.add_special_tokens({"bos_token": "<|user|>"})
    for tokenizer in (TOKENIZER, named):
        assert tokenizer.begin_id is None
        texts = ["sum 37", ""]
        assert tokenizer.encode_texts(texts) == tokenizer.encode_batch(texts)


@pytest.mark.weights
def test_the_template_of_a_real_checkpoint(real_checkpoint):
    tokenizer = Tokenizer.load(real_checkpoint)
    text = tokenizer.chat_text(
        [*turns([("What is 1 + 1?", "#### 2")]), {"role": "user", "content": "What is 3 + 4?"}]
    )
    assert text.index("What is 1") < text.index("#### 2") < text.index("What is 3")
    end = tokenizer.decode([tokenizer.eos_id], keep_special=True)
    assert f"#### 2{end}" in text
    if tokenizer.has_thinking_switch:
        tokenizer.thinking = "off"
        closed = tokenizer.chat_text("What is 3 + 4?")
        assert closed.rstrip().endswith("</think>")
        tokenizer.thinking = "on"
        assert "</think>" not in tokenizer.chat_text("What is 3 + 4?")
        # Thoughts stay in the text of a completion: the verifier looks for their end.
        ids = tokenizer.encode("<think>\n3\n</think>\n\n#### 7")
        assert tokenizer.decode(ids) == "<think>\n3\n</think>\n\n#### 7"
    else:
        with pytest.raises(ValueError, match="has no switch"):
            tokenizer.thinking = "off"
