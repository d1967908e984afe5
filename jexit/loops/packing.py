"""The shapes of packed batches: little padding, and few of them, since each one compiles anew."""

from __future__ import annotations

import dataclasses

import numpy as np

from jexit.data.loader import pack
from jexit.steps.completions import bucket_length

SLACK = 1.08  # rows of a new shape, of what its batch needs: the next batch is not the same
DEARER = 1.15  # cost of a shape that is there already, of a new one's, up to which it is taken
KEPT = 16  # shapes that a run remembers, the newest
LENGTHS = (1.0, 1.5, 2.0, 3.0)  # of a row, in its longest text


@dataclasses.dataclass(frozen=True, order=True)
class PackedShape:
    """Rows B, their tokens T and those of them that completions have, C."""

    rows: int
    length: int
    width: int

    @property
    def positions(self) -> int:
        return self.rows * self.length

    def cost(self, model_width: int) -> float:
        """Of a pass, in positions: with T keys, attention adds 2·T·D to some 12·D² products."""
        return self.positions * (1.0 + self.length / (6.0 * model_width))


@dataclasses.dataclass(frozen=True)
class Packed:
    """Where a batch's completions lie in rows of `shape`, which are divided as the batch is."""

    shape: PackedShape
    row_of_J: np.ndarray


class PackedShapes:
    """Shapes that a run's batches have had; a new one only where it saves a good tenth of the work.

    `shards` is the number of parts that the mesh divides rows into: a completion stays in its part,
    unless they cannot be divided equally and lie whole everywhere. Rows are a multiple of `unit`.
    The shapes follow from the batches before, so that a resumed run has to restore them.
    """

    def __init__(self, shards: int, micro_batches: int, model_width: int):
        self.shards, self.unit = shards, shards * micro_batches
        self.model_width = model_width
        self._known: list[PackedShape] = []

    def state(self) -> dict[str, np.ndarray]:
        shapes = [dataclasses.astuple(shape) for shape in self._known]
        return {"packed_shapes": np.asarray(shapes + [(0, 0, 0)] * (KEPT - len(shapes)), np.int32)}

    def load(self, values: dict[str, np.ndarray]) -> None:
        rows = values["packed_shapes"].tolist()
        self._known = [PackedShape(*row) for row in rows if row[0]]

    def fit(self, total_J: np.ndarray, completion_J: np.ndarray) -> Packed:
        """Rows for completions of these lengths, with their prompts and without.

        Every host calls this with the whole batch and gets the same.
        """
        parts = self.shards if len(total_J) % self.shards == 0 else 1
        longest = int(total_J.max())
        placed: dict[int, Packed] = {}  # by length of row, with the rows and the width it takes

        def at(length: int) -> Packed:
            if length not in placed:
                placed[length] = _packed(total_J, completion_J, length, parts)
            return placed[length]

        def holds(shape: PackedShape) -> bool:
            if shape.length < longest or shape.rows % parts:
                return False
            need = at(shape.length).shape
            return need.rows <= shape.rows and need.width <= shape.width

        def cost(shape: PackedShape) -> float:
            return shape.cost(self.model_width)

        lengths = {bucket_length(int(longest * times)) for times in LENGTHS}
        shape = min((self._new(at(length).shape, len(total_J)) for length in lengths), key=cost)
        known = min(filter(holds, self._known), key=cost, default=None)
        if known is not None and cost(known) <= DEARER * cost(shape):
            shape = known
        else:
            self._known = [*self._known, shape][-KEPT:]
        # Each part's rows begin where its share of them does.
        placed_J = at(shape.length)
        tight, wide = placed_J.shape.rows // parts, shape.rows // parts
        part_J, row_J = np.divmod(placed_J.row_of_J, tight)
        return Packed(shape, part_J * wide + row_J)

    def _new(self, need: PackedShape, texts: int) -> PackedShape:
        """A shape for batches a little larger than one that needs so much."""
        most = -(-texts // self.unit) * self.unit  # a row for each
        rows = min(-(-int(np.ceil(SLACK * need.rows)) // self.unit) * self.unit, most)
        widths = [known.width for known in self._known if known.length == need.length]
        width = max(min(bucket_length(need.width), need.length), *widths, 0)
        return PackedShape(rows, need.length, width)


def _packed(total_J: np.ndarray, completion_J: np.ndarray, length: int, parts: int) -> Packed:
    """Each part packed by itself, into as many rows as the one with the most needs."""
    rows = [pack(total.tolist(), length) for total in np.split(total_J, parts)]
    most = max(map(max, rows)) + 1
    row_of_J = np.concatenate([most * part + np.asarray(of) for part, of in enumerate(rows)])
    width = int(np.bincount(row_of_J, weights=completion_J).max())
    return Packed(PackedShape(most * parts, length, width), row_of_J)
