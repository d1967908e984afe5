"""Converts the JSON files of Hugging Face directories to jexit's settings, and back.

`config.json` corresponds to `Architecture`, PEFT's `adapter_config.json` to `LoRA`, and jexit's own
`exit_heads.json` to `ExitSettings`. `config.json` is read both as transformers 4 writes it
(`rope_theta`, `rope_scaling`) and as transformers 5 does (`rope_parameters`). Values that affect
the computation come from the file, never from jexit's own defaults.
"""

from __future__ import annotations

import dataclasses
import math
import os
import pathlib
from collections.abc import Iterable
from typing import Any

from convert import names
from jexit.config import PROJECTIONS, ExitSettings, LoRA
from jexit.errors import MissingFile, UserError, without_remedy
from jexit.presets import FAMILIES, SCALINGS, Architecture, Count, Number, RopeScaling
from jexit.settings import build, checked
from jexit.untrusted import read_object

ADAPTER_CONFIG = "adapter_config.json"
EXIT_CONFIG = "exit_heads.json"
_EXIT_FORMAT = 1
_EXIT_KEYS = (
    *("kind", "norm", "continuation", "continuation_rank"),
    *("hazard_temperature", "min_hazard", "sharpness", "target"),
)
# Keys of PEFT adapters that are more than plain LoRA on whole projections.
_BEYOND_LORA = (
    *("alora_invocation_tokens", "alpha_pattern", "corda_config", "eva_config", "exclude_modules"),
    *("fan_in_fan_out", "layer_replication", "layers_pattern", "layers_to_transform", "lora_bias"),
    *("megatron_config", "modules_to_save", "rank_pattern", "target_parameters"),
    *("trainable_token_indices", "use_dora", "use_qalora", "use_rslora"),
)
# Keys with which a family's config.json adds biases to projections that have none in jexit.
_BIASES = {"qwen2": (), "qwen3": ("attention_bias",), "llama": ("attention_bias", "mlp_bias")}
# The numbers of config.json, and the fields of `Architecture` that store them.
_FIELDS = {
    "vocab_size": "vocab_size",
    "hidden_size": "width",
    "num_hidden_layers": "layers",
    "num_attention_heads": "query_heads",
    "num_key_value_heads": "kv_heads",
    "head_dim": "head_dim",
    "intermediate_size": "mlp_width",
    "max_position_embeddings": "max_positions",
    "rms_norm_eps": "rms_norm_eps",
}
_QWEN3_HEAD_DIM = 128  # what a Qwen3 config.json without head_dim means


def read_architecture(directory: str | os.PathLike[str]) -> Architecture:
    """Returns the architecture that the config.json of a Hugging Face directory describes.

    Raises MissingFile if there is no config.json. Raises UserError for a model family or a feature
    that jexit does not support (sliding windows, other rope types, quantised weights).
    """
    file = pathlib.Path(directory) / "config.json"
    if not file.exists():
        raise MissingFile(
            f"{directory} does not contain a config.json; give the directory of a Hugging Face "
            "checkpoint"
        )
    return architecture_of_config(read_object(file, "copy it again"), where=str(file))


