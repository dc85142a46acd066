"""Squeezed windows hold every active row once, and nothing that costs without being seen."""

import pytest
import torch
from hypothesis import example, given, settings
from window_cases import Problem, one_full_window, problem, problems

from idlevit_mm.ops import place_rows, read_rows

quick = settings(deadline=None, max_examples=60, derandomize=True)


def windows_of(packing):
    """(bucket, slots, sources, regions, places) of every window, in the order of places."""
    for bucket in packing.buckets:
        for window in range(bucket.num_windows):
            first = bucket.first + window * bucket.width
            places = range(first, first + bucket.width)
            part = slice(first, first + bucket.width)
            yield (
                bucket,
                packing.slots[part].tolist(),
                packing.sources[part].tolist(),
                packing.regions[part].tolist(),
                places,
            )


def owner(case, slots, sources):
    """(image, window) the rows of a squeezed window come from; they must agree."""
    side = case.layout.token_ids.shape[1]
    padding = (case.layout.token_ids == len(case.layout.slot_ids)).tolist()
    owners = set()
    for slot, source in zip(slots, sources, strict=True):
        image, row = divmod(source, case.rows)
        count = case.active.shape[1]
        if slot == side:
            owners.add((image, row - count))
        elif slot < side and row < count:
            window, place = divmod(int(case.token_slots[image, row]), side)
            # Any row may stand in padding.
            if place == slot and not padding[window][slot]:
                owners.add((image, window))
    return owners


@given(problems())
@example(problem(1, 13, 7, 3, count=5, batch=2))
@example(problem(7, 7, 7, count=1))
@example(problem(9, 14, 7, 3, summarised=True, count=100, batch=3))
@quick
def test_every_occupied_slot_has_one_place_in_its_window(case: Problem):
    packing = case.pack()
    expected = case.occupied()
    side = case.layout.token_ids.shape[1]
    padding_places, places = [], torch.full((case.batch * case.rows,), len(packing.sources))
    for bucket, slots, sources, regions, at in windows_of(packing):
        filled = [slot for slot in slots if slot <= side]
        assert slots[len(filled) :] == [side + 1] * (bucket.width - len(filled)), 'gap'
        candidates = [
            key
            for key in owner(case, slots, sources)
            if expected.get(key) == filled
            and all(
                source == case.row(*key, slot) or case.row(*key, slot) is None
                for slot, source in zip(filled, sources, strict=False)
            )
        ]
        assert len(candidates) == 1, 'a window with a stranger, or one that is there twice'
        image, window = candidates[0]
        del expected[image, window]
        for slot, region, place in zip(slots, regions, at, strict=True):
            row = case.row(image, window, slot) if slot <= side else None
            assert region == (case.region(window, slot) if slot <= side else -1)
            if row is not None:
                places[row] = place
            elif slot < side:
                padding_places.append(place)
    assert not expected, 'windows without a place'
    assert packing.places.tolist() == places.tolist()
    assert sorted(packing.padding.tolist()) == padding_places
    assert packing.all_placed == bool((places < len(packing.sources)).all())


@given(problems())
@quick
def test_buckets_cover_all_places_without_gap(case: Problem):
    packing = case.pack()
    side = case.layout.token_ids.shape[1]
    end = 0
    for bucket in packing.buckets:
        assert bucket.first == end
        assert bucket.num_windows > 0
        assert 0 <= bucket.num_border <= bucket.num_windows
        assert 0 < bucket.width <= side + case.summarised
        end += bucket.num_windows * bucket.width
    widths = [bucket.width for bucket in packing.buckets]
    assert len(set(widths)) == len(widths), 'two buckets of one width'
    assert end == len(packing.sources) == len(packing.slots) == len(packing.regions)
    for bucket, slots, *_ in windows_of(packing):
        # The step is 8: fewer empty places than that.
        assert sum(slot == side + 1 for slot in slots) < 8, bucket


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
    side = case.layout.token_ids.shape[1]
    packing = case.pack()
    found = {}
    for bucket, slots, *_ in windows_of(packing):
        found[bucket] = found.get(bucket, True) and slots == list(range(side))
    assert {bucket: bucket.complete for bucket in packing.buckets} == found


