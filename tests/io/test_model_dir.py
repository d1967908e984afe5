"""Model directories: what is saved is what is loaded, and what is wrong is said in one sentence."""

import json
import pathlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jexit
from jexit.data.tokenizer import Tokenizer
from jexit.io.array_store import ArrayStore
from jexit.io.model_dir import load, save_model, write_model
from jexit.io.model_source import find_model, open_model
from jexit.model.lora import LoRA
from jexit.model.transformer import ExitHeadSettings, Transformer
from jexit.presets import Architecture, Yarn

TOKENIZER = pathlib.Path(jexit.__file__).parent / "assets" / "tiny"
ADAPTER = LoRA(rank=2, alpha=6.0, dropout=0.1, targets=("q", "down"))
HEAD = ExitHeadSettings(kind="mlp", norm="rms", bias=-1.5)


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.load(TOKENIZER)


def make_model(vocab_size, *, exits=(1, 2), head=HEAD, lora=ADAPTER, tied=True, layers=3):
    """A model in which no parameter is at its initial value."""
    arch = Architecture(
        family="qwen3" if tied else "qwen2",
        vocab_size=vocab_size,
        width=8,
        layers=layers,
        query_heads=2,
        kv_heads=1,
        head_dim=4,
        mlp_width=12,
        rope_theta=5e6,
        rms_norm_eps=1e-5,
        tied=tied,
        max_positions=64,
        yarn=Yarn(factor=2.0, original_max_positions=32),
    )
    abstract = nnx.eval_shape(
        lambda: Transformer(arch, exit_layers=exits, exit_head=head, lora=lora, rngs=nnx.Rngs(0))
    )
    # Drawn by NumPy: to compile jax's generators for every shape would take most of the time.
    graphdef, state = nnx.split(abstract)
    rng = np.random.default_rng(1)
    state = jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), leaf.dtype), state)
    return nnx.merge(graphdef, state)


def parameters(model):
    flat = nnx.to_flat_state(nnx.state(model, nnx.Param))
    return {".".join(path): np.asarray(leaf[...]) for path, leaf in flat}


def same_model(found, wanted):
    """Same parameters, bit for bit, under the same settings."""
    ours, theirs = parameters(found), parameters(wanted)
    return (
        ours.keys() == theirs.keys()
        and all(ours[k].dtype == theirs[k].dtype for k in ours)
        and all(np.array_equal(ours[k], theirs[k]) for k in ours)
        and settings(found) == settings(wanted)
    )


def settings(model):
    head = model.exit_head
    return model.arch, model.exit_layers, (head.kind, head.norm), model.lora


def is_trainable(path):
    return path.startswith("exits.") or path.endswith((".lora_a", ".lora_b"))


@pytest.fixture(scope="module")
def model(tokenizer):
    return make_model(tokenizer.vocab_size)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory, model, tokenizer):
    """`base` (weights only), `whole` (everything) and `refers` (to `base`)."""
    root = tmp_path_factory.mktemp("models")
    weights = {k: v for k, v in parameters(model).items() if not is_trainable(k)}
    (root / "base").mkdir()
    write_model(
        root / "base",
        model.arch,
        weights=weights.items(),
        adapters={},
        exits={},
        exit_layers=(),
        exit_head=HEAD,
        lora=None,
        tokenizer=tokenizer,
        source="org/small",
    )
    save_model(root / "whole", model, tokenizer)
    save_model(root / "refers", model, tokenizer, base=root / "base")
    edit(root / "refers", base="../base")  # so that copies refer to their own
    return root


@pytest.fixture
def models(saved_once, tmp_path):
    return pathlib.Path(shutil.copytree(saved_once, tmp_path / "models"))


def edit(directory, **changes):
    file = directory / "jexit.json"
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({k: v for k, v in values.items() if v != "gone"}))


def tree(directory):
    return {
        p.relative_to(directory).as_posix(): p.read_bytes()
        for p in directory.rglob("*")
        if p.is_file()
    }


# Round trips


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
    head = ExitHeadSettings(kind=kind, norm=norm)
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
            {"exit_head": ExitHeadSettings(kind="linear")},
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


# Damage


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
        ({"eos_ids": 5}, "is incomplete or altered"),
        ({"exit_layers": [2, 1]}, r"exit heads at \(2, 1\); exits are rising layer numbers"),
        ({"exit_layers": [1, 3]}, r"exit heads at \(1, 3\); exits are rising .* from 1 to 2"),
    ],
)
def test_an_altered_description_is_one_sentence(models, changes, words):
    edit(models / "whole", **changes)
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
    error, words = ValueError, rf"stores {name} with shape \(2, 2\)"
    if how == "surplus":
        store.write("blocks.extra", np.zeros((2, 2), np.float32))
        words = r"stores blocks\.extra with shape \(2, 2\), the model has no such parameter"
    elif how == "damaged":
        for path in (folder / name).rglob("d/*"):
            path.write_bytes(b"")
        words = rf"the parameter {name} in .*{part} cannot be read .*copy or convert"
    elif how == "no_folder":
        shutil.rmtree(folder)
        error, words = FileNotFoundError, rf"lacks its \w+ \({part}/\)"
    else:
        shutil.rmtree(folder / name)
        words = rf"lacks the parameters {name}; copy or convert" if how == "missing" else words
        if how == "misshapen":
            store.write(name, np.zeros((2, 2), np.float32))
    with pytest.raises(error, match=words):
        load(models / "whole")


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


def test_a_base_with_adapters_of_its_own_is_refused(models):
    edit(models / "refers", base="../whole")
    with pytest.raises(ValueError, match=r"has adapters itself; merge them first"):
        load(models / "refers")


# Finding


def test_a_runs_directory_means_its_model(models, tmp_path):
    shutil.move(models / "whole", tmp_path / "run" / "model")
    (tmp_path / "run" / "config.json").write_text("{}")  # the run's, not Hugging Face's
    assert find_model(tmp_path / "run") == tmp_path / "run" / "model"


def test_what_is_no_model_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="file is a file; give the directory of a model"):
        open_model("file")
    with pytest.raises(FileNotFoundError, match=r"empty holds no model \(none of jexit\.json"):
        open_model("empty")
    for path in ("", "runs/a/b", "./none", "/nowhere"):
        with pytest.raises(FileNotFoundError, match="no model directory at"):
            open_model(path)
    with pytest.raises(
        FileNotFoundError, match=r"no directory org/none, .*fetch a hub model first"
    ):
        open_model("org/none")


def test_a_hub_id_means_the_local_cache(models, tmp_path, monkeypatch):
    from huggingface_hub import constants

    snapshot = tmp_path / "hub" / "models--org--small" / "snapshots" / "abc"
    shutil.copytree(models / "whole", snapshot)
    (tmp_path / "hub" / "models--org--small" / "refs").mkdir()
    (tmp_path / "hub" / "models--org--small" / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.chdir(tmp_path)
    assert open_model("org/small").directory == snapshot
