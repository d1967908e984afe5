"""Architectures of the model families that jexit knows, by preset name.

A checkpoint always brings its own numbers (`Architecture` is read from its config.json); this table
serves configs that need the shape before there are weights. Figures: the models' published
config.json files.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, Literal, get_args

LARGEST_COUNT = 2**31 - 1  # what an index of 32 bits reaches

Family = Literal["qwen2", "qwen3", "llama"]  # model_type in config.json
FAMILIES: tuple[Family, ...] = get_args(Family)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN rope scaling (arXiv:2309.00071) as Hugging Face parameterises it."""

    kind: Literal["yarn"] = "yarn"
    factor: float
    original_max_positions: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    truncate: bool = True

    def __post_init__(self) -> None:
        _check_numbers(self)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3Rope:
    """Llama 3.1's rope scaling (meta-llama/llama-models) as Hugging Face parameterises it."""

    kind: Literal["llama3"] = "llama3"
    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_positions: int

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"high_freq_factor is {self.high_freq_factor:g} and must be above low_freq_factor, "
                f"which is {self.low_freq_factor:g}; correct the rope scaling in config.json"
            )


RopeScaling = Yarn | Llama3Rope
_SCALINGS = {"yarn": Yarn, "llama3": Llama3Rope}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Architecture:
    """Shape and constants of one Qwen-family or Llama transformer."""

    family: Family
    vocab_size: int
    width: int
    layers: int
    query_heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int
    rope_theta: float
    rms_norm_eps: float
    tied: bool
    max_positions: int
    rope_scaling: RopeScaling | None = None

    @property
    def qkv_bias(self) -> bool:
        return self.family == "qwen2"

    @property
    def qk_norm(self) -> bool:
        return self.family == "qwen3"

    def __post_init__(self) -> None:
        _check_numbers(self)
        if self.family not in FAMILIES:
            raise ValueError(f"family is {self.family!r}; jexit computes {', '.join(FAMILIES)}")
        if self.query_heads % self.kv_heads:
            raise ValueError(
                f"{self.query_heads} query heads do not divide among {self.kv_heads} key/value "
                "heads; correct num_attention_heads or num_key_value_heads in config.json"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")

    def to_dict(self) -> dict:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: dict) -> Architecture:
        values = dict(values)
        scaling = values.pop("rope_scaling", None)
        if yarn := values.pop("yarn", None):  # how the first model directories name it
            scaling = {"kind": "yarn", **yarn}
        if scaling is None:
            return cls(**values)
        kind = scaling.get("kind")
        if kind not in _SCALINGS:
            raise ValueError(f"rope_scaling is of kind {kind!r}; jexit computes yarn and llama3")
        return cls(**values, rope_scaling=_SCALINGS[kind](**scaling))


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value <= LARGEST_COUNT


