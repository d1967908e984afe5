"""Chat templates that behave as those of four families do, in the shipped tokenizer's marks."""

from __future__ import annotations

import pathlib
from typing import Any

from tokenizers.processors import TemplateProcessing

import jexit
from jexit.data.tokenizer import Tokenizer

TINY = pathlib.Path(jexit.__file__).parent / "assets" / "tiny"

_TURNS = (
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content }}"
    "{% if turn.role == 'assistant' and not loop.last %}<|end|>{% endif %}{% endfor %}"
)

# Thinks unless it is told not to: then it closes an empty block itself.
SWITCHED = _TURNS + (
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}"
    "{% endif %}"
)
# Opens the block itself, and leaves earlier thoughts out.
OPENED = (
    "{% for turn in messages %}<|{{ turn.role }}|>{{ turn.content.split('</think>')[-1] }}"
    "{% if turn.role == 'assistant' %}<|end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
# Brings a system prompt where the messages have none.
DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|system|>Add well.{% endif %}"
    + _TURNS
    + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# Writes the begin token itself, as Llama's does.
BEGINNING = "{{ bos_token }}" + _TURNS + "{% if add_generation_prompt %}<|assistant|>{% endif %}"
BEGIN = "<|begin|>"


def with_template(template: str | None) -> Tokenizer:
    """The shipped tokenizer with another chat template, or with none."""
    tokenizer = Tokenizer.load(TINY)
    tokenizer.backend.chat_template = template
    return tokenizer


def with_begin_token(template: str | None) -> Tokenizer:
    """`with_template` for a tokenizer that puts a begin token before texts, as Llama's do."""
    tokenizer = with_template(template)
    tokenizer.directory = None  # whose files have no such token
    put_before_texts(tokenizer.backend, BEGIN)
    return tokenizer


def put_before_texts(backend: Any, token: str) -> None:
    """Has a tokenizer of transformers put a new begin token before every text."""
    backend.add_special_tokens({"bos_token": token})
    backend.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{token} $A",
        pair=f"{token} $A {token} $B",
        special_tokens=[(token, backend.bos_token_id)],
    )
