"""What a training needs besides its data, built and tried before they are opened."""

from __future__ import annotations

import contextlib
import math
import traceback
from collections.abc import Collection, Iterator, Mapping
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import CheckpointHook, EarlyStoppingHook
from mmengine.model import is_model_wrapper
from mmengine.registry import OPTIMIZERS, PARAM_SCHEDULERS
from mmengine.runner import BaseLoop
from torch import nn

from ..errors import SettingError, UsageError, likely, one_line
from .assembly import evaluating
from .checks import parts_of
from .data_sets import warn
from .settings import check_number, naming, part_of
from .sharding import optimizers_of

# Least value of what schedulers take.
_SCHEDULED = {
    **dict.fromkeys(('gamma', 'factor', 'start_factor', 'end_factor'), 0),
    **dict.fromkeys(('step_size', 'T_max', 'total_steps'), 1),
    **dict.fromkeys(('eta_min', 'milestones', 'power', 'begin', 'end'), -math.inf),
}
# Scores by what is measured; those of single classes aside.
_OF_IOU = {
    'mIoU': ('aAcc', 'mIoU', 'mAcc'),
    'mDice': ('aAcc', 'mDice', 'mAcc'),
    'mFscore': ('aAcc', 'mFscore', 'mPrecision', 'mRecall'),
}
_OF_PANOPTIC = [f'{name}{kind}' for name in ('PQ', 'SQ', 'RQ') for kind in ('', '_th', '_st')]
_LIBRARIES = ('mmdet', 'mmseg', 'mmcv')
_SIDE = 256
_NUMBERS = {'score_thr', 'nms_pre', 'max_per_img', 'min_bbox_size', 'mask_thr_binary'}
# What wrong settings raise; a size that a model cannot take, or data that it wants besides, do not.
_OF_SETTINGS = (AttributeError, NameError, TypeError, AssertionError, KeyError)


def build_first(runner: Any) -> None:
    """Build or check what a training needs besides its data, which may take long to open.

    Raises:
        SettingError: A part does not build, or ``save_best`` names no score.
    """
    kind = part_of(runner.optim_wrapper, 'optimizer').get('type')
    with OPTIMIZERS.switch_scope_and_registry(None) as known:
        if isinstance(kind, str) and known.get(kind) is None:
            hint = likely(kind, {**OPTIMIZERS.module_dict, **known.module_dict})
            raise SettingError(f'optim_wrapper.optimizer.type={kind!r} is unknown{hint}')
    with naming('optim_wrapper'):
        runner.optim_wrapper = runner.build_optim_wrapper(runner.optim_wrapper)
    wrappers = getattr(runner.optim_wrapper, 'optim_wrappers', {'': runner.optim_wrapper})
    for wrapper in wrappers.values():
        if getattr(wrapper, 'clip_grad_kwargs', None):
            with naming('optim_wrapper.clip_grad'):
                weight = torch.ones(1, requires_grad=True)
                weight.grad = torch.ones(1)
                wrapper.clip_func([weight], **wrapper.clip_grad_kwargs)
            for name in ('max_norm', 'clip_value'):
                value = wrapper.clip_grad_kwargs.get(name, 1)
                if not value > 0:
                    key = f'optim_wrapper.clip_grad.{name}'
                    raise SettingError(f'{key}={value!r} must be a number above 0')
    for optimizer in optimizers_of(runner.optim_wrapper):
        _check_optimizer(optimizer)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    _tell_custom_keys(runner, model)
    for key in ('activation_checkpointing', 'efficient_conv_bn_eval'):
        names = runner.cfg.get(key) or []
        with naming(key):
            for name in [names] if isinstance(names, str) else names:
                attrgetter(name)(model)
    with naming('compile'):
        torch._dynamo.lookup_backend(part_of(runner.cfg, 'compile').get('backend', 'inductor'))
    schedulers = runner.param_schedulers
    if isinstance(schedulers, (Mapping, list, tuple)) and len(wrappers) == 1:
        with naming('param_scheduler'):
            several = [schedulers] if isinstance(schedulers, Mapping) else schedulers
            for number, one in enumerate(several):
                _try_scheduler(number, one, optimizers_of(runner.optim_wrapper)[0])
    if runner._val_loop is not None and not isinstance(runner._val_loop, BaseLoop):
        with naming('val_evaluator'):
            runner._val_evaluator = runner.build_evaluator(runner._val_evaluator)
            for metric in runner._val_evaluator.metrics:
                for name in metric.metrics if type(metric).__name__ == 'IoUMetric' else ():
                    if name not in _OF_IOU:  # known when the first validation is done
                        allowed = ', '.join(_OF_IOU)
                        raise ValueError(f'iou_metrics has {name!r}; allowed: {allowed}')
        _check_scores(runner, runner._val_evaluator.metrics)
        rehearse(model)


