"""Random numbers and data that are a function of the position in the training run.

Every sample is drawn, augmented and trained on with random numbers that follow from (seed, rank,
number of the batch, place in the batch) alone. A run that was killed and resumed therefore sees
exactly what an uninterrupted run would have seen, whatever the number of data loading workers,
and it need not load the data of the iterations that it skips.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import get_rank
from torch.utils.data import DataLoader, Dataset, Sampler

# Streams: the numbers of an iteration of the model must not repeat those of a sample.
MODEL_STREAM = 0
DATA_STREAM = 1
VALIDATION_STREAM = 2
KEEP_RATIO_STREAM = 3
# Settings that a rebuilt data loader takes over.
_SETTINGS = (
    *('num_workers', 'collate_fn', 'pin_memory', 'timeout', 'worker_init_fn', 'generator'),
    *('multiprocessing_context', 'persistent_workers', 'prefetch_factor'),
)


def mixed_seed(*entropy: int) -> int:
    """Mix non-negative integers into one seed of 64 bits; equal input, equal seed."""
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0])


def run_seed(runner: Any) -> int:
    """Seed that all ranks share; ``runner.seed`` differs where ``diff_rank_seed`` is set."""
    differs = (runner._randomness_cfg or {}).get('diff_rank_seed', False)
    return runner.seed - (get_rank() if differs else 0)


def seed_generators(seed: int, accelerator: bool) -> None:
    """Seed the generators of Python, numpy and torch by 64 bits.

    Data loading workers must not touch those of an ``accelerator``.
    """
    random.seed(seed)
    np.random.seed([seed & 0xFFFFFFFF, seed >> 32])  # noqa: NPY002 (mmcv draws from this one)
    if accelerator:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)


class SeededIndex(NamedTuple):
    """An index of a data set, and the seed to read the sample with."""

    index: Any
    seed: int


class SeededDataset(Dataset):
    """Seeds the generators before a sample is read; everything else is the data set's own.

    Args:
        dataset: Any map-style data set. Hooks read and set its attributes through this one.
    """

    def __init__(self, dataset: Any) -> None:
        object.__setattr__(self, 'wrapped', dataset)

    def __getitem__(self, item: Any) -> Any:
        if isinstance(item, SeededIndex):
            seed_generators(item.seed, accelerator=False)
            item = item.index
        return self.wrapped[item]

    def __len__(self) -> int:
        return len(self.wrapped)

    def __getattr__(self, name: str) -> Any:
        # Only asked for what this class lacks. Special methods change how torch reads a data set
        # (__getitems__) or copies it, and 'wrapped' is missing while a copy is being made.
        if name == 'wrapped' or (name.startswith('__') and name.endswith('__')):
            raise AttributeError(name)
        return getattr(self.wrapped, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.wrapped, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {'wrapped': self.wrapped}

    def __setstate__(self, state: dict[str, Any]) -> None:
        object.__setattr__(self, 'wrapped', state['wrapped'])


class SeededBatchSampler(Sampler):
    """Gives every index of a batch sampler the seed of its position in the run.

    Args:
        batch_sampler: Iterable over lists of indices.
        seed: Seed of the run.
        rank: Number of this process.

    Attributes:
        position: Number of batches drawn since the run began.
    """

    def __init__(self, batch_sampler: Any, seed: int, rank: int) -> None:
        self.batch_sampler = batch_sampler
        self.seed = seed
        self.rank = rank
        self.position = 0
        self._opened: Iterator | None = None

    @property
    def sampler(self) -> Any:
        """The sampler of indices below, whose ``set_epoch`` mmengine calls."""
        return self.batch_sampler.sampler

    @property
    def batch_size(self) -> int:
        """Samples in a batch."""
        return self.batch_sampler.batch_size

    def skip_batch(self) -> bool:
        """Draw a batch of indices without handing it out; False at the end of the pass.

        The next iteration over the sampler goes on behind the skipped batches.
        """
        if self._opened is None:
            self._opened = iter(self.batch_sampler)
        if next(self._opened, None) is None:
            self._opened = None
            return False
        self.position += 1
        return True

    def __iter__(self) -> Iterator[list[SeededIndex]]:
        batches = iter(self.batch_sampler) if self._opened is None else self._opened
        self._opened = None
        for batch in batches:
            position = self.position
            self.position += 1
            yield [
                SeededIndex(index, mixed_seed(self.seed, DATA_STREAM, self.rank, position, place))
                for place, index in enumerate(batch)
            ]

    def __len__(self) -> int:
        return len(self.batch_sampler)


class ReplayDataLoader(DataLoader):
    """A data loader that can start in the middle of a run.

    Nothing is loaded before the first batch is asked for: mmengine's iteration based loop opens
    its loader before it knows that it resumes.

    Attributes:
        to_skip: Number of batches to hand out as None, without loading them, before the first
            real one; mmengine's loop throws these away.
    """

    to_skip = 0
    batch_sampler: SeededBatchSampler

    @classmethod
    def from_loader(cls, loader: DataLoader, seed: int, rank: int) -> ReplayDataLoader:
        """Rebuild a loader in batch mode, not yet iterated over; seed and rank are the run's."""
        return cls(
            SeededDataset(loader.dataset),
            batch_sampler=SeededBatchSampler(loader.batch_sampler, seed, rank),
            **{name: getattr(loader, name) for name in _SETTINGS},
        )

    def __iter__(self) -> Any:
        while self.to_skip > 0:
            if not self.batch_sampler.skip_batch():
                return  # the loop opens the next pass and goes on skipping
            self.to_skip -= 1
            yield None
        yield from super().__iter__()
