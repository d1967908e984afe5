"""Model directories that are damaged: each is one sentence."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from saved_models import edit, make_model

from jexit.io import array_store
from jexit.io.array_store import ArrayStore
from jexit.io.model_dir import load, save_model


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, r"format version 2; this jexit reads 1: make the model again"),
        ({"format_version": "gone"}, r"format version None"),
        ({"architecture": "gone"}, r"is incomplete or altered \('architecture'\); convert it"),
        ({"architecture": {"layers": 3}}, "is incomplete or altered"),
        ({"architecture": [1]}, "is incomplete or altered"),
        ({"lora": {"rank": 2}}, "is incomplete or altered"),
        ({"exit_head": {"colour": "red"}}, "is incomplete or altered"),
        ({"eos_ids": ["a"]}, r"is incomplete or altered \('a', which is no token's number\)"),
        ({"eos_ids": [-1]}, "is incomplete or altered"),
        ({"base": 5}, r"is incomplete or altered \(base is no text\)"),
        ({"exit_head": {"kind": "big"}}, r"exit heads of kind 'big' with norm 'rms'"),
        ({"lora": {"rank": 2.5, "alpha": 6.0, "targets": ["q"]}}, r"LoRA of rank 2\.5"),
        ({"lora": {"rank": 2, "alpha": 6.0, "targets": ["head"]}}, "LoRA targets name 'head'"),
        ({"lora": {"rank": 2, "alpha": 6.0, "dropout": 1, "targets": ["q"]}}, "LoRA dropout is 1"),
        ({"exit_layers": [2, 1]}, r"exit heads at \(2, 1\); exits are rising layer numbers"),
        ({"exit_layers": [1, 3]}, r"exit heads at \(1, 3\); exits are rising .* from 1 to 2"),
    ],
)
def test_an_altered_description_is_one_sentence(models, changes, words):
    edit(models / "whole", **changes)
    with pytest.raises(ValueError, match=words) as caught:
        load(models / "whole")
    assert str(models / "whole") in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("layers", 30_000_000, r"misshapen .*blocks\.attn\.q\.kernel \[3, 8, 2, 4\] in place of"),
        ("layers", 2**31, r"layers is 2147483648; it is a whole number from 1 to 2147483647"),
        ("vocab_size", 10**9, r"misshapen embed\.embedding"),
        ("kv_heads", 0, "kv_heads is 0; it is a whole number"),
        ("width", "8", "width is '8'; it is a whole number"),
        ("rope_theta", -1.0, r"rope_theta is -1\.0; it is a number above 0"),
        ("tied", "no", "tied is 'no'; it is true or false"),
        ("family", "mistral", "family is 'mistral'; jexit computes qwen2, qwen3, llama"),
        ("rope_scaling", {"kind": "yarn", "factor": 0.0}, "missing .* 'original_max_positions'"),
        (
            "rope_scaling",
            {"kind": "yarn", "factor": 0.0, "original_max_positions": 32},
            r"factor is 0\.0; it is",
        ),
        ("rope_scaling", {"kind": "linear"}, "of kind 'linear'; jexit computes yarn and llama3"),
    ],
)
def test_an_altered_architecture_is_one_sentence_at_once(models, deadline, key, value, words):
    values = json.loads((models / "whole" / "jexit.json").read_text())["architecture"]
    edit(models / "whole", architecture=values | {key: value})
    with pytest.raises(ValueError, match=words) as caught:
        load(models / "whole")
    assert str(models / "whole") in str(caught.value) and "\n" not in str(caught.value)


def test_a_description_that_is_no_json_is_one_sentence(models):
    file = models / "whole" / "jexit.json"
    file.write_text(file.read_text()[:100])
    with pytest.raises(ValueError, match=r"jexit\.json is not valid JSON .*copy it again"):
        load(models / "whole")


@pytest.mark.parametrize("part", ["base", "adapters", "exits"])
@pytest.mark.parametrize("how", ["missing", "misshapen", "surplus", "damaged", "no_folder"])
def test_wrong_arrays_are_one_sentence(models, part, how):
    folder = models / "whole" / part
    store = ArrayStore(folder)
    name = store.names()[0]
    error, words = ValueError, rf"{part} are not those its configuration describes: {how} {name}"
    if how == "surplus":
        store.write("blocks.extra", np.zeros((2, 2), np.float32))
        words = words.replace(name, "blocks.extra")
    elif how == "damaged":
        for path in (folder / name).rglob("d/*"):
            path.write_bytes(b"")
        words = rf"the parameter {name} in .*{part} cannot be read .*copy or convert"
    elif how == "no_folder":
        shutil.rmtree(folder)
        error, words = FileNotFoundError, rf"lacks its \w+ \({part}/\)"
    else:
        shutil.rmtree(folder / name)
        if how == "misshapen":
            store.write(name, np.zeros((2, 2), np.float32))
    with pytest.raises(error, match=words):
        load(models / "whole")


@pytest.mark.parametrize("part", ["base", "adapters", "exits"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_arrays_that_are_not_finite_are_named(models, monkeypatch, part, value):
    store = ArrayStore(models / "whole" / part)
    name = store.names()[-1]
    array = store.read(name).copy()
    array.reshape(-1)[-1] = value
    shutil.rmtree(store.directory / name)
    with monkeypatch.context() as patched:
        patched.setattr(array_store, "all_finite", lambda array: True)
        store.write(name, array)
    words = rf"the parameter {name} in .*{part} holds NaN or infinity; copy or convert"
    with pytest.raises(ValueError, match=words):
        load(models / "whole")


def test_weights_that_a_narrower_dtype_cannot_hold_are_refused(models, tokenizer):
    model = make_model(tokenizer.vocab_size)
    scale = model.final_norm.scale
    scale[...] = jnp.full_like(scale[...], 3.4e38)
    save_model(models / "large", model, tokenizer)
    load(models / "large", dtype="float32")
    words = r"final_norm\.scale of .*large is too large for bfloat16; load it in a wider dtype"
    with pytest.raises(ValueError, match=words):
        load(models / "large", dtype="bfloat16")


@pytest.mark.parametrize("part", ["weights", "adapters", "exits"])
def test_a_model_that_is_not_finite_is_not_written(models, tokenizer, part):
    model = make_model(tokenizer.vocab_size)
    broken = {
        "weights": model.final_norm.scale,
        "adapters": model.blocks.attn.q.lora_b,
        "exits": model.exits.b2,
    }[part]
    broken[...] = jnp.full_like(broken[...], jnp.nan)
    before = sorted(models.rglob("*"))
    with pytest.raises(ValueError, match=r"the parameter .* holds NaN or infinity, so it is not w"):
        save_model(models / "whole", model, tokenizer, overwrite=True)
    assert sorted(models.rglob("*")) == before


def test_a_missing_tokenizer_is_one_sentence(models):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (models / "whole" / name).unlink()
    with pytest.raises(FileNotFoundError, match="holds no tokenizer"):
        load(models / "whole")


def test_an_adapter_without_a_tokenizer_uses_its_bases(models, tokenizer):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (models / "refers" / name).unlink()
    found = load(models / "refers")[1]
    assert found.encode("sum 12") == tokenizer.encode("sum 12")


def test_a_tokenizer_with_more_tokens_than_embeddings_is_refused(tmp_path, tokenizer):
    save_model(tmp_path / "m", make_model(tokenizer.vocab_size - 1), tokenizer)
    with pytest.raises(ValueError, match=r"tokens, the model only \d+ embeddings; use the model's"):
        load(tmp_path / "m")


def test_a_base_that_is_gone_is_named_with_the_remedy(models):
    shutil.rmtree(models / "base")
    with pytest.raises(
        FileNotFoundError, match=r"needs its base model at \.\./base, which is gone"
    ):
        load(models / "refers")
    (models / "base").mkdir()
    with pytest.raises(FileNotFoundError, match=r"correct the path in jexit\.json"):
        load(models / "refers")


def test_a_base_that_has_changed_is_refused(models):
    values = json.loads((models / "base" / "jexit.json").read_text())["architecture"]
    edit(models / "base", architecture={**values, "rope_theta": 1e4})
    with pytest.raises(ValueError, match=r"is another model now \(rope_theta 10000.0 in place of"):
        load(models / "refers")


def test_a_base_that_leads_back_is_refused(models):
    edit(models / "refers", base=".")
    with pytest.raises(ValueError, match=r"refers, which is made of it, as its base; correct .*js"):
        load(models / "refers")
    edit(models / "base", base="../refers")
    edit(models / "refers", base="../base")
    with pytest.raises(ValueError, match=r"names .*refers, which is made of it, as its base"):
        load(models / "refers")


def test_a_base_with_adapters_of_its_own_is_refused(models):
    edit(models / "refers", base="../whole")
    with pytest.raises(ValueError, match=r"has adapters itself; merge them first"):
        load(models / "refers")