def _tell_custom_keys(runner: Any, model: nn.Module) -> None:
    """Say which custom keys are no part of a weight's name but resemble one.

    Others, such as that of a table that a model may have, are right where they are.
    """
    names = [name for name, _ in model.named_parameters()]
    words = {word for name in names for word in name.split('.')}
    for key in part_of(runner.cfg, 'optim_wrapper.paramwise_cfg.custom_keys'):
        hint = likely(key.rpartition('.')[2] or key, words, 0.85)
        if hint and not any(key in name for name in names):
            text = f'optim_wrapper.paramwise_cfg.custom_keys: {key!r} is in the name of no weight'
            warn(text + hint)


def _check_optimizer(optimizer: torch.optim.Optimizer) -> None:
    for group in optimizer.param_groups:
        for name, value in group.items():
            key = f'optim_wrapper.optimizer.{name}'
            if isinstance(value, float) and not math.isfinite(value):
                raise SettingError(f'{key}={value!r} must be a finite number')
            if name == 'momentum' and value > 1:
                raise SettingError(f'{key}={value!r} must be at most 1')


def _try_scheduler(number: int, config: Any, optimizer: torch.optim.Optimizer) -> None:
    """Build a scheduler for a weight that belongs to nothing."""
    if not isinstance(config, Mapping):
        return
    for name in _SCHEDULED.keys() & config.keys():
        value = config[name]
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None:
                check_number(f'param_scheduler.{number}.{name}', one, _SCHEDULED[name], whole=False)
    group = {k: v for k, v in optimizer.param_groups[0].items() if k != 'params'}
    dummy = torch.optim.Optimizer([torch.ones(1, requires_grad=True)], group)
    arguments = {key: value for key, value in config.items() if key != 'convert_to_iter_based'}
    with contextlib.suppress(AttributeError):  # somebody's may want a weight of the model
        PARAM_SCHEDULERS.build(
            {'end': 10**6, **arguments}, default_args=dict(optimizer=dummy, epoch_length=1)
        )


def _scores(metric: Any) -> list[str] | None:
    """Names of the scores of a metric, without those of single classes; None if unknown."""
    kind, names = type(metric).__name__, getattr(metric, 'metrics', None)
    if kind in ('DumpResults', 'DumpDetResults'):
        return []
    if kind == 'IoUMetric' and isinstance(names, list):
        return [score for name in names for score in _OF_IOU.get(name, ())]
    if kind == 'DepthMetric' and isinstance(names, list):
        return names
    if kind == 'CocoMetric' and {'bbox', 'segm'}.issuperset(names or 'x'):
        ends = ('', '_50', '_75', '_s', '_m', '_l')
        return [f'{name}_mAP{end}' for name in names or () for end in ends]
    if kind == 'CocoPanopticMetric':
        return _OF_PANOPTIC
    if kind == 'VOCMetric' and metric.metric == 'mAP':
        return ['mAP', *(f'AP{int(threshold * 100):02d}' for threshold in metric.iou_thrs)]
    return None


def _check_scores(runner: Any, metrics: Collection[Any]) -> None:
    """Check the scores that hooks and schedulers wait for."""
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.save_best:
            _check_score('default_hooks.checkpoint.save_best', hook.key_indicators, metrics)
        elif isinstance(hook, EarlyStoppingHook):
            key = 'custom_hooks.EarlyStoppingHook.monitor'
            _check_score(key, [hook.monitor], metrics, needed=hook.strict)
    schedulers = runner.param_schedulers
    for one in [schedulers] if isinstance(schedulers, Mapping) else schedulers or ():
        if isinstance(one, Mapping) and isinstance(monitor := one.get('monitor'), str):
            _check_score('param_scheduler.monitor', [monitor], metrics, needed=False)