def architecture_of_config(config: dict[str, Any], *, where: str = "config.json") -> Architecture:
    """Returns the architecture that `config`, a parsed config.json, describes.

    `where` names the file in error messages. Raises UserError for a missing or invalid value, and
    for a model family or a feature that jexit does not support.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise UserError(
            f"{where} describes a {family!r} model, but jexit supports only model_type qwen2, "
            "qwen3 and llama (Qwen2, Qwen2.5, R1-Distill-Qwen, dense Qwen3, Llama 3, SmolLM2); "
            "use a checkpoint of one of these"
        )
    _refuse_unsupported(config, family, where)

    def number(key: str, default: Any = None) -> Any:
        return positive(config, key, where, default, whole=key != "rms_norm_eps")

    heads = number("num_attention_heads")
    head_dim = _QWEN3_HEAD_DIM if family == "qwen3" else number("hidden_size") // heads
    defaults = {"num_key_value_heads": heads, "head_dim": head_dim}
    rope_theta, rope_scaling = _rope(config, where)
    return Architecture(
        family=family,
        rope_theta=rope_theta,
        rope_scaling=rope_scaling,
        tied=bool(config.get("tie_word_embeddings", False)),
        **{field: number(key, defaults.get(key)) for key, field in _FIELDS.items()},
    )


def config_of_architecture(
    arch: Architecture,
    *,
    dtype: str,
    eos_ids: Iterable[int] = (),
    pad_id: int | None = None,
    bos_id: int | None = None,
) -> dict[str, Any]:
    """Returns the contents of a config.json for `arch`, readable by transformers 4 and 5.

    `dtype` is the name of the weights' dtype, such as "bfloat16". Token ids that are None or empty
    become null.
    """
    ends = sorted(eos_ids)
    config: dict[str, Any] = {
        "architectures": [f"{arch.family.title()}ForCausalLM"],
        "model_type": arch.family,
        **{key: getattr(arch, field) for key, field in _FIELDS.items()},
        "hidden_act": "silu",
        "rope_theta": arch.rope_theta,
        "rope_scaling": arch.rope_scaling and _scaling_config(arch.rope_scaling),
        "tie_word_embeddings": arch.tied,
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
        raise UserError(
            f"{where} describes quantised weights, which jexit does not support; use the "
            "checkpoint in bfloat16, float16 or float32"
        )
    activation = config.get("hidden_act", "silu")
    if activation != "silu":
        raise UserError(
            f"{where} sets hidden_act to {activation!r}, but jexit supports only silu; use a "
            "checkpoint with hidden_act silu"
        )
    for key in _BIASES[family]:
        if value := config.get(key):
            raise UserError(
                f"{where} sets {key} to {value!r}, but jexit does not support these biases in "
                f"{family} models; use a checkpoint with {key} false"
            )
    kinds = config.get("layer_types")
    if isinstance(kinds, list):
        windowed = "sliding_attention" in kinds
    else:
        first, layers = config.get("max_window_layers"), config.get("num_hidden_layers")
        windowed = not (isinstance(first, int) and isinstance(layers, int) and first >= layers)
    if windowed and config.get("use_sliding_window") and config.get("sliding_window"):
        raise UserError(
            f"{where} limits attention to a sliding window of {config['sliding_window']}, but "
            "jexit supports only full attention; use a checkpoint with use_sliding_window false"
        )


def positive(
    values: dict[str, Any], key: str, where: str, default: Any = None, *, whole: bool = False
) -> Any:
    """Returns the positive number `values[key]`, or `default` if the key is absent or null.

    With `whole`, the number must be an integer. `where` names the file in error messages. Raises
    UserError if the value is not a positive number, or if it is absent and there is no default.
    """
    value = default if values.get(key) is None else values[key]
    if value is None:
        raise UserError(
            f"{where} has no {key}, which every model needs; copy the file again from the "
            "original model"
        )
    return checked(Count if whole else Number, value, f"{key} in {where}")


def _rope(config: dict[str, Any], where: str) -> tuple[float, RopeScaling | None]:
    """Returns (rope_theta, scaling) of a parsed config.json; the scaling is None for plain RoPE.

    transformers 5 writes `rope_parameters`, and transformers 4 `rope_theta` and `rope_scaling`. In
    a file with both, `rope_scaling` takes precedence, as in transformers 5.
    """
    given: dict[str, Any] = {}
    for key in ("rope_parameters", "rope_scaling"):
        part = config.get(key) or {}
        if not isinstance(part, dict):
            raise UserError(
                f"{where} sets {key} to {part!r}, but it must be a JSON object; copy config.json "
                "again from the checkpoint"
            )
        if "type" in part:  # the older name of rope_type
            part = {"rope_type": part["type"]} | part
        given |= part
    if any(isinstance(value, dict) for value in given.values()):
        raise UserError(
            f"{where} has separate rope parameters for each layer type, but jexit supports only "
            "one set for all layers; use a checkpoint with one set"
        )
    theta = positive(
        {"rope_theta": given.get("rope_theta", config.get("rope_theta"))}, "rope_theta", where
    )
    rotated = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if rotated not in (None, 1, 1.0):
        raise UserError(
            f"{where} rotates only a part of each head (partial_rotary_factor {rotated!r}), but "
            "jexit supports only whole heads; use a checkpoint with partial_rotary_factor 1"
        )
    kind = given.get("rope_type", "default")
    if kind == "default":
        return theta, None
    if kind not in [*SCALINGS]:  # a list, because `kind` may not be hashable
        raise UserError(
            f"{where} has the rope type {kind!r}, but jexit supports only default, llama3 and "
            "yarn; use a checkpoint with one of these"
        )
    positions = positive(config, "max_position_embeddings", where, whole=True)
    name = "original_max_position_embeddings"
    found = {name: config.get(name) or given.get(name)}
    original = positive(found, name, where, positions, whole=True)
    fields = [field.name for field in dataclasses.fields(SCALINGS[kind])]
    values = {key: given[key] for key in fields if given.get(key) is not None}
    values |= {"kind": kind, "original_max_positions": original}
    if kind == "yarn":
        values["factor"] = positive(given, "factor", where, positions / original)
        values["attention_factor"] = _attention_factor(given, values["factor"], where)
    return theta, build(SCALINGS[kind], values, f"{where}: rope_scaling")


def _attention_factor(given: dict[str, Any], factor: float, where: str) -> float | None:
    """Returns the attention factor in YaRN's rope parameters `given`; None means the default.

    If mscale and mscale_all_dim are given instead, the factor is (0.1·mscale·ln(factor) + 1) /
    (0.1·mscale_all_dim·ln(factor) + 1), or 1 if factor ≤ 1 (DeepSeek-V2, arXiv:2405.04434, section
    3.1.4, as in transformers).
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


