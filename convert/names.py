"""A table that maps parameter names of Hugging Face checkpoints to those of jexit, and back.

A `Rule` maps one kind of tensor in a checkpoint to one parameter and describes how their axes
correspond:

    Rule("model.layers.{layer}.self_attn.q_proj.weight", "blocks.attn.q.kernel", "(N H) D -> D N H")

The left side of the layout lists the axes of the tensor in the file: letters in brackets are
flattened into one axis, and `1` is an axis of length one. The right side lists the axes of the
parameter, without the leading axis on which jexit stacks layers or exits. The letters are those of
`jexit.axes`, with W for the width of an exit head and C for the rank of a continuation (the maps
that replace the layers after a token's exit). This module contains names and shapes only, and
imports only the standard library.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

LAYER = "{layer}"

# Buffers that old checkpoints store although they follow from config.json.
IGNORED_SUFFIXES = (".rotary_emb.inv_freq",)

TIED_HEAD = "lm_head.weight"  # a tied checkpoint may repeat the embedding under this name

# jexit's projection: module of a decoder layer, parameter path, layout of its weight.
PROJECTIONS = {
    "q": ("self_attn.q_proj", "blocks.attn.q", "(N H) D -> D N H"),
    "k": ("self_attn.k_proj", "blocks.attn.k", "(K H) D -> D K H"),
    "v": ("self_attn.v_proj", "blocks.attn.v", "(K H) D -> D K H"),
    "o": ("self_attn.o_proj", "blocks.attn.o", "D (N H) -> N H D"),
    "gate": ("mlp.gate_proj", "blocks.mlp.gate", "F D -> D F"),
    "up": ("mlp.up_proj", "blocks.mlp.up", "F D -> D F"),
    "down": ("mlp.down_proj", "blocks.mlp.down", "D F -> F D"),
}

# PEFT's `target_modules` name the last part of the module.
MODULE_OF_TARGET = {name: module.split(".")[1] for name, (module, _, _) in PROJECTIONS.items()}
TARGET_OF_MODULE = {module: name for name, module in MODULE_OF_TARGET.items()}


_AXES = {
    "V": "vocab_size",
    "D": "width",
    "O": "width",  # in a tensor with another axis D
    "N": "query_heads",
    "K": "kv_heads",
    "H": "head_dim",
    "F": "mlp_width",
    "R": "rank",
    "W": "exit_width",
    "C": "continuation_rank",
}


@dataclasses.dataclass(frozen=True)
class Rule:
    """Maps one kind of tensor in a safetensors file to one parameter of jexit.

    `layout` describes how the axes correspond (see the module docstring). In all methods, `sizes`
    maps axis letters to lengths.
    """

    name: str  # in the file; {layer} stands for a layer's or an exit's number
    path: str  # in the parameter tree
    layout: str

    @property
    def stacked(self) -> bool:
        """Whether the parameter stacks layers or exits; the file has a tensor for each of them."""
        return LAYER in self.name

    def name_at(self, layer: int | None) -> str:
        """Returns the name of the tensor for one layer or exit; for None, `name` itself."""
        return self.name if layer is None else self.name.replace(LAYER, str(layer))

    def file_shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        groups, _ = _parse(self.layout)
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups)

    def shape(self, sizes: Mapping[str, int]) -> tuple[int, ...]:
        _, letters = _parse(self.layout)
        return tuple(sizes[letter] for letter in letters)

    def to_jexit(self, tensor: Any, sizes: Mapping[str, int]) -> Any:
        """Converts the tensor of one layer or exit to the corresponding slice of the parameter.

        `tensor` is any array with the methods reshape and transpose.
        """
        groups, letters = _parse(self.layout)
        flat = [letter for group in groups for letter in group]
        split = tensor.reshape([sizes[letter] for letter in flat])
        return split.transpose([flat.index(letter) for letter in letters])

    def to_hf(self, parameter: Any, sizes: Mapping[str, int]) -> Any:
        """Converts the slice of the parameter for one layer or exit to the tensor in the file."""
        groups, letters = _parse(self.layout)
        flat = [letter for group in groups for letter in group]
        ordered = parameter.transpose([letters.index(letter) for letter in flat])
        return ordered.reshape(self.file_shape(sizes))


def axis_sizes(**sizes: Any) -> dict[str, int]:
    """Returns {axis letter: length} for all letters, given lengths by name (0 if not given).

    The names are the fields of an `Architecture`, and rank, exit_width and continuation_rank.
    """
    return {letter: sizes.get(name, 0) for letter, name in _AXES.items()}


def base_rules(family: str, tied: bool) -> tuple[Rule, ...]:
    """Returns the rules of the base weights of a model family.

    Qwen2 has biases for queries, keys and values. Qwen3 has norms for queries and keys. Llama has
    neither. If `tied` is true, the output head shares the embedding and has no rule.
    """
    layer = f"model.layers.{LAYER}."
    rules = [Rule("model.embed_tokens.weight", "embed.embedding", "V D -> V D")]
    if not tied:
        rules.append(Rule(TIED_HEAD, "head.kernel", "V D -> V D"))
    rules += [
        Rule(f"{layer}{module}.weight", f"{path}.kernel", layout)
        for module, path, layout in PROJECTIONS.values()
    ]
    if family == "qwen2":
        for name, heads in (("q", "N"), ("k", "K"), ("v", "K")):
            module, path, _ = PROJECTIONS[name]
            rules.append(Rule(f"{layer}{module}.bias", f"{path}.bias", f"({heads} H) -> {heads} H"))
    if family == "qwen3":
        for norm in ("q_norm", "k_norm"):
            rules.append(
                Rule(f"{layer}self_attn.{norm}.weight", f"blocks.attn.{norm}.scale", "H -> H")
            )
    rules += [
        Rule(f"{layer}input_layernorm.weight", "blocks.attn_norm.scale", "D -> D"),
        Rule(f"{layer}post_attention_layernorm.weight", "blocks.mlp_norm.scale", "D -> D"),
        Rule("model.norm.weight", "final_norm.scale", "D -> D"),
    ]
    return tuple(rules)


def adapter_rules(targets: Iterable[str]) -> tuple[Rule, ...]:
    """Returns the rules of the LoRA adapters of the projections `targets`.

    In PEFT's files, each projection has a matrix lora_A [R, in] and a matrix lora_B [out, R].
    """
    rules = []
    for target in targets:
        module, path, layout = PROJECTIONS[target]
        (outputs, inputs), _ = _parse(layout)
        prefix = f"base_model.model.model.layers.{LAYER}.{module}"
        rules += [
            Rule(
                f"{prefix}.lora_A.weight",
                f"{path}.lora_a",
                f"R {_group(inputs)} -> {' '.join(inputs)} R",
            ),
            Rule(
                f"{prefix}.lora_B.weight",
                f"{path}.lora_b",
                f"{_group(outputs)} R -> R {' '.join(outputs)}",
            ),
        ]
    return tuple(rules)


def exit_rules(kind: str, norm: str) -> tuple[Rule, ...]:
    """Returns the rules of the exit heads, which the file numbers by layer.

    Each head consists of the PyTorch modules norm (RMSNorm, if `norm` is "rms"), hidden (Linear, if
    `kind` is "mlp") and out (Linear).
    """
    prefix = f"exit_heads.{LAYER}"
    rules = []
    if norm == "rms":
        rules.append(Rule(f"{prefix}.norm.weight", "exits.scale", "D -> D"))
    if kind == "mlp":
        rules += [
            Rule(f"{prefix}.hidden.weight", "exits.w1", "W D -> D W"),
            Rule(f"{prefix}.hidden.bias", "exits.b1", "W -> W"),
        ]
    rules += [
        Rule(f"{prefix}.out.weight", "exits.w2", "1 W -> W"),
        Rule(f"{prefix}.out.bias", "exits.b2", "1 -> "),
    ]
    return tuple(rules)


def continuation_rules(rank: int) -> tuple[Rule, ...]:
    """Returns the rules of the continuation, an affine map for each layer m that a token skips.

    The file stores the maps of layer m as PyTorch's Linear modules: update, or with `rank` above 0
    reduce followed by update.
    """
    prefix, path = f"continuation.{LAYER}", "blocks.continuation"
    if rank == 0:
        weights = [Rule(f"{prefix}.update.weight", f"{path}.update.kernel", "O D -> D O")]
    else:
        weights = [
            Rule(f"{prefix}.reduce.weight", f"{path}.reduce.kernel", "C D -> D C"),
            Rule(f"{prefix}.update.weight", f"{path}.update.kernel", "D C -> C D"),
        ]
    return (*weights, Rule(f"{prefix}.update.bias", f"{path}.update.bias", "D -> D"))


def _group(letters: tuple[str, ...]) -> str:
    return letters[0] if len(letters) == 1 else f"({' '.join(letters)})"


@functools.cache
def _parse(layout: str) -> tuple[tuple[tuple[str, ...], ...], tuple[str, ...]]:
    """Returns the two sides of a layout.

    The left side is a tuple of groups, one per axis of the tensor in the file. A group contains the
    letters that are flattened into the axis, and is empty for `1`. The right side is a tuple of
    letters.
    """
    left, right = layout.split("->")
    groups = []
    for bracket, letter in re.findall(r"\(([^)]*)\)|(\S+)", left):
        group = bracket.split() if bracket else [letter]
        groups.append(tuple(axis for axis in group if axis != "1"))
    return tuple(groups), tuple(right.split())
