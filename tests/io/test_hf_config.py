"""Hugging Face's config.json becomes an Architecture, or is refused in one sentence."""

import copy
import dataclasses
import itertools
import json
import math

import pytest
import transformers

from jexit.errors import MissingFile, UserError
from jexit.io.files import write_json
from jexit.io.hf_config import (
    architecture_of_config,
    config_of_architecture,
    read_architecture,
)
from jexit.presets import PRESETS, Yarn

# As published with Qwen/Qwen2.5-0.5B-Instruct, Qwen/Qwen3-4B and meta-llama/Llama-3.2-1B-Instruct.
QWEN2 = {
    "model_type": "qwen2", "hidden_act": "silu", "hidden_size": 896, "intermediate_size": 4864,
    "max_position_embeddings": 32768, "max_window_layers": 21, "num_attention_heads": 14,
    "num_hidden_layers": 24, "num_key_value_heads": 2, "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0, "sliding_window": 32768, "tie_word_embeddings": True,
    "torch_dtype": "bfloat16", "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3 = {
    "model_type": "qwen3", "attention_bias": False, "head_dim": 128, "hidden_act": "silu",
    "hidden_size": 2560, "intermediate_size": 9728, "max_position_embeddings": 40960,
    "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": None, "tie_word_embeddings": True, "use_sliding_window": False,
    "vocab_size": 151936,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "attention_bias": False, "eos_token_id": [128001, 128008, 128009],
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 8192,
    "max_position_embeddings": 131072, "mlp_bias": False, "num_attention_heads": 32,
    "num_hidden_layers": 16, "num_key_value_heads": 8, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
    "rope_scaling": LLAMA3, "rope_theta": 500000.0, "tie_word_embeddings": True,
    "vocab_size": 128256,
}  # fmt: skip
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
# What jexit makes of them; `PRESETS` is tested against published figures in test_config.
SCALINGS = {
    "yarn": (YARN, Yarn(factor=4.0, original_max_positions=32768)),
    "llama3": (LLAMA3, PRESETS["llama-3.2-1b"].architecture.rope_scaling),
}


def read(config, **changes):
    changed = {**config, **changes}
    return architecture_of_config({k: v for k, v in changed.items() if v != "gone"})


def test_published_configs_are_the_presets():
    assert read(QWEN2) == PRESETS["qwen2.5-0.5b"].architecture
    assert read(QWEN3) == PRESETS["qwen3-4b"].architecture
    assert read(LLAMA) == PRESETS["llama-3.2-1b"].architecture
    # max_window_layers counts the layers below that attend to everything.
    assert read(QWEN2, use_sliding_window=True, max_window_layers=24) == read(QWEN2)
    read(QWEN3, use_sliding_window=True, sliding_window=64, layer_types=["full_attention"] * 36)


def test_constants_come_from_the_file_and_absent_ones_are_transformers():
    for theta in (1e4, 5e6):
        for spelling in ({"rope_theta": theta}, {"rope_parameters": {"rope_theta": theta}}):
            arch = read(QWEN3, **{"rope_theta": "gone", **spelling}, rms_norm_eps=1e-5)
            assert (arch.rope_theta, arch.rms_norm_eps) == (theta, 1e-5)
    changed = read(QWEN3, head_dim=64, tie_word_embeddings=False)
    assert (changed.head_dim, changed.tied) == (64, False)
    for config in (QWEN2, QWEN3, LLAMA):
        less = {k: v for k, v in config.items() if k not in ("head_dim", "tie_word_embeddings")}
        arch = architecture_of_config(less)
        theirs = transformers.AutoConfig.for_model(**copy.deepcopy(less))
        heads = theirs.num_attention_heads
        assert arch.head_dim == (getattr(theirs, "head_dim", None) or theirs.hidden_size // heads)
        assert arch.tied == theirs.tie_word_embeddings
    assert read(QWEN2, num_key_value_heads="gone").kv_heads == QWEN2["num_attention_heads"]


def test_rope_scaling_in_every_spelling():
    for kind, (given, expected) in SCALINGS.items():
        less = {k: v for k, v in given.items() if k != "rope_type"}
        five = {"rope_theta": "gone", "rope_parameters": {**given, "rope_theta": 1e6}}
        four, three = ({"rope_scaling": given}, {"rope_scaling": {**less, "type": kind}})
        for spelling in (five, four, three):
            arch = read(QWEN3, **spelling)
            assert arch.rope_scaling == expected and arch.rope_theta == 1e6
        # Where the file leaves the original context out, transformers takes all positions for it.
        less = {k: v for k, v in given.items() if k != "original_max_position_embeddings"}
        assert read(QWEN3, rope_scaling=less).rope_scaling.original_max_positions == 40960
        # Where a file has both, transformers takes rope_scaling.
        both = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, **three}
        theirs = transformers.AutoConfig.for_model(**copy.deepcopy(QWEN3 | both))
        assert theirs.rope_parameters["rope_type"] == kind
        assert read(QWEN3, **both).rope_scaling == expected
    fine = {"beta_fast": 16, "beta_slow": 2, "attention_factor": 1.5, "truncate": False}
    expected = Yarn(factor=4.0, original_max_positions=32768, **fine)
    assert read(QWEN3, rope_scaling={**YARN, **fine}).rope_scaling == expected
    assert read(QWEN3, rope_scaling={"rope_type": "default"}).rope_scaling is None
    less = {"rope_type": "yarn", "original_max_position_embeddings": 10_240}
    assert read(QWEN3, rope_scaling=less).rope_scaling.factor == 4.0  # of 40,960 positions


