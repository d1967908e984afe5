"""`python -m convert.from_hf`: what it brings along, and what it refuses in one sentence."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jexit
from convert import from_hf
from jexit.io.array_store import ArrayStore
from jexit.io.model_source import open_model
from tolerances import LOGITS

ROOT = pathlib.Path(from_hf.__file__).parents[1]
WEIGHTS = "model.safetensors"


def convert(source, target):
    assert from_hf.main([f"--source={source}", f"--target={target}"]) == 0
    return open_model(target)


def edit_weights(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def test_as_a_command_it_prints_one_line(checkpoints, tmp_path):
    target = tmp_path / "target"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("JAX_PLATFORMS", None)  # the command sets its own
    arguments = [f"--source={checkpoints('qwen2')}", f"--target={target}"]
    done = subprocess.run(
        [sys.executable, "-m", "convert.from_hf", *arguments],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=False,
    )  # fmt: skip
    words = f"wrote {target}: qwen2, 4 layers × 32, 0.0 M parameters, float32\n"
    assert (done.returncode, done.stdout, done.stderr) == (0, words, "")
    assert list(tmp_path.iterdir()) == [target]
    source = open_model(target)
    assert source.source == str(checkpoints("qwen2"))
    assert source.exit_layers == () and source.lora is None


def test_tokenizer_chat_template_and_end_tokens_come_along(broken, tmp_path):
    for name, ends in (("generation_config.json", [0, 1]), ("config.json", [2, 0])):
        values = json.loads((broken / name).read_text()) | {"eos_token_id": ends}
        (broken / name).write_text(json.dumps(values))
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04not even a pickle")  # left alone
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        tokenizer = convert(broken, target).tokenizer()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (broken / name).read_bytes()
    assert tokenizer.eos_ids == {0, 1, 2}
    assert tokenizer.chat_text("a 1") == "<user>a 1<assistant>"
    text = "count 1 2 3<end>"
    assert tokenizer.encode(text) == open_model(broken).tokenizer().encode(text)


def test_a_repeated_tied_head_is_ignored_and_another_one_refused(checkpoints, tmp_path, refuses):
    source = shutil.copytree(checkpoints("qwen3"), tmp_path / "source")

    def repeat(tensors):  # and old buffers, which follow from the config
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_weights(source, repeat)
    convert(source, tmp_path / "first")
    assert "head" not in "".join(ArrayStore(tmp_path / "first" / "base").names())
    edit_weights(source, lambda tensors: np.ravel(tensors["lm_head.weight"])[-1:].fill(9.0))
    message = refuses(from_hf.main, source)
    assert "tie_word_embeddings" in message and "lm_head.weight" in message


def test_missing_surplus_and_misshapen_tensors_are_all_named_at_once(broken, refuses):
    def change(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.4.mlp.up_proj.weight"] = np.ones((48, 32), np.float32)
        tensors["model.layers.1.self_attn.k_proj.bias"] = np.ones(17, np.float32)

    edit_weights(broken, change)
    missing, surplus, misshapen = refuses(from_hf.main, broken).split("; ")[:3]
    assert missing.endswith("missing model.layers.2.mlp.up_proj.weight, model.norm.weight")
    assert surplus == "surplus model.layers.4.mlp.up_proj.weight"
    assert misshapen == "misshapen model.layers.1.self_attn.k_proj.bias [17] instead of [16])"


def test_what_cannot_be_converted_is_one_sentence_and_nothing_written(broken, tmp_path, refuses):
    """How each is refused in detail is tested with the reading of models, in tests/io."""
    (tmp_path / "there").mkdir()
    precious = tmp_path / "there" / "precious"
    precious.write_text("data")
    for source, target, words in (
        (broken / "config.json", None, "is a file"),
        (tmp_path / "nowhere", None, "no model directory at"),
        ("nobody/no-such-model", None, "local cache"),
        (broken, tmp_path / "there", "is not empty, but it must be"),
        (broken, precious, "is a file"),
    ):
        assert words in refuses(from_hf.main, source, target=target)
    for name, words in (("tokenizer.json", "contains no tokenizer"), (WEIGHTS, f"no {WEIGHTS}")):
        (broken / name).rename(tmp_path / name)
        assert words in refuses(from_hf.main, broken)
        (tmp_path / name).rename(broken / name)


def test_a_write_that_fails_leaves_nothing_behind(broken, refuses, tmp_path, monkeypatch):
    write, calls = ArrayStore.write, []

    def fails_at_the_fifth(self, name, array):
        calls.append(name)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        if len(calls) == 10:
            raise KeyboardInterrupt
        write(self, name, array)

    monkeypatch.setattr(ArrayStore, "write", fails_at_the_fifth)
    message = refuses(from_hf.main, broken, target=tmp_path / "new" / "target")
    assert "No space left on device" in message and len(calls) == 5
    with pytest.raises(KeyboardInterrupt):
        from_hf.main([f"--source={broken}", f"--target={tmp_path / 'target'}"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_jexits_own_directory_converts_too(students, tmp_path):
    """A student that refers to its base becomes one that stands alone."""
    model, directory = students("qwen2")
    source = convert(directory, tmp_path / "alone")
    assert source.base == tmp_path / "alone"
    assert source.lora == model.lora and source.exit_layers == model.exit_layers
    again, _ = jexit.load(tmp_path / "alone")
    tokens_BT = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(
        jexit.forward(again, tokens_BT).logits_BTV, jexit.forward(model, tokens_BT).logits_BTV
    )


def test_the_first_layers_alone_are_those_of_transformers(checkpoints, students, tmp_path, capsys):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    source, target = checkpoints("llama"), tmp_path / "cut"
    assert from_hf.main([f"--source={source}", f"--target={target}", "--layers=3"]) == 0
    model, _ = jexit.load(target)
    assert (model.arch.layers, open_model(target).source) == (3, "")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(source, num_hidden_layers=3).eval()
    tokens_BT = np.arange(12).reshape(1, 12)
    with torch.no_grad():
        wanted = theirs(torch.tensor(tokens_BT)).logits
    np.testing.assert_allclose(
        jexit.forward(model, tokens_BT).logits_BTV, wanted, rtol=0, atol=LOGITS
    )
    capsys.readouterr()
    _, student = students("qwen2")
    for path, layers, sentence in [
        (source, 4, "--layers is 4, but it must be at least 1 and less than 4, the number of"),
        (source, 0, "--layers is 0, but it must be at least 1"),
        (student, 2, f"{student} has adapters or exit heads, which were trained for all layers"),
    ]:
        arguments = [f"--source={path}", f"--target={tmp_path / 'no'}", f"--layers={layers}"]
        assert from_hf.main(arguments) == 1
        assert sentence in capsys.readouterr().err and not (tmp_path / "no").exists()
