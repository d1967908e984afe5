"""Model directories that are damaged or tampered with: each is one sentence, and at once."""

import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from saved_models import edit, make_model

import jexit
from jexit.aot import programs
from jexit.io import array_store
from jexit.io.array_store import ArrayStore
from jexit.io.model_dir import save_model
from jexit.io.model_source import open_model
from small_runs import make_config

ASSETS = pathlib.Path(jexit.__file__).parent / "assets"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
PARTS = ("base", "adapters", "exits")


@pytest.fixture
def hf(tmp_path):
    """A Hugging Face checkpoint."""
    return shutil.copytree(ASSETS / "tiny", tmp_path / "hf")


@pytest.fixture
def peft(hf, tmp_path):
    """An adapter and heads on it."""
    directory = shutil.copytree(ASSETS / "tiny-calibrated", tmp_path / "peft")
    edit_json(directory / "adapter_config.json", base_model_name_or_path="../hf")
    return directory


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(directory):
    """All that `load` reads of a directory before it makes the model."""
    source = open_model(directory)
    source.weights(), source.adapters(), source.exits(), source.tokenizer()
    for _ in source.weights().parameters():
        pass


def refusal(directory, read=read):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_json_that_is_none_is_named(hf, peft, models):
    for directory, names in (
        (hf, ("config.json", "generation_config.json", "tokenizer.json")),
        (peft, ("adapter_config.json", "exit_heads.json")),
        (models / "whole", ("jexit.json",)),
    ):
        for name in names:
            before = (directory / name).read_bytes()
            for text in (b'{"a": ' * 100_000, b"[3]", b'{"r": 1e999}', b"\xff\xfe\x00"):
                (directory / name).write_bytes(text)
                assert str(directory) in refusal(directory)
            (directory / name).write_bytes(before)


def test_what_is_no_file_of_its_own_is_not_read(hf, peft, models, tmp_path, deadline):
    elsewhere = tmp_path / "elsewhere"
    for directory, names in (
        (hf, ("config.json", WEIGHTS, "generation_config.json", "tokenizer.json")),
        (peft, ("adapter_config.json", "adapter_model.safetensors", "exit_heads.safetensors")),
        (models / "whole", ("jexit.json", "tokenizer.json")),
    ):
        for name in names:
            path = directory / name
            path.rename(elsewhere)
            os.mkfifo(path)
            assert "is a named pipe, not a file" in refusal(directory)
            path.unlink()
            path.symlink_to("/dev/zero")
            assert "is a device, not a file" in refusal(directory)
            path.unlink()
            path.symlink_to(elsewhere)
            assert f"is a link to {elsewhere}, which is outside its" in refusal(directory)
            path.unlink()
            elsewhere.rename(path)
    arrays = models / "whole" / "base"
    arrays.rename(elsewhere)
    arrays.symlink_to(elsewhere)
    assert f"base is a link to {elsewhere}" in refusal(models / "whole")
    arrays.unlink()
    elsewhere.rename(arrays)
    pipe = next(arrays.rglob("manifest.ocdbt"))
    pipe.unlink()
    os.mkfifo(pipe)
    assert f"{pipe} is a named pipe" in refusal(models / "whole")


def test_an_index_names_files_beside_it_and_a_tensor_is_there_once(hf, tmp_path):
    data, tensors = (hf / WEIGHTS).read_bytes(), load_file(hf / WEIGHTS)
    end = 8 + int.from_bytes(data[:8], "little")
    entry = json.dumps({"model.norm.weight": json.loads(data[8:end])["model.norm.weight"]})
    header = f"{entry[:-1]},".encode() + data[9:end]
    (hf / WEIGHTS).write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    said = refusal(hf)
    assert f"{hf / WEIGHTS} is damaged" in said and "duplicate key 'model.norm.weight'" in said
    (hf / WEIGHTS).rename(tmp_path / "outside.safetensors")

    def refused(weight_map):
        (hf / INDEX).write_text(json.dumps({"weight_map": weight_map}))
        return refusal(hf)

    for name in ("../outside.safetensors", f"{tmp_path}/outside.safetensors", "sub/a.safetensors"):
        assert "which is not a .safetensors file beside it" in refused({"model.norm.weight": name})
    shards = [f"model-{number:05}-of-00002.safetensors" for number in (1, 2)]
    save_file(tensors, hf / shards[0])
    shared = dict.fromkeys(tensors, shards[0]) | {"model.norm.weight": shards[1]}
    assert f"does not contain {shards[1]}" in refused(shared)
    save_file({"model.norm.weight": np.ones(96, np.float32)}, hf / shards[1])
    assert f"{shards[1]} and {shards[0]} both contain model.norm.weight" in refused(shared)


