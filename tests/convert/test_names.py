"""Names and layouts of every tensor, both ways, and against the libraries that own them."""

import numpy as np
import pytest
from flax import nnx

from convert import names
from jexit.config import PROJECTIONS
from jexit.model.exits import ExitSettings
from jexit.model.lora import LoRA
from jexit.model.transformer import Transformer
from jexit.presets import FAMILIES, PRESETS, Architecture

ARCH = Architecture(
    family="qwen3",
    vocab_size=67,
    width=32,
    layers=4,
    query_heads=4,
    kv_heads=2,
    head_dim=12,
    mlp_width=48,
    rope_theta=1e4,
    rms_norm_eps=1e-6,
    tied=True,
    max_positions=64,
)
SIZES = names.axis_sizes(**ARCH.to_dict(), rank=3, exit_width=64)
TABLES = {
    "qwen2": names.base_rules("qwen2", tied=False),
    "qwen2-tied": names.base_rules("qwen2", tied=True),
    "qwen3": names.base_rules("qwen3", tied=False),
    "qwen3-tied": names.base_rules("qwen3", tied=True),
    "llama": names.base_rules("llama", tied=False),
    "llama-tied": names.base_rules("llama", tied=True),
    "adapters": names.adapter_rules(PROJECTIONS),
    "exits-mlp": names.exit_rules("mlp", "rms"),
    "exits-linear": names.exit_rules("linear", "none"),
}
RULES = [
    pytest.param(table, rule, id=f"{table}:{rule.path}")
    for table, rules in TABLES.items()
    for rule in rules
]


@pytest.mark.parametrize(("table", "rule"), RULES)
def test_every_name_leads_back_to_its_rule(table, rule):
    for layer in (0, 3, 27) if rule.stacked else (None,):
        assert names.find(TABLES[table], rule.name_at(layer)) == (rule, layer)


@pytest.mark.parametrize(("table", "rule"), RULES)
def test_every_layout_is_its_own_inverse_and_moves_every_entry(table, rule):
    tensor = np.arange(np.prod(rule.file_shape(SIZES))).reshape(rule.file_shape(SIZES))
    parameter = rule.to_jexit(tensor, SIZES)
    assert parameter.shape == rule.shape(SIZES)
    np.testing.assert_array_equal(rule.to_hf(parameter, SIZES), tensor)


@pytest.mark.parametrize("table", TABLES)
def test_names_and_paths_are_unique(table):
    rules = TABLES[table]
    assert len({rule.name for rule in rules}) == len({rule.path for rule in rules}) == len(rules)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.scale",
        "model.layers.00.self_attn.q_proj.weight",
        "model.layers.x.self_attn.q_proj.weight",
        "layers.0.self_attn.q_proj.weight",
        "model.embed_tokens.bias",
        "model.layers.{layer}.self_attn.q_proj",
        "",
    ],
)
def test_unknown_names_lead_nowhere(name):
    assert names.find(TABLES["qwen2"], name) is None


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_names_and_shapes_are_hugging_faces(family, tied):
    pytest.importorskip("torch")
    import hf_models

    model = hf_models.make_model(family, tie_word_embeddings=tied, head_dim=12)
    theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
    ours = {}
    for rule in names.base_rules(family, tied):
        for layer in range(4) if rule.stacked else (None,):
            ours[rule.name_at(layer)] = rule.file_shape(SIZES)
    assert ours == theirs


def test_adapter_names_and_shapes_are_pefts():
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import hf_models

    modules = [names.MODULE_OF_TARGET[target] for target in PROJECTIONS]
    config = peft.LoraConfig(r=3, target_modules=modules, task_type="CAUSAL_LM")
    model = peft.get_peft_model(hf_models.make_model("qwen3", tie_word_embeddings=True), config)
    theirs = {
        name: tuple(tensor.shape) for name, tensor in peft.get_peft_model_state_dict(model).items()
    }
    ours = {
        rule.name_at(layer): rule.file_shape(SIZES)
        for rule in TABLES["adapters"]
        for layer in range(4)
    }
    assert ours == theirs


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_paths_and_shapes_are_the_models(family, tied):
    """Every parameter of the model has a rule, and no rule lacks a parameter."""
    arch = Architecture.from_dict({**ARCH.to_dict(), "family": family, "tied": tied})

    def build():
        return Transformer(
            arch,
            exit_layers=(1, 3),
            exit_head=ExitSettings(),
            lora=LoRA(rank=3, alpha=3.0, targets=PROJECTIONS),
            rngs=nnx.Rngs(0),
        )

    state = nnx.state(nnx.eval_shape(build))
    theirs = {".".join(path): leaf.shape for path, leaf in nnx.to_flat_state(state)}
    ours = {}
    for rules, stack in (
        (names.base_rules(family, tied), 4),
        (TABLES["adapters"], 4),
        (TABLES["exits-mlp"], 2),
    ):
        for rule in rules:
            ours[rule.path] = (stack,) * rule.stacked + rule.shape(SIZES)
    assert ours == theirs


def test_targets_and_modules_name_each_other():
    assert set(names.MODULE_OF_TARGET) == set(PROJECTIONS)
    for target, module in names.MODULE_OF_TARGET.items():
        assert names.TARGET_OF_MODULE[module] == target
    assert names.MODULE_OF_TARGET["o"] == "o_proj" and names.MODULE_OF_TARGET["up"] == "up_proj"


def test_published_shapes():
    """The query projection of Qwen3-4B is 4096 × 2560 in the file (its model card's figures)."""
    sizes = names.axis_sizes(**PRESETS["qwen3-4b"].architecture.to_dict())
    rule, layer = names.find(TABLES["qwen3"], "model.layers.35.self_attn.q_proj.weight")
    assert layer == 35
    assert rule.file_shape(sizes) == (4096, 2560) and rule.shape(sizes) == (2560, 32, 128)
