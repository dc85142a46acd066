"""What can be known to be wrong before any work is done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from mmengine.registry import DATASETS

from ..checkpoints import (
    BACKBONE,
    compare,
    is_local,
    load_checkpoint,
    unwrapped,
    weights_of,
    with_shapes,
)
from ..errors import UsageError, shortened
from ..registry import AUXILIARY_LOSSES, arguments_of

Keys = tuple[str | int, ...]
Differences = dict[str, tuple[Any, Any]]
ABSENT = '(none)'

# Keys under which data sets hold others.
_WRAPPED = ('dataset', 'datasets')

_COCO = 'COCO 2017 (train2017, val2017, annotations) from https://cocodataset.org'
_ADE = 'ADEChallengeData2016 from http://sceneparsing.csail.mit.edu'
# What stands in a path, which data set that is, and where it comes from.
_SOURCES = {'coco': ('coco', _COCO), 'adechallenge': ('ade20k', _ADE), 'ade20k': ('ade20k', _ADE)}
# Data sets of the package by the folder they are in: what their writer takes besides.
_WRITTEN = {'digit_scenes': ' --layout coco ade', 'digits': ''}


def parts_of(
    config: Any, path: Keys = (), scope: str | None = None
) -> Iterator[tuple[Keys, Any, str | None]]:
    """Walk through all dicts inside a part of a config: path, dict, and the scope of its type."""
    items: Any = enumerate(config) if isinstance(config, (list, tuple)) else ()
    if isinstance(config, dict):
        scope = config.get('_scope_') or scope
        yield path, config, scope
        items = config.items()
    for key, value in items:
        yield from parts_of(value, (*path, key), scope)


def class_of(kind: Any, scope: str | None = None) -> tuple[str, str]:
    """Library ('' where that is open) and name of the class that a type, text or class, means."""
    if isinstance(kind, str):
        library, _, name = kind.rpartition('.')
        return library.partition('.')[0] or scope or '', name
    return getattr(kind, '__module__', '').partition('.')[0], getattr(kind, '__name__', str(kind))


def leaf_datasets(dataset: Any, key: str) -> Iterator[tuple[str, dict]]:
    """Dotted name and config of every data set that reads files, inside of all wrappers."""
    for path, part, _ in parts_of(dataset, (key,)):
        wraps = any(isinstance(part.get(name), (dict, list, tuple)) for name in _WRAPPED)
        if not wraps and all(isinstance(step, int) or step in _WRAPPED for step in path[1:]):
            yield '.'.join(map(str, path)), part


def evaluators_of(cfg: Any, phase: str) -> list[Any]:
    """Configs of the evaluators of a phase, which a config may give as one or as several."""
    found = cfg.get(f'{phase}_evaluator') or []
    return [found] if isinstance(found, dict) else list(found)


def differences(before: Any, after: Any, key: str = '') -> Differences:
    """Old and new value of what differs, by dotted names; ``'(none)'`` for what one lacks."""
    if isinstance(before, (list, tuple)) and type(before) is type(after):
        before, after = dict(enumerate(before)), dict(enumerate(after))
    if not (isinstance(before, Mapping) and isinstance(after, Mapping)):
        same = before is after or (type(before) is type(after) and before == after)
        return {} if same else {key: (before, after)}
    found: Differences = {}
    for name in dict.fromkeys([*before, *after]):
        old, new = (values.get(name, ABSENT) for values in (before, after))
        found |= differences(old, new, f'{key}.{name}' if key else str(name))
    return found


def check_datasets(cfg: Any, phases: tuple[str, ...]) -> None:
    """Check that the folders and files exist that the data loaders of some phases will read.

    Raises:
        UsageError: One is missing; with its key in the config, and where to get the data.
    """
    for phase in phases:
        loader = cfg.get(f'{phase}_dataloader')
        if not isinstance(loader, dict):
            continue
        for key, dataset in leaf_datasets(loader.get('dataset'), f'{phase}_dataloader.dataset'):
            _check_dataset(dataset, key, cfg.get('default_scope'))
        for evaluator in evaluators_of(cfg, phase):
            path = evaluator.get('ann_file') if isinstance(evaluator, dict) else None
            if path and is_local(path) and not os.path.exists(path):
                raise UsageError(
                    f'{phase}_evaluator.ann_file {path} does not exist. Give it the annotation '
                    f'file of {phase}_dataloader: --cfg-options {phase}_evaluator.ann_file=PATH'
                )


def _downloads(kind: Any, scope: str | None) -> bool:
    """Whether data sets of a class fetch what is not there, as mmpretrain's of CIFAR do."""
    with DATASETS.switch_scope_and_registry(scope) as registry:
        cls = registry.get(kind) if isinstance(kind, str) else kind
    argument = arguments_of(cls).get('download') if isinstance(cls, type) else None
    return argument is not None and argument.default is True


