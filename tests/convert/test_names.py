"""Names and layouts of every tensor, both ways, and against the libraries that own them."""

import numpy as np
import pytest
from flax import nnx

from convert import names
from jexit.config import PROJECTIONS, ExitSettings, LoRA
from jexit.io.weights import adapter_part, base_part, exit_part
from jexit.model.transformer import Transformer
from jexit.presets import FAMILIES, PRESETS, Architecture

LORA = LoRA(rank=3, targets=PROJECTIONS)
KINDS = [(family, tied) for family in FAMILIES for tied in (False, True)]


def architecture(family="qwen3", tied=True):
    return Architecture(
        family=family, vocab_size=67, width=32, layers=4, query_heads=4, kv_heads=2, head_dim=12,
        mlp_width=48, rope_theta=1e4, rms_norm_eps=1e-6, tied=tied, max_positions=64,
    )  # fmt: skip


def tensors_of(part):
    """Name and shape of every tensor in Hugging Face's files."""
    return {name: rule.file_shape(part.sizes) for rule, all_ in part.rules() for name in all_}


def test_every_layout_is_its_own_inverse_and_moves_every_entry():
    head = ExitSettings(continuation="linear")
    factored = ExitSettings(continuation="linear", continuation_rank=5, kind="linear", norm="none")
    parts = [base_part(architecture(*kind)) for kind in KINDS]
    parts += [exit_part(architecture(), (1, 3), each) for each in (head, factored)]
    for part in [*parts, adapter_part(architecture(), LORA)]:
        rules = [rule for rule, _ in part.rules()]
        assert len({rule.name for rule in rules}) == len({rule.path for rule in rules}) > 1
        for rule in rules:
            shape = rule.file_shape(part.sizes)
            tensor = np.arange(np.prod(shape)).reshape(shape)
            parameter = rule.to_jexit(tensor, part.sizes)
            assert parameter.shape == rule.shape(part.sizes)
            np.testing.assert_array_equal(rule.to_hf(parameter, part.sizes), tensor)
    # The query projection of Qwen3-4B is 4096 × 2560 in the file (its model card's figures).
    part = base_part(PRESETS["qwen3-4b"].architecture)
    assert tensors_of(part)["model.layers.35.self_attn.q_proj.weight"] == (4096, 2560)
    assert part.shapes()["blocks.attn.q.kernel"] == (36, 2560, 32, 128)


def test_names_and_shapes_are_hugging_faces_and_pefts():
    pytest.importorskip("torch")
    peft = pytest.importorskip("peft")
    import hf_models

    for family, tied in KINDS:
        model = hf_models.make_model(family, tie_word_embeddings=tied, head_dim=12)
        theirs = {name: tuple(tensor.shape) for name, tensor in model.named_parameters()}
        assert tensors_of(base_part(architecture(family, tied))) == theirs
    modules = [names.MODULE_OF_TARGET[target] for target in PROJECTIONS]
    assert [names.TARGET_OF_MODULE[module] for module in modules] == list(PROJECTIONS)
    config = peft.LoraConfig(r=3, target_modules=modules, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(hf_models.make_model("qwen3", tie_word_embeddings=True), config)
    state = peft.get_peft_model_state_dict(adapted)
    theirs = {name: tuple(tensor.shape) for name, tensor in state.items()}
    assert tensors_of(adapter_part(architecture(), LORA)) == theirs


def test_paths_and_shapes_are_the_models():
    """Every parameter of the model has a rule, and no rule lacks a parameter."""
    for kind in KINDS:
        arch = architecture(*kind)
        for head in (ExitSettings(), ExitSettings(continuation="linear", continuation_rank=5)):

            def build(arch=arch, head=head):
                options = {"exit_layers": (1, 3), "exit_head": head, "lora": LORA}
                return Transformer(arch, **options, rngs=nnx.Rngs(0))

            state = nnx.to_flat_state(nnx.state(nnx.eval_shape(build)))
            parts = (base_part(arch), adapter_part(arch, LORA), exit_part(arch, (1, 3), head))
            ours = {path: shape for part in parts for path, shape in part.shapes().items()}
            assert ours == {".".join(path): leaf.shape for path, leaf in state}
