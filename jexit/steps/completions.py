"""Prompts with completions on device, and the window of positions that produce the completions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jexit.axes import Array, Bool, DepthBT, Float, Int, MaskBT


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    """Right-padded rows: prompt, completion, padding. T input positions, C completion positions.

    Completion position i comes from the pass at input position prompt_length − 1 + i. Position 0
    is produced by the last prompt position, which never leaves early.
    """

    tokens_BT: Int[Array, "B T"]
    prompt_lengths_B: Int[Array, "B"]
    completion_tokens_BC: Int[Array, "B C"]
    completion_lengths_B: Int[Array, "B"]

    @property
    def valid_BT(self) -> MaskBT:
        length_B = self.prompt_lengths_B + self.completion_lengths_B
        return jnp.arange(self.tokens_BT.shape[1]) < length_B[:, None]

    @property
    def token_BC(self) -> Bool[Array, "B C"]:
        """Positions that hold a generated token."""
        width = self.completion_tokens_BC.shape[1]
        return jnp.arange(width) < self.completion_lengths_B[:, None]

    @property
    def action_BC(self) -> Bool[Array, "B C"]:
        """Positions whose token came from a pass that could leave: all but the first."""
        return self.token_BC & (jnp.arange(self.completion_tokens_BC.shape[1]) > 0)

    def window(self, values: Float[Array, "B T *X"]) -> Float[Array, "B C *X"]:
        """Picks, for every completion position, the value at the input position producing it."""
        width, length = self.completion_tokens_BC.shape[1], self.tokens_BT.shape[1]
        index_BC = self.prompt_lengths_B[:, None] - 1 + jnp.arange(width)
        index_BC = jnp.minimum(index_BC, length - 1)
        return jnp.take_along_axis(
            values, index_BC.reshape(*index_BC.shape, *([1] * (values.ndim - 2))), axis=1
        )

    def input_depths(self, depth_BC: Int[Array, "B C"], layers: int) -> DepthBT:
        """Depths at input positions: `depth_BC` where a pass could leave, `layers` elsewhere."""
        width = self.completion_tokens_BC.shape[1]
        index_BT = jnp.arange(self.tokens_BT.shape[1]) - (self.prompt_lengths_B[:, None] - 1)
        inside_BT = (index_BT > 0) & (index_BT < self.completion_lengths_B[:, None])
        picked_BT = jnp.take_along_axis(depth_BC, jnp.clip(index_BT, 0, width - 1), axis=1)
        return jnp.where(inside_BT, picked_BT, layers)


def pad_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    shape: tuple[int, int] | None = None,
) -> Completions:
    """Rows of token ids as NumPy arrays of `shape` (T, C), which must hold them.

    Without a shape T and C come from a short ladder of lengths, against recompilation.
    """
    prompt_lengths = np.asarray([len(prompt) for prompt in prompts], np.int32)
    lengths = np.asarray([len(completion) for completion in completions], np.int32)
    total, width = shape or (
        bucket_length(int((prompt_lengths + lengths).max())),
        bucket_length(int(lengths.max())),
    )
    tokens_BT = np.full((len(prompts), total), pad_id, np.int32)
    completion_BC = np.full((len(prompts), width), pad_id, np.int32)
    for row, (prompt, completion) in enumerate(zip(prompts, completions, strict=True)):
        tokens_BT[row, : len(prompt) + len(completion)] = [*prompt, *completion]
        completion_BC[row, : len(completion)] = completion
    return Completions(tokens_BT, prompt_lengths, completion_BC, lengths)


def bucket_length(length: int) -> int:
    """The next length in a geometric ladder (eighths of a power of two, at least 8)."""
    power = 1 << max(length - 1, 1).bit_length()
    notch = max(power // 16, 8)
    return -(-length // notch) * notch
