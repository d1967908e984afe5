"""`python -m convert.to_hf`: what transformers and peft make of it equals jexit's student."""

import copy
import json

import jax
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from saved_models import same_model

import jexit
from convert import from_hf, to_hf
from jexit.config import ExitSettings
from jexit.io.model_dir import save_model
from tolerances import LOGITS

torch = pytest.importorskip("torch")
hf_models = pytest.importorskip("hf_models")
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

EXITS = (1, 3)
TOKENS_BT = hf_models.random_tokens(2, 14, seed=8)


# Names and layouts of every family are held against transformers in test_names.
EVERY_FAMILY = pytest.mark.parametrize(
    "family",
    ["qwen2", *(pytest.param(name, marks=pytest.mark.slow) for name in ("qwen3", "llama"))],
)


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


def test_there_and_back_every_tensor_is_bit_equal(tmp_path):
    for family, dtype, options in (
        ("qwen2", torch.bfloat16, {"max_shard_size": "20KB"}),
        ("qwen3", torch.float16, {}),
        ("llama", torch.float32, {"max_shard_size": "20KB"}),
    ):
        hf, ours, back = (tmp_path / f"{family}-{part}" for part in ("hf", "jexit", "again"))
        scaling = {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0}
        if family == "llama":
            scaling |= {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
        scaling |= {"original_max_position_embeddings": 128}
        tied = family == "qwen3"
        theirs = hf_models.make_model(family, tie_word_embeddings=tied, rope_parameters=scaling)
        hf_models.save(hf, theirs.to(dtype), **options)
        assert from_hf.main([f"--source={hf}", f"--target={ours}"]) == 0
        again = load(export(ours, back))
        assert not list(back.glob("exit_heads*")) and again.dtype == dtype
        before, after = tensors_of(hf), tensors_of(back)
        assert before.keys() == after.keys()
        for name, tensor in before.items():
            assert tensor.dtype == after[name].dtype, name
            assert tensor.tobytes() == after[name].tobytes(), name
        np.testing.assert_array_equal(logits(again), logits(load(hf)))
        assert theirs.config.rope_parameters.items() <= again.config.rope_parameters.items()


@EVERY_FAMILY
def test_a_merged_student_in_transformers_equals_jexits(students, tmp_path, family):
    model, directory = students(family)
    target = export(directory, tmp_path / family)
    theirs = load(target)
    student = jexit.forward(model, TOKENS_BT)
    teacher = jexit.forward(model, TOKENS_BT, adapters=False)
    assert np.abs(logits(theirs) - student.logits_BTV).max() <= LOGITS
    assert np.abs(logits(theirs) - teacher.logits_BTV).max() > 0.5
    hazard_BTE = hazards_in_torch(theirs, target)
    assert np.abs(hazard_BTE - student.hazard_logits_BTE).max() <= LOGITS
    # Merged weights and the heads beside them are a model directory of jexit, too.
    merged, _ = jexit.load(target)
    assert merged.lora is None and merged.exit_layers == EXITS
    policy = jexit.Prescribed(np.random.default_rng(0).choice([*EXITS, 4], TOKENS_BT.shape))
    found, truth = (jexit.forward(each, TOKENS_BT, policy=policy) for each in (merged, model))
    assert np.abs(found.logits_BTV - truth.logits_BTV).max() <= LOGITS
    assert np.abs(found.hazard_logits_BTE - truth.hazard_logits_BTE).max() <= LOGITS


def hazards_in_torch(model, directory):
    """Hazard logits of the exit heads in a directory, read as their description says."""
    config = json.loads((directory / "exit_heads.json").read_text())
    assert config["exit_layers"] == list(EXITS) and config["kind"] == "mlp"
    heads = {k: torch.tensor(v) for k, v in load_file(directory / "exit_heads.safetensors").items()}
    functions, found = torch.nn.functional, []
    with torch.no_grad():
        residuals = hf_models.residuals_by_hand(model, TOKENS_BT, np.full(TOKENS_BT.shape, 4))
        for layer in EXITS:
            at = f"exit_heads.{layer}"
            norm = heads[f"{at}.norm.weight"]
            x = functions.rms_norm(residuals[layer], (32,), norm, config["rms_norm_eps"])
            x = functions.linear(x, heads[f"{at}.hidden.weight"], heads[f"{at}.hidden.bias"]).relu()
            found.append(functions.linear(x, heads[f"{at}.out.weight"], heads[f"{at}.out.bias"]))
    return torch.cat(found, dim=-1).numpy()


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


@EVERY_FAMILY
def test_a_peft_adapter_on_its_base_equals_jexits_student(students, tmp_path, family):
    peft = pytest.importorskip("peft")
    model, directory = students(family)
    target = export(directory, tmp_path / family, "--adapter=peft")
    assert not list(target.rglob("model*.safetensors"))
    # It names its base itself, and carries its settings.
    adapted = peft.AutoPeftModelForCausalLM.from_pretrained(target).eval()
    student = np.asarray(jexit.forward(model, TOKENS_BT).logits_BTV)
    assert np.abs(logits(adapted) - student).max() <= LOGITS
    with adapted.disable_adapter():
        teacher = np.asarray(jexit.forward(model, TOKENS_BT, adapters=False).logits_BTV)
        assert np.abs(logits(adapted) - teacher).max() <= LOGITS
    config = json.loads((target / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["lora_dropout"]) == (3, 5.0, 0.1)
    # And comes back bit for bit.
    again, tokenizer = jexit.load(target)
    assert same_model(again, model) and tokenizer.has_chat_template


def test_a_peft_adapter_brings_a_base_that_nobody_has_published_or_names_another(
    students, tmp_path
):
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


def test_transformers_generates_from_it_and_stops_at_the_end_token(students, tmp_path):
    model, directory = students("qwen2")
    for adapter in ("peft", "merge"):
        target = export(directory, tmp_path / adapter, f"--adapter={adapter}")
        tokenizer = AutoTokenizer.from_pretrained(target)
        messages = [{"role": "user", "content": "a 1"}]
        assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>a 1"
        assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (0, 1)
    theirs = load(target)
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
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "precious").write_text("data")
    for source, options, target, words in (
        (checkpoints("qwen2"), ["--adapter=peft"], None, "no LoRA adapter to write; use --adap"),
        (directory, ["--base=x/y"], None, "--base names the base model of an adapter"),
        (tmp_path / "nowhere", [], None, "no model directory at"),
        (directory, [], tmp_path / "there", "is not empty"),
    ):
        assert words in refuses(to_hf.main, source, *options, target=target)


def test_altered_adapters_and_heads_are_refused(students, tmp_path, refuses):
    source = export(students("qwen2")[1], tmp_path / "adapter", "--adapter=peft")
    adapter = {"r": "three", "lora_alpha": -1.0, "lora_dropout": 1.5, "use_dora": True}
    adapter |= {"peft_type": "IA3", "target_modules": ["q_proj", "lm_head"]}
    heads = {"kind": "cubic", "norm": None, "exit_layers": ["1"], "format_version": 2}
    for name, changes in (("adapter_config.json", adapter), ("exit_heads.json", heads)):
        before = (source / name).read_text()
        for key, value in changes.items():
            (source / name).write_text(json.dumps(json.loads(before) | {key: value}))
            assert "; " in refuses(to_hf.main, source), key
        (source / name).write_text(before)
    for file in ("adapter_model.safetensors", "exit_heads.safetensors"):
        before = load_file(source / file)
        name = sorted(before)[-1]
        save_file(before | {name: np.full_like(before[name], np.nan)}, source / file)
        words = f"{name} in {source / file} contains NaN or infinity"
        assert words in refuses(from_hf.main, source)
        save_file(before, source / file)
