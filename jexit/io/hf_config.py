"""Hugging Face's config.json and jexit's `Architecture`, both ways.

Reads the spellings of transformers 4 (`rope_theta`, `rope_scaling`) and 5 (`rope_parameters`). What
shapes the computation comes from the file, never from a default.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from jexit.presets import (
    LARGEST_COUNT,
    Architecture,
    Llama3Rope,
    RopeScaling,
    Yarn,
    is_count,
    is_positive,
)
from jexit.untrusted import read_object

ARCHITECTURE_NAMES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "llama": "LlamaForCausalLM",
}
# Biases that a family's config.json can ask for, on projections that have none in jexit.
_BIASES = {"qwen2": (), "qwen3": ("attention_bias",), "llama": ("attention_bias", "mlp_bias")}
_QWEN3_HEAD_DIM = 128  # the format's own meaning of a Qwen3 config.json without head_dim


def write_json(file: pathlib.Path, values: dict[str, Any]) -> None:
    file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", "utf-8")


def read_architecture(directory: str | os.PathLike[str]) -> Architecture:
    """The architecture that a Hugging Face directory's config.json describes.

    Raises FileNotFoundError when there is no config.json, ValueError for another model family or a
    feature that jexit does not compute (sliding windows, other rope types, quantised weights).
    """
    file = pathlib.Path(directory) / "config.json"
    if not file.exists():
        raise FileNotFoundError(
            f"{directory} holds no config.json; give the directory of a Hugging Face checkpoint"
        )
    return architecture_of_config(read_object(file, "copy it again"), where=str(file))


def architecture_of_config(config: dict[str, Any], *, where: str = "config.json") -> Architecture:
    """`read_architecture` for a config that has been parsed; `where` names it in messages."""
    family = config.get("model_type")
    if not isinstance(family, str) or family not in ARCHITECTURE_NAMES:
        raise ValueError(
            f"{where} describes a {family!r} model; jexit reads model_type qwen2, qwen3 and llama "
            "(Qwen2, Qwen2.5, R1-Distill-Qwen, dense Qwen3, Llama 3, SmolLM2): use one of these"
        )
    _refuse_unsupported(config, family, where)

    def count(key: str, default: int | None = None) -> int:
        return positive(config, key, where, default, whole=True)

    width, heads = count("hidden_size"), count("num_attention_heads")
    head_dim = count("head_dim", _QWEN3_HEAD_DIM if family == "qwen3" else width // heads)
    rope_theta, rope_scaling = _rope(config, where)
    return Architecture(
        family=family,
        vocab_size=count("vocab_size"),
        width=width,
        layers=count("num_hidden_layers"),
        query_heads=heads,
        kv_heads=count("num_key_value_heads", heads),
        head_dim=head_dim,
        mlp_width=count("intermediate_size"),
        rope_theta=rope_theta,
        rms_norm_eps=positive(config, "rms_norm_eps", where),
        tied=bool(config.get("tie_word_embeddings", False)),
        max_positions=count("max_position_embeddings"),
        rope_scaling=rope_scaling,
    )


def config_of_architecture(
    arch: Architecture,
    *,
    dtype: str,
    eos_ids: Iterable[int] = (),
    pad_id: int | None = None,
    bos_id: int | None = None,
) -> dict[str, Any]:
    """A config.json that transformers 4 and 5 load; `dtype` is the weights' on disk."""
    ends = sorted(eos_ids)
    config: dict[str, Any] = {
        "architectures": [ARCHITECTURE_NAMES[arch.family]],
        "model_type": arch.family,
        "vocab_size": arch.vocab_size,
        "hidden_size": arch.width,
        "num_hidden_layers": arch.layers,
        "num_attention_heads": arch.query_heads,
        "num_key_value_heads": arch.kv_heads,
        "head_dim": arch.head_dim,
        "intermediate_size": arch.mlp_width,
        "hidden_act": "silu",
        "max_position_embeddings": arch.max_positions,
        "rms_norm_eps": arch.rms_norm_eps,
        "rope_theta": arch.rope_theta,
        "rope_scaling": arch.rope_scaling and _scaling_config(arch.rope_scaling),
        "tie_word_embeddings": arch.tied,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "use_cache": True,
        "bos_token_id": bos_id,
        "eos_token_id": ends[0] if len(ends) == 1 else ends or None,
        "pad_token_id": pad_id,
        "torch_dtype": dtype,
        **dict.fromkeys(_BIASES[arch.family], False),
    }
    if arch.family != "llama":
        config |= {"use_sliding_window": False, "sliding_window": None}
    return config


