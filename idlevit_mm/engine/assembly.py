"""Models that do not build, or whose parts do not fit each other, in one line each."""

from __future__ import annotations

import copy
import re
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from mmengine.model import is_model_wrapper
from torch import nn

from ..backbones import IdleBackbone
from ..errors import SettingError, UsageError, one_line
from .checks import parts_of
from .settings import with_likely_word

# What a head raises that gets other maps than it was built for.
_MISFITS = (RuntimeError, ValueError, AssertionError, IndexError)
_SHORT = 80
_HEADS = re.compile(r'(bbox|rpn|decode|auxiliary)_head(\.\d+)?')


def assembled(build: Callable[[], nn.Module], config: Any) -> nn.Module:
    """Build a model by its config.

    Raises:
        SettingError: A part does not build, or does not fit what it gets its maps from; the message
            has the dotted name of the part.
    """
    config = copy.deepcopy(config) if isinstance(config, dict) else {}  # building adds to it
    try:
        model = build()
    except UsageError:
        raise
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        # An assertion has nothing to say but what it asserts.
        text = one_line(error, 300) if str(error) else f'{one_line(error)}, {last.line}'
        text = f'{_place(error, config)} does not build: {with_likely_word(text)}'
        if 'idlevit_mm' not in Path(last.filename).parts:
            text += f' ({Path(last.filename).name}:{last.lineno})'
        raise SettingError(text) from error
    for name, part in [] if is_model_wrapper(model) else model.named_modules():
        if isinstance(getattr(part, 'backbone', None), IdleBackbone):
            _check_joints(part, f'model.{name}.' if name else 'model.')
    return model


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put every submodule in eval mode and give each its own mode back afterwards."""
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for submodule, training in modes:
            submodule.training = training


def _place(error: BaseException, config: Any) -> str:
    """Dotted name, and short values, of the innermost part of a model that was being built."""
    for frame, _ in reversed(list(traceback.walk_tb(error.__traceback__))):
        built: Any = frame.f_locals.get('cfg')
        for keys, part, _ in parts_of(config, ('model',)) if isinstance(built, dict) else ():
            # Models add to the configs of their parts.
            if part and all(name in built and built[name] == part[name] for name in part):
                value = f'={dict(part)!r}'
                return '.'.join(map(str, keys)) + (value if len(value) < _SHORT else '')
    return 'model'


def _check_joints(model: Any, prefix: str) -> None:
    """Check that neck and heads can take what a detector or segmentor hands to them.

    What looks wrong is refused only if it fails when it is tried.
    """
    backbone: Any = model.backbone
    first = next((part for part in backbone.modules() if isinstance(part, nn.Conv2d)), None)
    preprocessor = getattr(model, 'data_preprocessor', None)
    mean, spread = (getattr(preprocessor, name, None) for name in ('mean', 'std'))
    for name, value in (
        ('std', 1 if spread is None else spread.min().item()),
        ('pad_size_divisor', getattr(preprocessor, 'pad_size_divisor', 1)),
    ):
        if not value > 0:
            raise SettingError(
                f'{prefix}data_preprocessor.{name} holds {value!r}; allowed: numbers above 0'
            )
    if type(model).__module__.startswith('mmseg.'):
        _check_windows(getattr(model, 'test_cfg', None), prefix)
    # One mean serves any number of channels.
    if first is not None and mean is not None and len(mean) not in (1, first.in_channels):
        raise SettingError(
            f'{prefix}backbone.in_channels={first.in_channels}, but {prefix}data_preprocessor.mean '
            f'has {len(mean)} entries, one for each channel of an image'
        )
    # What somebody's own family or subclass returns need not be as wide as its blocks.
    if not type(backbone).forward.__module__.startswith('idlevit_mm.'):
        return
    widths = [stage[0].embed_dims for stage in backbone.idle_blocks]
    maps = [widths[index if len(widths) > 1 else 0] for index in backbone.out_indices]
    source = f'{prefix}backbone (out_indices={backbone.out_indices})'
    has_class = getattr(backbone, 'output_cls_token', False)
    if type(model).__name__ == 'ImageClassifier' and model.head is not None:
        pooled = has_class or model.neck is not None
        if not pooled or getattr(model.head, 'in_channels', maps[-1]) != maps[-1]:
            _check_classifier(model, prefix, maps, source)
        return
    if has_class:
        return
    if (neck := getattr(model, 'neck', None)) is not None:
        wanted = getattr(neck, 'in_channels', maps)
        fits = wanted == maps[-1] if isinstance(wanted, int) else list(wanted) == maps
        _check_joint(f'{prefix}neck', neck, wanted, maps, source, fits)
        number, width = getattr(neck, 'num_outs', None), getattr(neck, 'out_channels', None)
        if not isinstance(number, int) or not isinstance(width, int):
            return
        maps, source = [width] * number, f'{prefix}neck (num_outs={number})'
    for name, head in model.named_modules():
        if not _HEADS.fullmatch(name) or isinstance(head, nn.ModuleList):
            continue
        name = f'{prefix}{name}'
        wanted, index = getattr(head, 'in_channels', None), getattr(head, 'in_index', None)
        if isinstance(index, int):
            index, wanted = [index], [wanted]
        if isinstance(index, (list, tuple)):
            # With resize_concat a head notes the sum.
            known = all(-len(maps) <= one < len(maps) for one in index)
            chosen = [maps[one] for one in index] if known else []
            fits = known and wanted in (sum(chosen), chosen, tuple(chosen))
            _check_joint(name, head, wanted, maps, f'{source} and in_index={index}', fits)
        elif isinstance(wanted, int):
            _check_joint(name, head, wanted, maps, source, set(maps) == {wanted})
        _check_levels(name, head, len(maps), source)


def _check_classifier(model: Any, prefix: str, maps: Sequence[int], source: str) -> None:
    """Check that a classifier's neck and head take what its backbone gives."""
    feats: Any = tuple(torch.zeros(1, width, 2, 2) for width in maps)
    if getattr(model.backbone, 'output_cls_token', False):
        feats = tuple([one, one[:, :, 0, 0]] for one in feats)
    try:
        with torch.no_grad(), torch.random.fork_rng(), evaluating(model):
            model.head(feats if model.neck is None else model.neck(feats))
    except (*_MISFITS, TypeError) as error:
        raise SettingError(
            f'{prefix}head (in_channels={getattr(model.head, "in_channels", None)}) does not take '
            f'what {prefix}neck makes of maps of {list(maps)} channels from {source} '
            f'({one_line(error, 150)}); without class token: neck=dict(type="GlobalAveragePooling")'
        ) from error
    except Exception:
        return  # they want something else besides, and may be right


