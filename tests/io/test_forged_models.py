"""Model directories that somebody has tampered with: each is one sentence, and at once."""

import json
import os
import pathlib
import re
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import jexit
from jexit.aot import programs
from jexit.io.model_dir import load
from jexit.io.model_source import find_model, open_model
from small_runs import make_config

ASSETS = pathlib.Path(jexit.__file__).parent / "assets"
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
READ = {  # what jexit reads of each directory; the library reads the tokenizer's own two
    "hf": ("config.json", WEIGHTS, "generation_config.json"),
    "peft": (
        "adapter_config.json",
        "adapter_model.safetensors",
        "exit_heads.json",
        "exit_heads.safetensors",
    ),
    "whole": ("jexit.json",),
}
TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
HOSTILE = {
    "nested": b'{"a": ' * 100_000,
    "listed": b"[" * 100_000,
    "infinite": b'{"format_version": 1e999}',
    "large": b'{"r": 1%s}' % (b"0" * 400),
    "nan": b'{"r": NaN}',
    "twice": b'{"r": 1, "r": 2}',
    "no object": b"[3]",
    "no text": b"\xff\xfe\x00",
}


@pytest.fixture
def copied(tmp_path, request):
    """Copies a directory: a Hugging Face checkpoint, an adapter and heads on it, or jexit's own."""

    def copy(kind: str) -> pathlib.Path:
        if kind == "whole":
            return request.getfixturevalue("models") / kind
        hf = shutil.copytree(ASSETS / "tiny", tmp_path / "hf")
        if kind == "hf":
            return hf
        peft = shutil.copytree(ASSETS / "tiny-calibrated", tmp_path / "peft")
        edit_json(peft / "adapter_config.json", base_model_name_or_path="../hf")
        return peft

    return copy


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def read(directory):
    """All that `load` reads of a directory before it makes the model."""
    source = open_model(directory)
    source.weights(), source.adapters(), source.exits(), source.tokenizer()


def refusal(directory, read=read):
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        read(directory)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize(
    ("kind", "name"),
    [(k, n) for k, names in READ.items() for n in names if n.endswith(".json")],
)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_json_that_is_none_is_named(copied, kind, name, text):
    source = copied(kind)
    (source / name).write_bytes(text)
    assert str(source / name) in refusal(source)


@pytest.mark.parametrize("name", TOKENIZER)
@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE)
def test_a_tokenizers_files_are_read_or_refused(copied, name, text):
    source = copied("hf")
    (source / name).write_bytes(text)
    try:
        read(source)
    except ValueError as error:
        assert str(source) in str(error) and "\n" not in str(error)


@pytest.mark.parametrize(
    ("kind", "name"), [(k, n) for k, names in READ.items() for n in (*names, TOKENIZER[0])]
)
@pytest.mark.parametrize("how", ["pipe", "device", "directory", "elsewhere"])
def test_what_is_no_file_of_its_own_is_not_read(copied, tmp_path, deadline, kind, name, how):
    source = copied(kind)
    path = source / name
    path.rename(tmp_path / "elsewhere")
    if how == "pipe":
        os.mkfifo(path)
    elif how == "directory":
        path.mkdir()
    else:
        path.symlink_to("/dev/zero" if how == "device" else tmp_path / "elsewhere")
    words = {"pipe": "is a named pipe, not a file", "device": "is a device, not a file"}
    words |= {"directory": "", "elsewhere": f"is a link to {tmp_path / 'elsewhere'}, outside of"}
    assert words[how] in refusal(source)


def test_a_pipe_among_the_arrays_is_not_read(copied, deadline):
    source = copied("whole")
    pipe = next((source / "base").rglob("manifest.ocdbt"))
    pipe.unlink()
    os.mkfifo(pipe)
    assert f"{pipe} is a named pipe" in refusal(source)


def test_a_folder_of_arrays_that_lies_elsewhere_is_not_read(copied, tmp_path):
    source = copied("whole")
    (source / "base").rename(tmp_path / "arrays")
    (source / "base").symlink_to(tmp_path / "arrays")
    assert f"base is a link to {tmp_path / 'arrays'}" in refusal(source)


