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

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")

TOKENIZER = Tokenizer.load(TINY)


@pytest.fixture
def directory(tmp_path):
    """A model directory with the tiny tokenizer and nothing else."""
    for name in TOKENIZER_FILES:
        shutil.copyfile(TINY / name, tmp_path / name)
    return tmp_path


@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.text(alphabet="+# 019sum\n"))
@example("sum by 3 37295184")
@example("Zürich, 東京 \U0001f600 \x00\r\n\t  ++++++ ##### <|end|><|pad|>")
def test_any_text_survives(text):
    ids = TOKENIZER.encode(text)
    assert all(0 <= i < 512 for i in ids)
    assert TOKENIZER.decode(ids, keep_special=True) == text


def test_digits_and_signs_are_single_tokens():
    assert TOKENIZER.tokens(TOKENIZER.encode("sum by 3 37295184")) == [
        *("sum", " by", " ", "3", " "),
        *"37295184",
    ]
    chain = "1+2++3+++4++++5####6"
    assert TOKENIZER.tokens(TOKENIZER.encode(chain)) == [
        *("1", "+", "2", "++", "3", "+++", "4", "++++", "5", "####", "6")
    ]
    assert TOKENIZER.tokens(TOKENIZER.encode("7\n#### 7")) == ["7", "\n", "####", " ", "7"]


def test_examples_fit_56_tokens():
    for task in (make_task("sums", steps="mixed"), make_task("word_problems")):
        problems = [task.problem("train", index) for index in range(1000)]
        prompts = TOKENIZER.encode_prompts([problem.prompt for problem in problems])
        completions = TOKENIZER.encode_batch([problem.completion for problem in problems])
        lengths = [len(p) + len(c) + 1 for p, c in zip(prompts, completions, strict=True)]
        assert 40 < max(lengths) <= 56


