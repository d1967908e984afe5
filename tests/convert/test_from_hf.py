"""`python -m convert.from_hf`: what it brings along, and what it refuses in one sentence."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jexit
from convert import from_hf
from jexit.io.array_store import ArrayStore
from jexit.io.model_source import open_model

ROOT = pathlib.Path(from_hf.__file__).parents[1]
WEIGHTS = "model.safetensors"


def command(module, source, target):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("JAX_PLATFORMS", None)  # the command sets its own
    return subprocess.run(
        [sys.executable, "-m", module, f"--source={source}", f"--target={target}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )


def edit_config(directory, **changes):
    file = directory / "config.json"
    config = json.loads(file.read_text()) | changes
    config = {key: value for key, value in config.items() if value is not ...}
    file.write_text(json.dumps(config))


def edit_weights(directory, change):
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, metadata={"format": "pt"})


def test_command_prints_one_line_and_writes_the_model(checkpoints, tmp_path):
    done = command("convert.from_hf", checkpoints("qwen2"), tmp_path / "target")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == (
        f"wrote {tmp_path / 'target'}: qwen2, 4 layers × 32, 0.0 M parameters, float32\n"
    )
    assert [entry.name for entry in tmp_path.iterdir()] == ["target"]
    source = open_model(tmp_path / "target")
    assert source.source == str(checkpoints("qwen2"))
    assert source.exit_layers == () and source.lora is None


def test_command_fails_with_one_line_and_writes_nothing(tmp_path):
    (tmp_path / "empty").mkdir()
    done = command("convert.from_hf", tmp_path / "empty", tmp_path / "target")
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr.startswith(f"error: {tmp_path / 'empty'} holds no model")
    assert done.stderr.count("\n") == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["empty"]


@pytest.mark.parametrize("options", [[], ["--source=x"], ["--source=x", "--target=y", "--z=1"]])
def test_usage_errors_exit_with_two(options, capsys):
    with pytest.raises(SystemExit) as stop:
        from_hf.main(options)
    assert stop.value.code == 2
    assert "usage: python -m convert.from_hf" in capsys.readouterr().err


def test_tokenizer_chat_template_and_end_tokens_come_along(broken, tmp_path):
    file = broken / "generation_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": [0, 1]}))
    edit_config(broken, eos_token_id=[2, 0])
    target = tmp_path / "target"
    assert from_hf.main([f"--source={broken}", f"--target={target}"]) == 0
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (target / name).read_bytes() == (broken / name).read_bytes()
    tokenizer = open_model(target).tokenizer()
    assert tokenizer.eos_ids == {0, 1, 2}
    assert tokenizer.chat_text("a 1") == "<user>a 1<assistant>"
    straight = open_model(broken).tokenizer()
    text = "count 1 2 3<end>"
    assert tokenizer.encode(text) == straight.encode(text)
    assert tokenizer.decode(tokenizer.encode("count 1 2 3")) == "count 1 2 3"


def test_old_buffers_and_a_repeated_tied_head_are_ignored(checkpoints, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoints("qwen3").iterdir():
        (source / file.name).write_bytes(file.read_bytes())

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(6, np.float32)
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()

    edit_weights(source, add)
    assert from_hf.main([f"--source={source}", f"--target={tmp_path / 'target'}"]) == 0
    assert "head" not in "".join(ArrayStore(tmp_path / "target" / "base").names())


def test_tied_head_that_differs_is_refused(checkpoints, tmp_path, refuses):
    source = tmp_path / "source"
    source.mkdir()
    for file in checkpoints("qwen3").iterdir():
        (source / file.name).write_bytes(file.read_bytes())
    edit_weights(
        source, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] + 1.0})
    )
    message = refuses(from_hf.main, source)
    assert "tie_word_embeddings" in message and "lm_head.weight" in message


def test_missing_surplus_and_misshapen_tensors_are_all_named_at_once(broken, refuses):
    def change(tensors):
        del tensors["model.layers.2.mlp.up_proj.weight"]
        del tensors["model.norm.weight"]
        tensors["model.layers.4.mlp.up_proj.weight"] = np.ones((48, 32), np.float32)
        tensors["model.layers.0.self_attn.q_norm.weight"] = np.ones(8, np.float32)
        tensors["model.layers.1.self_attn.k_proj.bias"] = np.ones(17, np.float32)
        tensors["model.embed_tokens.weight"] = np.ones((66, 32), np.float32)

    edit_weights(broken, change)
    message = refuses(from_hf.main, broken)
    missing, surplus, misshapen = message.split("; ")[:3]
    assert "missing model.layers.2.mlp.up_proj.weight, model.norm.weight" in missing
    assert surplus.startswith("surplus ") and surplus.count(", ") == 1
    assert "model.layers.4.mlp.up_proj.weight" in surplus
    assert "model.layers.0.self_attn.q_norm.weight" in surplus
    assert "model.layers.1.self_attn.k_proj.bias [17] in place of [16]" in misshapen
    assert "model.embed_tokens.weight [66, 32] in place of [67, 32]" in misshapen


def test_config_of_another_depth_names_the_layers_that_it_misses(broken, refuses):
    edit_config(broken, num_hidden_layers=5, layer_types=["full_attention"] * 5)
    message = refuses(from_hf.main, broken)
    assert message.count("model.layers.4.") == 12 and "surplus" not in message


def test_pickle_is_refused(broken, refuses):
    (broken / WEIGHTS).rename(broken / "pytorch_model.bin")
    message = refuses(from_hf.main, broken)
    assert "pickle (pytorch_model.bin)" in message and "safetensors" in message


def test_pickle_beside_safetensors_is_not_touched(broken, tmp_path):
    (broken / "pytorch_model.bin").write_bytes(b"\x80\x04not even a pickle")
    assert from_hf.main([f"--source={broken}", f"--target={tmp_path / 'target'}"]) == 0


def test_missing_tokenizer_is_refused(broken, refuses):
    (broken / "tokenizer.json").unlink()
    assert "holds no tokenizer" in refuses(from_hf.main, broken)


def test_damaged_tokenizer_is_refused(broken, refuses):
    (broken / "tokenizer.json").write_text('{"version": "1.0", "model"')
    assert "the tokenizer in" in refuses(from_hf.main, broken)


def test_missing_weights_are_refused(broken, refuses):
    (broken / WEIGHTS).unlink()
    assert f"holds no {WEIGHTS}" in refuses(from_hf.main, broken)


@pytest.mark.parametrize("kept", [0.0, 0.001, 0.5, 0.999])
def test_truncated_weights_are_refused(broken, refuses, kept):
    size = (broken / WEIGHTS).stat().st_size
    os.truncate(broken / WEIGHTS, int(size * kept))
    assert "is damaged or not a safetensors file" in refuses(from_hf.main, broken)


def test_missing_shard_is_named(broken, refuses):
    (broken / WEIGHTS).rename(broken / "model-00001-of-00002.safetensors")
    index = {
        "metadata": {},
        "weight_map": {
            "model.norm.weight": "model-00001-of-00002.safetensors",
            "model.embed_tokens.weight": "model-00002-of-00002.safetensors",
        },
    }
    (broken / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    message = refuses(from_hf.main, broken)
    assert "lacks model-00002-of-00002.safetensors" in message


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.layers.3.self_attn.q_proj.bias",
        "model.layers.2.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_weights_that_are_not_finite_are_named(broken, refuses, name, value):
    edit_weights(broken, lambda tensors: np.ravel(tensors[name])[-1:].fill(value))
    message = refuses(from_hf.main, broken)
    assert f"{name} in {broken / WEIGHTS} holds NaN or infinity; copy it again" in message
    with pytest.raises(ValueError, match=f"{name} in .*{WEIGHTS} holds NaN or infinity"):
        jexit.load(broken)


def test_integer_weights_are_refused(broken, refuses):
    edit_weights(broken, lambda t: t.update({"model.norm.weight": np.ones(32, np.int8)}))
    message = refuses(from_hf.main, broken)
    assert "model.norm.weight as I8" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": "mistral"}, "describes a 'mistral' model"),
        ({"model_type": "qwen3_moe"}, "describes a 'qwen3_moe' model"),
        ({"model_type": ...}, "describes a None model"),
        ({"hidden_size": ...}, "has no hidden_size"),
        ({"rms_norm_eps": ...}, "has no rms_norm_eps"),
        ({"rope_parameters": ...}, "has no rope_theta"),
        ({"hidden_act": "gelu"}, "hidden_act to 'gelu'"),
        ({"num_attention_heads": 3, "head_dim": 8}, "3 query heads do not divide among 2"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "scales rope by 'linear'"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "has no low_freq_factor"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"]},
            "sliding window of 8",
        ),
        ({"quantization_config": {"bits": 4}}, "quantised"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_models_and_incomplete_configs_are_refused(broken, refuses, changes, words):
    edit_config(broken, **changes)
    assert words in refuses(from_hf.main, broken)


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"qwen2"', "\x00\xff"])
def test_damaged_config_is_refused(broken, refuses, text):
    (broken / "config.json").write_bytes(text.encode("latin-1"))
    assert "config.json" in refuses(from_hf.main, broken)


NUMBERS = (
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "rms_norm_eps",
    "vocab_size",
)
ALLOWED = [["num_key_value_heads", None], ["rms_norm_eps", 2.5]]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (key, value)
        for key in NUMBERS
        for value in ("x", None, -4, 0, 2.5, [1], {}, True)
        if [key, value] not in ALLOWED
    ],
)
def test_nonsense_numbers_in_the_config_are_refused(broken, refuses, key, value):
    edit_config(broken, **{key: value})
    assert key in refuses(from_hf.main, broken)


def test_source_that_is_no_model_is_refused(tmp_path, refuses):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "notes.txt").write_text("hello")
    assert "holds no model" in refuses(from_hf.main, tmp_path / "notes")
    assert "is a file" in refuses(from_hf.main, tmp_path / "notes" / "notes.txt")
    assert "no model directory at" in refuses(from_hf.main, tmp_path / "nowhere")
    assert "local cache" in refuses(from_hf.main, "nobody/no-such-model")


def test_target_that_exists_is_left_alone(broken, tmp_path, refuses):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("data")
    message = refuses(from_hf.main, broken, target=tmp_path / "there")
    assert "exists and is not empty" in message
    assert "is a file" in refuses(from_hf.main, broken, target=tmp_path / "there" / "precious")
    assert (tmp_path / "there" / "precious").read_text() == "data"


def test_empty_target_is_used_and_parents_are_made(broken, tmp_path):
    (tmp_path / "empty").mkdir()
    for target in (tmp_path / "empty", tmp_path / "a" / "b" / "c"):
        assert from_hf.main([f"--source={broken}", f"--target={target}"]) == 0
        assert open_model(target).architecture.layers == 4


def test_full_disk_leaves_nothing_behind(broken, refuses, tmp_path, monkeypatch):
    write, calls = ArrayStore.write, []

    def fails_at_the_fifth(self, name, array):
        calls.append(name)
        if len(calls) == 5:
            raise OSError(28, "No space left on device")
        write(self, name, array)

    monkeypatch.setattr(ArrayStore, "write", fails_at_the_fifth)
    message = refuses(from_hf.main, broken, target=tmp_path / "new" / "target")
    assert "No space left on device" in message and len(calls) == 5


def test_interruption_leaves_nothing_behind(broken, tmp_path, monkeypatch):
    def interrupted(self, name, array):
        raise KeyboardInterrupt

    monkeypatch.setattr(ArrayStore, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        from_hf.main([f"--source={broken}", f"--target={tmp_path / 'target'}"])
    assert [entry.name for entry in tmp_path.iterdir()] == ["source"]


def test_jexits_own_directory_converts_too(students, tmp_path):
    """A student that refers to its base becomes one that stands alone."""
    model, directory = students("qwen2")
    target = tmp_path / "alone"
    assert from_hf.main([f"--source={directory}", f"--target={target}"]) == 0
    source = open_model(target)
    assert source.base == target
    assert source.lora == model.lora and source.exit_layers == model.exit_layers
    again, _ = jexit.load(target)
    tokens_BT = np.arange(12).reshape(1, 12)
    np.testing.assert_array_equal(
        jexit.forward(again, tokens_BT).logits_BTV, jexit.forward(model, tokens_BT).logits_BTV
    )