def _check_dataset(dataset: dict, key: str, scope: str | None) -> None:
    backend = (dataset.get('backend_args') or {}).get('backend', 'local')
    root = dataset.get('data_root') or ''
    if backend not in ('local', 'LocalBackend', 'disk') or not is_local(root):
        return
    if dataset.get('download', _downloads(dataset.get('type'), scope)):
        return
    prefix = dataset.get('data_prefix')
    inside = {'ann_file': dataset.get('ann_file'), 'data_prefix': prefix}
    if isinstance(prefix, dict):
        inside |= {f'data_prefix.{name}': value for name, value in prefix.items()}
    paths = {'data_root': root}
    for name, value in inside.items():
        if isinstance(value, str) and value and is_local(value):
            paths[name] = os.path.join(root, value)
    for name, path in paths.items():
        if path and not os.path.exists(path):
            raise UsageError(f'{key}.{name} {path} does not exist. {_data_hint(path, root, key)}')


def _data_hint(path: str, root: str, key: str) -> str:
    """Where the data come from, for those that the package knows."""
    place, lower = root or os.path.dirname(path), path.lower()
    for folder in (Path(path), *Path(path).parents):
        if folder.name in _WRITTEN:
            writer = f'python tools/dataset_converters/{folder.name}.py {folder}'
            name = folder.name.replace('_', ' ')
            return f'Write the {name} with: {writer}{_WRITTEN[folder.name]}'
    source = f'Put the data at {place}'
    for word, (name, what) in _SOURCES.items():
        if word in lower:
            checker = f'python tools/prepare_data.py {name} checks it'
            source = f'Download {what} and unpack or link it as {place} (docs/data.md; {checker})'
    return f'{source}, or name its place with --cfg-options {key}.data_root=PATH'


def check_pretrained(cfg: Any) -> None:
    """Check that the files of every ``init_cfg=dict(type='Pretrained')`` can be read.

    Raises:
        UsageError: If one is missing, broken or unsafe; the message names its key.
    """
    for place, part, _ in parts_of(cfg.get('model'), ('model',)):
        for name in ('checkpoint', 'pretrained'):
            path, key = part.get(name), '.'.join(map(str, (*place, name)))
            if not is_local(path) or (name == 'checkpoint' and part.get('type') != 'Pretrained'):
                continue
            if not os.path.isfile(os.path.expanduser(path)):
                raise UsageError(
                    f'{key} {path} does not exist. Name another file with --cfg-options '
                    f'{key}=PATH, or train from scratch by setting that init_cfg to None'
                )
            load_checkpoint(path)


def check_teachers(cfg: Any) -> None:
    """Check that the files can be read that teachers of ``AuxiliaryLossHook`` are built from.

    Raises:
        UsageError: A file of this machine is missing, a checkpoint is broken or unsafe, or a loss
            has no teacher.
    """
    anew = not cfg.get('load_from') and not cfg.get('resume')
    for keys, loss, _ in parts_of(cfg.get('custom_hooks'), ('custom_hooks',)):
        if len(keys) != 4 or keys[2] != 'losses':
            continue
        name, kind, teacher = '.'.join(map(str, keys)), loss.get('type'), loss.get('teacher')
        cls = AUXILIARY_LOSSES.get(kind) if isinstance(kind, str) else kind
        is_taught = cls is not None and 'teacher' in arguments_of(cls)
        if teacher is None and anew and is_taught:
            raise UsageError(
                f'{name} ({kind}) has no teacher, and there is no checkpoint that '
                'training starts from: --cfg-options load_from=dense.pth, or '
                f'{name}.teacher.checkpoint=dense.pth'
            )
        for key, path in teacher.items() if isinstance(teacher, dict) else ():
            if is_local(path) and not os.path.isfile(path):
                raise UsageError(f'{name}.teacher.{key}={path} does not exist')
            if is_local(path) and key == 'checkpoint':
                load_checkpoint(path)