def test_settings_that_the_files_do_not_bear_out_are_refused_at_once(hf, peft, models, deadline):
    for path, changes, words in (
        (hf / "config.json", {"num_hidden_layers": 30_000_000}, "describes 30000000 layers, but"),
        (hf / "config.json", {"num_hidden_layers": 9}, "missing model.layers.8."),
        (hf / "config.json", {"vocab_size": 10**9}, "misshapen model.embed_tokens.weight [512, 9"),
        (hf / "config.json", {"eos_token_id": 2**70}, "sets eos_token_id to 118059162071741130342"),
        (peft / "adapter_config.json", {"r": 9_999}, "misshapen base_model.model.model.layers.0."),
        (
            peft / "adapter_config.json",
            {"base_model_name_or_path": [1]},
            "name_or_path to [1]",
        ),
        (
            peft / "adapter_config.json",
            {"base_model_name_or_path": "."},
            "must not form a cycle; correct the path",
        ),
        (peft / "exit_heads.json", {"exit_layers": [1, 7]}, "missing exit_heads.7."),
        (peft / "exit_heads.json", {"exit_layers": [*range(90_000)]}, "heads at (0, 1, 2, 3, 4, 5"),
    ):
        before = path.read_text()
        edit_json(path, **changes)
        assert words in refusal(path.parent, jexit.load), changes
        if "30000000" in words:  # nor is it compiled
            assert words in refusal(make_config("rl", hf), programs.architecture)
        path.write_text(before)
    architecture = json.loads((models / "whole" / "jexit.json").read_text())["architecture"]
    for changes, words in (
        ({"format_version": 2}, "format version 2, but this version of jexit reads only 1; make"),
        ({"architecture": "gone"}, "is incomplete or corrupted ('architecture' is missing); conv"),
        ({"architecture": {"layers": 3}}, "architecture.family is missing, but it must be one of"),
        ({"exit_head": {"colour": "red"}}, "exit_head.colour does not exist"),
        ({"eos_ids": ["a"]}, "incomplete or corrupted (eos_ids contains 'a', but a token id"),
        ({"base": 5}, "is incomplete or corrupted (base is 5, but it must be of type str)"),
        ({"exit_layers": [2, 1]}, "exit heads at (2, 1), but exits must be rising layer num"),
        ({"layers": 30_000_000}, "blocks.attn.q.kernel [3, 8, 2, 4] instead of"),
        ({"kv_heads": 0}, "architecture.kv_heads is 0, but it must be at least 1"),
        ({"family": "mistral"}, "family is 'mistral', but it must be one of qwen2, qwen3, llama"),
        (
            {"rope_scaling": {"kind": "linear"}},
            "kind is 'linear', but it must be yarn or llama3",
        ),
    ):
        before = (models / "whole" / "jexit.json").read_text()
        inside = changes.keys() <= architecture.keys()
        edit(models / "whole", **({"architecture": architecture | changes} if inside else changes))
        said = refusal(models / "whole", jexit.load)
        assert words in said and str(models / "whole") in said, changes
        (models / "whole" / "jexit.json").write_text(before)


def spoil(store, how):
    """Damages a part's arrays; the first two by name, where single ones are meant."""
    first, second = store.names()[:2]
    array, small = store.read(first).copy(), np.zeros((2, 2), np.float32)
    if how == "damaged":
        for path in (store.directory / first).rglob("d/*"):
            path.write_bytes(b"")
        return
    shutil.rmtree(store.directory / ("." if how == "gone" else first))
    if how == "not finite":
        array.reshape(-1)[-1] = np.nan
        store.write(first, array)
    if how == "others":
        shutil.rmtree(store.directory / second)
        store.write(second, small)
        store.write("extra", small)


def test_wrong_arrays_are_one_sentence(models, monkeypatch):
    for part in PARTS:
        folder = models / "whole" / part
        store = ArrayStore(folder)
        first, second = store.names()[:2]
        lists = rf"missing {first}; surplus extra; misshapen {second} \[2, 2\] instead of"
        for how, words in (
            ("others", rf"{part} do not match .* \({lists}"),
            ("damaged", f"the parameter {first} in {folder} cannot be read"),
            ("gone", rf"\({part}/\); convert or copy the model again"),
            ("not finite", f"{first} in {folder} contains NaN or infinity; copy or convert"),
        ):
            shutil.copytree(folder, models / "kept")
            with monkeypatch.context() as patched:
                patched.setattr(array_store, "all_finite", lambda array: True)
                spoil(store, how)
            assert re.search(words, refusal(models / "whole")), how
            shutil.rmtree(folder, ignore_errors=True)
            (models / "kept").rename(folder)


def test_a_tokenizer_is_there_and_fits(models, tokenizer):
    save_model(models / "m", make_model(tokenizer.vocab_size - 1), tokenizer)
    assert re.search(r"tokens, but the model has only \d+ embeddings", refusal(models / "m"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (models / "whole" / name).unlink()
    assert "contains no tokenizer" in refusal(models / "whole")


def test_a_base_that_is_none_is_named_with_the_remedy(models):
    values = json.loads((models / "base" / "jexit.json").read_text())["architecture"]
    edit(models / "base", architecture={**values, "rope_theta": 1e4})
    said = refusal(models / "refers")
    assert "replaced by another model (rope_theta is 10000.0 instead of" in said
    edit(models / "refers", base="../whole")
    assert "must not have any; merge them first" in refusal(models / "refers")
    edit(models / "refers", base=".")
    assert "refers as its base model, but base models must not form a cycle; correct" in refusal(
        models / "refers"
    )
    edit(models / "base", base="../refers", architecture=values)
    edit(models / "refers", base="../base")
    assert re.search(
        "names .*refers as its base model, but base models must not form a cycle",
        refusal(models / "refers"),
    )
    shutil.rmtree(models / "base")
    assert "needs its base model at ../base, but no model was found" in refusal(models / "refers")
    (models / "base").mkdir()
    assert "correct the path in jexit.json" in refusal(models / "refers")
