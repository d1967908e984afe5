"""Chooses the shapes of packed batches, with little padding and few different shapes.

Every new shape costs a compilation of the training step.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jexit.data.loader import pack
from jexit.dist import host_rows, place_rows
from jexit.steps.completions import Completions, bucket_length, pack_completions

SLACK = 1.05  # rows of a new shape / rows that its batch needs: later batches may need more
REUSE_COST = 1.12  # a known shape is reused up to this multiple of a new shape's cost
KEPT = 16  # a run remembers this number of the newest shapes
LENGTHS = (1.0, 1.5, 2.0, 3.0, 4.0, 6.0)  # row lengths to try, as multiples of the longest text


@dataclasses.dataclass(frozen=True, order=True)
class PackedShape:
    """The shape of a packed batch: rows B, tokens per row T and completion tokens per row C."""

    rows: int
    length: int
    width: int

    @property
    def positions(self) -> int:
        return self.rows * self.length

    def cost(self, model_width: int) -> float:
        """Returns the cost of a pass at this shape, relative to one position without attention.

        With D = `model_width`, a position costs about 12·D² multiply-adds in matrix products and
        2·T·D in attention over T keys.
        """
        return self.positions * (1.0 + self.length / (6.0 * model_width))


class Lengths(NamedTuple):
    """The lengths, in tokens, of the J completions of a batch and of the prompt of each completion.

    `number_J` is the number of each completion's prompt. Completions of the same prompt are
    adjacent.
    """

    prompt_J: np.ndarray
    number_J: np.ndarray
    completion_J: np.ndarray


@dataclasses.dataclass(frozen=True)
class Packed:
    """The placement of a batch's J completions: completion j goes into row `row_of_J[j]`."""

    shape: PackedShape
    row_of_J: np.ndarray
    shared: bool  # whether completions of one prompt in the same row share one copy of the prompt
    tokens: int  # number of tokens in the rows

    @property
    def padding(self) -> float:
        """The fraction of positions that do not contain a token."""
        return 1.0 - self.tokens / self.shape.positions

    def placed(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        pad_id: int,
        *,
        numbers: np.ndarray,
        prompt_of: np.ndarray,
    ) -> Completions:
        """Packs this host's prompts and completions into rows and places them on the devices.

        `prompts` and `completions` have one entry per completion. `numbers` contains the index of
        each completion in the whole batch, and `prompt_of` the number of each completion's prompt.
        """
        rows, row_of = host_rows(self.shape.rows), self.row_of_J[numbers]
        here = np.flatnonzero(np.isin(row_of, rows.index_B))
        made = pack_completions(
            [prompts[index] for index in here],
            [completions[index] for index in here],
            pad_id,
            row_of=rows.find(row_of[here]),
            shape=(len(rows.index_B), self.shape.length, self.shape.width),
            prompt_of=prompt_of[here] if self.shared else None,
            numbers=numbers[here],
        )
        return place_rows(made, rows)