def _check_score(
    setting: str, keys: Collection[str], metrics: Collection[Any], needed: bool = True
) -> None:
    """Check that metrics give the scores of a setting, or say that they do not."""
    known: list[str] = []
    unknown: list[str] = []
    for metric in metrics:
        found, prefix = _scores(metric), getattr(metric, 'prefix', None)
        if found is None:
            unknown.append(type(metric).__name__)
        known += [f'{prefix}/{name}' if prefix else name for name in found or ()]
    by_class = any(getattr(metric, 'classwise', False) for metric in metrics)
    for key in keys:
        if key == 'auto' or key in known or (by_class and key.endswith('_precision')):
            continue
        said = f'{setting}={key!r}'
        if not unknown:
            text = f'{said} is no score of val_evaluator{likely(key, known)}; allowed: '
            text += ', '.join(['auto'] * needed + known)
            if needed:
                raise SettingError(text)
        else:
            names = ', '.join(unknown)
            text = f'{said}: only the first validation shows whether {names} gives it'
            text += likely(key, known)
        warn(text)


def rehearse(model: nn.Module) -> None:
    """Test a detector or segmentor of the libraries on an empty image.

    What a test needs is first read after an epoch of training.

    Raises:
        SettingError: A setting cannot be worked with.
    """
    library = type(model).__module__.partition('.')[0]
    convolutions = (part for part in model.modules() if isinstance(part, nn.Conv2d))
    first = next(convolutions, None)
    if library not in _LIBRARIES or first is None:
        return
    _check_boxes(model)
    try:
        with torch.no_grad(), torch.random.fork_rng(), evaluating(model):
            model.test_step(_batch(library, first.in_channels))
    except (AttributeError, NameError, TypeError) as error:
        place, text = _place(error), str(error)
        # Some want more of a sample than an image: texts, or proposals, having no rpn_head.
        if place and 'Sample' not in text and f'{type(model).__name__!r} object' not in text:
            raise SettingError(
                f'model cannot be tested: {one_line(error, 200)} ({place}); allowed in '
                'model.test_cfg is what its heads read there'
            ) from error
    except Exception:
        return  # perhaps it needs a larger image


@contextlib.contextmanager
def first_step(runner: Any) -> Iterator[None]:
    """Say in one line what the libraries cannot do with the settings of a model.

    Raises:
        SettingError: In place of what they raise in the first iteration.
    """
    begins = runner.iter
    try:
        yield
    except UsageError:
        raise
    except _OF_SETTINGS as error:
        place = _place(error)
        if not place or runner.iter > begins:
            raise
        raise SettingError(
            f'model does not train: {type(error).__name__}: {one_line(error, 200)} ({place}); '
            "check the settings of the part that this is in, its loss and the model's train_cfg"
        ) from error


def _batch(library: str, channels: int) -> dict[str, list[Any]]:
    if library == 'mmseg':
        from mmseg.structures import SegDataSample as Sample
    else:
        from mmdet.structures import DetDataSample as Sample
    side = _SIDE, _SIDE
    sample = Sample(metainfo=dict(img_shape=side, ori_shape=side, scale_factor=(1.0, 1.0)))
    return dict(inputs=[torch.zeros(channels, *side, dtype=torch.uint8)], data_samples=[sample])


def _check_boxes(model: Any) -> None:
    """Check what chooses among boxes, of which an empty image has none."""
    for keys, part, _ in parts_of(getattr(model, 'test_cfg', None), ('model', 'test_cfg')):
        key = '.'.join(map(str, keys))
        for name in _NUMBERS & part.keys():
            if isinstance(part[name], str):
                raise SettingError(f'{key}.{name}={part[name]!r} must be a number')
        # Boxes of mmrotate have five numbers or eight.
        if keys[-1] == 'nms' and part and part.get('type') not in ('nms_rotated', 'nms_quadri'):
            from mmcv.ops import batched_nms

            with naming(key):
                batched_nms(torch.ones(1, 4), torch.ones(1), torch.zeros(1), part)


def _place(error: BaseException) -> str:
    """File and line of a library, if it is one that could not go on; what it calls may be torch."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        parts = Path(frame.filename).parts
        if 'torch' not in parts:
            inside = set(_LIBRARIES) & set(parts)
            return f'{Path(frame.filename).name}:{frame.lineno}' if inside else ''
    return ''
