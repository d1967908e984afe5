import json
import pathlib
import re
import shutil

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import jexit.data.tokenizer as tokenizer_module
from jexit.data.tokenizer import Tokenizer
from jexit.tasks import make_task

TINY = pathlib.Path(tokenizer_module.__file__).parents[1] / "assets" / "tiny"
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


def test_words_of_the_word_problems_are_single_tokens():
    task = make_task("word_problems")
    for index in range(300):
        prompt = task.problem("train", index).prompt
        words = re.findall(r" ?[A-Za-z]+|\d|\s|[^\sA-Za-z\d]", prompt)
        assert TOKENIZER.tokens(TOKENIZER.encode(prompt)) == words


@pytest.mark.parametrize("name", ["sums", "word_problems"])
def test_examples_fit_56_tokens(name):
    task = make_task(name, **({"steps": "mixed"} if name == "sums" else {}))
    problems = [task.problem("train", index) for index in range(2000)]
    prompts = TOKENIZER.encode_prompts([problem.prompt for problem in problems])
    completions = TOKENIZER.encode_batch([problem.completion for problem in problems])
    lengths = [len(p) + len(c) + 1 for p, c in zip(prompts, completions, strict=True)]
    assert 40 < max(lengths) <= 56


def test_vocabulary_and_special_tokens():
    assert TOKENIZER.vocab_size == 512
    assert TOKENIZER.tokens([0, 1, 2, 3]) == ["<|pad|>", "<|user|>", "<|assistant|>", "<|end|>"]
    assert (TOKENIZER.pad_id, TOKENIZER.eos_id, TOKENIZER.eos_ids) == (0, 3, {3})
    assert TOKENIZER.decode([*TOKENIZER.encode("####4"), 3, 0, 0]) == "####4"


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


def test_batches_equal_single_encodings():
    texts = ["sum 123", "", "Tom has 3 apples.", "é+"]
    assert TOKENIZER.encode_batch(texts) == [TOKENIZER.encode(text) for text in texts]
    assert TOKENIZER.encode_batch([]) == []


def test_the_library_loads_it_beside_a_qwen3_config(directory):
    transformers = pytest.importorskip("transformers")
    (directory / "config.json").write_text(
        json.dumps({"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"]})
    )
    text = "sum by 3 372+++1####1 Zürich"
    loaded = transformers.AutoTokenizer.from_pretrained(str(directory))
    assert loaded(text)["input_ids"] == TOKENIZER.encode(text)


def test_without_a_chat_template_the_prompt_is_plain_text(directory):
    (directory / "chat_template.jinja").unlink()
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["chat_template"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.encode_prompt("sum 37") == tokenizer.encode("sum 37")


def test_end_tokens_are_a_set(directory):
    # Qwen3's generation_config.json lists two, its config.json one of them; PAD may be one too.
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 400]}))
    (directory / "config.json").write_text(json.dumps({"model_type": "qwen3", "eos_token_id": 401}))
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["pad_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    tokenizer = Tokenizer.load(directory)
    assert tokenizer.eos_ids == {3, 400, 401}
    assert tokenizer.pad_id == tokenizer.eos_id == 3


def test_no_end_token_is_an_error(directory):
    settings = json.loads((directory / "tokenizer_config.json").read_text())
    del settings["eos_token"]
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="names no end token"):
        Tokenizer.load(directory)


def test_saved_files_are_the_same_bytes(directory, tmp_path):
    target = tmp_path / "copy"
    Tokenizer.load(directory).save(target)
    for name in TOKENIZER_FILES:
        assert (target / name).read_bytes() == (directory / name).read_bytes()
    Tokenizer.load(target).save(target)  # onto itself: nothing to do, nothing lost
    assert Tokenizer.load(target).encode("sum 12") == TOKENIZER.encode("sum 12")


def test_a_tokenizer_without_a_directory_is_saved_too(tmp_path):
    Tokenizer(TOKENIZER.backend).save(tmp_path)
    assert Tokenizer.load(tmp_path).encode_prompt("sum 12") == TOKENIZER.encode_prompt("sum 12")


def test_missing_and_broken_files(directory):
    with pytest.raises(FileNotFoundError, match=r"no model directory at .*config.model.path"):
        Tokenizer.load(directory / "nowhere")
    text = (directory / "tokenizer.json").read_text()
    (directory / "tokenizer.json").write_text(text[: len(text) // 2])
    with pytest.raises(ValueError, match="cannot be read"):
        Tokenizer.load(directory)
    (directory / "tokenizer.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no tokenizer .*copy the tokenizer's files"):
        Tokenizer.load(directory)


def test_broken_generation_config(directory):
    (directory / "generation_config.json").write_text("[3")
    with pytest.raises(ValueError, match=r"generation_config\.json"):
        Tokenizer.load(directory)