def test_what_jexit_does_not_compute_is_refused_in_one_sentence():
    window = {"use_sliding_window": True, "sliding_window": 4096}
    window["layer_types"] = ["full_attention"] * 35 + ["sliding_attention"]
    for config, changes, words in (
        (QWEN2, {"model_type": "gone"}, "describes a None model"),
        (QWEN3, {"model_type": "qwen3_moe"}, "describes a 'qwen3_moe' model, but jexit supports"),
        (QWEN2, {"use_sliding_window": True}, "sliding window of 32768, but jexit supports"),
        (QWEN3, window, "sliding window of 4096"),
        (QWEN3, {"rope_scaling": {"type": "linear", "factor": 2}}, "has the rope type 'linear'"),
        (
            QWEN3,
            {
                "rope_parameters": {"rope_type": "default"},
                "rope_scaling": {"type": "linear", "factor": 2},
            },
            "has the rope type 'linear'",
        ),
        (LLAMA, {"rope_scaling": {"rope_type": ["x"]}}, "only default, llama3 and yarn"),
        (QWEN3, {"rope_scaling": {**LLAMA3, "low_freq_factor": None}}, "low_freq_factor is missi"),
        (QWEN3, {"rope_scaling": {**LLAMA3, "factor": 0}}, "scaling.factor is 0.0, but it must"),
        (QWEN3, {"rope_scaling": {**LLAMA3, "high_freq_factor": 1}}, "must be above low_freq_fact"),
        (QWEN3, {"rope_scaling": {**YARN, "factor": "x"}}, "factor in config.json is 'x'"),
        (QWEN3, {"rope_scaling": [1]}, "rope_scaling to [1], but it must be a JSON obj"),
        (
            QWEN3,
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            "each layer type",
        ),
        (QWEN3, {"partial_rotary_factor": 0.5}, "rotates only a part of each head"),
        (QWEN3, {"rope_theta": "gone"}, "has no rope_theta, which every model needs; copy"),
        (LLAMA, {"rms_norm_eps": "gone"}, "has no rms_norm_eps"),
        (QWEN3, {"vocab_size": None}, "has no vocab_size"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act to 'gelu', but jexit supports only silu"),
        (QWEN3, {"attention_bias": True}, "attention_bias to True, but jexit does not"),
        (LLAMA, {"attention_bias": True}, "attention_bias to True, but jexit does not"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias to True, but jexit does not support these biases"),
        (QWEN3, {"quantization_config": {"bits": 4}}, "quantised weights, which jexit does not"),
        (QWEN3, {"num_key_value_heads": 5}, "32 query heads cannot be divided evenly among 5"),
        (QWEN3, {"head_dim": 65}, "head_dim is 65, but it must be even"),
        *[(QWEN2, {"hidden_size": value}, "hidden_size") for value in ("x", -4, 0, 2.5, [1], True)],
        *[(QWEN3, {"rms_norm_eps": value}, "rms_norm_eps") for value in ("x", -4, {}, math.inf)],
    ):
        with pytest.raises(UserError) as caught:
            read(config, **changes)
        assert words in str(caught.value) and "\n" not in str(caught.value), changes


def test_the_message_names_the_file(tmp_path):
    with pytest.raises(MissingFile, match=r"not contain a config\.json; give the directory of a"):
        read_architecture(tmp_path / "none")
    mistral = json.dumps({**QWEN2, "model_type": "mistral"})
    for text, words in (
        (mistral, "describes"), ('{"model_type"', "is not valid JSON"), ("[1]", "contains a JSON")
    ):  # fmt: skip
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=f"{tmp_path}/config.json {words}"):
            read_architecture(tmp_path)


def test_transformers_reads_what_is_written(tmp_path):
    for preset, (kind, (given, scaling)) in itertools.product(
        ("qwen2.5-0.5b", "qwen3-4b", "smollm2-135m"), (*SCALINGS.items(), ("none", ({}, None)))
    ):
        arch = dataclasses.replace(PRESETS[preset].architecture, rope_scaling=scaling)
        directory = tmp_path / f"{preset}-{kind}"
        directory.mkdir()
        config = config_of_architecture(arch, dtype="bfloat16", eos_ids=(7, 3), pad_id=1)
        write_json(directory / "config.json", config)
        assert read_architecture(directory) == arch
        theirs = transformers.AutoConfig.from_pretrained(directory)
        assert theirs.architectures == [f"{arch.family.title()}ForCausalLM"]
        assert theirs.rope_parameters.items() >= {**given, "rope_theta": arch.rope_theta}.items()
        assert set(getattr(theirs, "layer_types", ["full_attention"])) == {"full_attention"}
        assert (theirs.eos_token_id, theirs.pad_token_id) == ([3, 7], 1)
        # And what transformers saves in its own spelling comes back as well.
        theirs.save_pretrained(directory)
        assert read_architecture(directory) == arch
