"""Tiny random Hugging Face models and early exits done by hand around their layers."""

from __future__ import annotations

import pathlib
import string
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM as AutoModel
from transformers import LlamaConfig, Qwen2Config, Qwen2Tokenizer, Qwen3Config

from chat_templates import put_before_texts

VOCABULARY = 67
CONFIGS = {"qwen2": Qwen2Config, "qwen3": Qwen3Config, "llama": LlamaConfig}
END, PAD = "<end>", "<pad>"
CHAT_TEMPLATE = (
    "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def make_model(family: str = "qwen2", *, seed: int = 0, **overrides: Any) -> torch.nn.Module:
    """A random float32 model in which no parameter is a zero or a one that would hide itself."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-3,
        "tie_word_embeddings": False,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
        **overrides,
    }
    if family == "qwen3":
        settings.setdefault("head_dim", 12)
    config = CONFIGS[family](**settings)
    model = AutoModel.from_config(config, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if name.endswith("norm.weight"):
                parameter.copy_(1.0 + 0.4 * noise)
            elif name.endswith("bias"):
                parameter.copy_(0.5 * noise)
            elif "embed" in name or "lm_head" in name:
                parameter.copy_(0.7 * noise)
            else:
                parameter.copy_(noise * parameter.shape[-1] ** -0.5)
    return model


def make_tokenizer(family: str = "qwen2") -> Qwen2Tokenizer:
    """Lower-case letters, digits and blanks, one token each, with a chat template; `<end>` is 0.

    For Llama it puts a begin token before texts, and the template writes it too.
    """
    words = [END, PAD, "<user>", "<assistant>", *string.ascii_lowercase, *string.digits, "Ġ", "Ċ"]
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        unk_token=END,
        eos_token=END,
        pad_token=PAD,
        additional_special_tokens=["<user>", "<assistant>"],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    if family == "llama":
        put_before_texts(tokenizer, "<begin>")
        tokenizer.chat_template = "{{ bos_token }}" + CHAT_TEMPLATE
    return tokenizer


def save(directory: pathlib.Path, model: torch.nn.Module, **options: Any) -> pathlib.Path:
    """Writes model and tokenizer as transformers does."""
    model.save_pretrained(directory, **options)
    make_tokenizer(model.config.model_type).save_pretrained(directory)
    return directory


def random_tokens(rows: int, length: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, VOCABULARY, (rows, length)).astype(np.int32)


def residuals_by_hand(
    model: torch.nn.Module,
    tokens_BT: np.ndarray | Sequence[Sequence[int]],
    depth_BT: np.ndarray,
    lengths_B: Sequence[int] | None = None,
    continuation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> list[torch.Tensor]:
    """Residuals [B, T, D] entering layers 0 … L−1 and leaving the last, tokens leaving at a depth.

    Every layer runs over the whole sequence, so it takes the key and value of a token that has left
    from its residual; its output is kept only where layer < depth. Elsewhere the residual stays, or
    becomes h + h · A[layer] + b[layer] with `continuation` (A [L, D, D], b [L, D]).
    """
    trunk = model.model
    tokens_BT, depth_BT = torch.as_tensor(np.asarray(tokens_BT)), torch.as_tensor(depth_BT)
    batch, length = tokens_BT.shape
    positions = torch.arange(length)[None]
    allowed = torch.ones(length, length, dtype=torch.bool).tril()[None].repeat(batch, 1, 1)
    if lengths_B is not None:
        allowed &= torch.arange(length) < torch.as_tensor(lengths_B)[:, None, None]
    mask = torch.zeros(batch, 1, length, length).masked_fill(
        ~allowed[:, None], torch.finfo(torch.float32).min
    )
    h_BTD = trunk.embed_tokens(tokens_BT)
    rotary = trunk.rotary_emb(h_BTD, positions)
    residuals = [h_BTD]
    for index, layer in enumerate(trunk.layers):
        new_BTD = layer(
            h_BTD, attention_mask=mask, position_ids=positions, position_embeddings=rotary
        )
        if continuation is not None:
            a_DD, b_D = (part[index] for part in continuation)
            h_BTD = h_BTD + h_BTD @ a_DD + b_D
        h_BTD = torch.where((index < depth_BT)[..., None], new_BTD, h_BTD)
        residuals.append(h_BTD)
    return residuals


def freeze_by_hand(
    model: torch.nn.Module,
    tokens_BT: np.ndarray | Sequence[Sequence[int]],
    depth_BT: np.ndarray,
    lengths_B: Sequence[int] | None = None,
    continuation: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> torch.Tensor:
    """Logits [B, T, V] of `residuals_by_hand`."""
    last_BTD = residuals_by_hand(model, tokens_BT, depth_BT, lengths_B, continuation)[-1]
    return model.lm_head(model.model.norm(last_BTD))
