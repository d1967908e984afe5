"""Model directories: what is saved is what is loaded, under settings that agree."""

import json
import resource
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
from jexit.data.tokenizer import Tokenizer
from jexit.io.array_store import ArrayStore
from jexit.io.model_dir import load, save_model
from jexit.io.model_source import open_model
from jexit.model.exits import ExitSettings
from jexit.model.lora import LoRA


def tree(directory):
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


def test_a_whole_model_comes_back(saved_once, model, tokenizer):
    found, found_tokenizer = load(saved_once / "whole")
    assert same_model(found, model)
    assert found_tokenizer.eos_ids == tokenizer.eos_ids
    assert found_tokenizer.vocab_size == tokenizer.vocab_size
    assert found_tokenizer.encode("sum 3729518") == tokenizer.encode("sum 3729518")


def test_a_model_that_refers_to_its_base_comes_back_and_stores_no_weights(saved_once, model):
    assert same_model(load(saved_once / "refers")[0], model)
    assert not (saved_once / "refers" / "base").exists()
    assert open_model(saved_once / "refers").source == "org/small"


def test_it_computes_what_the_saved_model_computes(saved_once, model):
    tokens_BT = jnp.asarray([[5, 9, 2, 7]])
    wanted = jexit.forward(model, tokens_BT, policy=jexit.Full())
    found = jexit.forward(jexit.load(saved_once / "refers")[0], tokens_BT, policy=jexit.Full())
    assert np.array_equal(found.logits_BTV, wanted.logits_BTV)
    assert np.array_equal(found.hazard_logits_BTE, wanted.hazard_logits_BTE)


@pytest.mark.parametrize(
    ("kind", "norm", "tied"), [("linear", "none", False), ("mlp", "none", True)]
)
def test_every_kind_of_head_comes_back_without_adapters(tmp_path, tokenizer, kind, norm, tied):
    head = ExitSettings(kind=kind, norm=norm)
    wanted = make_model(tokenizer.vocab_size, exits=(2,), head=head, lora=None, tied=tied)
    save_model(tmp_path / "m", wanted, tokenizer)
    assert same_model(load(tmp_path / "m")[0], wanted)


def test_every_end_token_comes_back(tmp_path, model):
    two_ends = Tokenizer.load(TOKENIZER)
    two_ends.eos_ids |= {7}
    save_model(tmp_path / "m", model, two_ends)
    assert load(tmp_path / "m")[1].eos_ids == two_ends.eos_ids
    # Other programs read them from the file that Hugging Face gives them.
    assert Tokenizer.load(tmp_path / "m").eos_ids == two_ends.eos_ids


def test_training_on_from_adapters_refers_to_the_root(models, model, tokenizer):
    save_model(models / "further", model, tokenizer, base=models / "refers")
    values = json.loads((models / "further" / "jexit.json").read_text())
    assert values["base"] == str(models / "base")
    assert same_model(load(models / "further")[0], model)


def test_a_shipped_base_is_named_so_that_any_installation_finds_it(
    models, model, tokenizer, tmp_path, monkeypatch
):
    package = tmp_path / "site-packages" / "jexit"
    shutil.copytree(models / "base", package / "assets" / "small")
    monkeypatch.setattr(jexit, "__file__", str(package / "__init__.py"))
    save_model(tmp_path / "run", model, tokenizer, base="jexit/assets/small")
    assert json.loads((tmp_path / "run" / "jexit.json").read_text())["base"] == "jexit/assets/small"
    assert same_model(load(tmp_path / "run")[0], model)


# Writing


def test_a_directory_is_replaced_only_when_asked(models, model, tokenizer):
    before = tree(models / "whole")
    with pytest.raises(ValueError, match="exists and is not empty; give another target"):
        save_model(models / "whole", model, tokenizer)
    assert tree(models / "whole") == before
    other = make_model(tokenizer.vocab_size, exits=(1,), lora=None)
    save_model(models / "whole", other, tokenizer, overwrite=True)
    assert same_model(load(models / "whole")[0], other)


def test_replacing_the_base_itself_keeps_the_weights(models, model, tokenizer):
    save_model(models / "base", model, tokenizer, base=models / "base", overwrite=True)
    assert same_model(load(models / "base")[0], model)
    assert json.loads((models / "base" / "jexit.json").read_text())["source"] == "org/small"


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("fails", ["interrupt", "disk"])
def test_a_failed_write_leaves_the_old_directory_or_none(
    models, model, tokenizer, monkeypatch, replaces, fails
):
    target = models / ("whole" if replaces else "new")
    before = tree(models)
    if fails == "interrupt":
        write, calls = ArrayStore.write, []

        def interrupted(self, name, array):
            calls.append(name)
            if len(calls) == 4:
                raise KeyboardInterrupt
            write(self, name, array)

        monkeypatch.setattr(ArrayStore, "write", interrupted)
        with pytest.raises(KeyboardInterrupt):
            save_model(target, model, tokenizer, overwrite=replaces)
    else:
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        # No file may pass this size: writes fail inside the storage library, as on a full disk.
        resource.setrlimit(resource.RLIMIT_FSIZE, (2_000, hard))
        try:
            with pytest.raises(ValueError, match=r"cannot be written to .*; free some space"):
                save_model(target, model, tokenizer, overwrite=replaces)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert tree(models) == before


