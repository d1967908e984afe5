"""Prompts with completions packed into arrays, and the input positions that produce each token."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jexit.axes import Array, Bool, DepthBT, Float, Int, MaskBT
from jexit.model.attention import BRANCHES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Completions:
    """Rows of token ids, each of which contains one or several completions J with their prompts.

    Each completion follows its prompt and does not attend to other completions. With `branches`,
    the completions of one prompt in a row follow a single copy of the prompt, a trunk to which all
    of them attend. A shared copy is exact, because prompt tokens run all layers.

    Arrays with axis T describe input positions: the token ids, and the arguments `segment_BT` (0:
    padding) and `positions_BT` of `run`. Arrays with axis C describe the completions' tokens.
    `source_BC` is the input position whose pass produced a token; for a completion's first token,
    this is the last prompt position, which never leaves early. `owner_BC` is the index of the
    token's completion, and `place_BC` is the token's index in that completion (−1: padding).
    """

    tokens_BT: Int[Array, "B T"]
    segment_BT: Int[Array, "B T"]
    positions_BT: Int[Array, "B T"]
    completion_tokens_BC: Int[Array, "B C"]
    source_BC: Int[Array, "B C"]
    owner_BC: Int[Array, "B C"]
    place_BC: Int[Array, "B C"]
    branches: bool = dataclasses.field(default=False, metadata={"static": True})

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
        """A mask of the positions that contain a token."""
        return self.segment_BT > 0

    @property
    def token_BC(self) -> Bool[Array, "B C"]:
        """A mask of the positions that contain a generated token."""
        return self.place_BC >= 0

    @property
    def action_BC(self) -> Bool[Array, "B C"]:
        """A mask of the tokens whose pass could leave early: all but a completion's first token."""
        return self.place_BC > 0

    def window(self, values: Float[Array, "B T *X"]) -> Float[Array, "B C *X"]:
        """Returns, for each completion token, the value at the input position that produced it."""
        index = self.source_BC.reshape(*self.source_BC.shape, *([1] * (values.ndim - 2)))
        return jnp.take_along_axis(values, index, axis=1)

    def input_depths(self, depth_BC: Int[Array, "B C"], layers: int) -> DepthBT:
        """Returns depths per input position: `depth_BC` where a pass could leave, else `layers`."""
        return self._at_inputs(depth_BC, layers)

    @property
    def action_BT(self) -> Bool[Array, "B T"]:
        """A mask of the input positions whose pass could leave early."""
        return self._at_inputs(jnp.ones_like(self.source_BC), 0) > 0

    def _at_inputs(self, values_BC: Int[Array, "B C"], elsewhere: int) -> Int[Array, "B T"]:
        """Moves the values of action tokens to the input positions that produced these tokens.

        An action token is one whose pass could leave early. All other input positions get the value
        `elsewhere`.
        """
        length = self.tokens_BT.shape[1]

        def scattered(source_C: Array, action_C: Array, values_C: Array) -> Array:
            at_C = jnp.where(action_C, source_C, length)  # beyond the row: dropped
            return jnp.full(length, elsewhere, values_C.dtype).at[at_C].set(values_C, mode="drop")

        return jax.vmap(scattered)(self.source_BC, self.action_BC, values_BC)

    def by_row(self, values_JW: Array) -> Array:
        """Rearranges values from [J, W], by completion and token, to rows [B, C]; 0 at padding."""
        values_BC = values_JW[self.owner_BC, jnp.maximum(self.place_BC, 0)]
        return jnp.where(self.token_BC, values_BC, jnp.zeros((), values_JW.dtype))

    def by_completion(self, values_BC: Array, shape: tuple[int, int]) -> Array:
        """Rearranges values from rows [B, C] to completions and their tokens, [J, W] = `shape`.

        The value is 0 after the last token of a completion.
        """
        place_BC = jnp.where(self.token_BC, self.place_BC, shape[1])  # beyond the end: dropped
        values_JW = jnp.zeros(shape, values_BC.dtype)
        return values_JW.at[self.owner_BC, place_BC].set(values_BC, mode="drop")


def pad_completions(
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    pad_id: int,
    shape: tuple[int, int] | None = None,
) -> Completions:
    """Puts each prompt with its completion into a row of its own, in NumPy arrays.

    `shape` is (T, C), the numbers of tokens and of completion tokens per row; every row has to fit.
    If `shape` is None, T and C are the longest lengths, rounded up by `bucket_length` to limit
    recompilation.
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

    `prompts[j]` is the prompt of completion j, which goes into row `row_of[j]`. If `prompt_of` is
    None, each completion gets its own copy of its prompt. Otherwise, completions of a row that have
    the same number in `prompt_of` share one copy. `numbers[j]` is the index of completion j in the
    whole batch (None: j itself), for calls with only a part of the batch.
    """
    count, length, width = shape
    tokens_BT = np.full((count, length), pad_id, np.int32)
    segment_BT, positions_BT = np.zeros_like(tokens_BT), np.zeros_like(tokens_BT)
    completion_BC = np.full((count, width), pad_id, np.int32)
    source_BC, owner_BC = np.zeros_like(completion_BC), np.zeros_like(completion_BC)
    place_BC = np.full_like(completion_BC, -1)
    filled_B, produced_B = np.zeros((2, count), np.int64)
    trunks: dict[tuple[int, int], list[int]] = {}  # segment, last position, branches so far

    def write(row: int, ids: Sequence[int], segment: int, position: int) -> np.ndarray:
        """Appends the ids to the row and returns their indices in the row."""
        here = filled_B[row] + np.arange(len(ids))
        tokens_BT[row, here] = ids
        segment_BT[row, here] = segment
        positions_BT[row, here] = position + np.arange(len(ids))
        filled_B[row] += len(ids)
        return here

    for place, (row, prompt, completion) in enumerate(
        zip(row_of, prompts, completions, strict=True)
    ):
        key = (row, place if prompt_of is None else prompt_of[place])
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
        owner_BC[row, there] = place if numbers is None else numbers[place]
        place_BC[row, there] = np.arange(len(completion))
        produced_B[row] += len(completion)
    return Completions(
        tokens_BT,
        segment_BT,
        positions_BT,
        completion_BC,
        source_BC,
        owner_BC,
        place_BC,
        branches=prompt_of is not None,
    )


def bucket_length(length: int) -> int:
    """Rounds a length up to a multiple of 1/8 of the largest power of two below it, at least of 8.

    The results form a geometric ladder, so that batches have few different shapes.
    """
    power = 1 << max(length - 1, 1).bit_length()
    notch = max(power // 16, 8)
    return -(-length // notch) * notch
