"""What tests of configs share: reading them, building them cheaply, comparing their settings."""

import copy
import functools
import importlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

pytest.importorskip('mmcv.ops')
mmdet = pytest.importorskip('mmdet')
mmseg = pytest.importorskip('mmseg')

import torch  # noqa: E402
from mmengine.config import Config  # noqa: E402
from mmengine.registry import MODELS, DefaultScope  # noqa: E402
from torch.overrides import TorchFunctionMode  # noqa: E402

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / 'configs'
ALL = sorted(
    path.relative_to(CONFIGS).as_posix()
    for path in CONFIGS.rglob('*.py')
    if '_base_' not in path.parts
)
DIGITS = [name for name in ALL if name.startswith('digit_scenes/')]
ABSENT = '<absent>'
# The configs of the forks onedl-* name a mirror of OpenMMLab's server.
MIRROR, SERVER = 'https://mmassets.onedl.ai/', 'https://download.openmmlab.com/'
COMPARED = (
    'default_scope',
    'model',
    'optim_wrapper',
    'param_scheduler',
    'train_cfg',
    'val_cfg',
    'test_cfg',
    'train_dataloader',
    'val_dataloader',
    'test_dataloader',
    'val_evaluator',
    'test_evaluator',
    'default_hooks',
    'custom_hooks',
    'env_cfg',
    'log_processor',
    'visualizer',
    'tta_pipeline',
    'tta_model',
    'auto_scale_lr',
    'randomness',
    'load_from',
    'resume',
)


class Uninitialised(TorchFunctionMode):
    """Skips the drawing of initial weights, which is most of the time that building takes."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if getattr(func, '__module__', None) == 'torch.nn.init':
            return (kwargs or {}).get('tensor', args[0] if args else None)
        return func(*args, **(kwargs or {}))


@functools.cache
def read(name: str) -> Config:
    """Settings of a config of this project, the same for all who ask: to look at alone."""
    return Config.fromfile(CONFIGS / name)


def load(name: str) -> Config:
    """Settings of a config of this project, to change at will."""
    return copy.deepcopy(read(name))


def load_reference(package: ModuleType, name: str) -> Config:
    """Settings of a config that mmdet or mmseg ships, to change at will."""
    return copy.deepcopy(_read_reference(package, name))


@functools.cache
def _read_reference(package: ModuleType, name: str) -> Config:
    path = shipped(package, f'configs/{name}')
    # It may import packages that only its own backbone needs.
    return Config.fromfile(path, import_custom_modules=False)


def shipped(package: ModuleType, name: str) -> Path:
    path = Path(package.__file__).parent / '.mim' / name
    if not path.exists():
        pytest.skip(f'{package.__name__} was installed without {name}')
    return path


def register(cfg: Config) -> None:
    """Fill the registries of the config's scope."""
    utils = importlib.import_module(f'{cfg.default_scope}.utils')
    utils.register_all_modules(init_default_scope=False)
    if 'mmdet.models' in cfg.custom_imports.imports:
        import mmdet.models  # noqa: F401


def build(cfg: Config) -> torch.nn.Module:
    register(cfg)
    with DefaultScope.overwrite_default_scope(cfg.default_scope):
        # Some models write into their settings.
        return MODELS.build(copy.deepcopy(cfg.model))


def is_plain(name: str) -> bool:
    return 'idle-vit' in name or 'idle-deit' in name


def flat(value: Any, prefix: str = '') -> Iterator[tuple[str, Any]]:
    """Leaves of nested settings by dotted key; None counts as not set, a mirror as its server."""
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from flat(item, f'{prefix}.{key}' if prefix else str(key))
    elif isinstance(value, (list, tuple)) and any(
        isinstance(item, (Mapping, list)) for item in value
    ):
        yield f'{prefix}.length', len(value)
        for index, item in enumerate(value):
            yield from flat(item, f'{prefix}.{index}')
    elif isinstance(value, str):
        yield prefix, value.replace(MIRROR, SERVER)
    elif value is not None:
        yield prefix, tuple(value) if isinstance(value, (list, tuple)) else value


def differences(
    old: Config, new: Config, keys: Iterable[str] = COMPARED
) -> dict[str, tuple[Any, Any]]:
    """Settings that differ by dotted key: their value in the first and in the second config."""
    keys = list(keys)
    before = dict(flat({key: old.get(key) for key in keys}))
    after = dict(flat({key: new.get(key) for key in keys}))
    return {
        key: (before.get(key, ABSENT), after.get(key, ABSENT))
        for key in before.keys() | after.keys()
        if before.get(key, ABSENT) != after.get(key, ABSENT)
    }
