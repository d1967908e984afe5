"""Early exits of a jexit model for transformers; exported models contain a copy of this file.

    model = AutoModelForCausalLM.from_pretrained(DIR, trust_remote_code=True)
    model.exit_policy = "threshold:0.5"  # or "sample", "fixed:12", "full"
    tokens = model.generate(**inputs)
    model.last_depths  # the number of layers that ran for each generated token

Without `trust_remote_code` the same directory loads as a plain model, which runs all layers. The
exits need transformers 4.57 or newer.

A token that leaves at an exit skips the layers above the exit. There the token's residual stays as
it is, or goes through a linear map per layer, and each skipped layer still computes the key and
value of the token from that residual. A layer that every row of the batch skips computes nothing
else. Prompt tokens never leave: exits decide only in steps that extend a cache by one token.
`forward(..., depths=...)` prescribes the depth of every position instead.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import shutil
import sys
from typing import Any

import torch
import transformers
from packaging.version import Version
from safetensors.torch import load_file
from torch import nn
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.utils import cached_file

if Version(transformers.__version__).release < (4, 57):
    raise ImportError(
        f"transformers is at version {transformers.__version__}, but exits need 4.57 or newer; run "
        "pip install --upgrade transformers"
    )

EXIT_FILES = ("exit_heads.json", "exit_heads.safetensors")
# Settings of `generate` with which a pass makes several tokens, or none.
NOT_A_PASS_PER_TOKEN = (
    "assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit", "prefill_chunk_size",
)  # fmt: skip


@dataclasses.dataclass
class ExitOutput(CausalLMOutputWithPast):
    """The output of a causal language model, with depths [B, T] and hazard logits [B, T, E].

    B is the number of rows, T that of positions, and E that of exits. Hazard logits are NaN at
    exits that a position did not reach.
    """

    depths: torch.LongTensor | None = None
    hazard_logits: torch.FloatTensor | None = None


class _Float32(nn.Module):
    """A module whose buffers stay in float32 when the model is cast to another dtype.

    `follow` moves them to the device of a residual. They cannot be placed before the first pass: a
    device map may put each layer elsewhere, and an offloaded layer has no device of its own.
    """

    def __init__(self, tensors: dict[str, torch.Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name.replace(".", "_"), tensor.float(), persistent=False)

    def _apply(self, move: Any, recurse: bool = True) -> Any:
        return super()._apply(lambda tensor: tensor.to(move(tensor).device), recurse)

    def follow(self, h: torch.Tensor) -> None:
        if next(self.buffers()).device != h.device:
            with torch.inference_mode(False):  # buffers that a later backward pass can use
                self.to(h.device)


class ExitHead(_Float32):
    """An exit head in float32: z = w2 · relu(W1 · norm(h) + b1) + b2, or linear without W1.

    Maps residuals h [..., D] to hazard logits z [...]. The norm is optional.
    """

    def __init__(self, tensors: dict[str, torch.Tensor], eps: float) -> None:
        super().__init__(tensors)
        self.eps = eps

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.follow(h)
        x = h.to(self.out_weight.dtype)
        if hasattr(self, "norm_weight"):
            x = nn.functional.rms_norm(x, x.shape[-1:], self.norm_weight, self.eps)
        if hasattr(self, "hidden_weight"):
            x = nn.functional.linear(x, self.hidden_weight, self.hidden_bias).relu()
        return nn.functional.linear(x, self.out_weight, self.out_bias)[..., 0]


class Continuation(_Float32):
    """The map h ← h + update(h) of residuals [..., D] for tokens that skip a layer.

    If the weights contain `reduce`, the update is low-rank: update(reduce(h)).
    """

    def forward(self, h: torch.Tensor) -> torch.Tensor:
        self.follow(h)
        x = h.to(self.update_weight.dtype)
        x = nn.functional.linear(x, self.reduce_weight) if hasattr(self, "reduce_weight") else x
        return h + nn.functional.linear(x, self.update_weight, self.update_bias).to(h.dtype)


class Exits(nn.Module):
    """The exit heads and the continuation of a model, and the state of its current pass."""

    def __init__(self, config: dict[str, Any], tensors: dict[str, torch.Tensor], layers: int):
        super().__init__()
        self.exit_layers, self.layers = tuple(config["exit_layers"]), layers
        self.policy = "full"
        self.temperature = config.get("hazard_temperature") or 1.0  # which is above 0
        self.min_hazard = config.get("min_hazard") or 0.0
        self.depth_BT = None  # no pass is under way
        eps = config["rms_norm_eps"]
        self.heads = nn.ModuleDict(
            {f"{n}": ExitHead(_under(tensors, f"exit_heads.{n}."), eps) for n in self.exit_layers}
        )
        linear = config["continuation"] == "linear"
        self.continuation = nn.ModuleDict(
            {f"{n}": Continuation(_under(tensors, f"continuation.{n}.")) for n in range(layers)}
            if linear
            else {}
        )

    def begin(self, shape: torch.Size, device: torch.device, *, decides: bool, depths: Any) -> None:
        """Starts a pass over positions [B, T] of the shape `shape`.

        If `decides`, the policy decides where tokens leave. Otherwise `depths` prescribes the depth
        of each position (None: all layers). Raises ValueError for a depth that is neither an exit
        nor the number of layers.
        """
        kind, _, argument = self.policy.partition(":")
        self._decides = decides and kind in ("threshold", "sample")
        self._called = 0
        if depths is None and decides and kind == "fixed":
            depths = torch.full(shape, int(argument))
        given = torch.full(shape, self.layers) if depths is None else torch.as_tensor(depths)
        known = torch.tensor([*self.exit_layers, self.layers])
        wrong = given.cpu()[~torch.isin(given.cpu(), known)]
        if wrong.numel():
            raise ValueError(
                f"depths contains {float(wrong[0]):g}, but each depth must be one of "
                f"{', '.join(map(str, known.tolist()))} (an exit, or all layers); use only these"
            )
        self.depth_BT = given.to(device, torch.long).expand(shape).clone()
        self.hazard_BTE = torch.full(
            (*shape, len(self.exit_layers)), torch.nan, dtype=torch.float32, device=device
        )

    def end(self, device: torch.device) -> dict[str, torch.Tensor]:
        """Returns the depths [B, T] and the hazard logits [B, T, E] of the pass, on `device`.

        Raises RuntimeError if a layer ran without its exits.
        """
        if self._called < self.layers:
            raise RuntimeError(
                f"{self._called} of {self.layers} layers ran with exits, but all must, and the "
                "forward method of the others has been replaced; restore that method, or load the "
                "model again"
            )
        return {"depths": self.depth_BT.to(device), "hazard_logits": self.hazard_BTE.to(device)}

    def layer(self, run: Any, layer: nn.Module, number: int, h: torch.Tensor, kwargs: Any) -> Any:
        """Returns the residual [B, T, D] after `layer` for the residual `h` [B, T, D] before it.

        `run(h, **kwargs)` computes the layer. For tokens that have left, the continuation computes
        the residual instead. `number` is the index of the layer.
        """
        if self.depth_BT is None:  # called by the layers alone
            return run(h, **kwargs)
        self._called += 1
        self.depth_BT, self.hazard_BTE = self.depth_BT.to(h.device), self.hazard_BTE.to(h.device)
        alive_BT = self.depth_BT > number
        if number in self.exit_layers:
            z_BT = self.heads[f"{number}"](h)
            e = self.exit_layers.index(number)
            reached_BT = self.depth_BT >= number
            self.hazard_BTE[..., e] = torch.where(reached_BT, z_BT, torch.nan).float()
            if self._decides:
                leaves_BT = alive_BT & self._leaves(z_BT)
                self.depth_BT = torch.where(leaves_BT, number, self.depth_BT)
                alive_BT = alive_BT & ~leaves_BT
        if alive_BT.all():
            return run(h, **kwargs)
        skipped = self.continuation[f"{number}"](h) if self.continuation else h
        if not alive_BT.any():
            _keys_and_values(layer, h, kwargs)
            return skipped
        return torch.where(alive_BT[..., None], run(h, **kwargs), skipped)

    def _leaves(self, z_BT: torch.Tensor) -> torch.Tensor:
        kind, _, argument = self.policy.partition(":")
        if kind == "threshold":
            return torch.sigmoid(z_BT) > float(argument)
        hazard_BT = torch.sigmoid(z_BT / self.temperature)
        hazard_BT = self.min_hazard + (1.0 - self.min_hazard) * hazard_BT
        return torch.rand_like(hazard_BT) < hazard_BT

    def check(self, policy: str) -> str:
        """Returns `policy` if it names a valid policy; raises ValueError if not."""
        kind, _, argument = str(policy).partition(":")
        depths = (*self.exit_layers, self.layers)
        if policy in ("full", "sample"):
            return policy
        if kind == "fixed" and argument.isdecimal() and int(argument) in depths:
            return policy
        try:
            if kind == "threshold" and 0.0 < float(argument) < 1.0:
                return policy
        except ValueError:
            pass
        raise ValueError(
            f"exit_policy is {policy!r}, but it must be full, sample, threshold:X with 0 < X < 1, "
            f"or fixed:N with N one of {', '.join(map(str, depths))}; set one of these"
        )


def _under(tensors: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Returns the tensors whose names begin with `prefix`, with the prefix removed."""
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def _keys_and_values(layer: nn.Module, h: torch.Tensor, kwargs: Any) -> None:
    """Writes the keys and values of a skipped layer to the cache, if there is a cache.

    Raises RuntimeError if a cache is in use that is not among `kwargs`.
    """
    attention = layer.self_attn
    cache = kwargs.get("cache", kwargs.get("past_key_values"))
    if cache is None and kwargs.get("use_cache"):
        raise RuntimeError(
            f"layer {attention.layer_idx} was called with use_cache but without cache or "
            "past_key_values, so keys and values would be lost; use a version of transformers that "
            "passes one of these, such as 5.24"
        )
    if cache is None:
        return
    x = layer.input_layernorm(h)
    shape = (*x.shape[:-1], -1, attention.head_dim)
    keys, values = attention.k_proj(x).view(shape), attention.v_proj(x).view(shape)
    if hasattr(attention, "k_norm"):
        keys = attention.k_norm(keys)
    keys, values = keys.transpose(1, 2), values.transpose(1, 2)
    rotate = sys.modules[type(layer).__mro__[1].__module__].apply_rotary_pos_emb
    _, keys = rotate(keys, keys, *kwargs["position_embeddings"])
    # Before transformers 5 a static cache needs the position, and would write to slot 0 without it.
    position = kwargs.get("cache_position")
    told = () if position is None else ({"cache_position": position},)
    cache.update(keys, values, attention.layer_idx, *told)


