"""`python -m convert.to_hf`: what transformers and peft make of it equals jexit's student."""

import copy
import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jexit
from convert import from_hf, to_hf
from jexit.io.model_dir import save_model
from jexit.presets import FAMILIES
from tolerances import LOGITS

torch = pytest.importorskip("torch")
hf_models = pytest.importorskip("hf_models")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

EXITS = (1, 3)
TOKENS_BT = hf_models.random_tokens(2, 14, seed=8)


def export(source, target, *options):
    assert to_hf.main([f"--source={source}", f"--target={target}", *options]) == 0
    return target


def logits(model, tokens_BT=TOKENS_BT):
    """In float64, so that what differs from it is jexit's rounding alone."""
    with torch.no_grad():
        exact = copy.deepcopy(model).double()
        return exact(torch.tensor(tokens_BT, dtype=torch.long)).logits.numpy()


def load(directory, **options):
    return AutoModelForCausalLM.from_pretrained(directory, dtype="auto", **options).eval()


def tensors_of(directory):
    found = {}
    for file in sorted(directory.glob("model*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize(
    ("family", "dtype", "sharded"),
    [
        ("qwen2", torch.float32, False),
        ("qwen2", torch.bfloat16, True),
        ("qwen3", torch.float32, True),
        ("qwen3", torch.float16, False),
        ("llama", torch.bfloat16, False),
    ],
)
def test_there_and_back_every_tensor_is_bit_equal(tmp_path, family, dtype, sharded):
    scaling = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
    if family == "llama":
        scaling |= {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    scaling |= {"original_max_position_embeddings": 128}
    theirs = hf_models.make_model(
        family, tie_word_embeddings=family == "qwen3", rope_parameters=scaling
    )
    hf_models.save(
        tmp_path / "hf", theirs.to(dtype), **({"max_shard_size": "20KB"} if sharded else {})
    )
    assert from_hf.main([f"--source={tmp_path / 'hf'}", f"--target={tmp_path / 'jexit'}"]) == 0
    export(tmp_path / "jexit", tmp_path / "again")
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype
        np.testing.assert_array_equal(
            tensor.reshape(-1).view(np.uint8), after[name].reshape(-1).view(np.uint8), name
        )
    again = load(tmp_path / "again")
    assert again.dtype == dtype
    np.testing.assert_array_equal(logits(again), logits(load(tmp_path / "hf")))
    assert theirs.config.rope_parameters.items() <= again.config.rope_parameters.items()
    for key in ("tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "vocab_size"):
        assert getattr(again.config, key) == getattr(theirs.config, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_merged_student_in_transformers_equals_jexits(students, tmp_path, family):
    model, directory = students(family)
    target = export(directory, tmp_path / "merged")
    theirs = load(target)
    found = logits(theirs)
    student = jexit.forward(model, TOKENS_BT)
    teacher = jexit.forward(model, TOKENS_BT, adapters=False)
    assert np.abs(found - student.logits_BTV).max() <= LOGITS
    assert np.abs(found - teacher.logits_BTV).max() > 0.5

    # The exit heads beside it, read as their description says, with torch.
    config = json.loads((target / "exit_heads.json").read_text())
    assert config["exit_layers"] == list(EXITS) and config["kind"] == "mlp"
    heads = {
        name: torch.tensor(array)
        for name, array in load_file(target / "exit_heads.safetensors").items()
    }
    with torch.no_grad():
        residuals = hf_models.residuals_by_hand(theirs, TOKENS_BT, np.full(TOKENS_BT.shape, 4))
        for index, layer in enumerate(EXITS):
            head = {
                name.removeprefix(f"exit_heads.{layer}."): tensor
                for name, tensor in heads.items()
                if name.startswith(f"exit_heads.{layer}.")
            }
            x = torch.nn.functional.rms_norm(
                residuals[layer], (32,), head["norm.weight"], config["rms_norm_eps"]
            )
            x = torch.nn.functional.linear(x, head["hidden.weight"], head["hidden.bias"]).relu()
            z = torch.nn.functional.linear(x, head["out.weight"], head["out.bias"])[..., 0]
            gap = np.abs(z.numpy() - np.asarray(student.hazard_logits_BTE[..., index])).max()
            assert gap <= LOGITS


def test_merged_export_loads_as_the_whole_student(students, tmp_path):
    """Merged weights and the heads beside them are a model directory of jexit too."""
    model, directory = students("qwen2")
    merged, _ = jexit.load(export(directory, tmp_path / "merged"))
    assert merged.lora is None and merged.exit_layers == EXITS
    depth_BT = np.random.default_rng(0).integers(1, 5, TOKENS_BT.shape)
    policy = jexit.Prescribed(depth_BT)
    found = jexit.forward(merged, TOKENS_BT, policy=policy)
    truth = jexit.forward(model, TOKENS_BT, policy=policy)
    assert np.abs(found.logits_BTV - truth.logits_BTV).max() <= LOGITS
    assert np.abs(found.hazard_logits_BTE - truth.hazard_logits_BTE).max() <= LOGITS


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_merged_weights_take_the_dtype_asked_for(students, tmp_path, dtype):
    _, directory = students("qwen2")
    target = export(directory, tmp_path / "merged", f"--dtype={dtype}")
    kinds = {tensor.dtype for tensor in tensors_of(target).values()}
    numpy_dtype = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
    assert kinds == {numpy_dtype}
    assert json.loads((target / "config.json").read_text())["torch_dtype"] == dtype
    theirs = load(target)
    assert str(theirs.dtype) == f"torch.{dtype}"
    # The sum is rounded once: what is stored is the float32 merge, cast.
    exact = tensors_of(export(directory, tmp_path / "exact", "--dtype=float32"))
    for name, tensor in tensors_of(target).items():
        np.testing.assert_array_equal(tensor, exact[name].astype(numpy_dtype), name)


@pytest.mark.parametrize("family", FAMILIES)
def test_peft_adapter_on_its_base_equals_jexits_student(students, checkpoints, tmp_path, family):
    peft = pytest.importorskip("peft")
    model, directory = students(family)
    target = export(directory, tmp_path / "adapter", "--adapter=peft")
    assert not list(target.rglob("model*.safetensors"))
    base = load(checkpoints(family))
    adapted = peft.PeftModel.from_pretrained(base, target).eval()
    student = np.asarray(jexit.forward(model, TOKENS_BT).logits_BTV)
    assert np.abs(logits(adapted) - student).max() <= LOGITS
    with adapted.disable_adapter():
        teacher = np.asarray(jexit.forward(model, TOKENS_BT, adapters=False).logits_BTV)
        assert np.abs(logits(adapted) - teacher).max() <= LOGITS
    # It names its base itself, and carries its settings.
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(target).eval()
    assert np.abs(logits(alone) - student).max() <= LOGITS
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5.0, 0.1)


def test_peft_export_loads_back_bit_for_bit(students, tmp_path):
    model, directory = students("qwen3")
    target = export(directory, tmp_path / "adapter", "--adapter=peft")
    again, tokenizer = jexit.load(target)
    assert again.lora == model.lora and again.exit_layers == model.exit_layers
    before, after = (dict(nnx.to_flat_state(nnx.state(each, nnx.Param))) for each in (model, again))
    assert before.keys() == after.keys()
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf[...], after[path][...], ".".join(path))
    assert tokenizer.has_chat_template


def test_peft_export_of_a_model_trained_here_brings_its_base(students, tmp_path):
    """No published checkpoint holds this base, so a copy lies beside the adapter."""
    peft = pytest.importorskip("peft")
    model, _ = students("qwen2")
    _, tokenizer = jexit.load(students("qwen2")[1])
    save_model(tmp_path / "own", model, tokenizer)
    target = export(tmp_path / "own", tmp_path / "adapter", "--adapter=peft")
    assert (target / "base" / "model.safetensors").exists()
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(target).eval()
    student = np.asarray(jexit.forward(model, TOKENS_BT).logits_BTV)
    assert np.abs(logits(alone) - student).max() <= LOGITS


def test_peft_base_can_be_named(students, tmp_path):
    _, directory = students("qwen2")
    target = export(directory, tmp_path / "adapter", "--adapter=peft", "--base=owner/model")
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/model"


@pytest.mark.parametrize("adapter", ["merge", "peft"])
def test_tokenizer_and_chat_template_come_along(students, checkpoints, tmp_path, adapter):
    _, directory = students("qwen2")
    target = export(directory, tmp_path / "out", f"--adapter={adapter}")
    tokenizer = AutoTokenizer.from_pretrained(target)
    published = AutoTokenizer.from_pretrained(checkpoints("qwen2"))
    messages = [{"role": "user", "content": "a 1"}]
    for each in (tokenizer, published):
        assert each.apply_chat_template(messages, tokenize=False) == "<user>a 1"
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    assert (target / "tokenizer.json").read_bytes() == (
        checkpoints("qwen2") / "tokenizer.json"
    ).read_bytes()


def test_transformers_generates_from_it_and_stops_at_the_end_token(students, tmp_path):
    model, directory = students("qwen2")
    theirs = load(export(directory, tmp_path / "merged"))
    assert theirs.generation_config.eos_token_id in (0, [0])
    _, tokenizer = jexit.load(directory)
    prompts = ["count 1 2", "a", "why not"]
    ours = jexit.generate(model, tokenizer, prompts, max_new_tokens=24, temperature=0.0)
    for prompt, tokens in zip(prompts, ours.tokens, strict=True):
        ids = torch.tensor([tokenizer.encode_prompt(prompt)])
        out = theirs.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=24
        )
        assert out[0, ids.shape[1] :].tolist() == tokens


def test_model_without_heads_or_adapters_exports_plainly(checkpoints, tmp_path):
    target = export(checkpoints("qwen2"), tmp_path / "out")
    assert not list(target.glob("exit_heads*"))
    np.testing.assert_array_equal(logits(load(target)), logits(load(checkpoints("qwen2"))))


def test_linear_heads_without_norm_survive_the_round_trip(checkpoints, tmp_path):
    from jexit.model.exits import ExitSettings

    head = ExitSettings(kind="linear", norm="none")
    model, tokenizer = jexit.load(checkpoints("qwen3"), exit_layers=(2,), exit_head=head)
    model.exits.w2[...] = jax.random.normal(jax.random.key(0), model.exits.w2.shape)
    save_model(tmp_path / "model", model, tokenizer, base=checkpoints("qwen3"))
    again, _ = jexit.load(export(tmp_path / "model", tmp_path / "out"))
    assert (again.exit_head.kind, again.exit_head.norm) == ("linear", "none")
    np.testing.assert_array_equal(
        jexit.forward(again, jnp.asarray(TOKENS_BT)).hazard_logits_BTE,
        jexit.forward(model, jnp.asarray(TOKENS_BT)).hazard_logits_BTE,
    )


def test_adapter_of_a_model_that_has_none_is_refused(checkpoints, refuses):
    message = refuses(to_hf.main, checkpoints("qwen2"), "--adapter=peft")
    assert "has no adapter to write; use --adapter=merge" in message


def test_base_without_an_adapter_is_refused(students, refuses):
    assert "--base names the base" in refuses(to_hf.main, students("qwen2")[1], "--base=x/y")


def test_source_that_is_no_model_is_refused(tmp_path, refuses):
    (tmp_path / "empty").mkdir()
    assert "holds no model" in refuses(to_hf.main, tmp_path / "empty")
    assert "no model directory at" in refuses(to_hf.main, tmp_path / "nowhere")


def test_target_that_exists_is_left_alone(students, tmp_path, refuses):
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("data")
    message = refuses(to_hf.main, students("qwen2")[1], target=tmp_path / "there")
    assert "exists and is not empty" in message


@pytest.mark.parametrize("part", ["base", "adapters", "exits"])
def test_directory_that_lost_a_part_is_refused(students, checkpoints, tmp_path, refuses, part):
    _, directory = students("qwen2")
    source = tmp_path / "source"
    if part == "base":
        assert from_hf.main([f"--source={checkpoints('qwen2')}", f"--target={source}"]) == 0
    else:
        shutil.copytree(directory, source)
    shutil.rmtree(source / part)
    assert f"lacks its {'weights' if part == 'base' else part}" in refuses(to_hf.main, source)


def test_base_that_is_gone_is_named(students, tmp_path, refuses):
    source = pathlib.Path(shutil.copytree(students("qwen2")[1], tmp_path / "source"))
    file = source / "jexit.json"
    values = json.loads(file.read_text()) | {"base": str(tmp_path / "moved")}
    file.write_text(json.dumps(values))
    message = refuses(to_hf.main, source)
    assert f"needs its base model at {tmp_path / 'moved'}" in message


def test_damaged_parameter_is_named(checkpoints, tmp_path, refuses):
    source = tmp_path / "source"
    assert from_hf.main([f"--source={checkpoints('qwen2')}", f"--target={source}"]) == 0
    for file in (source / "base" / "blocks.attn.q.kernel").rglob("*"):
        if file.is_file():
            os.truncate(file, file.stat().st_size // 2)
    assert "blocks.attn.q.kernel" in refuses(to_hf.main, source)


@pytest.mark.parametrize("file", ["adapter_model.safetensors", "exit_heads.safetensors"])
def test_adapters_and_heads_that_are_not_finite_are_named(students, tmp_path, refuses, file):
    source = export(students("qwen2")[1], tmp_path / "adapter", "--adapter=peft")
    tensors = load_file(source / file)
    name = sorted(tensors)[-1]
    tensors[name].reshape(-1)[0] = np.nan
    save_file(tensors, source / file)
    words = f"{name} in {source / file} holds NaN or infinity"
    assert words in refuses(from_hf.main, source)
    with pytest.raises(ValueError, match=words):
        jexit.load(source)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("adapter_config.json", {"r": None}),
        ("adapter_config.json", {"r": "three"}),
        ("adapter_config.json", {"lora_alpha": -1.0}),
        ("adapter_config.json", {"lora_dropout": 1.5}),
        ("adapter_config.json", {"target_modules": [["q_proj"]]}),
        ("adapter_config.json", {"target_modules": []}),
        ("adapter_config.json", {"target_modules": ["q_proj", "lm_head"]}),
        ("adapter_config.json", {"use_dora": True}),
        ("adapter_config.json", {"peft_type": "IA3"}),
        ("exit_heads.json", {"kind": "cubic"}),
        ("exit_heads.json", {"norm": None}),
        ("exit_heads.json", {"exit_layers": 3}),
        ("exit_heads.json", {"exit_layers": [3, 1]}),
        ("exit_heads.json", {"exit_layers": ["1"]}),
        ("exit_heads.json", {"exit_layers": [1, 4]}),
        ("exit_heads.json", {"exit_layers": [1, 2]}),
        ("exit_heads.json", {"format_version": 2}),
    ],
)
def test_altered_adapter_and_head_settings_are_refused(students, tmp_path, refuses, name, changes):
    source = export(students("qwen2")[1], tmp_path / "adapter", "--adapter=peft")
    file = source / name
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    assert "; " in refuses(to_hf.main, source)
