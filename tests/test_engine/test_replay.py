"""The replayable data loader, by itself."""

import pickle

import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from toy import ToyData

from idlevit_mm.hooks.replay import (
    ReplayDataLoader,
    SeededDataset,
    SeededIndex,
    mixed_seed,
)


def loader(sampler=InfiniteSampler, seed=0, rank=0, **settings):
    data = ToyData(7)
    plain = torch.utils.data.DataLoader(
        data, batch_size=2, sampler=sampler(data, shuffle=True, seed=3), **settings
    )
    return ReplayDataLoader.from_loader(plain, seed, rank)


def take(batches, count):
    return [batch['x'] for batch, _ in zip(batches, range(count), strict=False)]


def same(one, other):
    return len(one) == len(other) and all(map(torch.equal, one, other))


def test_batches_follow_from_seed_and_rank():
    first = take(loader(), 9)
    torch.manual_seed(99)
    assert same(take(loader(), 9), first)
    assert not same(take(loader(seed=1), 9), first)
    assert not same(take(loader(rank=1), 9), first)
    assert len({batch.sum().item() for batch in first}) == 9


@pytest.mark.parametrize('skip', [1, 4, 11])
def test_skipping_goes_on_where_loading_would_be(skip):
    whole = take(loader(), 14)
    rest = loader()
    rest.to_skip = skip
    batches = iter(rest)
    assert [next(batches) for _ in range(skip)] == [None] * skip
    assert same(take(batches, 14 - skip), whole[skip:])


def test_skipping_does_not_load():
    rest = loader()

    class Unreadable(ToyData):
        def __getitem__(self, index):
            raise AssertionError('a skipped sample was read')

    object.__setattr__(rest.dataset, 'wrapped', Unreadable())
    rest.to_skip = 5
    batches = iter(rest)
    assert [next(batches) for _ in range(5)] == [None] * 5
    with pytest.raises(AssertionError, match='skipped sample'):
        next(batches)


def test_nothing_happens_before_the_first_batch_is_asked_for():
    # mmengine opens the loader before it knows that it resumes.
    rest = loader()
    batches = iter(rest)
    rest.to_skip = 3
    whole = take(loader(), 5)
    assert next(batches) is None
    assert next(batches) is None
    assert next(batches) is None
    assert same(take(batches, 2), whole[3:])


@pytest.mark.parametrize('skip', [0, 3, 4, 6, 9])
def test_skipping_over_passes_of_a_finite_sampler(skip):
    def run(skip, count):
        batches, epoch, found = loader(DefaultSampler), 0, []
        batches.to_skip = skip
        while len(found) < count:
            batches.batch_sampler.sampler.set_epoch(epoch)
            found += list(batches)
            epoch += 1
        return found[:count]

    whole, rest = run(0, 12), run(skip, 12)
    assert rest[:skip] == [None] * skip
    assert same([b['x'] for b in rest[skip:]], [b['x'] for b in whole[skip:]])
    assert len(loader(DefaultSampler)) == 4


def test_the_data_set_can_be_read_set_and_copied():
    data = SeededDataset(ToyData(5))
    assert len(data) == 5
    assert data.metainfo is ToyData.metainfo
    data.scale = 0.0
    assert data.wrapped.scale == 0.0
    assert data[2]['x'].tolist() == [2.0] * 3
    assert not hasattr(data, '__getitems__')
    with pytest.raises(AttributeError, match='nothing'):
        _ = data.nothing
    copy = pickle.loads(pickle.dumps(data))
    assert (len(copy), copy.scale) == (5, 0.0)


def test_a_seeded_index_seeds():
    data = SeededDataset(ToyData(5))
    assert torch.equal(data[SeededIndex(1, 7)]['x'], data[SeededIndex(1, 7)]['x'])
    assert not torch.equal(data[SeededIndex(1, 7)]['x'], data[SeededIndex(1, 8)]['x'])
    assert not torch.equal(data[1]['x'], data[1]['x'])


def test_seeds_do_not_collide():
    seeds = {
        mixed_seed(s, k, r, p) for s in range(4) for k in (1, 2) for r in (0, 1) for p in (0, 9)
    }
    assert len(seeds) == 32
    assert mixed_seed(1, 2) == mixed_seed(1, 2)