def is_positive(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < math.inf


_RULES = {
    "bool": (lambda value: isinstance(value, bool), "true or false"),
    "int": (is_count, f"a whole number from 1 to {LARGEST_COUNT}"),
    "float": (is_positive, "a number above 0"),
    "float | None": (lambda value: value is None or is_positive(value), "a number above 0"),
}


def _check_numbers(settings: Architecture | RopeScaling) -> None:
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        check, rule = _RULES.get(field.type, (lambda _: True, ""))
        if not check(value):
            raise ValueError(f"{field.name} is {value!r}; it is {rule}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Preset:
    """A named model: where its weights are published, its shape, its published LoRA setting."""

    hub_id: str
    architecture: Architecture
    lora_rank: int = 8


def _qwen3(
    width: int, layers: int, heads: int, mlp: int, *, kv: int = 8, tied: bool = False
) -> Architecture:
    return Architecture(
        family="qwen3",
        vocab_size=151_936,
        width=width,
        layers=layers,
        query_heads=heads,
        kv_heads=kv,
        head_dim=128,
        mlp_width=mlp,
        rope_theta=1e6,
        rms_norm_eps=1e-6,
        tied=tied,
        max_positions=40_960,
    )


def _qwen2(
    width: int,
    layers: int,
    heads: int,
    kv: int,
    mlp: int,
    *,
    tied: bool = False,
    vocab: int = 152_064,
    theta: float = 1e6,
    eps: float = 1e-6,
    positions: int = 32_768,
) -> Architecture:
    return Architecture(
        family="qwen2",
        vocab_size=vocab,
        width=width,
        layers=layers,
        query_heads=heads,
        kv_heads=kv,
        head_dim=width // heads,
        mlp_width=mlp,
        rope_theta=theta,
        rms_norm_eps=eps,
        tied=tied,
        max_positions=positions,
    )


def _llama(
    width: int,
    layers: int,
    heads: int,
    kv: int,
    mlp: int,
    *,
    vocab: int = 49_152,
    theta: float = 1e5,
    positions: int = 8192,
    scaling: RopeScaling | None = None,
) -> Architecture:
    return Architecture(
        family="llama",
        vocab_size=vocab,
        width=width,
        layers=layers,
        query_heads=heads,
        kv_heads=kv,
        head_dim=width // heads,
        mlp_width=mlp,
        rope_theta=theta,
        rms_norm_eps=1e-5,
        tied=True,
        max_positions=positions,
        rope_scaling=scaling,
    )


_LLAMA_3_2_1B = _llama(
    *(2048, 16, 32, 8, 8192),
    vocab=128_256,
    theta=5e5,
    positions=131_072,
    scaling=Llama3Rope(
        factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_positions=8192
    ),
)


PRESETS: dict[str, Preset] = {
    "qwen3-0.6b": Preset(
        hub_id="Qwen/Qwen3-0.6B", architecture=_qwen3(1024, 28, 16, 3072, tied=True)
    ),
    "qwen3-1.7b": Preset(
        hub_id="Qwen/Qwen3-1.7B", architecture=_qwen3(2048, 28, 16, 6144, tied=True)
    ),
    "qwen3-4b": Preset(
        hub_id="Qwen/Qwen3-4B", architecture=_qwen3(2560, 36, 32, 9728, tied=True), lora_rank=16
    ),
    "qwen3-8b": Preset(
        hub_id="Qwen/Qwen3-8B", architecture=_qwen3(4096, 36, 32, 12_288), lora_rank=16
    ),
    "qwen3-14b": Preset(
        hub_id="Qwen/Qwen3-14B", architecture=_qwen3(5120, 40, 40, 17_408), lora_rank=16
    ),
    "qwen3-32b": Preset(
        hub_id="Qwen/Qwen3-32B", architecture=_qwen3(5120, 64, 64, 25_600), lora_rank=16
    ),
    "qwen2.5-0.5b": Preset(
        hub_id="Qwen/Qwen2.5-0.5B-Instruct",
        architecture=_qwen2(896, 24, 14, 2, 4864, tied=True, vocab=151_936),
    ),
    "qwen2.5-1.5b": Preset(
        hub_id="Qwen/Qwen2.5-1.5B-Instruct",
        architecture=_qwen2(1536, 28, 12, 2, 8960, tied=True, vocab=151_936),
    ),
    "qwen2.5-3b": Preset(
        hub_id="Qwen/Qwen2.5-3B-Instruct",
        architecture=_qwen2(2048, 36, 16, 2, 11_008, tied=True, vocab=151_936),
        lora_rank=16,
    ),
    "qwen2.5-7b": Preset(
        hub_id="Qwen/Qwen2.5-7B-Instruct",
        architecture=_qwen2(3584, 28, 28, 4, 18_944),
        lora_rank=16,
    ),
    "r1-distill-qwen-1.5b": Preset(
        hub_id="deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B",
        architecture=_qwen2(1536, 28, 12, 2, 8960, vocab=151_936, theta=1e4, positions=131_072),
    ),
    "r1-distill-qwen-7b": Preset(
        hub_id="deepseek-ai/DeepSeek-R1-Distill-Qwen-7B",
        architecture=_qwen2(3584, 28, 28, 4, 18_944, theta=1e4, positions=131_072),
        lora_rank=16,
    ),
    "r1-distill-qwen-14b": Preset(
        hub_id="deepseek-ai/DeepSeek-R1-Distill-Qwen-14B",
        architecture=_qwen2(5120, 48, 40, 8, 13_824, eps=1e-5, positions=131_072),
        lora_rank=16,
    ),
    "r1-distill-qwen-32b": Preset(
        hub_id="deepseek-ai/DeepSeek-R1-Distill-Qwen-32B",
        architecture=_qwen2(5120, 64, 40, 8, 27_648, eps=1e-5, positions=131_072),
        lora_rank=16,
    ),
    "smollm2-135m": Preset(
        hub_id="HuggingFaceTB/SmolLM2-135M-Instruct", architecture=_llama(576, 30, 9, 3, 1536)
    ),
    "smollm2-360m": Preset(
        hub_id="HuggingFaceTB/SmolLM2-360M-Instruct", architecture=_llama(960, 32, 15, 5, 2560)
    ),
    "smollm2-1.7b": Preset(
        hub_id="HuggingFaceTB/SmolLM2-1.7B-Instruct",
        architecture=_llama(2048, 24, 32, 32, 8192, theta=1.3e5),
    ),
    "llama-3.2-1b": Preset(hub_id="meta-llama/Llama-3.2-1B-Instruct", architecture=_LLAMA_3_2_1B),
    "layerskip-llama-3.2-1b": Preset(
        hub_id="facebook/layerskip-llama3.2-1B", architecture=_LLAMA_3_2_1B
    ),
}
