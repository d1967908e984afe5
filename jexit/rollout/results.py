"""The results of decoding: completions with the depth of every token."""

from __future__ import annotations

import dataclasses

import numpy as np

from jexit.dist import HostRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """The unused shares of the engine's work for a batch, over all devices."""

    prompt_padding: float  # share of the prefilled positions that are padding
    idle: float  # share of the places of all ticks that no row took, weighted by the ticks' costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """The completions of a batch: B = prompts · samples rows; rows of one prompt are adjacent.

    T is `max_new_tokens`. Beyond a row's length, tokens are `pad_id`, hazard logits are NaN and the
    other numbers are 0. A token's depth is the depth of the pass that produced it, so column 0 of
    `depths_BT` is L, except after a forced prefix. With several hosts, these are this host's rows.
    """

    prompts: list[list[int]]
    prompt_B: np.ndarray  # int, the index of a row's prompt in `prompts`
    host_rows: HostRows  # this host's rows of the whole batch
    tokens_BT: np.ndarray  # int32, with the end token as a row's last token
    lengths_B: np.ndarray  # int32, at least 1
    depths_BT: np.ndarray  # int32
    logprobs_BT: np.ndarray  # float32, under the tempered, truncated distribution (greedy: plain)
    depth_logprobs_BT: np.ndarray  # float32, under the policy; 0 where nothing was drawn
    hazard_logits_BTE: np.ndarray | None  # float32, NaN at exits that were not reached
    truncated_B: np.ndarray  # bool: reached `max_new_tokens` without an end token
    shape: tuple[int, int]  # compiled sizes: padded prompt length and final cache slots
    seconds: float  # without compilation
    efficiency: Efficiency

    @property
    def rows(self) -> int:
        return len(self.lengths_B)

    @property
    def prompt_lengths_B(self) -> np.ndarray:
        lengths = np.asarray([len(prompt) for prompt in self.prompts], np.int32)
        return lengths[self.prompt_B]

    def completion(self, row: int) -> list[int]:
        """Returns the generated tokens of a row, including the end token."""
        return self.tokens_BT[row, : self.lengths_B[row]].tolist()
