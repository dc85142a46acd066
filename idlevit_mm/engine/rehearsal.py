"""Settings of a model that mmdet and mmseg read when they first train or test, not before."""

from __future__ import annotations

import contextlib
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import SettingError, UsageError, one_line
from .assembly import evaluating
from .checks import parts_of
from .settings import naming

_LIBRARIES = ('mmdet', 'mmseg', 'mmcv')
_SIDE = 256
_NUMBERS = {'score_thr', 'nms_pre', 'max_per_img', 'min_bbox_size', 'mask_thr_binary'}
# What wrong settings raise; a size that a model cannot take, or data that it wants besides, do not.
_OF_SETTINGS = (AttributeError, NameError, TypeError, AssertionError, KeyError)


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