@given(problems().filter(lambda case: not case.summarised))
@quick
def test_complete_is_all_slots_in_order(case: Problem):
    assert_complete_as_documented(case)


@pytest.mark.parametrize('window', [2, 4, 8])
def test_complete_with_summaries(window):
    assert_complete_as_documented(one_full_window(window))


@pytest.mark.xfail(
    strict=True,
    reason='where L is no multiple of 8, full windows of a packing with summaries get an empty '
    'place (width L + 1) and yet count as complete, so that their mask is not read from slots',
)
@pytest.mark.parametrize('window', [3, 5, 6, 7])
def test_complete_with_summaries_where_the_step_leaves_a_place(window):
    assert_complete_as_documented(one_full_window(window))


def test_a_dense_map_is_one_complete_bucket_of_whole_windows():
    packing = problem(14, 21, 7, batch=2).pack()
    assert packing.buckets == ((0, 12, 49, 0, True),)
    assert len(packing.padding) == 0


def test_windows_without_active_token_cost_nothing():
    case = problem(14, 14, 7, count=1, batch=2)
    packing = case.pack()
    assert packing.buckets == ((0, 2, 8, 0, False),)
    assert packing.slots.view(2, 8)[:, 1:].eq(50).all()


@given(problems())
@quick
def test_rows_come_back_from_their_places(case: Problem):
    packing = case.pack()
    rows = torch.arange(1.0, case.batch * case.rows + 1)[:, None].repeat(1, 3)
    placed = place_rows(rows, torch.full((3,), -1.0), packing)
    there = packing.places < len(placed)
    assert torch.equal(read_rows(placed, packing)[there], rows[there])
    assert (placed[packing.padding] == -1.0).all()


@given(problems(most=9, windows=(2, 4)))
@quick
def test_place_and_read_equal_naive_indexing_with_gradients(case: Problem):
    packing = case.pack()
    generator = torch.Generator().manual_seed(1)

    def noise(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_()

    rows, blank = noise(case.batch * case.rows, 2), noise(2)
    placed = place_rows(rows, blank, packing)
    is_padding = torch.zeros(len(placed), dtype=torch.bool)
    is_padding[packing.padding] = True
    naive = torch.where(is_padding[:, None], blank, rows[packing.sources])
    assert torch.equal(placed, naive)
    # Empty places have no gradient, whatever arrives there.
    weight = noise(*placed.shape).detach()
    empty = packing.slots == case.layout.token_ids.shape[1] + 1
    got = torch.autograd.grad((placed * weight).sum(), (rows, blank))
    want = torch.autograd.grad((naive * weight)[~empty].sum(), (rows, blank))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)

    values = noise(*placed.shape)
    there = packing.places < len(placed)
    weight = noise(len(rows), 2).detach() * there[:, None]
    read = read_rows(values, packing)
    assert torch.equal(read[there], values[packing.places[there]])
    (got,) = torch.autograd.grad((read * weight).sum(), values)
    (want,) = torch.autograd.grad((values[packing.places[there]] * weight[there]).sum(), values)
    assert torch.equal(got, want)


@pytest.mark.parametrize('summarised', [False, True])
@pytest.mark.parametrize('count', [1, 7, None])
def test_numerical_gradients(summarised, count):
    case = problem(3, 5, 2, 1, count=count, batch=2, summarised=summarised)
    packing = case.pack()
    rows = torch.randn(case.batch * case.rows, 2, dtype=torch.float64, requires_grad=True)
    blank = torch.randn(2, dtype=torch.float64, requires_grad=True)
    there = packing.places < len(packing.sources)

    def there_and_back(rows, blank):
        placed = place_rows(rows, blank, packing)
        return placed[packing.padding], read_rows(placed.square(), packing)[there]

    assert torch.autograd.gradcheck(there_and_back, (rows, blank))
