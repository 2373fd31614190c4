"""The CPU's work is cut so that each element is done once, evenly, and without regard to the number of threads."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from torchtower._C import ChunkPlan

SIZE, ALIGNMENT = ChunkPlan.CHUNK_SIZE, ChunkPlan.ALIGNMENT
numels = st.lists(
    st.one_of(
        st.integers(0, 3 * ALIGNMENT),
        st.integers(0, 3 * SIZE),
        st.sampled_from([SIZE - 1, SIZE, SIZE + 1, 2 * SIZE]),
    ),
    max_size=30,
)


@given(numels)
@example([])
@example([0, 0, 5, 0])
@example([SIZE, SIZE, 1])
def test_each_element_is_in_one_piece(numels: list[int]) -> None:
    plan = ChunkPlan(numels)
    done = [0] * len(numels)
    for chunk in range(plan.num_chunks):
        for parameter, begin, end in plan.pieces(chunk):
            assert begin == done[parameter] < end
            done[parameter] = end
    assert done == numels


@given(numels)
def test_pieces_begin_at_whole_cache_lines_and_fit_a_chunk(numels: list[int]) -> None:
    plan = ChunkPlan(numels)
    for chunk in range(plan.num_chunks):
        pieces = plan.pieces(chunk)
        assert all(begin % ALIGNMENT == 0 for _, begin, _ in pieces)
        assert sum(end - begin for _, begin, end in pieces) <= SIZE


@given(numels)
def test_chunks_are_as_few_as_the_padded_elements_need(numels: list[int]) -> None:
    # All but the last are full to the last padded element: equal shares of chunks are equal shares of work.
    padded = sum(-(-numel // ALIGNMENT) * ALIGNMENT for numel in numels)
    assert ChunkPlan(numels).num_chunks == -(-padded // SIZE)


@given(numels)
def test_each_piece_has_a_slot_of_its_own_that_its_parameter_finds(numels: list[int]) -> None:
    plan = ChunkPlan(numels)
    slots = []
    for chunk in range(plan.num_chunks):
        for parameter, _, _ in plan.pieces(chunk):
            first, last = plan.chunks_of(parameter)
            assert first <= chunk < last
            slots.append(plan.slot(chunk, parameter))
    assert len(set(slots)) == len(slots)
    assert all(0 <= slot < plan.num_slots for slot in slots)
    found = [plan.slot(chunk, p) for p in range(len(numels)) for chunk in range(*plan.chunks_of(p))]
    assert sorted(found) == sorted(slots)


@pytest.mark.parametrize("numel", [2**31 - 1, 2**31 + 7, 2**40 + 1])
def test_tensors_beyond_32_bits_keep_their_index(numel: int) -> None:
    plan = ChunkPlan([5, numel, 3])
    assert plan.num_chunks == -(-(numel // ALIGNMENT * ALIGNMENT + 3 * ALIGNMENT) // SIZE)
    assert plan.pieces(0) == [(0, 0, 5), (1, 0, SIZE - ALIGNMENT)]
    middle = plan.num_chunks // 2
    begin = middle * SIZE - ALIGNMENT
    assert plan.pieces(middle) == [(1, begin, begin + SIZE)]
    *_, (parameter, _, end), last = plan.pieces(plan.num_chunks - 2) + plan.pieces(plan.num_chunks - 1)
    assert (parameter, end) == (1, numel)
    assert last == (2, 0, 3)
