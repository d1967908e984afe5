"""Runs decoded completions through a model again, together with their recorded depths."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from jexit.axes import Array
from jexit.dist import data_shards, place_rows, whole
from jexit.steps.completions import Completions, bucket_length, pad_completions

_POSITIONS = 8192  # in one batch, from which the number of rows follows


def batch_rows(count: int, length: int) -> int:
    """Returns the batch size for running `count` sequences of `length` tokens through a model.

    The result is a multiple of the number of data shards, and may exceed `count`.
    """
    shards = data_shards()
    return min(-(-count // shards), max(1, _POSITIONS // length)) * shards


@dataclasses.dataclass(frozen=True)
class Recorded:
    """Prompts and completions as token ids, with the depth of the pass that produced each token."""

    prompts: Sequence[Sequence[int]]
    completions: Sequence[Sequence[int]]
    depths: Sequence[Sequence[int]]
    pad_id: int

    def through(self, program: Callable[[Completions, Any], tuple[Array, ...]]) -> list[np.ndarray]:
        """Calls `program(rows, depth_BC)` on one batch after the other, and joins the outputs.

        `rows` contains the batch's B completions and `depth_BC` the depth of each of their tokens.
        A returned output has the shape [N, C, …], with one row for each of all N completions, in
        order; C is the length of the longest one. Entries beyond the end of a completion are zeros
        or outputs for padding.
        """
        length_B = np.asarray(
            [len(p) + len(c) for p, c in zip(self.prompts, self.completions, strict=True)]
        )
        order, width = np.argsort(-length_B, kind="stable"), max(map(len, self.completions))
        results: list[np.ndarray] = []
        start = 0
        while start < len(order):
            size = batch_rows(len(order) - start, bucket_length(int(length_B[order[start]])))
            own = order[start : start + size]
            start += size
            chosen = np.resize(own, size)  # the last batch is filled with its rows again
            rows = pad_completions(
                [self.prompts[i] for i in chosen],
                [self.completions[i] for i in chosen],
                self.pad_id,
            )
            depth_BC = np.zeros(rows.completion_tokens_BC.shape, np.int32)
            for row, i in enumerate(chosen):
                depth_BC[row, : len(self.depths[i])] = self.depths[i]
            found = whole(program(*place_rows((rows, depth_BC))), "recorded completions")
            for index, values_BCX in enumerate(found):
                if len(results) == index:
                    shape = (len(order), width, *values_BCX.shape[2:])
                    results.append(np.zeros(shape, values_BCX.dtype))
                columns = min(width, values_BCX.shape[1])
                results[index][own, :columns] = values_BCX[: len(own), :columns]
        return results
