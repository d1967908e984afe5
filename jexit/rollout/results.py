"""What decoding returns: completions with the depth of every token."""

from __future__ import annotations

import dataclasses

import numpy as np

from jexit.dist import HostRows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What the engine did for a batch, on all devices."""

    prompt_padding: float  # share of the prefilled positions that hold no token
    idle: float  # share of the places of all ticks that no row took, weighted by what a tick costs


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions of a batch: B = prompts · samples rows, those of one prompt adjacent.

    T is `max_new_tokens`; beyond a row's length there are `pad_id` and zeros. A token's depth is
    that of the pass that produced it, so column 0 of `depths_BT` is L, but after a forced prefix.
    With several hosts these are the rows that lie here.
    """

    prompts: list[list[int]]
    prompt_B: np.ndarray  # int, the index of a row's prompt in `prompts`
    host_rows: HostRows  # of the whole batch, the rows that are here
    tokens_BT: np.ndarray  # int32, the end token kept as a row's last
    lengths_B: np.ndarray  # int32, at least 1
    depths_BT: np.ndarray  # int32
    logprobs_BT: np.ndarray  # float32, of the tempered, truncated distribution (greedy: plain)
    depth_logprobs_BT: np.ndarray  # float32, under the policy; 0 where nothing was drawn
    hazard_logits_BTE: np.ndarray | None  # float32, NaN at exits that were not reached
    truncated_B: np.ndarray  # bool: ran into `max_new_tokens` without an end token
    shape: tuple[int, int]  # padded prompt length and last cache size: what was compiled for
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
        """The generated tokens of a row, the end token included."""
        return self.tokens_BT[row, : self.lengths_B[row]].tolist()