@functools.cache
def _layer_with_exits(layer_class: type) -> type:
    """Returns a subclass of a decoder layer's class that calls the layer through `Exits.layer`."""

    class LayerWithExits(layer_class):
        def forward(self, hidden_states: torch.Tensor, **kwargs: Any) -> Any:
            number = self.self_attn.layer_idx
            return self.exits[0].layer(super().forward, self, number, hidden_states, kwargs)

    return LayerWithExits


class WithExits:
    """A mix-in for causal language models of transformers that lets tokens leave early."""

    _passes = None

    @classmethod
    def from_pretrained(cls, path: Any, *args: Any, **kwargs: Any) -> Any:
        loaded = super().from_pretrained(path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        hub = {k: kwargs[k] for k in ("revision", "cache_dir", "token", "subfolder") if k in kwargs}
        model.exit_files = [cached_file(path, name, **hub) for name in EXIT_FILES]
        with open(model.exit_files[0]) as file:
            config = json.load(file)
        model.add_exits(config, load_file(model.exit_files[1]))
        return loaded

    def save_pretrained(self, save_directory: Any, *args: Any, **kwargs: Any) -> None:
        """Saves the model as transformers does, together with the files of the exits."""
        super().save_pretrained(save_directory, *args, **kwargs)
        for file in self.exit_files:
            target = os.path.join(save_directory, os.path.basename(file))
            if not (os.path.exists(target) and os.path.samefile(file, target)):
                shutil.copyfile(file, target)

    def add_exits(self, config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        """Adds exits to the layers, from the data of exit_heads.json and exit_heads.safetensors."""
        self.exits = Exits(config, tensors, self.config.num_hidden_layers)
        self.last_depths, self._passes = None, None
        for layer in self.model.layers:
            layer.__class__ = _layer_with_exits(type(layer))
            if "_old_forward" in vars(layer):  # what the hook of a device map calls
                layer._old_forward = type(layer).forward.__get__(layer)
            layer.exits = [self.exits]  # in a list, so that it is not a part of the layer

    @property
    def exit_policy(self) -> str:
        """How tokens leave: `full`, `sample`, `threshold:X` or `fixed:N`.

        Exits decide only in steps that extend a cache by one token, as in `generate`; to score
        texts at given depths, use `forward(..., depths=...)`.
        """
        return self.exits.policy

    @exit_policy.setter
    def exit_policy(self, policy: str) -> None:
        self.exits.policy = self.exits.check(policy)

    def forward(
        self, input_ids: Any = None, *args: Any, depths: Any = None, **kwargs: Any
    ) -> ExitOutput:
        """Runs the model like the base class; `depths` [B, T], or one number, prescribes depths.

        Always returns an output object, whatever `return_dict` is. Raises ValueError if depths are
        given while training with gradient checkpointing, and RuntimeError if a layer ran without
        its exits.
        """
        kwargs["return_dict"] = True
        exits = getattr(self, "exits", None)
        if exits is None:  # a model without weights, from a config
            return super().forward(input_ids, *args, **kwargs)
        if depths is not None and self.model.gradient_checkpointing and self.training:
            raise ValueError(
                "depths is given, but gradient checkpointing would run the layers again without "
                "these depths; disable gradient checkpointing, or leave depths out"
            )
        inputs = kwargs.get("inputs_embeds") if input_ids is None else input_ids
        # After the attention mask and the positions, or by either of its names.
        cache = args[2] if len(args) > 2 else kwargs.get("cache", kwargs.get("past_key_values"))
        continues = cache is not None and cache.get_seq_length() > 0
        # The first pass of `generate` ends the prompt, which may follow a given cache.
        decides = depths is None and inputs.shape[1] == 1 and continues and self._passes != []
        exits.begin(inputs.shape[:2], inputs.device, decides=decides, depths=depths)
        try:
            out = super().forward(input_ids, *args, **kwargs)
            found = exits.end(inputs.device)
        finally:
            exits.depth_BT = exits.hazard_BTE = None
        if self._passes is not None:
            self._passes.append(found["depths"][:, -1])
        return ExitOutput(**out, **found)

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """Generates like the base class; sets `last_depths` [B, N] to the depth of each new token.

        B is the number of rows, and N the largest number of new tokens. After the end of a row, the
        depths are 0. Raises ValueError for beam search, for options with which a pass does not
        produce exactly one token, and without a cache unless the policy is `full`.
        """
        own = self.generation_config
        config = kwargs.get("generation_config") or own

        def setting(name: str) -> Any:
            given = (kwargs.get(name), *(getattr(c, name, None) for c in (config, own)))
            return next((value for value in given if value is not None), None)

        if (beams := setting("num_beams") or 1) > 1:
            raise ValueError(
                f"num_beams is {beams}, but exits do not support beam search; set num_beams=1"
            )
        for name in NOT_A_PASS_PER_TOKEN:
            if setting(name):
                raise ValueError(
                    f"{name} is set, but exits need exactly one pass for each new token; leave it "
                    "out"
                )
        if setting("use_cache") is False and self.exit_policy != "full":
            raise ValueError(
                f"use_cache is False, but exit_policy={self.exit_policy!r} needs the cache; leave "
                "use_cache out, or set exit_policy to 'full'"
            )
        self._passes = []
        try:
            made = super().generate(*args, **kwargs)
            depths = torch.stack(self._passes, dim=1)
        finally:
            self._passes = None
        sequences = made if isinstance(made, torch.Tensor) else made.sequences
        depths = depths.to(sequences.device)  # a device map runs passes where the model begins
        tokens = sequences[:, -depths.shape[1] :]
        is_end, pad = torch.zeros_like(tokens, dtype=torch.bool), setting("pad_token_id")
        if (ends := setting("eos_token_id")) is not None:
            is_end = torch.isin(tokens, torch.as_tensor(ends, device=tokens.device))
        over = torch.cumsum(is_end, dim=1) - is_end.long() > 0
        if pad is not None:  # behind a stop string
            behind = tokens.eq(pad).flip(1).cumprod(dim=1).flip(1) > 0
            over |= behind & ~(is_end & (behind.cumsum(dim=1) == 1))
        depths = torch.where(over, 0, depths)
        self.last_depths = depths
        return made


class JexitLlamaForCausalLM(WithExits, transformers.LlamaForCausalLM):
    """A Llama model with exits."""


class JexitQwen2ForCausalLM(WithExits, transformers.Qwen2ForCausalLM):
    """A Qwen2 model with exits."""


class JexitQwen3ForCausalLM(WithExits, transformers.Qwen3ForCausalLM):
    """A Qwen3 model with exits."""
