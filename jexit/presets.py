"""The architectures of the supported models, by preset name.

Configs read this table when they need a model's shape before its weights are available. The values
are those of the models' published config.json files. For a checkpoint that is loaded, its own
config.json counts instead.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, get_args

from jexit.errors import UserError
from jexit.settings import Bounds, build, check

LARGEST_COUNT = 2**31 - 1  # the largest 32-bit index

Family = Literal["qwen2", "qwen3", "llama"]  # model_type in config.json
FAMILIES: tuple[Family, ...] = get_args(Family)
Count = Annotated[int, Bounds(1, LARGEST_COUNT)]
Number = Annotated[float, Bounds(1e-30, 1e30)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN scaling of rotary embeddings (arXiv:2309.00071), parameterised as in Hugging Face."""

    kind: Literal["yarn"] = "yarn"
    factor: Number
    original_max_positions: Count
    beta_fast: Number = 32.0
    beta_slow: Number = 1.0
    attention_factor: Number | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        check(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's scaling of rotary embeddings, parameterised as in Hugging Face."""

    kind: Literal["llama3"] = "llama3"
    factor: Number
    low_freq_factor: Number
    high_freq_factor: Number
    original_max_positions: Count

    def __post_init__(self) -> None:
        check(self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"high_freq_factor is {self.high_freq_factor:g}, but it must be above "
                f"low_freq_factor, which is {self.low_freq_factor:g}; correct the rope scaling in "
                "config.json"
            )


RopeScaling = Yarn | Llama3Rope
SCALINGS = {"yarn": Yarn, "llama3": Llama3Rope}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """The sizes and constants that define one Qwen2, Qwen3 or Llama transformer.

    `width` is the size of the residual, and `head_dim` that of one attention head. `tied` says
    whether the output head shares the embedding matrix. Raises UserError if values are out of range
    or do not fit together.
    """

    family: Family
    vocab_size: Count
    width: Count
    layers: Count
    query_heads: Count
    kv_heads: Count
    head_dim: Count
    mlp_width: Count
    rope_theta: Number
    rms_norm_eps: Number
    tied: bool
    max_positions: Count
    rope_scaling: RopeScaling | None = None

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    def __post_init__(self) -> None:
        check(self)
        if self.query_heads % self.kv_heads:
            raise UserError(
                f"{self.query_heads} query heads cannot be divided evenly among {self.kv_heads} "
                "key/value heads; correct num_attention_heads or num_key_value_heads in "
                "config.json"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim is {self.head_dim}, but it must be even for rotary embeddings; correct "
                "it in config.json"
            )

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Architecture:
        values = dict(values)
        scaling = values.pop("rope_scaling", None)
        if yarn := values.pop("yarn", None):  # the name in the first model directories
            scaling = {"kind": "yarn", **yarn}
        if scaling is not None:
            kind = scaling.get("kind")
            if kind not in SCALINGS:
                raise UserError(
                    f"rope_scaling.kind is {kind!r}, but it must be yarn or llama3; choose one of "
                    "these"
                )
            scaling = build(SCALINGS[kind], scaling, "rope_scaling")
        return build(cls, values | {"rope_scaling": scaling}, "architecture")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A named model: the hub id of its weights, its architecture, and its default LoRA rank."""

    hub_id: str
    architecture: Architecture
    lora_rank: int = 8


_QWEN = {"rope_theta": 1e6, "rms_norm_eps": 1e-6, "tied": False}
_QWEN3 = _QWEN | {"family": "qwen3", "vocab_size": 151_936, "head_dim": 128}
_QWEN3 |= {"max_positions": 40_960}
_QWEN2 = _QWEN | {"family": "qwen2", "vocab_size": 152_064, "max_positions": 32_768}
_QWEN2_SMALL = _QWEN2 | {"vocab_size": 151_936, "tied": True}
_R1 = _QWEN2 | {"max_positions": 131_072}
_R1_SMALL = _R1 | {"rope_theta": 1e4}
_LLAMA = {"family": "llama", "rms_norm_eps": 1e-5, "tied": True}
_SMOLLM2 = _LLAMA | {"vocab_size": 49_152, "rope_theta": 1e5, "max_positions": 8192}
_LLAMA_3_2 = _LLAMA | {"vocab_size": 128_256, "rope_theta": 5e5, "max_positions": 131_072}
_LLAMA_3_2["rope_scaling"] = Llama3Rope(
    factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
)


def _preset(
    hub_id: str,
    common: dict[str, Any],
    width: int,
    layers: int,
    heads: tuple[int, int],
    mlp_width: int,
    *,
    lora_rank: int = 8,
    **other: Any,
) -> Preset:
    """Returns a preset; `heads` is (query, key/value heads), and `other` overrides `common`."""
    shape = {"width": width, "layers": layers, "mlp_width": mlp_width}
    shape |= {"query_heads": heads[0], "kv_heads": heads[1], "head_dim": width // heads[0]}
    architecture = Architecture(**shape | common | other)
    return Preset(hub_id=hub_id, architecture=architecture, lora_rank=lora_rank)


_R1_NAME = "deepseek-ai/DeepSeek-R1-Distill-Qwen"
_SMOLLM2_NAME = "HuggingFaceTB/SmolLM2"
PRESETS: dict[str, Preset] = {
    "qwen3-0.6b": _preset("Qwen/Qwen3-0.6B", _QWEN3, 1024, 28, (16, 8), 3072, tied=True),
    "qwen3-1.7b": _preset("Qwen/Qwen3-1.7B", _QWEN3, 2048, 28, (16, 8), 6144, tied=True),
    "qwen3-4b": _preset("Qwen/Qwen3-4B", _QWEN3, 2560, 36, (32, 8), 9728, tied=True, lora_rank=16),
    "qwen3-8b": _preset("Qwen/Qwen3-8B", _QWEN3, 4096, 36, (32, 8), 12_288, lora_rank=16),
    "qwen3-14b": _preset("Qwen/Qwen3-14B", _QWEN3, 5120, 40, (40, 8), 17_408, lora_rank=16),
    "qwen3-32b": _preset("Qwen/Qwen3-32B", _QWEN3, 5120, 64, (64, 8), 25_600, lora_rank=16),
    "qwen2.5-0.5b": _preset("Qwen/Qwen2.5-0.5B-Instruct", _QWEN2_SMALL, 896, 24, (14, 2), 4864),
    "qwen2.5-1.5b": _preset("Qwen/Qwen2.5-1.5B-Instruct", _QWEN2_SMALL, 1536, 28, (12, 2), 8960),
    "qwen2.5-3b": _preset(
        "Qwen/Qwen2.5-3B-Instruct", _QWEN2_SMALL, 2048, 36, (16, 2), 11_008, lora_rank=16
    ),
    "qwen2.5-7b": _preset(
        "Qwen/Qwen2.5-7B-Instruct", _QWEN2, 3584, 28, (28, 4), 18_944, lora_rank=16
    ),
    "r1-distill-qwen-1.5b": _preset(
        f"{_R1_NAME}-1.5B", _R1_SMALL, 1536, 28, (12, 2), 8960, vocab_size=151_936
    ),
    "r1-distill-qwen-7b": _preset(
        f"{_R1_NAME}-7B", _R1_SMALL, 3584, 28, (28, 4), 18_944, lora_rank=16
    ),
    "r1-distill-qwen-14b": _preset(
        f"{_R1_NAME}-14B", _R1, 5120, 48, (40, 8), 13_824, rms_norm_eps=1e-5, lora_rank=16
    ),
    "r1-distill-qwen-32b": _preset(
        f"{_R1_NAME}-32B", _R1, 5120, 64, (40, 8), 27_648, rms_norm_eps=1e-5, lora_rank=16
    ),
    "smollm2-135m": _preset(f"{_SMOLLM2_NAME}-135M-Instruct", _SMOLLM2, 576, 30, (9, 3), 1536),
    "smollm2-360m": _preset(f"{_SMOLLM2_NAME}-360M-Instruct", _SMOLLM2, 960, 32, (15, 5), 2560),
    "smollm2-1.7b": _preset(
        f"{_SMOLLM2_NAME}-1.7B-Instruct", _SMOLLM2, 2048, 24, (32, 32), 8192, rope_theta=1.3e5
    ),
    "llama-3.2-1b": _preset(
        "meta-llama/Llama-3.2-1B-Instruct", _LLAMA_3_2, 2048, 16, (32, 8), 8192
    ),
    "layerskip-llama-3.2-1b": _preset(
        "facebook/layerskip-llama3.2-1B", _LLAMA_3_2, 2048, 16, (32, 8), 8192
    ),
}
