"""What is wrong with the settings of a training, found before its data are opened."""

from __future__ import annotations

import contextlib
import inspect
import math
import re
from collections.abc import Collection, Iterator, Mapping
from numbers import Real
from typing import Any

import mmengine.registry
from mmengine.config import Config
from mmengine.registry import LOOPS, MODEL_WRAPPERS, MODELS, Registry
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner, TestLoop, ValLoop

from ..errors import SettingError, UsageError, likely, one_line
from ..registry import arguments_of
from .checks import class_of

_KEYS = {
    *inspect.signature(Runner).parameters,
    *('runner_type', 'model_wrapper_cfg', 'custom_imports', 'activation_checkpointing', 'compile'),
    *('efficient_conv_bn_eval', 'find_unused_parameters', 'tta_model', 'tta_pipeline'),
}
_PHASES = ('train', 'val', 'test')
_TYPES: tuple[tuple[str, tuple[type, ...], str], ...] = (
    ('resume', (bool,), 'True or False; --resume takes a path'),
    ('load_from', (str,), 'a path or an address'),
    *((f'{phase}_cfg.fp16', (bool,), 'True or False') for phase in ('val', 'test')),
    ('default_scope', (str,), 'text'),
    *((key, (Mapping,), 'a dict') for key in ('default_hooks', 'env_cfg', 'randomness')),
    ('compile', (bool, Mapping), 'True, False or a dict'),
)
# Parts that must be dicts, or what is built of them.
_DICTS = (
    *(f'{phase}_dataloader{inside}' for phase in _PHASES for inside in ('', '.dataset')),
    'optim_wrapper',
)
# Least value of whole numbers, by the part that they are in.
_WHOLE: dict[str, dict[str, int]] = {
    'train_cfg': dict(max_epochs=1, max_iters=1, val_interval=1, val_begin=0),
    'optim_wrapper': dict(accumulative_counts=1),
    'env_cfg': dict(max_pixels=1),
    **{f'{phase}_dataloader': dict(batch_size=1, num_workers=0) for phase in _PHASES},
}
# Names that mmengine passes over where they are misspelt, by the part that they are in.
_NAMES = {
    'default_hooks': (
        *('runtime_info', 'timer', 'sampler_seed', 'logger', 'param_scheduler', 'checkpoint'),
        'visualization',
    ),
    'env_cfg': ('cudnn_benchmark', 'mp_cfg', 'dist_cfg', 'resource_limit', 'max_pixels'),
    'optim_wrapper.paramwise_cfg': (
        *('custom_keys', 'bias_lr_mult', 'bias_decay_mult', 'norm_decay_mult', 'flat_decay_mult'),
        *('dwconv_decay_mult', 'dcn_offset_lr_mult', 'bypass_duplicate', 'num_layers'),
        *('decay_rate', 'decay_type', 'layer_decay_rate'),
    ),
}
_OF_WEIGHTS = ('lr_mult', 'decay_mult')


def check_settings(cfg: Mapping[str, Any]) -> None:
    """Check the names and numbers in a config that mmengine takes, or passes over, in silence.

    Raises:
        UsageError: One is wrong.
    """
    for key in cfg.keys() - _KEYS:
        # A variable of a config, such as mode='x', is no model.
        known = _KEYS if isinstance(cfg[key], Mapping) else _KEYS - {'model'}
        if hint := likely(key, known, 0.9 if len(key) > 7 else 0.8):
            raise UsageError(f'{key} is no setting of a training{hint}')
    for key, allowed, what in _TYPES:
        value = _value_of(cfg, key)
        if not isinstance(value, (*allowed, type(None))):
            raise UsageError(f'{key}={value!r} must be {what}')
    for key in _DICTS:
        value = _value_of(cfg, key)
        if isinstance(value, (str, Real, list, tuple)):
            raise UsageError(f'{key}={value!r} must be a dict')
    for key, least in _WHOLE.items():
        for name in least.keys() & part_of(cfg, key).keys():
            check_number(f'{key}.{name}', cfg[key][name], least[name])
    if (scaling := part_of(cfg, 'auto_scale_lr')).get('enable'):
        key = 'auto_scale_lr.base_batch_size'
        check_number(key, scaling.get('base_batch_size'), 1)
    for key, value in part_of(cfg, 'env_cfg.dist_cfg').items():
        if key.endswith('timeout') and value is not None:
            check_number(f'env_cfg.dist_cfg.{key}', value, 0, whole=False)
    for key, names in _NAMES.items():
        _check_names(key, part_of(cfg, key), names)
    for key, one in part_of(cfg, 'optim_wrapper.paramwise_cfg.custom_keys').items():
        _check_names(f'optim_wrapper.paramwise_cfg.custom_keys.{key}', one, _OF_WEIGHTS)
    _check_phases(cfg)
    train = part_of(cfg, 'train_cfg')
    default = EpochBasedTrainLoop if train.get('by_epoch', True) else IterBasedTrainLoop
    sampler = part_of(cfg, 'train_dataloader.sampler').get('type')
    by_epoch = train.get('by_epoch', class_of(train.get('type'))[1] == 'EpochBasedTrainLoop')
    if by_epoch and class_of(sampler)[1] == 'InfiniteSampler':
        raise UsageError(
            'train_dataloader.sampler.type=InfiniteSampler never ends the epochs that train_cfg '
            'counts: use DefaultSampler, or train_cfg=dict(by_epoch=False, max_iters=...)'
        )
    for key, registry, usual, more in (
        ('train_cfg', LOOPS, default, ('by_epoch',)),
        ('val_cfg', LOOPS, ValLoop, ()),
        ('test_cfg', LOOPS, TestLoop, ()),
        ('model_wrapper_cfg', MODEL_WRAPPERS, None, ()),
    ):
        _check_arguments(key, cfg.get(key), registry, usual, more, cfg.get('default_scope'))