def find_resumable(
    work_dir: str | os.PathLike, out_dir: str | None = None
) -> tuple[str | None, list[str]]:
    """Find the whole checkpoint of a run with the most progress, going by what is stored inside.

    Args:
        work_dir: The work dir, all of whose checkpoints are looked at, whatever
            ``last_checkpoint`` says.
        out_dir: ``out_dir`` of the checkpoint hook.

    Returns:
        Path of the checkpoint or None, and what was passed over on the way and why.
    """
    folders = [Path(work_dir).absolute()]
    if out_dir is not None and is_local(out_dir):
        folders.append(Path(out_dir, Path(work_dir).name))
    found: list[tuple[int, int, float, str]] = []
    passed_over: list[str] = []
    for path in sorted(path for folder in folders for path in folder.glob('*.pth')):
        if path.name.startswith('best_'):
            continue  # without the state of the training
        try:
            checkpoint = load_checkpoint(path)
        except UsageError as error:
            passed_over.append(str(error))
            continue
        if problem := resuming_problem(checkpoint):
            passed_over.append(f'{path} {problem}')
            continue
        meta = checkpoint['meta']
        found.append((meta['iter'], meta['epoch'], path.stat().st_mtime, str(path)))
    for *_, name in sorted(found, reverse=True):
        try:
            load_checkpoint(name, verify=True)
            return name, passed_over
        except UsageError as error:
            passed_over.append(str(error))
    return None, passed_over


def resuming_problem(checkpoint: dict[str, Any]) -> str | None:
    """Why a training cannot go on from a checkpoint that has been read, if it cannot."""
    meta = checkpoint.get('meta')
    if 'optimizer' not in checkpoint or not isinstance(meta, dict):
        return 'holds weights only, not the state of a training'
    kinds: dict[str, Any] = {
        'optimizer': dict,
        'message_hub': dict,
        'param_schedulers': (list, dict),
    }
    wrong = [name for name, kind in kinds.items() if not isinstance(checkpoint.get(name), kind)]
    if 'param_schedulers' not in checkpoint:  # save_param_scheduler=False
        wrong.remove('param_schedulers')
    for name in ('iter', 'epoch'):
        if type(meta.get(name)) is not int or meta[name] < 0:
            wrong.append(f'meta.{name}')
    if not isinstance(meta.get('seed'), (int, type(None))):
        wrong.append('meta.seed')
    return f'has no usable {", ".join(wrong)}, which a training goes on from' if wrong else None


def check_weights(
    model: torch.nn.Module, checkpoint: dict[str, Any], path: str, purpose: str
) -> list[str]:
    """Check that a checkpoint belongs to a model, which mmengine only warns about.

    Args:
        model: Built model, possibly wrapped for test time augmentation or distribution.
        checkpoint: As read from ``path``.
        path: For messages.
        purpose: ``'resume'`` and ``'test'`` want every parameter; ``'load_from'`` takes what fits.

    Returns:
        Warnings, one text each; only ``'load_from'`` has any.

    Raises:
        UsageError: Nothing of the backbone fits, or a parameter that is wanted is missing or of
            another shape.
    """
    while isinstance(inner := getattr(model, 'module', None), torch.nn.Module):
        model = inner
    wanted, given = model.state_dict(), unwrapped(weights_of(checkpoint))
    if not given:
        raise UsageError(f'checkpoint {path} holds no weights')

    report = compare(wanted, given)
    shapes = shortened(with_shapes(report.mismatched, 'but the model has'))
    backbone = sorted(name for name in wanted if name.startswith(BACKBONE))
    if backbone and not set(report.matched) & set(backbone):
        bare = given.keys() & {name.removeprefix(BACKBONE) for name in backbone}
        if bare:
            advice = (
                'It looks like a backbone on its own: load it with --cfg-options model.backbone.'
                f'init_cfg.type=Pretrained model.backbone.init_cfg.checkpoint={path}'
            )
        else:
            advice = 'It belongs to another model'
        held = f'has other shapes than the model: {shapes}' if shapes else shortened(list(given))
        raise UsageError(
            f'checkpoint {path} shares no backbone weights with the model: it holds '
            f'{held}; the model has {shortened(backbone)}. {advice}'
        )
    if purpose == 'load_from':
        return [f'{path} does not fit everywhere; initialised anew: {shapes}'] if shapes else []
    missing = [name for name, _ in model.named_parameters() if name not in given]
    if shapes or missing:
        problem = f'has other shapes than the model: {shapes}'
        if not shapes:
            problem = f'lacks weights of the model: {shortened(missing)}'
        raise UsageError(
            f'checkpoint {path} {problem}. Use the config that the checkpoint was trained with'
        )
    return []