def _scaling_config(scaling: RopeScaling) -> dict[str, Any]:
    values = dataclasses.asdict(scaling)
    return {
        "rope_type": values.pop("kind"),
        "original_max_position_embeddings": values.pop("original_max_positions"),
        **{key: value for key, value in values.items() if value is not None},
    }


def _refuse_unsupported(config: dict[str, Any], family: str, where: str) -> None:
    if config.get("quantization_config"):
        raise ValueError(
            f"{where} has quantised weights; use the checkpoint in bfloat16, float16 or float32"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise ValueError(
            f"{where} sets hidden_act to {activation!r}; jexit computes silu only: use a "
            "checkpoint with hidden_act silu"
        )
    for key in _BIASES[family]:
        if value := config.get(key):
            raise ValueError(
                f"{where} sets {key} to {value!r}; jexit computes {family} without these biases: "
                f"use a checkpoint with {key} false"
            )
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        windowed = "sliding_attention" in kinds
    else:
        first, layers = config.get("max_window_layers"), config.get("num_hidden_layers")
        windowed = not (isinstance(first, int) and isinstance(layers, int) and first >= layers)
    if windowed and config.get("use_sliding_window") and config.get("sliding_window"):
        raise ValueError(
            f"{where} limits attention to a sliding window of {config['sliding_window']}; jexit "
            "computes full attention only: use a checkpoint with use_sliding_window false"
        )


def positive(
    values: dict[str, Any], key: str, where: str, default: Any = None, *, whole: bool = False
) -> Any:
    """A number above zero; `default` where the key is absent or null, an error if that is None."""
    value = values.get(key)
    if value is None:
        value = default
    if value is None:
        raise ValueError(f"{where} has no {key}; copy the file again")
    if not (is_count(value) if whole else is_positive(value)):
        rule = f"a whole number from 1 to {LARGEST_COUNT}" if whole else "a number above 0"
        raise ValueError(
            f"{where} sets {key} to {value!r}, which must be {rule}; copy the file again"
        )
    return value if whole else float(value)


def _rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """rope_theta and the scaling, from either spelling."""
    given: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = config.get(key) or {}
        if not isinstance(part, dict):
            raise ValueError(
                f"{where} sets {key} to {part!r}, which must be an object; copy config.json again "
                "from the checkpoint"
            )
        given |= part
    if any(isinstance(value, dict) for value in given.values()):
        raise ValueError(f"{where} gives rope parameters by layer type; jexit uses one set for all")
    theta = positive(
        {"rope_theta": given.get("rope_theta", config.get("rope_theta"))}, "rope_theta", where
    )
    if given.get("partial_rotary_factor", config.get("partial_rotary_factor")) not in (
        None,
        1,
        1.0,
    ):
        raise ValueError(f"{where} rotates a part of each head only; jexit rotates all of it")
    kind = given.get("rope_type", given.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind not in ("yarn", "llama3"):
        raise ValueError(
            f"{where} scales rope by {kind!r}; jexit knows default, llama3 and yarn: use a "
            "checkpoint with one of them"
        )
    positions = positive(config, "max_position_embeddings", where, whole=True)
    name = "original_max_position_embeddings"
    original = positive(
        {name: config.get(name) or given.get(name)}, name, where, positions, whole=True
    )
    if kind == "llama3":
        return theta, Llama3Rope(
            factor=positive(given, "factor", where),
            low_freq_factor=positive(given, "low_freq_factor", where),
            high_freq_factor=positive(given, "high_freq_factor", where),
            original_max_positions=original,
        )
    factor = positive(given, "factor", where, positions / original)
    return theta, Yarn(
        factor=factor,
        original_max_positions=original,
        beta_fast=positive(given, "beta_fast", where, 32.0),
        beta_slow=positive(given, "beta_slow", where, 1.0),
        attention_factor=_attention_factor(given, factor, where),
        truncate=bool(given.get("truncate", True)),
    )


def _attention_factor(given: dict[str, Any], factor: float, where: str) -> float | None:
    """The checkpoint's own attention factor, or the one that mscale and mscale_all_dim imply.

    mscale m stands for 0.1·m·ln(factor) + 1 and their ratio is the factor (DeepSeek-V2,
    arXiv:2405.04434, section 3.1.4, as transformers reads it). None: YaRN's own rule.
    """
    if given.get("attention_factor") is not None:
        return positive(given, "attention_factor", where)
    mscale, all_dim = given.get("mscale"), given.get("mscale_all_dim")
    if not (mscale and all_dim):
        return None
    mscale, all_dim = (positive(given, key, where) for key in ("mscale", "mscale_all_dim"))
    if factor <= 1.0:
        return 1.0
    return (0.1 * mscale * math.log(factor) + 1.0) / (0.1 * all_dim * math.log(factor) + 1.0)
