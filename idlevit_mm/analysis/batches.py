"""Batches of a config's data, for tools that look at a model without training or testing it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner, set_random_seed

from ..engine.checks import check_datasets
from ..errors import UsageError

PHASES = ('val', 'test', 'train')


def data_batches(
    cfg: Config, phase: str = 'val', num_images: int | None = None, seed: int = 0
) -> Iterator[dict[str, Any]]:
    """Batches of one of a config's data loaders, in this process, as the runner would get them.

    What the loader yields, before the model's data preprocessor: of one epoch, or of so many images
    at least as ``num_images`` says. The seed is that of the order and of random transforms.

    Raises:
        UsageError: The config has no such loader, or its data are not there.
        ValueError: ``phase`` or ``num_images`` is not allowed.
    """
    if phase not in PHASES:
        raise ValueError(f'phase={phase!r} must be one of {", ".join(PHASES)}')
    if num_images is not None and num_images < 1:
        raise ValueError(f'num_images={num_images} must be at least 1')
    key = f'{phase}_dataloader'
    if not isinstance(cfg.get(key), dict):
        raise UsageError(f'the config has no {key}')
    # What the evaluator reads is not needed here.
    check_datasets({key: cfg[key]}, (phase,))
    settings = {**cfg[key], 'num_workers': 0, 'persistent_workers': False}
    settings.pop('prefetch_factor', None)
    set_random_seed(seed)
    loader = Runner.build_dataloader(settings, seed=seed)
    # Samplers of iteration based training never end.
    length: int = len(loader.dataset)
    wanted = length if num_images is None else min(num_images, length)
    return islice(loader, -(-wanted // loader.batch_sampler.batch_size))
