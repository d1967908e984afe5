"""Packs prompts with completions into arrays, and records which pass produces each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jexit.axes import Array, Bool, DepthBT, Float, Int, MaskBT
from jexit.kernels import linear_logprob
from jexit.model.attention import BRANCHES


@struct.dataclass
class Completions:
    """Rows of token ids; each row contains one or more completions with their prompts.

    Each completion follows its prompt and does not attend to other completions. With `branches`,
    all completions of one prompt that are in the same row share a single copy of the prompt and
    attend to it. This sharing changes no result, because prompt tokens run all layers.

    Arrays with axis T describe input positions; `segment_BT` (0: padding) and `positions_BT` are
    arguments of `run`. Arrays with axis C describe the tokens of the completions. `source_BC` is
    the input position whose pass produced a token; for the first token of a completion, this is the
    last prompt position, which never leaves early. `owner_BC` is the index of the token's
    completion, and `index_BC` the index of the token in that completion (−1: padding).
    """

    tokens_BT: Int[Array, "B T"]
    segment_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    completion_tokens_BC: Int[Array, "B C"]
    source_BC: Int[Array, "B C"]
    owner_BC: Int[Array, "B C"]
    index_BC: Int[Array, "B C"]
    branches: bool = struct.field(pytree_node=False, default=False)

    @property
    def layout(self) -> dict[str, Any]:
        """The arguments of `run` that describe how texts are packed into the rows."""
        return {
            "segment_BT": self.segment_BT,
            "positions_BT": self.positions_BT,
            "branches": self.branches,
        }

    @property
    def valid_BT(self) -> MaskBT:
        """A mask that is True at input tokens and False at padding."""
        return self.segment_BT > 0

    @property
    def token_BC(self) -> Bool[Array, "B C"]:
        """A mask that is True at generated tokens and False at padding."""
        return self.index_BC >= 0

    @property
    def action_BC(self) -> Bool[Array, "B C"]:
        """A mask of the tokens whose pass could leave early: all but a completion's first token."""
        return self.index_BC > 0

    def window(self, values: Float[Array, "B T *X"]) -> Float[Array, "B C *X"]:
        """Returns `values` at the input position whose pass produced each completion token.

        The result [B, C, ...] has no meaning at padding (`token_BC` is False).
        """
        index = self.source_BC.reshape(*self.source_BC.shape, *([1] * (values.ndim - 2)))
        return jnp.take_along_axis(values, index, axis=1)

    @property
    def action_BT(self) -> Bool[Array, "B T"]:
        """A mask of the input positions whose pass could leave early."""
        return self.input_depths(jnp.ones_like(self.source_BC), 0) > 0

    def input_depths(self, depth_BC: Int[Array, "B C"], layers: int) -> DepthBT:
        """Returns the depth of each input position.

        If the pass at a position can leave early, this is the depth in `depth_BC` of the token that
        the pass produces; otherwise it is `layers`.
        """
        length = self.tokens_BT.shape[1]

        def scattered(source_C: Array, action_C: Array, depth_C: Array) -> Array:
            at_C = jnp.where(action_C, source_C, length)  # beyond the row: dropped
            return jnp.full(length, layers, depth_C.dtype).at[at_C].set(depth_C, mode="drop")

        return jax.vmap(scattered)(self.source_BC, self.action_BC, depth_BC)

    def by_row(self, values_JW: Array) -> Array:
        """Rearranges values of J completions [J, W] into packed rows [B, C]; 0 at padding."""
        values_BC = values_JW[self.owner_BC, jnp.maximum(self.index_BC, 0)]
        return jnp.where(self.token_BC, values_BC, jnp.zeros((), values_JW.dtype))

    def by_completion(self, values_BC: Array, shape: tuple[int, int]) -> Array:
        """Rearranges values in packed rows [B, C] into [J, W], a row per completion; 0 at padding.

        This is the inverse of `by_row`. `shape` is (J, W).
        """
        index_BC = jnp.where(self.token_BC, self.index_BC, shape[1])  # beyond the end: dropped
        values_JW = jnp.zeros(shape, values_BC.dtype)
        return values_JW.at[self.owner_BC, index_BC].set(values_BC, mode="drop")


