"""The results of decoding: completions with the depth of every token."""

from __future__ import annotations

import dataclasses

import numpy as np

from jexit.dist import HostRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grown:
    """The tokens that one call of `Arrivals.turn` or `Speculation.turn` added to a completion.

    Lists have one entry per token. `ticket` identifies the completion: it is the number that
    `Arrivals.join` returned or, under `Speculate`, the prompt's index.
    """

    ticket: int
    tokens: list[int]
    depths: list[int]
    logprobs: list[float]
    hazard_logits: list[list[float]]  # one entry per exit, NaN at exits that were not reached
    finished: bool


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The completions of a batch: B = prompts · samples rows; the rows of one prompt are adjacent.

    T is `max_new_tokens`. Beyond the length of a row, tokens are `pad_id`, hazard logits are NaN
    and all other numbers are 0. The depth of a token is the number of layers that ran in the pass
    that produced it; in column 0 it is L (all layers), except after a forced prefix, whose last
    token may exit early. With several hosts, the arrays contain only this host's rows.
    """

    prompts: list[list[int]]
    prompt_B: np.ndarray  # int, the index of a row's prompt in `prompts`
    host_rows: HostRows  # this host's rows of the whole batch
    tokens_BT: np.ndarray  # int32; a row may end with an end-of-sequence token
    lengths_B: np.ndarray  # int32, at least 1
    depths_BT: np.ndarray  # int32
    logprobs_BT: np.ndarray  # float32, under the tempered, truncated distribution (greedy: plain)
    depth_logprobs_BT: np.ndarray  # float32, under the policy; 0 where nothing was drawn
    hazard_logits_BTE: np.ndarray | None  # float32, NaN at exits that were not reached
    truncated_B: np.ndarray  # bool: reached `max_new_tokens` without an end-of-sequence token
    shape: tuple[int, int]  # compiled sizes: padded prompt length and final cache slots
    seconds: float  # without compilation
    prompt_padding: float  # fraction of the prefilled positions that are padding, over all devices
    idle: float  # fraction of the rows of all ticks that stayed empty, weighted by the ticks' costs

    @property
    def rows(self) -> int:
        return len(self.lengths_B)

    @property
    def prompt_lengths_B(self) -> np.ndarray:
        lengths = np.asarray([len(prompt) for prompt in self.prompts], np.int32)
        return lengths[self.prompt_B]

    def completion(self, row: int) -> list[int]:
        """Returns the generated token IDs of a row, with the end-of-sequence token, if any."""
        return self.tokens_BT[row, : self.lengths_B[row]].tolist()