@pytest.mark.parametrize("place", ["cache", "local"])
def test_the_hubs_cache_is_made_of_links(copied, tmp_path, monkeypatch, place):
    from huggingface_hub import constants

    source = copied("hf")
    cache = tmp_path / "hub" / "models--org--tiny"
    snapshot, blobs = cache / "snapshots" / "abc", cache / "blobs"
    blobs.mkdir(parents=True), (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("abc")
    directory = snapshot if place == "cache" else tmp_path / "copy"  # of older `--local-dir`
    directory.mkdir(parents=True)
    for number, file in enumerate(sorted(source.iterdir())):
        file.rename(blobs / f"{number:040x}")
        target = f"../../blobs/{number:040x}" if place == "cache" else blobs / f"{number:040x}"
        (directory / file.name).symlink_to(target)
    read(directory)
    if place == "cache":
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.chdir(tmp_path)
        assert find_model("org/tiny") == snapshot
        read("org/tiny")


def test_a_directory_may_itself_be_a_link(copied, tmp_path):
    source = copied("hf")
    (tmp_path / "link").symlink_to(source)
    (source / "again.json").symlink_to("config.json")
    read(tmp_path / "link")


@pytest.mark.parametrize(
    "name", ["../outside.safetensors", "{tmp}/outside.safetensors", "sub/a.safetensors", "..", ""]
)
def test_an_index_names_files_beside_it(copied, tmp_path, name):
    directory = copied("hf")
    (directory / "sub").mkdir()
    for path in (tmp_path / "outside.safetensors", directory / "sub" / "a.safetensors"):
        shutil.copy(directory / WEIGHTS, path)
    (directory / WEIGHTS).unlink()
    name = name.format(tmp=tmp_path)
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    start = re.escape(f"names {name[:8]!r}"[:-1])  # a long name is shortened in its middle
    assert re.search(f"{start}.*', which is no .safetensors file beside it", refusal(directory))


def test_a_shard_that_leads_outside_is_not_read(copied, tmp_path):
    directory = copied("hf")
    shard = "model-00001-of-00001.safetensors"
    (directory / WEIGHTS).rename(tmp_path / "outside.safetensors")
    (directory / shard).symlink_to("../outside.safetensors")
    (directory / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": shard}}))
    assert f"{shard} is a link to {tmp_path}/outside.safetensors" in refusal(directory)


def test_a_tensor_that_is_there_twice_is_refused(copied):
    path = copied("hf") / WEIGHTS
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    entry = json.dumps({"model.norm.weight": json.loads(data[8:end])["model.norm.weight"]})
    header = f"{entry[:-1]},".encode() + data[9:end]
    path.write_bytes(len(header).to_bytes(8, "little") + header + data[end:])
    said = refusal(path.parent)
    assert f"{path} is damaged" in said and "duplicate key 'model.norm.weight'" in said


def test_a_tensor_in_two_shards_is_refused(copied):
    directory = copied("hf")
    shards = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    tensors = load_file(directory / WEIGHTS)
    save_file(tensors, directory / shards[0])
    save_file({"model.norm.weight": np.ones(96, np.float32)}, directory / shards[1])
    (directory / WEIGHTS).unlink()
    weight_map = dict.fromkeys(tensors, shards[0]) | {"model.norm.weight": shards[1]}
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    assert f"{shards[1]} and {shards[0]} both hold model.norm.weight" in refusal(directory)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"num_hidden_layers": 30_000_000}, "describes 30000000 layers, and its weights are 9"),
        ({"num_hidden_layers": 10**200}, "must be a whole number from 1 to 2147483647"),
        ({"num_hidden_layers": 9}, "missing model.layers.8."),
        ({"vocab_size": 10**9}, "misshapen model.embed_tokens.weight [512, 96] in place of"),
        ({"hidden_size": 10**9}, "misshapen model.embed_tokens.weight [512, 96] in place of"),
        ({"eos_token_id": 2**70}, "sets eos_token_id to 1180591620717411303424, which is no token"),
    ],
    ids=str,
)
def test_what_the_weights_do_not_hold_is_refused_at_once(copied, deadline, changes, words):
    source = copied("hf")
    edit_json(source / "config.json", **changes)
    assert words in refusal(source, load)


def test_what_the_weights_do_not_hold_is_not_compiled_either(copied, deadline):
    source = copied("hf")
    edit_json(source / "config.json", num_hidden_layers=30_000_000)
    config = make_config("rl", source)
    assert "describes 30000000 layers" in refusal(config, programs.architecture)


@pytest.mark.parametrize(
    ("name", "changes", "words"),
    [
        ("adapter_config.json", {"r": 10**9}, "misshapen base_model.model.model.layers.0."),
        ("adapter_config.json", {"r": 10**30}, "r to 1000000"),
        ("adapter_config.json", {"base_model_name_or_path": [1]}, "names [1] as its base"),
        ("adapter_config.json", {"base_model_name_or_path": "."}, "as its base; correct the path"),
        ("exit_heads.json", {"exit_layers": [1, 7]}, "missing exit_heads.7."),
        ("exit_heads.json", {"exit_layers": [*range(90_000)]}, "heads at (0, 1, 2, 3, 4, 5, ...);"),
    ],
    ids=str,
)
def test_an_adapter_is_compared_with_its_files_at_once(copied, deadline, name, changes, words):
    source = copied("peft")
    edit_json(source / name, **changes)
    assert words in refusal(source, load)
