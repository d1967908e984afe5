"""What the engine refuses before it compiles anything."""

from __future__ import annotations

import math

import numpy as np

from jexit.errors import UserError
from jexit.model.policies import Policy, Prescribed, Sample, Threshold
from jexit.presets import Architecture


def check_written(prompts: list[list[int]], written: list[int]) -> None:
    """Raises UserError unless each prompt keeps a token of its own before what is written."""
    if len(written) != len(prompts):
        raise UserError(
            f"written has {len(written)} numbers for {len(prompts)} prompts; give one a prompt"
        )
    for index, (prompt, tokens) in enumerate(zip(prompts, written, strict=True)):
        if not 0 <= tokens < len(prompt):
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, of which {tokens} are said to be its "
                f"completion's; that is a number from 0 to {len(prompt) - 1}"
            )


def check_prompts(arch: Architecture, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raises UserError for prompts that the model cannot take with their completions."""
    if not prompts:
        raise UserError("there are no prompts to complete; give at least one")
    if not isinstance(max_new_tokens, int | np.integer) or max_new_tokens < 1:
        raise UserError(
            f"max_new_tokens is {max_new_tokens!r}; it must be a whole number of at least 1"
        )
    most = arch.max_positions
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise UserError(f"prompt {index} is empty; a prompt needs at least one token")
        if len(prompt) >= most:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens and the model takes {most} positions; "
                "shorten the prompt"
            )
        if len(prompt) + max_new_tokens > most:
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens and with {max_new_tokens} new ones "
                f"exceeds the model's {most} positions; lower max_new_tokens to at most "
                f"{most - len(prompt)}"
            )
        if not 0 <= min(prompt) <= max(prompt) < arch.vocab_size:
            outside = next(token for token in prompt if not 0 <= token < arch.vocab_size)
            raise UserError(
                f"prompt {index} holds token {outside} and the model's vocabulary has "
                f"{arch.vocab_size}; use the tokenizer that belongs to the model"
            )


def check_policy(policy: Policy) -> None:
    """Raises UserError for settings with which a policy's law is none."""
    if isinstance(policy, Sample):
        temperature, floor = float(policy.temperature), float(policy.min_hazard)
        if not 0.0 < temperature < math.inf:
            raise UserError(
                f"Sample has temperature {temperature}; hazards are σ(z / temperature), so give a "
                "number above 0, such as 1"
            )
        if not 0.0 <= floor <= 1.0:
            raise UserError(
                f"Sample has min_hazard {floor}; it is a probability, from 0 (no floor) to 1"
            )
    if isinstance(policy, Threshold) and math.isnan(float(policy.hazard)):
        raise UserError("Threshold has hazard nan; give the hazard above which a token leaves")


def fitted_policy(policy: Policy, rows: int, columns: int) -> Policy:
    """`Prescribed` cut to the tokens that may be generated."""
    if not isinstance(policy, Prescribed):
        return policy
    shape = np.shape(policy.depth_BT)
    if len(shape) != 2 or shape[0] != rows or shape[1] < columns:
        raise UserError(
            f"Prescribed has depths of shape {shape} for {rows} rows of up to {columns} tokens; "
            "give a row for each completion and a column for each token that may be generated"
        )
    return Prescribed(np.asarray(policy.depth_BT, np.int32)[:, :columns])
