"""A request to the decoder, and the checks that it must pass before anything is compiled."""

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
    """Prompts (lists of token IDs) and the settings for completing them.

    Temperature 0 means greedy decoding. The random draws of a completion depend only on `key`, on
    the prompt's number (`first_prompt` plus the prompt's index), and on the indices of the sample
    and the token, not on other completions or the engine's size. With several hosts, `prompts`
    contains only this host's share of the `total` prompts (`jexit.dist.host_rows`), but a
    `Prescribed` policy contains the depths of all prompts.

    All completions of prompt i are forced to begin with the last `forced[i]` tokens of prompt i.
    Forced tokens exit under the policy as if they had been decoded, and column 0 of `Prescribed`
    then applies to the first forced token. Returned completions contain only the new tokens. All
    samples of a prompt share the depths drawn for the prompt's forced tokens.
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
        return [0] * len(self.prompts) if self.forced is None else [int(n) for n in self.forced]

    def check(self, model: Transformer) -> None:
        """Raises UserError if the request is invalid or if `model` cannot serve the request."""
        arch = model.arch
        if not self.prompts:
            raise UserError("prompts is empty, but a request needs at least one prompt; add one")
        new = self.max_new_tokens
        if not isinstance(new, int | np.integer) or new < 1:
            raise UserError(
                f"max_new_tokens is {new!r}, but it must be a whole number of at least 1; give one "
                "such as 256"
            )
        if self.samples_per_prompt < 1:
            raise UserError(
                f"samples_per_prompt is {self.samples_per_prompt}, but it must be at least 1; set "
                "samples_per_prompt=1 for one completion per prompt"
            )
        for index, prompt in enumerate(self.prompts):
            _check_prompt(index, prompt, new, arch)
        # The first pass runs all layers, so the depth prescribed for it is not checked.
        free = self.policy
        if isinstance(free, Policy) and free.by_row:
            free = free.map_rows(lambda depth_BT: np.asarray(depth_BT)[..., 1:])
        check_policy(free, (*model.exit_layers, arch.layers))
        _check_forced(self.prompts, self.forced_B)
        if self.forced is not None and self.samples_per_prompt > 1 and self.policy.by_row:
            raise UserError(
                f"samples_per_prompt is {self.samples_per_prompt}, but the samples of a prompt "
                "share one prefill, so Prescribed cannot give each sample its own depths in the "
                "forced prefix; set samples_per_prompt=1 and repeat the prompts instead"
            )


def _check_prompt(index: int, prompt: Sequence[int], new: int, arch: Architecture) -> None:
    most = arch.max_positions
    if not prompt:
        raise UserError(
            f"prompt {index} is empty, but a prompt needs at least one token; add one or remove "
            "the prompt"
        )
    if len(prompt) >= most:
        raise UserError(
            f"prompt {index} has {len(prompt)} tokens, but the model has {most} positions and at "
            f"least one is needed for a new token; shorten the prompt to at most {most - 1} tokens"
        )
    if len(prompt) + new > most:
        raise UserError(
            f"prompt {index} has {len(prompt)} tokens, but with max_new_tokens={new} it may exceed "
            f"the model's {most} positions; lower max_new_tokens to at most {most - len(prompt)}"
        )
    if not 0 <= min(prompt) <= max(prompt) < arch.vocab_size:
        outside = next(token for token in prompt if not 0 <= token < arch.vocab_size)
        raise UserError(
            f"prompt {index} contains token {outside}, but the model's tokens are 0 to "
            f"{arch.vocab_size - 1}; use the tokenizer that belongs to the model"
        )


def _check_forced(prompts: Sequence[Sequence[int]], forced: list[int]) -> None:
    if len(forced) != len(prompts):
        raise UserError(
            f"forced has {len(forced)} entries, but prompts has {len(prompts)}; give one "
            "forced-prefix length per prompt"
        )
    for index, (prompt, tokens) in enumerate(zip(prompts, forced, strict=True)):
        if not 0 <= tokens < len(prompt):
            raise UserError(
                f"forced[{index}] is {tokens}, but prompt {index} has {len(prompt)} tokens and at "
                "least one must come before the forced prefix; give a number from 0 to "
                f"{len(prompt) - 1}"
            )
