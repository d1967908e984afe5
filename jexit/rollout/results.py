"""What decoding returns: completions with the depth of every token."""

from __future__ import annotations

import dataclasses

import numpy as np

from jexit.dist import HostRows
from jexit.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sequences:
    """Prompts with their completions, right-padded, for training and teacher forcing.

    Column t describes the pass at input position t, which produces token t + 1.
    """

    tokens_BT: np.ndarray  # int32
    lengths_B: np.ndarray  # int32, prompt and completion
    depth_BT: np.ndarray  # int32: recorded at action positions, L elsewhere; for `Prescribed`
    target_mask_BT: np.ndarray  # bool: positions that produce a generated token
    action_BT: np.ndarray  # bool: positions whose pass may leave early
    logprobs_BT: np.ndarray  # float32: recorded log-probability of token t + 1
    depth_logprobs_BT: np.ndarray  # float32: recorded log-probability of the depth at t


@dataclasses.dataclass(frozen=True, kw_only=True)
class Efficiency:
    """What the engine did for a batch, on all devices."""

    prefills: int  # prompts
    prompt_padding: float  # share of the prefilled positions that hold no token
    idle: float  # share of the places of all ticks that nobody took, weighted by what a tick costs
    ticks: int  # of the shard with the most


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Completions of a batch: B = prompts · samples rows, those of one prompt adjacent.

    T is `max_new_tokens`; beyond a row's length there are `pad_id` and zeros. A token's depth is
    that of the pass that produced it, so column 0 of `depths_BT` is L, but after a forced prefix.
    With several hosts these are the rows that lie here.
    """

    prompts: list[list[int]]
    forced: bool  # prompts ended in forced completion prefixes
    prompt_B: np.ndarray  # int, the index of a row's prompt in `prompts`
    host_rows: HostRows  # of the whole batch, the rows that are here
    layers: int
    pad_id: int
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

    def sequences(self, length: int | None = None) -> Sequences:
        """Prompts and completions right-padded to `length` (None: the longest row's).

        Raises UserError when a row does not fit, and after forced prefixes, the depths of whose
        tokens are not recorded.
        """
        if self.forced:
            raise UserError(
                "these rollouts went on from forced prefixes, whose depths are not recorded; "
                "decode from the prompts alone to have sequences for teacher forcing"
            )
        prompt_B = self.prompt_lengths_B
        total_B = prompt_B + self.lengths_B
        longest = int(total_B.max())
        length = longest if length is None else length
        if length < longest:
            raise UserError(
                f"sequences of length {length} cannot hold a prompt and completion of {longest} "
                "tokens; raise the length or lower max_new_tokens"
            )
        shape = (self.rows, length)
        tokens_BT = np.full(shape, self.pad_id, np.int32)
        depth_BT = np.full(shape, self.layers, np.int32)
        logprobs_BT = np.zeros(shape, np.float32)
        depth_logprobs_BT = np.zeros(shape, np.float32)
        for row in range(self.rows):
            prompt = self.prompts[self.prompt_B[row]]
            new, start, stop = self.lengths_B[row], prompt_B[row], total_B[row]
            tokens_BT[row, :start] = prompt
            tokens_BT[row, start:stop] = self.tokens_BT[row, :new]
            # The pass at position `start + i` produced generated token i + 1.
            produced = slice(start - 1, stop - 1)
            depth_BT[row, produced] = self.depths_BT[row, :new]
            logprobs_BT[row, produced] = self.logprobs_BT[row, :new]
            depth_logprobs_BT[row, produced] = self.depth_logprobs_BT[row, :new]
        position_T = np.arange(length)
        before_last_BT = position_T < total_B[:, None] - 1
        return Sequences(
            tokens_BT=tokens_BT,
            lengths_B=total_B.astype(np.int32),
            depth_BT=depth_BT,
            target_mask_BT=(position_T >= prompt_B[:, None] - 1) & before_last_BT,
            action_BT=(position_T >= prompt_B[:, None]) & before_last_BT,
            logprobs_BT=logprobs_BT,
            depth_logprobs_BT=depth_logprobs_BT,
        )
