"""A model, data and a runner that train in milliseconds and draw random numbers everywhere."""

import random
import uuid

import numpy as np
import torch
from mmengine.evaluator import BaseMetric
from mmengine.model import BaseModel

from idlevit_mm.engine import ResumableRunner


class ToyModel(BaseModel):
    """Dropout draws from torch, the noise on its loss from numpy and Python."""

    def __init__(self):
        super().__init__()
        self.backbone = torch.nn.Linear(3, 4)
        self.head = torch.nn.Linear(4, 1)

    def forward(self, x, mode='tensor'):
        x = self.backbone(torch.stack(list(x)))
        x = self.head(torch.nn.functional.dropout(x, 0.5, self.training))
        if mode == 'loss':
            return dict(loss=(x.square().mean()) * (1 + np.random.rand() + random.random()))  # noqa: NPY002
        return [dict(score=x.mean().item())]


class ToyData(torch.utils.data.Dataset):
    metainfo = dict(classes=('a', 'b'), table=np.arange(3))

    def __init__(self, size=7):
        self.size = size
        self.scale = 1.0

    def __len__(self):
        return self.size

    def __getitem__(self, index):
        noise = np.random.rand(3) + random.random() + torch.rand(3).numpy()  # noqa: NPY002
        return dict(x=torch.tensor(index + noise * self.scale, dtype=torch.float32))


class ToyMetric(BaseMetric):
    default_prefix = 'toy'

    def process(self, data_batch, data_samples):
        self.results.extend(sample['score'] for sample in data_samples)

    def compute_metrics(self, results):
        return dict(acc=np.float64(np.mean(results)))


def toy_runner(
    work_dir, by_epoch=True, hooks=(), workers=0, runner=ResumableRunner, seed=0, **changes
):
    """A runner of 4 epochs of 3 iterations, or of 10 iterations over an endless sampler."""
    loop = dict(by_epoch=True, max_epochs=4) if by_epoch else dict(by_epoch=False, max_iters=10)
    checkpoint = dict(type='CheckpointHook', by_epoch=by_epoch, interval=1 if by_epoch else 4)
    checkpoint.update(changes.pop('checkpoint', {}))
    sampler = changes.pop('sampler', 'DefaultSampler' if by_epoch else 'InfiniteSampler')
    torch.manual_seed(0)  # the runner takes the model built, so it cannot seed its weights
    settings = dict(
        model=ToyModel(),
        work_dir=str(work_dir),
        train_dataloader=dict(
            dataset=ToyData(),
            sampler=dict(type=sampler, shuffle=True),
            batch_size=3,
            num_workers=workers,
        ),
        train_cfg=dict(loop, val_interval=2 if by_epoch else 4),
        val_dataloader=dict(
            dataset=ToyData(4),
            sampler=dict(type='DefaultSampler', shuffle=False),
            batch_size=2,
            num_workers=0,
        ),
        val_cfg=dict(),
        val_evaluator=[ToyMetric()],
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.01)),
        param_scheduler=[
            dict(type='LinearLR', by_epoch=False, start_factor=0.1, begin=0, end=5),
            dict(type='OneCycleLR', by_epoch=False, total_steps=30, eta_max=0.02),
        ],
        default_hooks=dict(checkpoint=checkpoint),
        custom_hooks=list(hooks),
        randomness=dict(seed=seed),
        log_level='WARNING',
        # mmengine keeps logs and message hubs by name; the default is the time in seconds.
        experiment_name=uuid.uuid4().hex,
    )
    settings.update(changes)
    return runner(**settings)