def pad_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    shape: tuple[int, int] | None = None,
) -> Completions:
    """Puts each prompt with its completion into a row of its own, in NumPy arrays.

    `shape` is (T, C), the padded lengths of rows and completions; `pad_id` fills the rest. None
    means the longest lengths, rounded up by `bucket_length` to limit recompilation.
    """
    lengths = [len(completion) for completion in completions]
    longest = max(len(prompt) + length for prompt, length in zip(prompts, lengths, strict=True))
    total, width = shape or (bucket_length(longest), bucket_length(max(lengths)))
    rows = range(len(prompts))
    return pack_completions(
        prompts, completions, pad_id, row_of=rows, shape=(len(rows), total, width)
    )


def pack_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    *,
    row_of: Sequence[int],
    shape: tuple[int, int, int],
    prompt_of: Sequence[int] | None = None,
    numbers: Sequence[int] | None = None,
) -> Completions:
    """Packs prompts and completions into NumPy arrays of `shape` (B, T, C).

    `prompts[j]` is the prompt of completion j, which goes into row `row_of[j]`. Completions that
    are in the same row and have the same number in `prompt_of` share one copy of their prompt
    (None: no sharing). If a call packs only part of a batch, `numbers[j]` is the index of
    completion j in the whole batch (None: j itself).
    """
    count, length, width = shape
    tokens_BT = np.full((count, length), pad_id, np.int32)
    segment_BT, positions_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
    completion_BC = np.full((count, width), pad_id, np.int32)
    source_BC, owner_BC = np.zeros_like(completion_BC), np.zeros_like(completion_BC)
    index_BC = np.full_like(completion_BC, -1)
    filled_B, produced_B = np.zeros((2, count), np.int64)
    trunks: dict[tuple[int, int], list[int]] = {}  # segment, last position, branches so far

    def write(row: int, ids: Sequence[int], segment: int, position: int) -> np.ndarray:
        """Appends `ids` to row number `row`, and returns the indices of the new ids in the row."""
        here = filled_B[row] + np.arange(len(ids))
        tokens_BT[row, here] = ids
        segment_BT[row, here] = segment
        positions_BT[row, here] = position + np.arange(len(ids))
        filled_B[row] += len(ids)
        return here

    for index, (row, prompt, completion) in enumerate(
        zip(row_of, prompts, completions, strict=True)
    ):
        key = (row, index if prompt_of is None else prompt_of[index])
        if key not in trunks:
            segment = (len(trunks) + 1) * BRANCHES
            trunks[key] = [segment, write(row, prompt, segment, 0)[-1], 0]
        segment, last, branch = trunks[key]
        if prompt_of is not None:
            branch = trunks[key][2] = branch + 1
            assert branch < BRANCHES, "a prompt has too many completions"
        passes = write(row, completion, segment + branch, len(prompt))
        there = produced_B[row] + np.arange(len(completion))
        completion_BC[row, there] = completion
        source_BC[row, there] = [last, *passes[:-1]]
        owner_BC[row, there] = index if numbers is None else numbers[index]
        index_BC[row, there] = np.arange(len(completion))
        produced_B[row] += len(completion)
    return Completions(
        tokens_BT,
        segment_BT,
        positions_BT,
        completion_BC,
        source_BC,
        owner_BC,
        index_BC,
        branches=prompt_of is not None,
    )


def token_logprobs(
    head_VD: Array, hidden_BCD: Array, tokens_BC: Int[Array, "B C"], *, temperature: float = 1.0
) -> tuple[Float[Array, "B C"], Float[Array, "B C"]]:
    """Returns the log-probability of each token, and the entropy of its distribution, in nats.

    `head_VD` is the output head, and `hidden_BCD` are the hidden states, after the final norm, that
    predict the tokens. Logits are divided by `temperature`.
    """
    result = linear_logprob(flat(hidden_BCD), head_VD, flat(tokens_BC), temperature=temperature)
    return result.logprob_N.reshape(tokens_BC.shape), result.entropy_N.reshape(tokens_BC.shape)


def flat(values: Array) -> Array:
    """Reshapes [B, C, …] to [B·C, …]."""
    return values.reshape(-1, *values.shape[2:])


def bucket_length(length: int) -> int:
    """Rounds `length` up to a multiple of max(8, p / 8).

    Here p is the largest power of two below `length`.
    """
    power = 1 << max(length - 1, 1).bit_length()
    notch = max(power // 16, 8)
    return -(-length // notch) * notch
