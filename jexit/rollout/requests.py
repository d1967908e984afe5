"""What decoding is asked for, and what it refuses before anything is compiled."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence

import jax
import numpy as np

from jexit.axes import PRNGKey
from jexit.errors import UserError
from jexit.model.policies import Full, Policy, check_policy
from jexit.model.transformer import Transformer
from jexit.presets import Architecture
from jexit.rollout.sampling import Sampling


@dataclasses.dataclass(frozen=True, kw_only=True)
class Request:
    """Prompts, and how to complete them.

    Temperature 0 is greedy. A row's draws depend on the key, `first_prompt` plus its prompt's
    index, the sample's index and the token's, not on other rows nor on the engine's size. With
    several hosts `prompts` are this host's of `total` (`jexit.dist.host_rows`), and `Prescribed`
    holds the depths of all.

    `forced` says of each prompt how many of its last tokens are a forced completion prefix: these
    exit under the policy, as if they had been decoded, and columns of `Prescribed` count from the
    first of them. Completions hold new tokens only. Samples of one prompt share the depths that its
    prefix drew.
    """

    prompts: Sequence[Sequence[int]]
    policy: Policy = Full()
    max_new_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    eos_ids: Iterable[int]
    pad_id: int
    key: PRNGKey | int
    samples_per_prompt: int = 1
    adapters: bool = True  # False: the teacher
    hazards: bool = False  # whether they are recorded
    first_prompt: int = 0
    total: int | None = None
    forced: Sequence[int] | None = None

    def __post_init__(self) -> None:
        whole = [[int(token) for token in prompt] for prompt in self.prompts]
        object.__setattr__(self, "prompts", whole)

    @property
    def sampling(self) -> Sampling:
        return Sampling.of(self.temperature, self.top_p, top_k=self.top_k, min_p=self.min_p)

    @property
    def prng_key(self) -> PRNGKey:
        return jax.random.key(self.key) if isinstance(self.key, int | np.integer) else self.key

    @property
    def forced_B(self) -> list[int]:
        """Of each prompt's tokens, those of a forced prefix."""
        return [0] * len(self.prompts) if self.forced is None else [int(n) for n in self.forced]

    def check(self, model: Transformer) -> None:
        """Raises UserError if the request is invalid, or if this model cannot serve it."""
        arch = model.arch
        if not self.prompts:
            raise UserError("there are no prompts to complete; give at least one")
        new = self.max_new_tokens
        if not isinstance(new, int | np.integer) or new < 1:
            raise UserError(f"max_new_tokens is {new!r}; it must be a whole number of at least 1")
        if self.samples_per_prompt < 1:
            raise UserError(
                f"samples_per_prompt is {self.samples_per_prompt}; it must be at least 1"
            )
        for index, prompt in enumerate(self.prompts):
            _check_prompt(index, prompt, new, arch)
        # The first pass runs all layers, whatever is prescribed for it.
        free = self.policy
        if isinstance(free, Policy) and free.by_row:
            free = free.map_rows(lambda depth_BT: np.asarray(depth_BT)[..., 1:])
        check_policy(free, (*model.exit_layers, arch.layers))
        _check_forced(self.prompts, self.forced_B)
        if self.forced is not None and self.samples_per_prompt > 1 and self.policy.by_row:
            raise UserError(
                f"{self.samples_per_prompt} samples share one prefill, so Prescribed cannot give "
                "each its own depths in the forced prefix; repeat the prompts instead, with "
                "samples_per_prompt=1"
            )


def _check_prompt(index: int, prompt: Sequence[int], new: int, arch: Architecture) -> None:
    most = arch.max_positions
    if not prompt:
        raise UserError(f"prompt {index} is empty; a prompt needs at least one token")
    if len(prompt) >= most:
        raise UserError(
            f"prompt {index} has {len(prompt)} tokens and the model takes {most} positions; "
            "shorten the prompt"
        )
    if len(prompt) + new > most:
        raise UserError(
            f"prompt {index} has {len(prompt)} tokens and with {new} new ones exceeds the model's "
            f"{most} positions; lower max_new_tokens to at most {most - len(prompt)}"
        )
    if not 0 <= min(prompt) <= max(prompt) < arch.vocab_size:
        outside = next(token for token in prompt if not 0 <= token < arch.vocab_size)
        raise UserError(
            f"prompt {index} holds token {outside} and the model's vocabulary has "
            f"{arch.vocab_size}; use the tokenizer that belongs to the model"
        )


def _check_forced(prompts: Sequence[Sequence[int]], forced: list[int]) -> None:
    if len(forced) != len(prompts):
        raise UserError(
            f"forced has {len(forced)} numbers for {len(prompts)} prompts; give one a prompt"
        )
    for index, (prompt, tokens) in enumerate(zip(prompts, forced, strict=True)):
        if not 0 <= tokens < len(prompt):
            raise UserError(
                f"prompt {index} has {len(prompt)} tokens, but forced says that {tokens} of them "
                f"are a forced prefix; give a number from 0 to {len(prompt) - 1}"
            )
