"""What is wrong with the settings of a training, found before its data are opened."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from mmengine.hooks import CheckpointHook
from mmengine.registry import LOOPS, MODEL_WRAPPERS, MODELS, PARAM_SCHEDULERS
from mmengine.runner import BaseLoop, EpochBasedTrainLoop, IterBasedTrainLoop, Runner

from ..errors import SettingError, UsageError, likely, one_line
from ..registry import arguments_of
from .sharding import optimizers_of

_KEYS = {
    *inspect.signature(Runner).parameters,
    *('runner_type', 'model_wrapper_cfg', 'custom_imports', 'activation_checkpointing', 'compile'),
    *('efficient_conv_bn_eval', 'find_unused_parameters', 'tta_model', 'tta_pipeline'),
}
_LENGTHS = ('max_epochs', 'max_iters', 'val_interval')


def check_settings(cfg: Mapping[str, Any]) -> None:
    """Check the names and numbers in a config that mmengine takes, or passes over, in silence.

    Raises:
        UsageError: One is wrong.
    """
    for key in cfg.keys() - _KEYS:
        if hint := likely(key, _KEYS, 0.9 if len(key) > 7 else 0.8):
            raise UsageError(f'{key} is no setting of a training{hint}')
    for key, allowed, what in (
        ('resume', (bool, type(None)), 'True or False; --resume takes a path'),
        ('load_from', (str, type(None)), 'a path or an address'),
    ):
        if not isinstance(cfg.get(key), allowed):
            raise UsageError(f'{key}={cfg[key]!r} must be {what}')
    train = cfg.get('train_cfg') or {}
    for name in _LENGTHS if isinstance(train, Mapping) else ():
        value = train.get(name, 1)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 1:
            raise UsageError(f'train_cfg.{name}={value!r} must be a whole number from 1 on')
    default = EpochBasedTrainLoop if train.get('by_epoch', True) else IterBasedTrainLoop
    _check_arguments('train_cfg', train, LOOPS, default, ('by_epoch',))
    wrapper = cfg.get('model_wrapper_cfg')
    _check_arguments('model_wrapper_cfg', wrapper, MODEL_WRAPPERS, None, ())


def _check_arguments(key: str, part: Any, registry: Any, default: Any, more: Any) -> None:
    """Check the names in a part of a config against the arguments of the class that it means."""
    if not isinstance(part, Mapping):
        return
    kind = part.get('type', default)
    cls = registry.get(kind) if isinstance(kind, str) else kind
    if cls is None and kind is not None:
        raise UsageError(f'{key}.type={kind!r} is unknown{likely(kind, registry.module_dict)}')
    known = [*arguments_of(cls), 'type', '_scope_', *more] if cls is not None else ['type']
    for name in part:
        if name not in known:
            hint = likely(name, known)
            if cls is None and not hint:
                continue
            raise UsageError(f'{key}.{name} is no argument of {kind or key}{hint}')


def with_likely_word(message: str) -> str:
    """Add the likely word to a message about a class, or an argument of one, that is not there."""
    unknown = re.match(r'(.*?(\S+) is not in the .*? registry)\b', message)
    if unknown is not None:
        with MODELS.switch_scope_and_registry(None) as registry:
            known = {**MODELS.module_dict, **registry.module_dict}
        return unknown.group(1) + likely(unknown.group(2), known)
    found = re.search(r"(\w+)(?:\.__init__\(\)|`).*unexpected keyword argument '(\w+)'", message)
    if found is None:
        return message
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(found.group(1))
    return message + likely(found.group(2), arguments_of(cls)) if cls else message


@contextlib.contextmanager
def _naming(key: str) -> Iterator[None]:
    try:
        yield
    except (ValueError, TypeError, KeyError, AssertionError, OSError) as error:
        raise SettingError(f'{key} does not build: {one_line(error, 300)}') from error


def build_first(runner: Any) -> None:
    """Build or check what a training needs besides its data, which may take long to open.

    Raises:
        SettingError: A part does not build, or ``save_best`` names no score.
    """
    with _naming('optim_wrapper'):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    wrappers = getattr(runner.optim_wrapper, 'optim_wrappers', {'': runner.optim_wrapper})
    for wrapper in wrappers.values():
        if getattr(wrapper, 'clip_grad_kwargs', None):
            with _naming('optim_wrapper.clip_grad'):
                weight = torch.ones(1, requires_grad=True)
                weight.grad = torch.ones(1)
                wrapper.clip_func([weight], **wrapper.clip_grad_kwargs)
    schedulers = runner.param_schedulers
    if isinstance(schedulers, (Mapping, list, tuple)) and len(wrappers) == 1:
        with _naming('param_scheduler'):
            for one in [schedulers] if isinstance(schedulers, Mapping) else schedulers:
                _try_scheduler(one, optimizers_of(runner.optim_wrapper)[0])
    if runner._val_loop is not None and not isinstance(runner._val_loop, BaseLoop):
        with _naming('val_evaluator'):
            runner._val_evaluator = runner.build_evaluator(runner._val_evaluator)
        for hook in runner.hooks:
            if isinstance(hook, CheckpointHook) and hook.save_best:
                _check_save_best(hook.key_indicators, runner._val_evaluator.metrics)


def _try_scheduler(config: Any, optimizer: torch.optim.Optimizer) -> None:
    """Build a scheduler for a weight that belongs to nothing."""
    if not isinstance(config, Mapping):
        return
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != 'params'}
    dummy = torch.optim.Optimizer([torch.ones(1, requires_grad=True)], group)
    arguments = {key: value for key, value in config.items() if key != 'convert_to_iter_based'}
    with contextlib.suppress(AttributeError):  # somebody's may want a weight of the model
        PARAM_SCHEDULERS.build(
            {'end': 10**6, **arguments}, default_args=dict(optimizer=dummy, epoch_length=1)
        )


_OF_IOU = {
    'mIoU': ('aAcc', 'mIoU', 'mAcc'),
    'mDice': ('aAcc', 'mDice', 'mAcc'),
    'mFscore': ('aAcc', 'mFscore', 'mPrecision', 'mRecall'),
}


def _scores(metric: Any) -> list[str] | None:
    """Names of the scores of a metric, without those of single classes; None if unknown."""
    names = getattr(metric, 'metrics', None)
    if type(metric).__name__ == 'IoUMetric' and isinstance(names, list):
        return [score for name in names for score in _OF_IOU.get(name, ())]
    if type(metric).__name__ == 'CocoMetric' and {'bbox', 'segm'}.issuperset(names or 'x'):
        ends = ('', '_50', '_75', '_s', '_m', '_l')
        return [f'{name}_mAP{end}' for name in names or () for end in ends]
    return None


def _check_save_best(keys: Collection[str], metrics: Collection[Any]) -> None:
    known: list[str] = []
    for metric in metrics:
        found, prefix = _scores(metric), getattr(metric, 'prefix', None)
        if found is None or getattr(metric, 'classwise', False):
            return
        known += [f'{prefix}/{name}' if prefix else name for name in found]
    for key in keys:
        if key != 'auto' and key not in known:
            raise SettingError(
                f'default_hooks.checkpoint.save_best={key!r} is no score of val_evaluator'
                f'{likely(key, known)}; allowed: auto, {", ".join(known)}'
            )
