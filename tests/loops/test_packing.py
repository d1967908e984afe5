"""Where completions of random lengths lie in packed rows, and how many shapes that takes."""

import numpy as np

from jexit.loops.packing import KEPT, Lengths, Packed, PackedShape, PackedShapes
from jexit.model.attention import BRANCHES
from jexit.steps.completions import pack_completions

WIDTH = 96  # of the model
LONGEST = 512


def lengths(rng, count=192, samples=8, prompt=13, longest=56, mean=18.0):
    """Of completions that are mostly short and sometimes long."""
    completion_J = np.clip(rng.gamma(4.0, mean / 4.0, count).astype(int), 2, longest)
    number_J = np.arange(count) // samples
    prompt_J = rng.integers(prompt - 4, prompt + 5, number_J[-1] + 1)[number_J]
    return Lengths(prompt_J, number_J, completion_J)


def check(packed: Packed, asked: Lengths, parts=1):
    rows, length, width = packed.shape.rows, packed.shape.length, packed.shape.width
    assert packed.row_of_J.min() >= 0 and packed.row_of_J.max() < rows
    ids = [[1] * n for n in asked.prompt_J], [[2] * n for n in asked.completion_J]
    prompt_of = asked.number_J if packed.shared else None
    made = pack_completions(  # which raises where a row has not enough room
        *ids, 0, row_of=packed.row_of_J, shape=(rows, length, width), prompt_of=prompt_of
    )
    assert (made.tokens_BT > 0).sum() == packed.tokens
    assert (made.index_BC >= 0).sum() == asked.completion_J.sum()
    part_J = np.arange(len(asked.prompt_J)) * parts // len(asked.prompt_J)
    np.testing.assert_array_equal(packed.row_of_J // (rows // parts), part_J)


def test_a_row_has_room_for_what_lies_in_it():
    for shards, micro_batches, shared in (
        (1, 1, True),
        (1, 4, False),
        (4, 1, True),
        (32, 3, False),
    ):
        rng = np.random.default_rng(0)
        shapes = PackedShapes(
            shards, micro_batches, WIDTH, LONGEST, lambda _, shared=shared: shared
        )
        for step in range(0, 30, 2):
            asked = lengths(rng, mean=30.0 - 0.7 * step)
            packed = shapes.fit(asked)
            assert packed.shared == shared
            check(packed, asked, shards)
            assert packed.shape.rows % (shards * micro_batches) == 0


def test_little_padding_in_few_shapes():
    """Over 200 steps in which completions become half as long, and vary with their problems."""
    for shared in (True, False):
        shapes = PackedShapes(1, 1, WIDTH, LONGEST, lambda _, shared=shared: shared)
        rng, seen, padding = np.random.default_rng(1), set(), []
        for step in range(200):
            mean = (24.0 - 0.06 * step) * rng.uniform(0.9, 1.1)
            packed = shapes.fit(lengths(rng, mean=mean))
            seen.add(packed.shape)
            padding.append(packed.padding)
        assert np.mean(padding) < 0.15
        assert len(seen) <= 10


def test_a_shared_prompt_saves_its_copies():
    asked = lengths(np.random.default_rng(5), prompt=60, mean=8.0)
    apart, shared = (
        PackedShapes(1, 1, WIDTH, LONGEST, lambda length, kind=kind: kind).fit(asked)
        for kind in (False, True)
    )
    assert shared.shape.positions < 0.4 * apart.shape.positions


def test_completions_that_cannot_be_divided_lie_anywhere():
    asked = lengths(np.random.default_rng(2), count=27)
    packed = PackedShapes(8, 1, WIDTH, LONGEST).fit(asked)
    check(packed, asked)
    assert packed.shape.rows % 8 == 0
    # And no more rows than completions.
    packed = PackedShapes(1, 1, WIDTH, LONGEST).fit(
        Lengths(np.full(6, 16), np.arange(6), np.full(6, 24))
    )
    assert packed.shape == PackedShape(6, 40, 24)
    assert sorted(packed.row_of_J) == list(range(6))


def test_rows_are_longer_where_two_texts_would_not_share_one():
    """Texts of like length, a little over half of the longest, leave nearly half a row empty."""
    completion_J = np.random.default_rng(4).integers(5, 25, 192)
    completion_J[0] = 49
    asked = Lengths(np.full(192, 55), np.arange(192), completion_J)
    packed = PackedShapes(1, 1, WIDTH, LONGEST).fit(asked)
    check(packed, asked)
    assert packed.shape.length > 104
    assert packed.shape.positions < 0.85 * 192 * 104


def test_no_row_is_longer_than_a_text_may_be():
    asked = lengths(np.random.default_rng(7), longest=40)
    assert PackedShapes(1, 1, WIDTH, LONGEST).fit(asked).shape.length > 64
    packed = PackedShapes(1, 1, WIDTH, 60).fit(asked)
    check(packed, asked)
    assert packed.shape.length <= 64


def test_shapes_are_restored_and_those_of_another_mesh_are_taken_where_they_divide():
    rng = np.random.default_rng(3)
    batches = [lengths(rng, mean=mean) for mean in rng.uniform(6, 40, 60)]
    whole, first = PackedShapes(1, 2, WIDTH, LONGEST), PackedShapes(1, 2, WIDTH, LONGEST)
    made = [whole.fit(batch) for batch in batches]
    for batch in batches[:30]:
        first.fit(batch)
    state = first.state()
    assert state["packed_shapes"].shape == (KEPT, 3)
    assert any(shape[0] % 8 for shape in state["packed_shapes"])
    second, divided = PackedShapes(1, 2, WIDTH, LONGEST), PackedShapes(4, 2, WIDTH, LONGEST)
    for shapes in (second, divided):
        shapes.load(state)
    for packed, batch in zip(made[30:], batches[30:], strict=True):
        again = second.fit(batch)
        assert again.shape == packed.shape
        np.testing.assert_array_equal(again.row_of_J, packed.row_of_J)
        other = divided.fit(batch)
        check(other, batch, 4)
        assert other.shape.rows % 8 == 0


def test_rows_hold_each_completion_behind_its_prompt():
    prompts, completions = [[1, 2, 3], [4], [5, 6]], [[7, 8], [9], [10, 11, 12]]
    rows = pack_completions(prompts, completions, 0, row_of=[1, 0, 1], shape=(3, 11, 6))
    assert rows.tokens_BT.tolist() == [
        [4, 9, *[0] * 9], [1, 2, 3, 7, 8, 5, 6, 10, 11, 12, 0], [0] * 11,
    ]  # fmt: skip
    assert len(set(rows.segment_BT[1].tolist())) == 3
    assert rows.segment_BT[1].tolist() == [*[BRANCHES] * 5, *[3 * BRANCHES] * 5, 0]
    assert rows.positions_BT[1].tolist() == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 0]
    assert rows.completion_tokens_BC[1].tolist() == [7, 8, 10, 11, 12, 0]
    assert rows.source_BC[1].tolist() == [2, 3, 6, 7, 8, 0]
    assert rows.owner_BC[1].tolist() == [0, 0, 2, 2, 2, 0]
    assert rows.index_BC.tolist() == [[0, *[-1] * 5], [0, 1, 0, 1, 2, -1], [-1] * 6]
    np.testing.assert_array_equal(rows.window(rows.tokens_BT)[1, :5], [3, 7, 6, 10, 11])
    depth_BC = np.where(rows.index_BC >= 0, 2, 0).astype(np.int32)
    assert rows.input_depths(depth_BC, 9).tolist() == [
        [9] * 11, [9, 9, 9, 2, 9, 9, 9, 2, 2, 9, 9], [9] * 11,
    ]  # fmt: skip
    values_JW = np.arange(12, dtype=np.int32).reshape(3, 4)
    by_row = rows.by_row(values_JW)
    assert by_row.tolist() == [[4, 0, 0, 0, 0, 0], [0, 1, 8, 9, 10, 0], [0] * 6]
    back = rows.by_completion(by_row, (3, 4))
    assert back.tolist() == [[0, 1, 0, 0], [4, 0, 0, 0], [8, 9, 10, 0]]


def test_a_row_has_one_copy_of_a_prompt():
    prompts, completions = [[1, 2]] * 3, [[7, 8], [9], [10, 11, 12]]
    rows = pack_completions(
        prompts, completions, 0, row_of=[1, 0, 1], shape=(2, 8, 6), prompt_of=[0, 0, 0]
    )
    assert rows.tokens_BT.tolist() == [[1, 2, 9, *[0] * 5], [1, 2, 7, 8, 10, 11, 12, 0]]
    assert rows.positions_BT[1].tolist() == [0, 1, 2, 3, 2, 3, 4, 0]
    trunk = rows.segment_BT[1, 0]
    assert (rows.segment_BT[1] - trunk).tolist() == [0, 0, 1, 1, 2, 2, 2, -trunk]
    assert trunk % BRANCHES == 0 and trunk > 0
    assert rows.source_BC[1].tolist() == [1, 2, 1, 4, 5, 0]
    assert rows.owner_BC[1].tolist() == [0, 0, 2, 2, 2, 0]
