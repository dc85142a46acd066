"""What a benchmark measures: one case is one target under one set of conditions."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from idlevit_mm.errors import UsageError

PARTS = ('backbone', 'model')
MODES = ('inference', 'train')
COMPILES = ('none', 'default', 'reduce-overhead')
DTYPES = {'float32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


@dataclass(frozen=True)
class Case:
    """One target under one set of conditions.

    Attributes:
        target: name of a preset, a config file's name, or several joined by ' + '.
        part: one of ``PARTS``.
        shape: (H, W) of the images in pixels.
        batch: images per call.
        dtype: one of ``DTYPES``; other than float32 means autocast.
        mode: one of ``MODES``.
        compile: one of ``COMPILES``: the mode of ``torch.compile``, or none.
        device: 'cpu', 'cuda' or 'cuda:1' and so on.
        threads: of the CPU.
        channels_last: whether images and weights are laid out channels last.
    """

    target: str
    part: str
    shape: tuple[int, int]
    batch: int
    dtype: str
    mode: str
    compile: str
    device: str
    threads: int
    channels_last: bool = False

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """(B, 3, H, W)."""
        return (self.batch, 3, *self.shape)

    def as_dict(self) -> dict[str, Any]:
        """All conditions, ready for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, record: dict[str, Any]) -> Case:
        """Read what ``as_dict`` made."""
        height, width = record['shape']
        return cls(**{**record, 'shape': (height, width)})

    def __str__(self) -> str:
        return f'{self.target} {self.part} {self.mode}, {self.conditions}'

    @property
    def conditions(self) -> str:
        """All but target, part and mode, for a reader."""
        height, width = self.shape
        parts = [f'{self.batch}×3×{height}×{width}', self.dtype]
        if self.compile != 'none':
            parts.append(f'compile {self.compile}')
        if self.channels_last:
            parts.append('channels last')
        cpu = self.device == 'cpu'
        parts.append(f'{self.threads} thread{"s" * (self.threads != 1)}' if cpu else self.device)
        return ', '.join(parts)


def expand(
    targets: Sequence[str],
    *,
    part: str = 'backbone',
    shapes: Sequence[tuple[int, int]],
    batches: Sequence[int] = (1,),
    dtypes: Sequence[str] = ('float32',),
    modes: Sequence[str] = ('inference',),
    compiles: Sequence[str] = ('none',),
    device: str = 'cpu',
    threads: int = 1,
    channels_last: bool = False,
) -> list[Case]:
    """All combinations, target by target.

    Raises:
        UsageError: a value is unknown, or two of them do not go together.
    """
    for option, values, allowed in (
        ('--part', (part,), PARTS),
        ('--mode', modes, MODES),
        ('--dtypes', dtypes, tuple(DTYPES)),
        ('--compile', compiles, COMPILES),
    ):
        for value in values:
            if value not in allowed:
                raise UsageError(f'{option} {value}: must be one of {", ".join(allowed)}')
    for batch in batches:
        if batch < 1:
            raise UsageError(f'--batches {batch}: must be at least 1')
    if threads < 1:
        raise UsageError(f'--threads {threads}: must be at least 1')
    _check_device(device, dtypes, compiles)
    if part == 'model' and 'train' in modes:
        raise UsageError(
            '--mode train with --part model: a whole model trains on annotated images, which a '
            'benchmark has not; measure the backbone, or take --mode inference'
        )
    # Targets outermost; what is given twice is measured once.
    targets, modes, dtypes, compiles = map(_once, (targets, modes, dtypes, compiles))
    combinations = itertools.product(
        targets, modes, dtypes, compiles, dict.fromkeys(shapes), dict.fromkeys(batches)
    )
    return [
        Case(target, part, shape, batch, dtype, mode, compiling, device, threads, channels_last)
        for target, mode, dtype, compiling, shape, batch in combinations
    ]


def _once(values: Sequence[str]) -> list[str]:
    return list(dict.fromkeys(values))


def _check_device(device: str, dtypes: Sequence[str], compiles: Sequence[str]) -> None:
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise UsageError(f'--device {device}: must be cpu, cuda or cuda:NUMBER') from error
    if kind not in ('cpu', 'cuda'):
        raise UsageError(f'--device {device}: must be cpu, cuda or cuda:NUMBER')
    if kind == 'cuda' and not torch.cuda.is_available():
        raise UsageError(f'--device {device}: torch sees no CUDA device here; take --device cpu')
    if kind == 'cuda' and (torch.device(device).index or 0) >= torch.cuda.device_count():
        raise UsageError(f'--device {device}: there are {torch.cuda.device_count()} CUDA devices')
    if kind == 'cpu' and 'fp16' in dtypes:
        raise UsageError(
            '--dtypes fp16 on the CPU: nobody trains or infers so; take bf16 or --device cuda'
        )
    if kind == 'cpu' and 'reduce-overhead' in compiles:
        raise UsageError(
            '--compile reduce-overhead on the CPU: it means CUDA graphs; take --compile default or '
            '--device cuda'
        )