def test_a_base_of_another_shape_is_refused_before_anything_is_written(models, tokenizer):
    other = make_model(tokenizer.vocab_size, layers=4)
    with pytest.raises(ValueError, match=r"base is not the base of the model to save"):
        save_model(models / "new", other, tokenizer, base=models / "base")
    assert not (models / "new").exists()


# Loading


def test_dtypes_are_the_ones_asked_for(models, model, tokenizer):
    for dtype, expected in (("auto", "float32"), ("float32", "float32"), ("bfloat16", "bfloat16")):
        found = parameters(load(models / "refers", dtype=dtype)[0])
        for path, array in found.items():
            assert array.dtype.name == ("float32" if is_trainable(path) else expected), path
    half = load(models / "refers", dtype="bfloat16")[0]
    save_model(models / "half", half, tokenizer)
    assert json.loads((models / "half" / "jexit.json").read_text())["dtype"] == "bfloat16"
    stored, wanted = parameters(load(models / "half")[0]), parameters(model)
    for path, array in stored.items():
        kept = wanted[path] if is_trainable(path) else np.float32(jnp.bfloat16(wanted[path]))
        assert array.dtype == np.float32 and np.array_equal(array, kept), path


@pytest.mark.parametrize("dtype", ["float16", "int8", "single precision"])
def test_another_dtype_is_refused(saved_once, dtype):
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; choose auto, float32 or bfloat16"):
        load(saved_once / "whole", dtype=dtype)


def test_place_gets_every_parameter_once_in_its_final_dtype(saved_once, model):
    placed = {}

    def place(path, array):
        assert isinstance(array, np.ndarray) and path not in placed
        placed[path] = array.dtype.name
        return jnp.asarray(array)

    found = load(saved_once / "refers", dtype="bfloat16", place=place)[0]
    assert placed == {path: array.dtype.name for path, array in parameters(found).items()}


def test_a_base_gets_fresh_exits_and_adapters(saved_once):
    found = load(saved_once / "base", exit_layers=(1, 2), exit_head=HEAD, lora=ADAPTER)[0]
    assert settings(found)[1:] == ((1, 2), ("mlp", "rms"), ADAPTER)
    values = parameters(found)
    assert np.all(values["exits.b2"] == HEAD.bias) and values["exits.w1"].std() > 0.1
    assert all(not v.any() for k, v in values.items() if k.endswith("lora_b"))
    assert all(v.std() > 0.1 for k, v in values.items() if k.endswith("lora_a"))


def test_fresh_exits_follow_the_seed(saved_once):
    first, again, other = (load(saved_once / "base", seed=seed)[0] for seed in (0, 0, 1))
    assert first.exit_layers == (1,)  # half way up a model too shallow for every 5th layer
    assert first.lora is None
    assert same_model(first, again)
    assert not np.array_equal(parameters(first)["exits.w1"], parameters(other)["exits.w1"])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"exit_layers": (1,)}, r"has exit heads at \(1, 2\), not at \(1,\); leave exits\.layers"),
        (
            {"exit_head": ExitSettings(kind="linear")},
            "exit heads of kind mlp with norm rms, not linear with rms; set exit_head",
        ),
        (
            {"lora": LoRA(rank=4, alpha=6.0, targets=("q", "down"))},
            r"adapters of rank 2 and alpha 6 on q, down, not rank 4 and alpha 6",
        ),
        ({"lora": LoRA(rank=2, alpha=6.0, targets=("q",))}, "on q, down, not .* on q; set lora"),
        ({"exit_layers": (2, 1)}, "distinct layer numbers from 1 upwards"),
        ({"exit_layers": (0, 1)}, "distinct layer numbers from 1 upwards"),
    ],
)
def test_settings_that_contradict_the_directory_are_refused(saved_once, options, words):
    with pytest.raises(ValueError, match=words):
        load(saved_once / "refers", **options)


def test_settings_that_agree_are_not_refused(saved_once):
    lora = LoRA(rank=2, alpha=6.0, dropout=0.0, targets=("down", "q"))
    options = {"exit_layers": (1, 2), "exit_head": HEAD, "lora": lora}
    found = load(saved_once / "refers", **options)[0]
    assert found.lora.dropout == 0.0 and found.lora.targets == ADAPTER.targets


@pytest.mark.parametrize("exits", [(3,), (1, 7)])
def test_an_exit_beyond_the_last_layer_is_refused(saved_once, exits):
    with pytest.raises(ValueError, match=rf"exit {exits[-1]} is not below the model's 3 layers"):
        load(saved_once / "base", exit_layers=exits)