class PackedShapes:
    """The batch shapes of a run; a new shape is added only if it saves about a tenth of the work.

    `shards` is the number of parts into which the mesh divides rows. If the completions divide
    equally among the parts, each completion stays in its part; otherwise every device has all
    completions. The number of rows is a multiple of `shards` · `micro_batches`. A prompt with its
    completion has at most `longest` tokens. Rows have at most this length, rounded up, which limits
    the memory for attention scores. `model_width` serves to compare the costs of shapes.
    `shares(length)` returns whether completions in rows of `length` tokens can share a copy of
    their prompt. The chosen shapes depend on earlier batches, so checkpoints save the shapes
    (`state`, `load`).
    """

    def __init__(
        self,
        shards: int,
        micro_batches: int,
        model_width: int,
        longest: int,
        shares: Callable[[int], bool] = lambda length: True,
    ):
        self.shards, self.unit = shards, shards * micro_batches
        self.model_width, self.longest, self.shares = model_width, longest, shares
        self._known: list[PackedShape] = []

    def state(self) -> dict[str, np.ndarray]:
        shapes = [dataclasses.astuple(shape) for shape in self._known]
        return {"packed_shapes": np.asarray(shapes + [(0, 0, 0)] * (KEPT - len(shapes)), np.int32)}

    def load(self, values: dict[str, np.ndarray]) -> None:
        rows = values["packed_shapes"].tolist()
        self._known = [PackedShape(*row) for row in rows if row[0]]

    def fit(self, asked: Lengths) -> Packed:
        """Places completions with the lengths `asked` in rows of a known or a new shape.

        Every host must pass the lengths of the whole batch; all hosts then get the same result.
        """
        count = len(asked.prompt_J)
        parts = self.shards if count % self.shards == 0 else 1
        longest = int((asked.prompt_J + asked.completion_J).max())
        tight: dict[int, Packed] = {}  # by row length: placements without spare rows and width

        def at(length: int) -> Packed:
            if length not in tight:
                tight[length] = _packed(asked, length, parts, shared=self.shares(length))
            return tight[length]

        def holds(shape: PackedShape) -> bool:
            if shape.length < longest or shape.rows % self.unit:  # `unit`: a shape of another mesh
                return False
            need = at(shape.length).shape
            return need.rows <= shape.rows and need.width <= shape.width

        def cost(shape: PackedShape) -> float:
            return shape.cost(self.model_width)

        most = bucket_length(self.longest)
        lengths = {min(bucket_length(int(longest * times)), most) for times in LENGTHS}
        shape = min((self._new(at(length).shape, count) for length in lengths), key=cost)
        known = min(filter(holds, self._known), key=cost, default=None)
        if known is not None and cost(known) <= REUSE_COST * cost(shape):
            shape = known
        else:
            self._known = [*self._known, shape][-KEPT:]
        # Moves each part's rows to the beginning of its share of the chosen shape's rows.
        packed = at(shape.length)
        part_J, row_J = np.divmod(packed.row_of_J, packed.shape.rows // parts)
        row_of_J = part_J * (shape.rows // parts) + row_J
        return dataclasses.replace(packed, shape=shape, row_of_J=row_of_J)

    def _new(self, need: PackedShape, completions: int) -> PackedShape:
        """Returns a shape with more rows and width than `need`, so that similar batches fit too.

        It has at most one row per completion, rounded up to a multiple of `unit`.
        """
        most = -(-completions // self.unit) * self.unit  # one row per completion
        rows = min(-(-int(np.ceil(SLACK * need.rows)) // self.unit) * self.unit, most)
        widths = [known.width for known in self._known if known.length == need.length]
        width = max(min(bucket_length(need.width), need.length), *widths, 0)
        return PackedShape(rows, need.length, width)


def _packed(lengths: Lengths, length: int, parts: int, *, shared: bool) -> Packed:
    """Packs each of `parts` equal parts of the completions into rows of `length` tokens.

    The parts get equally many rows, as few as the packing allows. If `shared`, completions of a
    prompt in the same row share one copy of it.
    """
    rows: list[list[int]] = []
    for prompt_J, number_J, completion_J in zip(
        *(np.split(values, parts) for values in lengths), strict=True
    ):
        # A chunk goes into one row: a prompt and as many of its completions as fit.
        chunks: list[int] = []
        chunk_of: list[int] = []
        for index, (prompt, completion) in enumerate(zip(prompt_J, completion_J, strict=True)):
            goes_on = shared and index > 0 and number_J[index] == number_J[index - 1]
            if goes_on and chunks[-1] + completion <= length:
                chunks[-1] += int(completion)
            else:
                chunks.append(int(prompt + completion))
            chunk_of.append(len(chunks) - 1)
        row_of = pack(chunks, length)
        rows.append([row_of[chunk] for chunk in chunk_of])
    most = max(map(max, rows)) + 1
    row_of_J = np.concatenate([most * part + np.asarray(of) for part, of in enumerate(rows)])
    width = int(np.bincount(row_of_J, weights=lengths.completion_J).max())
    # One copy of a prompt per completion or, if shared, per row.
    copies = np.stack([row_of_J, lengths.number_J if shared else np.arange(len(row_of_J))], 1)
    _, first = np.unique(copies, axis=0, return_index=True)
    tokens = int(lengths.completion_J.sum() + lengths.prompt_J[first].sum())
    return Packed(PackedShape(most * parts, length, width), row_of_J, shared, tokens)