def test_vocabulary_and_special_tokens():
    assert TOKENIZER.vocab_size == 512
    assert TOKENIZER.tokens([0, 1, 2, 3]) == ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.eos_ids) == (0, 3, {3})
    assert TOKENIZER.decode([*TOKENIZER.encode("####4"), 3, 0, 0]) == "####4"
    texts = ["sum 123", "", "Tom has 3 apples.", "é+"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.encode_batch([]) == []


def test_chat_format():
    ids = TOKENIZER.encode_prompt("sum 37")
    assert TOKENIZER.decode(ids, keep_special=True) == "<|user|>sum 37<|assistant|>"
    assert TOKENIZER.encode_prompts(["sum 37"]) == [ids]
    conversation = [
        {"role": "user", "content": "sum 37"},
        {"role": "assistant", "content": "####0"},
    ]
    whole = TOKENIZER.backend.apply_chat_template(conversation, tokenize=False)
    assert whole == "<|user|>sum 37<|assistant|>####0<|end|>"


def test_the_library_loads_it_beside_a_qwen3_config(directory):
    transformers = pytest.importorskip("transformers")
    (directory / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    )
    text = "sum by 3 372+++1####1 Zürich"
    loaded = transformers.AutoTokenizer.from_pretrained(str(directory))
    assert loaded(text)["input_ids"] == TOKENIZER.encode(text)


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
    with pytest.raises(UserError, match="names no end token"):
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
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer .*copy the tokenizer's files"):
        Tokenizer.load(directory)


SHOT = ("sum 12", "+3####3")


def test_a_template_with_a_switch_thinks_as_it_is_told():
    tokenizer = with_template(SWITCHED)
    assert tokenizer.has_thinking_switch and tokenizer.thinking == "auto"
    assert tokenizer.chat_text("sum 37") == "<|user|>sum 37<|assistant|>"
    tokenizer.thinking = "off"
    assert tokenizer.chat_text("sum 37").endswith("<|assistant|><think>\n\n</think>\n\n")
    assert not tokenizer.opens_thinking
    ids = tokenizer.encode_prompt("sum 37")
    assert ids == tokenizer.encode(tokenizer.chat_text("sum 37"))
    assert tokenizer.encode_prompts(["sum 37"]) == [ids]
    tokenizer.thinking = "on"
    assert tokenizer.chat_text("sum 37") == "<|user|>sum 37<|assistant|>"


def test_a_template_that_opens_the_thought_itself():
    tokenizer = with_template(OPENED)
    assert tokenizer.chat_text("sum 37") == "<|user|>sum 37<|assistant|><think>\n"
    assert tokenizer.opens_thinking
    ids = [*tokenizer.encode("3+7\n</think>\n\n####0"), tokenizer.eos_id]
    assert tokenizer.decode(ids) == "3+7\n</think>\n\n####0"
    assert tokenizer.completion_text(ids) == "<think>\n3+7\n</think>\n\n####0"
    other = with_template(SWITCHED)
    assert other.completion_text(ids) == other.decode(ids)


def test_a_default_system_prompt_is_the_templates_own():
    tokenizer = with_template(DEFAULT_SYSTEM)
    assert tokenizer.chat_text("sum 37") == "<|system|>Add well.<|user|>sum 37<|assistant|>"
    messages = [{"role": "system", "content": "Add."}, {"role": "user", "content": "sum 37"}]
    assert tokenizer.render(messages) == "<|system|>Add.<|user|>sum 37<|assistant|>"


def test_a_template_without_a_switch_refuses_one():
    for template, value in itertools.product([OPENED, DEFAULT_SYSTEM, None], ["on", "off"]):
        tokenizer = with_template(template)
        assert not tokenizer.has_thinking_switch
        said = f"thinking is '{value}'.*has no switch.*thinking=auto"
        with pytest.raises(UserError, match=said):
            tokenizer.thinking = value
        assert tokenizer.thinking == "auto"
        tokenizer.thinking = "auto"
    with pytest.raises(UserError, match="thinking is 'yes'; choose one of auto, on, off"):
        with_template(SWITCHED).thinking = "yes"


def test_worked_examples_are_earlier_turns():
    for template in (SWITCHED, OPENED, DEFAULT_SYSTEM):
        tokenizer = with_template(template)
        alone, text = tokenizer.chat_text("sum 37"), tokenizer.chat_text("sum 37", [SHOT])
        first = alone.index("<|user|>")
        turns = "<|user|>sum 12<|assistant|>+3####3<|end|>"
        assert text == alone[:first] + turns + alone[first:]
        assert tokenizer.encode_prompts(["sum 37", "sum 4"], [[SHOT], []]) == [
            tokenizer.encode_prompt("sum 37", [SHOT]),
            tokenizer.encode_prompt("sum 4"),
        ]


def test_without_a_template_worked_examples_are_text():
    tokenizer = with_template(None)
    assert tokenizer.chat_text("sum 37", [SHOT, SHOT]) == (
        "sum 12\n+3####3\n\nsum 12\n+3####3\n\nsum 37"
    )


@pytest.fixture(params=["made", "loaded"])
def llama(request, tmp_path):
    """A tokenizer that puts a begin token before texts, with a chat template that writes it."""
    tokenizer = with_begin_token(BEGINNING)
    begin = tokenizer.backend.bos_token_id
    assert tokenizer.backend.encode("sum 37") == [begin, *tokenizer.encode("sum 37")]
    if request.param == "loaded":
        tokenizer.save(tmp_path)
        tokenizer = Tokenizer.load(tmp_path)
    assert tokenizer.begin_id == begin
    return tokenizer


def test_a_prompt_from_a_template_begins_once(llama):
    ids = llama.encode_prompt("sum 37", [SHOT])
    text = f"{BEGIN}<|user|>sum 12<|assistant|>+3####3<|end|><|user|>sum 37<|assistant|>"
    assert llama.decode(ids, keep_special=True) == llama.chat_text("sum 37", [SHOT]) == text
    assert ids.count(llama.begin_id) == 1
    assert llama.encode_prompts(["sum 37"], [[SHOT]]) == [ids]
    # Also when a caller has rendered it.
    assert llama.encode_texts([text]) == [ids]


def test_an_answer_does_not_begin(llama):
    for ids in (llama.encode("+3####3"), *llama.encode_batch(["+3####3", ""])):
        assert llama.begin_id not in ids
    assert llama.encode_texts(["+3####3", ""]) == [
        [llama.begin_id, *llama.encode("+3####3")],
        [llama.begin_id],
    ]


def test_a_prompt_without_a_template_begins_as_the_tokenizer_has_it():
    llama = with_begin_token(None)
    alone = llama.encode_prompt("sum 37")
    assert alone == llama.backend.encode("sum 37") and alone[0] == llama.begin_id
    assert llama.encode_prompt(f"{BEGIN}sum 37") == alone
    assert llama.encode_prompt("sum 37", [SHOT]).count(llama.begin_id) == 1


def test_a_template_without_a_begin_token_has_the_say():
    llama = with_begin_token(SWITCHED)
    assert llama.begin_id not in llama.encode_prompt("sum 37")


def test_where_no_begin_token_is_put_before_texts_none_is():
    assert TOKENIZER.begin_id is None
    # SmolLM2's names one for its chat template and puts none before texts.
    tokenizer = with_template(None)
    tokenizer.backend.add_special_tokens({"bos_token": "<|user|>"})
    assert tokenizer.begin_id is None
    for made in (TOKENIZER, tokenizer):
        assert made.encode_texts(["sum 37", ""]) == made.encode_batch(["sum 37", ""])


@pytest.mark.weights
def test_the_template_of_a_real_checkpoint(real_checkpoint):
    tokenizer = Tokenizer.load(real_checkpoint)
    text = tokenizer.chat_text("What is 3 + 4?", [("What is 1 + 1?", "#### 2")])
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
