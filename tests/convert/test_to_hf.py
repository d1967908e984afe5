"""`python -m convert.to_hf`: what transformers and peft make of it equals jexit's student."""

import copy
import json
import pathlib
import shutil

import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

import jexit
from convert import from_hf, to_hf
from jexit.config import ExitSettings
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
    files = sorted(directory.glob("model*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


@pytest.mark.parametrize(
    ("family", "dtype", "sharded"),
    [
        ("qwen2", torch.bfloat16, True),
        ("qwen3", torch.float16, False),
        ("llama", torch.float32, True),
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
    options = {"max_shard_size": "20KB"} if sharded else {}
    hf_models.save(tmp_path / "hf", theirs.to(dtype), **options)
    assert from_hf.main([f"--source={tmp_path / 'hf'}", f"--target={tmp_path / 'jexit'}"]) == 0
    export(tmp_path / "jexit", tmp_path / "again")
    assert not list((tmp_path / "again").glob("exit_heads*"))
    before, after = tensors_of(tmp_path / "hf"), tensors_of(tmp_path / "again")
    assert before.keys() == after.keys()
    for name, tensor in before.items():
        assert tensor.dtype == after[name].dtype and tensor.tobytes() == after[name].tobytes(), name
    again = load(tmp_path / "again")
    assert again.dtype == dtype
    np.testing.assert_array_equal(logits(again), logits(load(tmp_path / "hf")))
    assert theirs.config.rope_parameters.items() <= again.config.rope_parameters.items()
    for key in ("tie_word_embeddings", "rms_norm_eps", "max_position_embeddings", "vocab_size"):
        assert getattr(again.config, key) == getattr(theirs.config, key)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_merged_student_in_transformers_equals_jexits(students, checkpoints, tmp_path, family):
    model, directory = students(family)
    target = export(directory, tmp_path / "merged")
    theirs = load(target)
    student = jexit.forward(model, TOKENS_BT)
    teacher = jexit.forward(model, TOKENS_BT, adapters=False)
    assert np.abs(logits(theirs) - student.logits_BTV).max() <= LOGITS
    assert np.abs(logits(theirs) - teacher.logits_BTV).max() > 0.5

    # The exit heads beside it, read as their description says, with torch.
    config = json.loads((target / "exit_heads.json").read_text())
    assert config["exit_layers"] == list(EXITS) and config["kind"] == "mlp"
    heads = load_file(target / "exit_heads.safetensors")
    functions = torch.nn.functional
    with torch.no_grad():
        residuals = hf_models.residuals_by_hand(theirs, TOKENS_BT, np.full(TOKENS_BT.shape, 4))
        for index, layer in enumerate(EXITS):
            prefix = f"exit_heads.{layer}."
            head = {name: torch.tensor(heads[name]) for name in heads if name.startswith(prefix)}
            head = {name.removeprefix(prefix): tensor for name, tensor in head.items()}
            eps = config["rms_norm_eps"]
            x = functions.rms_norm(residuals[layer], (32,), head["norm.weight"], eps)
            x = functions.linear(x, head["hidden.weight"], head["hidden.bias"]).relu()
            z = functions.linear(x, head["out.weight"], head["out.bias"])[..., 0]
            hazard_BT = np.asarray(student.hazard_logits_BTE[..., index])
            assert np.abs(z.numpy() - hazard_BT).max() <= LOGITS

    # Merged weights and the heads beside them are a model directory of jexit, too.
    merged, _ = jexit.load(target)
    assert merged.lora is None and merged.exit_layers == EXITS
    policy = jexit.Prescribed(np.random.default_rng(0).choice([*EXITS, 4], TOKENS_BT.shape))
    found, truth = (jexit.forward(each, TOKENS_BT, policy=policy) for each in (merged, model))
    assert np.abs(found.logits_BTV - truth.logits_BTV).max() <= LOGITS
    assert np.abs(found.hazard_logits_BTE - truth.hazard_logits_BTE).max() <= LOGITS


def test_merged_weights_take_the_dtype_asked_for(students, tmp_path):
    _, directory = students("qwen2")
    exact = tensors_of(export(directory, tmp_path / "float32", "--dtype=float32"))
    for dtype in ("bfloat16", "float16"):
        target = export(directory, tmp_path / dtype, f"--dtype={dtype}")
        assert json.loads((target / "config.json").read_text())["torch_dtype"] == dtype
        assert str(load(target).dtype) == f"torch.{dtype}"
        # The sum is rounded once: what is stored is the float32 merge, cast.
        kind = np.dtype(getattr(ml_dtypes, dtype, None) or dtype)
        for name, tensor in tensors_of(target).items():
            assert tensor.dtype == kind
            np.testing.assert_array_equal(tensor, exact[name].astype(kind), name)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_adapter_on_its_base_equals_jexits_student(students, checkpoints, tmp_path, family):
    peft = pytest.importorskip("peft")
    model, directory = students(family)
    target = export(directory, tmp_path / "adapter", "--adapter=peft")
    assert not list(target.rglob("model*.safetensors"))
    adapted = peft.PeftModel.from_pretrained(load(checkpoints(family)), target).eval()
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
    # And comes back bit for bit.
    again, tokenizer = jexit.load(target)
    assert again.lora == model.lora and again.exit_layers == model.exit_layers
    before, after = (dict(nnx.to_flat_state(nnx.state(each, nnx.Param))) for each in (model, again))
    assert before.keys() == after.keys() and tokenizer.has_chat_template
    for path, leaf in before.items():
        np.testing.assert_array_equal(leaf[...], after[path][...], ".".join(path))


def test_a_peft_export_brings_a_base_that_nobody_has_published_or_names_another(students, tmp_path):
    peft = pytest.importorskip("peft")
    model, directory = students("qwen2")
    save_model(tmp_path / "own", model, jexit.load(directory)[1])
    target = export(tmp_path / "own", tmp_path / "adapter", "--adapter=peft")
    alone = peft.AutoPeftModelForCausalLM.from_pretrained(target).eval()
    student = np.asarray(jexit.forward(model, TOKENS_BT).logits_BTV)
    assert np.abs(logits(alone) - student).max() <= LOGITS
    target = export(directory, tmp_path / "named", "--adapter=peft", "--base=owner/model")
    config = json.loads((target / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "owner/model"


def test_tokenizer_and_chat_template_come_along(students, checkpoints, tmp_path):
    for adapter in ("merge", "peft"):
        target = export(students("qwen2")[1], tmp_path / adapter, f"--adapter={adapter}")
        tokenizer = AutoTokenizer.from_pretrained(target)
        messages = [{"role": "user", "content": "a 1"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>a 1"
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
        published = checkpoints("qwen2") / "tokenizer.json"
        assert (target / "tokenizer.json").read_bytes() == published.read_bytes()


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


def test_linear_heads_without_norm_survive_the_round_trip(checkpoints, tmp_path):
    head = ExitSettings(kind="linear", norm="none", continuation="linear", continuation_rank=3)
    model, tokenizer = jexit.load(checkpoints("qwen3"), exit_layers=(2,), exit_head=head)
    for leaf in (model.exits.w2, model.blocks.continuation.update.kernel):
        leaf[...] = jax.random.normal(jax.random.key(0), leaf.shape)
    save_model(tmp_path / "model", model, tokenizer, base=checkpoints("qwen3"))
    again, _ = jexit.load(export(tmp_path / "model", tmp_path / "out"))
    assert again.exit_head == head
    policy = jexit.Prescribed(np.full(TOKENS_BT.shape, 2))
    found, truth = (jexit.forward(each, TOKENS_BT, policy=policy) for each in (again, model))
    np.testing.assert_array_equal(found.hazard_logits_BTE, truth.hazard_logits_BTE)
    np.testing.assert_array_equal(found.logits_BTV, truth.logits_BTV)


def test_what_cannot_be_exported_is_one_sentence(students, checkpoints, tmp_path, refuses):
    _, directory = students("qwen2")
    message = refuses(to_hf.main, checkpoints("qwen2"), "--adapter=peft")
    assert "has no adapter to write; use --adapter=merge" in message
    assert "--base names the base" in refuses(to_hf.main, directory, "--base=x/y")
    assert "no model directory at" in refuses(to_hf.main, tmp_path / "nowhere")
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("data")
    assert "is not empty" in refuses(to_hf.main, directory, target=tmp_path / "there")
    source = pathlib.Path(shutil.copytree(directory, tmp_path / "source"))
    shutil.rmtree(source / "exits")
    assert "lacks its exits (exits/)" in refuses(to_hf.main, source)
    values = json.loads((source / "jexit.json").read_text()) | {"base": str(tmp_path / "moved")}
    (source / "jexit.json").write_text(json.dumps(values))
    assert f"needs its base model at {tmp_path / 'moved'}" in refuses(to_hf.main, source)


def test_altered_adapters_and_heads_are_refused(students, tmp_path, refuses):
    source = export(students("qwen2")[1], tmp_path / "adapter", "--adapter=peft")
    for name, changes in (
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
    ):
        before = (source / name).read_text()
        (source / name).write_text(json.dumps(json.loads(before) | changes))
        assert "; " in refuses(to_hf.main, source), changes
        (source / name).write_text(before)
    for file in ("adapter_model.safetensors", "exit_heads.safetensors"):
        before = load_file(source / file)
        name = sorted(before)[-1]
        broken = before | {name: np.full_like(before[name], np.nan)}
        save_file(broken, source / file)
        words = f"{name} in {source / file} holds NaN or infinity"
        assert words in refuses(from_hf.main, source)
        save_file(before, source / file)
