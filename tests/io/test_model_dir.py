"""Model directories: found where they are, and what is saved is what is loaded."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import (
    ADAPTER,
    HEAD,
    TOKENIZER,
    is_trainable,
    make_model,
    parameters,
    same_model,
    settings,
)

import jexit
from jexit.config import ExitSettings, LoRA
from jexit.data.tokenizer import Tokenizer
from jexit.errors import MissingFile, UserError
from jexit.io.array_store import ArrayStore
from jexit.io.model_dir import load, save_model
from jexit.io.model_source import find_model, open_model


def tree(directory):
    return {path: path.read_bytes() for path in directory.rglob("*") if path.is_file()}


def description(directory):
    return json.loads((directory / "jexit.json").read_text())


def test_models_come_back_bit_for_bit(saved_once, model, tokenizer, tmp_path):
    whole, found = load(saved_once / "whole")
    assert same_model(whole, model)
    assert found.eos_ids == tokenizer.eos_ids and found.vocab_size == tokenizer.vocab_size
    assert found.encode("sum 3729518") == tokenizer.encode("sum 3729518")
    # One that refers to its base stores no weights.
    refers = jexit.load(saved_once / "refers")[0]
    assert same_model(refers, model) and not (saved_once / "refers" / "base").exists()
    assert open_model(saved_once / "refers").source == "org/small"
    # Other heads, untied, without adapters, with one more end token.
    head = ExitSettings(kind="linear", norm="none")
    wanted = make_model(tokenizer.vocab_size, exits=(2,), head=head, lora=None, tied=False)
    two_ends = Tokenizer.load(TOKENIZER)
    two_ends.eos_ids |= {7}
    save_model(tmp_path / "m", wanted, two_ends)
    again, found = load(tmp_path / "m")
    assert same_model(again, wanted) and found.eos_ids == two_ends.eos_ids
    # Other programs read them from the file that Hugging Face gives them.
    assert Tokenizer.load(tmp_path / "m").eos_ids == two_ends.eos_ids


def test_a_base_is_referred_to_by_its_root(models, model, tokenizer, tmp_path, monkeypatch):
    save_model(models / "further", model, tokenizer, base=models / "refers")
    assert description(models / "further")["base"] == str(models / "base")
    assert same_model(load(models / "further")[0], model)
    # A shipped one by its name, so that any installation finds it.
    package = tmp_path / "site-packages" / "jexit"
    shutil.copytree(models / "base", package / "assets" / "small")
    monkeypatch.setattr(jexit, "__file__", str(package / "__init__.py"))
    save_model(tmp_path / "run", model, tokenizer, base="jexit/assets/small")
    assert description(tmp_path / "run")["base"] == "jexit/assets/small"
    assert same_model(load(tmp_path / "run")[0], model)
    # An adapter without a tokenizer uses its base's.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (models / "refers" / name).unlink()
    assert load(models / "refers")[1].encode("sum 12") == tokenizer.encode("sum 12")


def test_a_model_is_found_in_a_run_and_in_the_hubs_cache(models, tmp_path, monkeypatch):
    from huggingface_hub import constants

    shutil.copytree(models / "whole", tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's, not Hugging Face's
    assert find_model(tmp_path / "run") == tmp_path / "run" / "model"
    (tmp_path / "link").symlink_to(tmp_path / "run")
    open_model(tmp_path / "link")
    # The hub's cache is made of links, as are copies of older `--local-dir`.
    cache = tmp_path / "hub" / "models--org--tiny"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    for folder in (snapshot, blobs, cache / "refs", tmp_path / "copy"):
        folder.mkdir(parents=True)
    (cache / "refs" / "main").write_text("abc")
    for number, file in enumerate(sorted(TOKENIZER.iterdir())):
        shutil.copy(file, blobs / f"{number:040x}")
        (snapshot / file.name).symlink_to(f"../../blobs/{number:040x}")
        (tmp_path / "copy" / file.name).symlink_to(blobs / f"{number:040x}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert find_model("org/tiny") == snapshot
    for path in ("org/tiny", snapshot, tmp_path / "copy"):
        assert open_model(path).tokenizer().vocab_size == 512


def test_what_is_no_model_is_one_sentence_with_what_makes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "begun" / "checkpoints").mkdir(parents=True)
    with pytest.raises(UserError, match=r"file is a file, but a model is a directory .*; give s"):
        open_model("file")
    for path, words in (
        ("empty", r"empty contains no model \(none of jexit\.json"),
        ("begun", "begun is a run that has not finished"),
        ("", "no model directory at"),
        ("runs/a/b", "no model directory at"),
        ("/nowhere", "no model directory at"),
        ("org/none", "no directory org/none, .*download the model first"),
        ("runs/sft-qwen2.5-0.5b", r"make it with .*--config=configs/sft\.py:qwen2\.5-0\.5b$"),
        ("runs/rl-tiny/model", r"make it with python -m jexit\.main --config=configs/rl\.py:tiny$"),
        ("models/qwen3-4b", r"convert\.from_hf --source=Qwen/Qwen3-4B --target=models/qwen3-4b$"),
    ):
        with pytest.raises(MissingFile, match=words):
            jexit.load(path)


# Writing


def test_a_directory_is_replaced_only_when_asked(models, model, tokenizer):
    before = tree(models / "whole")
    with pytest.raises(UserError, match=r"is not empty, but it must be .*; give another one, or"):
        save_model(models / "whole", model, tokenizer)
    assert tree(models / "whole") == before
    # Replacing the base itself keeps the weights.
    save_model(models / "base", model, tokenizer, base=models / "base", overwrite=True)
    assert same_model(load(models / "base")[0], model)
    assert description(models / "base")["source"] == "org/small"
    deeper = make_model(tokenizer.vocab_size, layers=4)
    with pytest.raises(UserError, match="base is not the base model of the model to be saved"):
        save_model(models / "new", deeper, tokenizer, base=models / "base")
    assert not (models / "new").exists()


def test_a_failed_write_leaves_the_old_directory_or_none(models, tokenizer, monkeypatch, full_disk):
    model, before = make_model(tokenizer.vocab_size), tree(models)
    write, calls = ArrayStore.write, []

    def interrupted(self, name, array):
        calls.append(name)
        if len(calls) % 5 == 4:
            raise KeyboardInterrupt
        write(self, name, array)

    def save(error, words):
        for target in ("whole", "new"):
            with pytest.raises(error, match=words):
                save_model(models / target, model, tokenizer, overwrite=True)
        assert tree(models) == before

    with monkeypatch.context() as patched:
        patched.setattr(ArrayStore, "write", interrupted)
        save(KeyboardInterrupt, None)
    with full_disk(2_000):
        save(UserError, r"cannot be written to .*; free some space")
    model.exits.b2[...] = jnp.full_like(model.exits.b2[...], jnp.nan)
    save(UserError, r"the parameter exits\.b2 contains NaN or infinity, so it is not writ")


# Loading


def test_dtypes_are_the_ones_asked_for(models, model, tokenizer):
    for dtype, expected in (("auto", "float32"), ("bfloat16", "bfloat16")):
        placed = {}

        def place(path, array, placed=placed):
            assert isinstance(array, np.ndarray) and path not in placed
            placed[path] = array.dtype.name
            return jnp.asarray(array)

        half = load(models / "refers", dtype=dtype, place=place)[0]
        kinds = {p: "float32" if is_trainable(p) else expected for p in parameters(half)}
        assert placed == kinds == {p: array.dtype.name for p, array in parameters(half).items()}
    save_model(models / "half", half, tokenizer)
    assert description(models / "half")["dtype"] == "bfloat16"
    stored, wanted = parameters(load(models / "half")[0]), parameters(model)
    for path, array in stored.items():
        kept = wanted[path] if is_trainable(path) else np.float32(jnp.bfloat16(wanted[path]))
        assert array.dtype == np.float32 and np.array_equal(array, kept), path
    with pytest.raises(UserError, match="dtype is 'float16', but it must be auto, float32 or bf"):
        load(models / "whole", dtype="float16")
    shutil.rmtree(models / "whole" / "base" / "final_norm.scale")
    ArrayStore(models / "whole" / "base").write("final_norm.scale", np.full(8, 3.4e38, np.float32))
    words = r"final_norm\.scale in .*whole has values that are too large for bfloat16; set"
    with pytest.raises(UserError, match=words):
        load(models / "whole", dtype="bfloat16")


def test_a_base_gets_fresh_exits_and_adapters(saved_once):
    found = load(saved_once / "base", exit_layers=(1, 2), exit_head=HEAD, lora=ADAPTER)[0]
    assert settings(found)[1:] == ((1, 2), ("mlp", "rms"), ADAPTER)
    values = parameters(found)
    assert np.all(values["exits.b2"] == HEAD.bias) and values["exits.w1"].std() > 0.1
    assert all(not v.any() for k, v in values.items() if k.endswith("lora_b"))
    assert all(v.std() > 0.1 for k, v in values.items() if k.endswith("lora_a"))
    first, again, other = (load(saved_once / "base", seed=seed)[0] for seed in (0, 0, 1))
    assert first.exit_layers == (1,)  # half way up a model too shallow for every 5th layer
    assert first.lora is None and same_model(first, again)
    assert not np.array_equal(parameters(first)["exits.w1"], parameters(other)["exits.w1"])


def test_settings_agree_with_the_directory_or_are_refused(saved_once):
    lora = LoRA(rank=2, alpha=6.0, dropout=0.0, targets=("down", "q"))
    options = {"exit_layers": (1, 2), "exit_head": HEAD, "lora": lora}
    found = load(saved_once / "refers", **options)[0]
    assert found.lora.dropout == 0.0 and found.lora.targets == ADAPTER.targets
    for options, words in (
        (
            {"exit_layers": (1,)},
            r"layers is \(1,\), but .* has exits\.layers=\(1, 2\); set config\.exits",
        ),
        (
            {"exit_head": ExitSettings(kind="linear")},
            "linear, but .* has exit_head.kind=mlp",
        ),
        (
            {"lora": dataclasses.replace(lora, rank=4)},
            "is 4, but .* has lora.rank=2; set",
        ),
        (
            {"lora": dataclasses.replace(lora, targets=("q",))},
            r"targets=\('down', 'q'\); set",
        ),
        ({"exit_layers": (2, 1)}, r"config\.exits\.layers is \(2, 1\), but exits must be rising"),
        ({"exit_layers": (1, 7)}, "exits must be rising layer numbers from 1 to 2"),
    ):
        with pytest.raises(UserError, match=words):
            load(saved_once / "refers", **options)