def _check_windows(test_cfg: Any, prefix: str) -> None:
    """Check how a segmentor sees an image in a test, which it first does in a validation."""
    mode = test_cfg.get('mode') if isinstance(test_cfg, dict) else None
    if mode not in (None, 'slide', 'whole'):
        raise SettingError(f'{prefix}test_cfg.mode={mode!r}; allowed: slide, whole')
    for name in ('crop_size', 'stride') if mode == 'slide' else ():
        value = test_cfg.get(name)
        sides = value if isinstance(value, (list, tuple)) else ()
        if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
            raise SettingError(
                f'{prefix}test_cfg.{name}={value!r}; allowed with mode=slide: (height, width) in '
                'whole numbers from 1 on'
            )


def _check_joint(
    name: str, part: nn.Module, wanted: Any, maps: Sequence[int], source: str, fits: bool
) -> None:
    if fits:
        return
    sizes = [max(64 >> level, 2) for level in range(len(maps))]
    try:
        with torch.no_grad(), torch.random.fork_rng(), evaluating(part):
            part(tuple(torch.zeros(1, *size) for size in zip(maps, sizes, sizes, strict=True)))
    except _MISFITS as error:
        raise SettingError(
            f'{name}.in_channels={wanted}, but it gets maps of {list(maps)} channels from {source}'
        ) from error
    except Exception:
        return  # it wants something else besides, and may be right


def _check_levels(name: str, head: Any, number: int, source: str) -> None:
    generator: Any = getattr(head, 'prior_generator', None)
    levels = getattr(generator, 'num_levels', number)
    if levels == number:
        return
    try:
        generator.grid_priors([(2, 2)] * number, device='cpu')
    except _MISFITS as error:
        raise SettingError(
            f'{name} has anchors for {levels} levels (strides={generator.strides}), but gets '
            f'{number} maps from {source}'
        ) from error