@contextlib.contextmanager
def naming(key: str) -> Iterator[None]:
    """Name the part of a config that an exception is about.

    Raises:
        SettingError: In place of any other exception.
    """
    try:
        yield
    except UsageError:
        raise
    except Exception as error:
        text = with_likely_word(one_line(error, 300))
        raise SettingError(f'{key} does not build: {text}') from error


def part_of(cfg: Mapping[str, Any] | Config, key: str) -> Mapping[str, Any]:
    """The part of a config of a dotted name; an empty one where there is none."""
    found = _value_of(cfg, key)
    return found if isinstance(found, Mapping) else {}


def _value_of(cfg: Any, key: str) -> Any:
    for name in key.split('.'):
        cfg = cfg.get(name) if isinstance(cfg, (Mapping, Config)) else None
    return cfg


def check_number(key: str, value: Any, least: float = -math.inf, whole: bool = True) -> None:
    """Check a number of a config.

    Raises:
        SettingError: It is none, is below ``least``, or is not whole where it has to be.
    """
    number: Any = value if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    if not number >= least or (whole and number % 1):
        what = f'a {"whole " if whole else ""}number'
        raise SettingError(f'{key}={value!r} must be {what} from {least:g} on')


def _check_names(key: str, part: Any, names: Collection[str]) -> None:
    for name, value in part.items() if isinstance(part, Mapping) else ():
        # Hooks may have any name: one with a type is whole, whatever others are called.
        own = isinstance(value, Mapping) and 'type' in value
        if name not in names and not own and (hint := likely(name, names, 0.8)):
            raise UsageError(f'{key}.{name} is no setting{hint}')


def _check_phases(cfg: Mapping[str, Any]) -> None:
    for phase in ('val', 'test'):
        keys = [f'{phase}_{name}' for name in ('dataloader', 'cfg', 'evaluator')]
        lacking = [key for key in keys if cfg.get(key) is None]
        if len(lacking) in (1, 2):
            raise UsageError(
                f'{", ".join(lacking)} is missing or None: {", ".join(keys)} go together, all of '
                'them or none'
            )


def _check_arguments(
    key: str, part: Any, registry: Any, default: Any, more: Any, scope: str | None
) -> None:
    """Check the names in a part of a config against the arguments of the class that it means."""
    if not isinstance(part, Mapping):
        return
    kind = part.get('type', default)
    cls = kind
    if isinstance(kind, str):
        with registry.switch_scope_and_registry(scope) as own:
            cls = own.get(kind)
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
    unknown = re.match(r'(.*?(\S+) is not in the (?:\w+::)?(.*?) registry)\b', message)
    if unknown is not None:
        roots = {one.name: one for one in vars(mmengine.registry).values() if type(one) is Registry}
        root = roots.get(unknown.group(3), MODELS)
        with root.switch_scope_and_registry(None) as registry:
            known = {**root.module_dict, **registry.module_dict}
        return unknown.group(1) + likely(unknown.group(2), known)
    found = re.search(r"(\w+)(?:\.__init__\(\)|`).*unexpected keyword argument '(\w+)'", message)
    if found is None:
        return message
    with MODELS.switch_scope_and_registry(None) as registry:
        cls = registry.get(found.group(1))
    return message + likely(found.group(2), arguments_of(cls)) if cls else message