def read_adapter_config(directory: pathlib.Path) -> tuple[LoRA, str]:
    """Returns (LoRA settings, base model) of the PEFT adapter in `directory`.

    The base model is given by its hub id, its path or, if the file names none, "". Raises UserError
    for an adapter that is more than plain LoRA, such as DoRA or one with several ranks.
    """
    file = directory / ADAPTER_CONFIG
    config = read_object(file, "copy it again")
    if config.get("peft_type") != "LORA":
        raise UserError(
            f"{file} has peft_type {config.get('peft_type')!r}, but jexit supports only LORA; use "
            "a LoRA adapter"
        )
    used = [key for key in _BEYOND_LORA if config.get(key)]
    if config.get("bias", "none") != "none":
        used.append("bias")
    if used:
        raise UserError(
            f"{file} uses {', '.join(used)}, but jexit supports only plain LoRA: the same "
            "projections in every layer, one rank and one alpha, no biases, and no variants such "
            "as DoRA; use an adapter without these settings"
        )
    known = list(names.TARGET_OF_MODULE)  # a list, because modules may not be hashable
    modules = config.get("target_modules")
    modules = known if modules == "all-linear" else modules
    if not isinstance(modules, list) or not modules or any(m not in known for m in modules):
        raise UserError(
            f"{file} has target_modules {modules!r}, but jexit supports only {', '.join(known)}; "
            "use an adapter with only these"
        )
    targets = {names.TARGET_OF_MODULE[module] for module in modules}
    lora = build(
        LoRA,
        {
            "rank": positive(config, "r", str(file), whole=True),
            "alpha": positive(config, "lora_alpha", str(file)),
            "dropout": config.get("lora_dropout") or 0.0,
            "targets": [name for name in PROJECTIONS if name in targets],
        },
        str(file),
    )
    base = config.get("base_model_name_or_path") or ""
    if not isinstance(base, str):
        raise UserError(
            f"{file} sets base_model_name_or_path to {base!r}, but it must be a string; copy the "
            "file again from the original adapter"
        )
    return lora, base


def adapter_config(lora: LoRA, base: str) -> dict[str, Any]:
    """Returns the contents of adapter_config.json; `base` is the base model's name or path."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "target_modules": [names.MODULE_OF_TARGET[target] for target in lora.targets],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }


def read_exit_config(directory: pathlib.Path) -> tuple[tuple[int, ...], ExitSettings]:
    """Returns (exit layers, settings of the exit heads) from the file `directory`/exit_heads.json.

    Raises UserError if the file has another format version or invalid values.
    """
    file = directory / EXIT_CONFIG
    config = read_object(file, "copy it again")
    version, layers = config.get("format_version"), config.get("exit_layers")
    if version != _EXIT_FORMAT:
        raise UserError(
            f"{file} has format version {version!r}, but this version of jexit reads only "
            f"{_EXIT_FORMAT}; export the exit heads again with this version"
        )
    if not isinstance(layers, list):
        raise UserError(
            f"{file} sets exit_layers to {layers!r}, but it must be a list of layer numbers; "
            "export the exit heads again"
        )
    settings = {"kind": config.get("kind"), "norm": config.get("norm")}
    # The first files had no keys for the continuation.
    settings |= {key: config[key] for key in _EXIT_KEYS if key in config}
    try:
        return tuple(layers), build(ExitSettings, settings, str(file))
    except UserError as error:
        raise UserError(f"{without_remedy(error)}; export the exit heads again") from error


def exit_config(layers: tuple[int, ...], head: ExitSettings, eps: float) -> dict[str, Any]:
    """Returns the contents of exit_heads.json; `eps` is the epsilon of the heads' RMSNorm."""
    return {
        "format_version": _EXIT_FORMAT,
        "exit_layers": list(layers),
        **{key: getattr(head, key) for key in _EXIT_KEYS},
        "rms_norm_eps": eps,
    }
