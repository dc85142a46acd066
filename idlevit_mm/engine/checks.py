"""What can be known to be wrong before any work is done."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from ..checkpoints import is_local, load_checkpoint, unwrapped, weights_of
from ..errors import BrokenCheckpointError, UsageError, shortened
from ..registry import AUXILIARY_LOSSES


def leaf_datasets(dataset: Any, key: str) -> Iterator[tuple[str, dict]]:
    """Walk through wrappers such as RepeatDataset and ConcatDataset.

    Args:
        dataset: Config of a data set.
        key: Its dotted name in the config.

    Yields:
        Dotted name and config of every data set that reads files itself.
    """
    if isinstance(dataset, (list, tuple)):
        for number, part in enumerate(dataset):
            yield from leaf_datasets(part, f'{key}.{number}')
    elif isinstance(dataset, dict):
        if isinstance(dataset.get('dataset'), dict):
            yield from leaf_datasets(dataset['dataset'], f'{key}.dataset')
        elif isinstance(dataset.get('datasets'), (list, tuple)):
            yield from leaf_datasets(dataset['datasets'], f'{key}.datasets')
        else:
            yield key, dataset


def _data_hint(path: str, root: str | None, key: str) -> str:
    place = root or os.path.dirname(path)
    lower = path.lower()
    if 'digit_scenes' in lower:
        folder = Path(path)
        while folder.name and folder.name != 'digit_scenes':
            folder = folder.parent
        target = str(folder) if folder.name else place
        return (
            'Write the digit scenes with: '
            f'python tools/dataset_converters/digit_scenes.py {target} --layout coco ade'
        )
    if 'adechallenge' in lower or 'ade20k' in lower:
        source = (
            'Download ADEChallengeData2016 from http://sceneparsing.csail.mit.edu and unpack or '
            f'link it as {place} (docs/data.md; python tools/prepare_data.py ade20k checks it)'
        )
    elif 'coco' in lower:
        source = (
            'Download COCO 2017 (train2017, val2017, annotations) from https://cocodataset.org '
            f'and unpack or link it as {place} (docs/data.md; python tools/prepare_data.py coco '
            'checks it)'
        )
    else:
        source = f'Put the data at {place}'
    return f'{source}, or name its place with --cfg-options {key}.data_root=PATH'


def check_datasets(cfg: Any, phases: tuple[str, ...]) -> None:
    """Check that the folders and annotation files that a run will read exist.

    Args:
        cfg: Config of the run.
        phases: Of ``'train'``, ``'val'``, ``'test'``: the data loaders that will be built.

    Raises:
        UsageError: Naming the first missing path, its key in the config, and where to get the
            data.
    """
    for phase in phases:
        loader = cfg.get(f'{phase}_dataloader')
        if not isinstance(loader, dict):
            continue
        for key, dataset in leaf_datasets(loader.get('dataset'), f'{phase}_dataloader.dataset'):
            _check_dataset(dataset, key)
        evaluators = cfg.get(f'{phase}_evaluator')
        if isinstance(evaluators, dict):
            evaluators = [evaluators]
        for evaluator in evaluators or []:
            path = evaluator.get('ann_file') if isinstance(evaluator, dict) else None
            if path and is_local(path) and not os.path.exists(path):
                raise UsageError(
                    f'{phase}_evaluator.ann_file {path} does not exist. Give it the annotation '
                    f'file of {phase}_dataloader: --cfg-options {phase}_evaluator.ann_file=PATH'
                )


def _check_dataset(dataset: dict, key: str) -> None:
    backend = dataset.get('backend_args') or {}
    if backend.get('backend', 'local') not in ('local', 'LocalBackend', 'disk'):
        return
    root = dataset.get('data_root') or None
    if root is not None and not is_local(root):
        return
    if root is not None and not os.path.isdir(root):
        raise UsageError(f'{key}.data_root {root} does not exist. {_data_hint(root, root, key)}')

    entries = {'ann_file': dataset.get('ann_file')}
    prefix = dataset.get('data_prefix')
    if isinstance(prefix, dict):
        entries.update({f'data_prefix.{name}': value for name, value in prefix.items()})
    for name, value in entries.items():
        if not isinstance(value, str) or not value or not is_local(value):
            continue
        path = os.path.join(root, value) if root else value
        if not os.path.exists(path):
            raise UsageError(f'{key}.{name} {path} does not exist. {_data_hint(path, root, key)}')


def pretrained_files(config: Any, key: str = 'model') -> Iterator[tuple[str, str]]:
    """Find every local checkpoint that a model's config starts from.

    Yields:
        Dotted name in the config, and path.
    """
    if isinstance(config, dict):
        if config.get('type') == 'Pretrained' and is_local(config.get('checkpoint')):
            yield f'{key}.checkpoint', config['checkpoint']
        for name, value in config.items():
            if name == 'pretrained' and is_local(value):
                yield f'{key}.{name}', value
            yield from pretrained_files(value, f'{key}.{name}')
    elif isinstance(config, (list, tuple)):
        for number, value in enumerate(config):
            yield from pretrained_files(value, f'{key}.{number}')


def check_pretrained(cfg: Any) -> None:
    """Check that the files of every ``init_cfg=dict(type='Pretrained')`` can be read.

    Raises:
        UsageError: If one is missing, broken or unsafe; the message names its key.
    """
    for key, path in pretrained_files(cfg.get('model')):
        if not os.path.isfile(os.path.expanduser(path)):
            raise UsageError(
                f'{key} {path} does not exist. Name another file with --cfg-options {key}=PATH, '
                'or train from scratch by setting that init_cfg to None'
            )
        load_checkpoint(path)


def _has_no_start(cfg: Any) -> bool:
    """Whether a training begins with weights of no detector or segmentor."""
    return not cfg.get('load_from') and not cfg.get('resume')


def _is_taught(loss: dict[str, Any]) -> bool:
    """Whether a loss compares the model with a teacher."""
    kind = loss.get('type')
    cls = AUXILIARY_LOSSES.get(kind) if isinstance(kind, str) else kind
    return cls is not None and 'teacher' in inspect.signature(cls).parameters


def check_teachers(cfg: Any) -> None:
    """Check that the files can be read that teachers of ``AuxiliaryLossHook`` are built from.

    Raises:
        UsageError: A file of this machine is missing, a checkpoint is broken or unsafe, or a loss
            has no teacher.
    """
    for number, hook in enumerate(cfg.get('custom_hooks') or ()):
        losses = hook.get('losses') if isinstance(hook, dict) else None
        for place, loss in enumerate(losses if isinstance(losses, (list, tuple)) else ()):
            if not isinstance(loss, dict):
                continue
            teacher = loss.get('teacher')
            if teacher is None and _has_no_start(cfg) and _is_taught(loss):
                raise UsageError(
                    f'custom_hooks.{number}.losses.{place} ({loss["type"]}) has no teacher, and '
                    'there is no checkpoint that training starts from: --cfg-options '
                    f'load_from=dense.pth, or custom_hooks.{number}.losses.{place}.'
                    'teacher.checkpoint=dense.pth'
                )
            for key, path in teacher.items() if isinstance(teacher, dict) else ():
                if is_local(path) and not os.path.isfile(path):
                    raise UsageError(
                        f'custom_hooks.{number}.losses.{place}.teacher.{key}={path} does not exist'
                    )
                if is_local(path) and key == 'checkpoint':
                    load_checkpoint(path)


def find_resumable(work_dir: str | os.PathLike) -> tuple[str | None, list[str]]:
    """Find the newest whole checkpoint of a run.

    Looks at the one that ``last_checkpoint`` names, then at ``epoch_*.pth`` and ``iter_*.pth``
    from the highest number down.

    Args:
        work_dir: Folder of the run; it need not exist.

    Returns:
        Path of the checkpoint or None, and what was passed over on the way and why.

    Raises:
        UnsafeCheckpointError: If the newest whole one holds more than mmengine writes.
    """
    folder = Path(work_dir)
    candidates: list[Path] = []
    note = folder / 'last_checkpoint'
    if note.is_file():
        named = note.read_text().strip()
        if named:
            # A work dir that was moved still holds its checkpoint under the same name.
            candidates += [Path(named), folder / Path(named).name]
    numbered = []
    for path in [*folder.glob('epoch_*.pth'), *folder.glob('iter_*.pth')]:
        number = path.stem.rsplit('_', 1)[1]
        if number.isdigit():
            numbered.append((int(number), path))
    candidates += [path for _, path in sorted(numbered, reverse=True)]

    passed_over: list[str] = []
    seen = set()
    for path in candidates:
        if path in seen:
            continue
        seen.add(path)
        if not path.is_file():
            if path.parent == folder or not (folder / path.name).is_file():
                passed_over.append(f'{path} does not exist')
            continue
        try:
            checkpoint = load_checkpoint(path)
        except BrokenCheckpointError as error:
            passed_over.append(str(error))
            continue
        if 'optimizer' not in checkpoint or 'meta' not in checkpoint:
            passed_over.append(f'{path} holds no state of the training')
            continue
        return str(path), passed_over
    return None, passed_over


def check_weights(
    model: torch.nn.Module, checkpoint: dict[str, Any], path: str, purpose: str
) -> list[str]:
    """Check that a checkpoint belongs to a model, which mmengine only warns about.

    Args:
        model: Built model, possibly wrapped for test time augmentation or distribution.
        checkpoint: As read from ``path``.
        path: For messages.
        purpose: ``'resume'`` and ``'test'`` want every parameter; ``'load_from'`` takes what
            fits, as fine-tuning to other classes does.

    Returns:
        Warnings, one text each; only ``'load_from'`` has any.

    Raises:
        UsageError: If nothing of the backbone is in the checkpoint, if a parameter is missing
            (resume, test), or if shapes differ. For ``'load_from'`` a head may differ in the
            first dimension, which counts classes.
    """
    while isinstance(inner := getattr(model, 'module', None), torch.nn.Module):
        model = inner
    wanted = model.state_dict()
    given = unwrapped(weights_of(checkpoint))
    if not given:
        raise UsageError(f'checkpoint {path} holds no weights')

    backbone = {name for name in wanted if name.startswith('backbone.')}
    if backbone and not backbone & given.keys():
        bare = {name.removeprefix('backbone.') for name in backbone} & given.keys()
        advice = (
            'It looks like a backbone on its own: load it with --cfg-options '
            f'model.backbone.init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint={path}'
            if bare
            else 'It belongs to another model'
        )
        raise UsageError(
            f'checkpoint {path} shares no backbone weights with the model: it holds '
            f'{shortened(list(given))}; the model has {shortened(sorted(backbone))}. {advice}'
        )

    warnings = []
    differing = {
        n: (v.shape, wanted[n].shape)
        for n, v in given.items()
        if n in wanted and v.shape != wanted[n].shape
    }
    other_classes = {
        name: shapes
        for name, shapes in differing.items()
        if purpose == 'load_from'
        and 'head' in name.split('.')[0]
        and len(shapes[0]) == len(shapes[1])
        and shapes[0][1:] == shapes[1][1:]
    }
    wrong = {name: shapes for name, shapes in differing.items() if name not in other_classes}
    if wrong:
        listed = [f'{n} {tuple(a)} but the model has {tuple(b)}' for n, (a, b) in wrong.items()]
        raise UsageError(
            f'checkpoint {path} has other shapes than the model: {shortened(listed)}. Use the '
            'config that the checkpoint was trained with'
        )
    if other_classes:
        listed = [f'{n} {tuple(a)} to {tuple(b)}' for n, (a, b) in other_classes.items()]
        warnings.append(
            f'{path} was trained with another number of classes; these are initialised anew: '
            f'{shortened(listed)}'
        )

    missing = [name for name, _ in model.named_parameters() if name not in given]
    if missing and purpose != 'load_from':
        raise UsageError(
            f'checkpoint {path} lacks weights of the model: {shortened(missing)}. Use the config '
            'that the checkpoint was trained with'
        )
    return warnings
