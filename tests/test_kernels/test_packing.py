"""Squeezed windows hold every active row once, and nothing that costs without being seen."""

from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from window_cases import Problem, full_and_idle_windows, problem, problems

from idlevit_mm.kernels.cpu.packing import _STEP, pack_whole_windows, pack_windows
from idlevit_mm.ops import window_layout

quick = settings(deadline=None, max_examples=60, derandomize=True)


def windows_of(packing):
    """(bucket, slots, rows, regions) of every window, in the order of places."""
    for bucket in packing.buckets:
        for window in range(bucket.num_windows):
            first = bucket.first + window * bucket.width
            part = slice(first, first + bucket.width)
            yield (
                bucket,
                packing.slots[part].tolist(),
                packing.rows[part].tolist(),
                packing.regions[part].tolist(),
            )


def rows_of(case, image, window, slots):
    """Packed rows that belong into slots of a window; B * R for padding."""
    rows = [case.row(image, window, slot) for slot in slots]
    return [case.batch * case.rows if row is None else row for row in rows]


@given(problems())
@example(problem(1, 13, 7, 3, count=5, batch=2))
@example(problem(7, 7, 7, count=1))
@example(problem(9, 14, 7, 3, summarised=True, count=100, batch=3))
@quick
def test_every_occupied_slot_has_one_place_in_its_window(case: Problem):
    packing = case.pack()
    number = case.batch * case.rows
    expected = {
        tuple(rows_of(case, *key, slots)): (key, slots) for key, slots in case.occupied().items()
    }
    for bucket, slots, rows, regions in windows_of(packing):
        filled = tuple(row for row in rows if row <= number)
        empty = bucket.width - len(filled)
        assert filled in expected, 'rows that do not belong together, or are there twice'
        (_, window), want = expected.pop(filled)
        assert slots == [*want, *[case.slots + 1] * empty]
        assert rows == [*filled, *[number + 1] * empty]
        assert regions == [*(case.region(window, slot) for slot in want), *[-1] * empty]
    assert not expected, 'windows without a place'


@given(problems())
@quick
def test_rows_and_places_are_inverse(case: Problem):
    """Each row has one place, unless it is a summary of nothing."""
    packing, number = case.pack(), case.batch * case.rows
    counts = Counter(row for row in packing.rows.tolist() if row < number)
    assert set(counts.values()) == {1}
    missing = set(range(number)) - counts.keys()
    full = {
        case.row(image, window, case.slots)
        for image in range(case.batch)
        for window in range(len(case.layout.token_ids))
        if case.summarised and case.slots not in case.occupied().get((image, window), [])
    }
    assert missing == full
    assert packing.has_padding or not (packing.rows == number).any()


@given(problems(most=24, windows=(1, 4)))
@quick
def test_buckets_cover_all_places_without_gap(case: Problem):
    packing = case.pack()
    end = 0
    for bucket in packing.buckets:
        assert bucket.first == end
        assert bucket.num_windows > 0
        assert 0 <= bucket.num_border <= bucket.num_windows
        end += bucket.num_windows * bucket.width
    assert end == len(packing.rows) == len(packing.slots) == len(packing.regions)
    widths = [bucket.width for bucket in packing.buckets]
    assert widths == sorted(set(widths)), 'two buckets of one width'


@given(problems(most=24, windows=(1, 4)), st.sampled_from([1, 50, 400, 10**6]))
@quick
def test_widths_waste_less_than_a_step_where_windows_are_many(case: Problem, min_places: int):
    packing = case.pack(min_places)
    most = case.slots + case.summarised
    found = []
    for bucket, slots, *_ in windows_of(packing):
        count = sum(slot <= case.slots for slot in slots)
        assert 0 < count <= bucket.width <= most
        rounded = max(min(-(-count // _STEP) * _STEP, case.slots), count)
        found.append((rounded, bucket.width))
    numbers = Counter(rounded for rounded, _ in found)
    for rounded, width in found:
        assert width >= rounded
        assert width == rounded or numbers[rounded] * rounded < min_places


@given(problems())
@quick
def test_border_windows_are_the_last_of_their_bucket(case: Problem):
    packing = case.pack()
    for bucket in packing.buckets:
        inner = bucket.num_windows - bucket.num_border
        part = packing.regions[bucket.first : bucket.first + bucket.num_windows * bucket.width]
        assert (part.view(-1, bucket.width)[:inner] == -1).all()
    most = len(case.layout.regions) * case.batch
    assert sum(bucket.num_border for bucket in packing.buckets) <= most


def assert_complete_as_documented(case):
    packing = case.pack()
    found = {}
    for bucket, slots, *_ in windows_of(packing):
        found[bucket] = found.get(bucket, True) and slots == list(range(case.slots))
    assert {bucket: bucket.complete for bucket in packing.buckets} == found


@given(problems())
@quick
def test_complete_is_all_slots_in_order(case: Problem):
    assert_complete_as_documented(case)


@pytest.mark.parametrize('window', [3, 4, 7])
def test_complete_with_summaries(window):
    """Of 9 and 49 slots the step leaves a place, of 16 none."""
    assert_complete_as_documented(full_and_idle_windows(window))


@given(problems())
@example(problem(14, 21, 7, 3, batch=3))
@example(problem(1, 1, 7))
@quick
def test_all_tokens_without_ids_is_all_tokens_by_id(case: Problem):
    height, width = case.hw_shape
    case = problem(height, width, case.window, case.shift, batch=case.batch)
    dense = pack_windows(None, case.batch, case.hw_shape, case.window, case.shift)
    for name, got, want in zip(dense._fields, dense, case.pack(), strict=True):
        assert torch.equal(got, want) if isinstance(got, torch.Tensor) else got == want, name


def test_a_dense_map_is_one_complete_bucket_of_whole_windows():
    packing = problem(14, 21, 7, batch=2).pack()
    assert packing.buckets == ((0, 12, 49, 0, True),)
    assert not packing.has_padding


def test_windows_without_active_token_cost_nothing():
    packing = problem(14, 14, 7, count=1, batch=2).pack()
    assert packing.buckets == ((0, 2, 8, 0, False),)
    assert packing.slots.view(2, 8)[:, 1:].eq(50).all()


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 5), st.integers(1, 3), st.booleans())
@quick
def test_whole_windows_stand_one_after_another(height, width, window, batch, shifted):
    shift = window // 2 if shifted else 0
    layout = window_layout(height, width, window, shift, torch.device('cpu'))
    count = max(1, len(layout.token_ids) // 2)
    chosen = torch.rand(batch, len(layout.token_ids)).topk(count).indices.sort().values
    packing = pack_whole_windows(chosen, (height, width), window, shift)
    (bucket,) = packing.buckets
    slots = window**2
    assert bucket[:3] == (0, batch * count, slots)
    assert bucket.complete
    assert len(packing.rows) == batch * count * slots
    first = len(layout.token_ids) - len(layout.regions)
    for place, row in enumerate(packing.rows.tolist()):
        number = int(chosen.flatten()[place // slots])
        padding = int(layout.token_ids[number, place % slots]) < 0
        assert row == (len(packing.rows) if padding else place)
        assert packing.has_padding or not padding
        region = int(layout.regions[number - first, place % slots]) if number >= first else -1
        assert bucket.num_border or region == -1
        assert packing.regions[place] == region
    assert packing.slots.tolist() == list(range(slots)) * (batch * count)


def test_tables_that_are_shared_are_not_changed():
    case = problem(9, 13, 4, 2, count=50, batch=2, summarised=True)
    before = [part.numpy().copy() for part in case.pack()[:3]]
    problem(9, 13, 4, 2, count=3, batch=2, summarised=True, seed=1).pack()
    for a, b in zip(case.pack()[:3], before, strict=True):
        assert np.array_equal(a.numpy(), b)
