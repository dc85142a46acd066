"""Built models for the analyses: load one, change what it keeps, put the dense class in.

Only functions that need mmdet or mmseg import them.
"""

from __future__ import annotations

import copy
import importlib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.logging import MMLogger
from mmengine.registry import MODELS, init_default_scope
from torch import nn

from ..checkpoints import compare, of_policy, read_weights
from ..engine import launch
from ..engine.assembly import assembled
from ..errors import UsageError
from ..losses import shared_copy
from ..policies import KeepRatios
from ..registry import arguments_of

# Precisions by the names that options have for them.
DTYPES = {'float32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}

_PROJECTS = {'mmdet': 'mmdetection', 'mmseg': 'mmsegmentation', 'mmpretrain': 'mmpretrain'}


def load_config(config: str | Path | Config, cfg_options: dict[str, Any] | None = None) -> Config:
    """Read a config (its custom imports included), merge options and set its default scope.

    Raises:
        UsageError: there is no such file, it cannot be read, or an option does not apply.
    """
    if isinstance(config, Config):
        cfg = copy.deepcopy(config)
        cfg.merge_from_dict(cfg_options or {})
    else:
        cfg = launch.load_config(str(config), cfg_options)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return cfg


def load_model(
    config: str | Path | Config,
    checkpoint: str | Path | None = None,
    device: str | torch.device = 'cpu',
    cfg_options: dict[str, Any] | None = None,
) -> nn.Module:
    """Build the model of a config in eval mode, with the config as ``model.cfg``.

    A checkpoint is loaded strictly; without one weights are as at the start of a training.

    Raises:
        UsageError: the config cannot be read, a part of the model does not build or does not fit
            the others (``SettingError``), or the checkpoint does not exist, is damaged, holds
            more than weights and mmengine's records, or its weights are not those of this model.
    """
    cfg = load_config(config, cfg_options)
    model_cfg = copy.deepcopy(cfg.model)
    if isinstance(preprocessor := cfg.get('data_preprocessor'), dict):
        model_cfg.setdefault('data_preprocessor', copy.deepcopy(preprocessor))
    if checkpoint is not None and model_cfg.get('backbone', {}).get('init_cfg') is not None:
        # The checkpoint overwrites them: do not fetch ImageNet weights first.
        model_cfg.backbone.init_cfg = None
    model = assembled(lambda: MODELS.build(model_cfg), model_cfg)
    if checkpoint is not None:
        weights = read_weights(checkpoint)
        if misfit := compare(model.state_dict(), weights).misfit():
            raise UsageError(
                f'checkpoint {checkpoint} does not fit {type(model).__name__}: it {misfit}'
            )
        model.load_state_dict(weights, strict=True)
    elif hasattr(model, 'init_weights'):
        # mmengine logs how every single parameter was initialised.
        logger = MMLogger.get_current_instance()
        level = logger.level
        logger.setLevel('WARNING')
        try:
            model.init_weights()
        finally:
            logger.setLevel(level)
    model.cfg = cfg
    return model.to(device).eval()


def with_keep_ratios(
    model: nn.Module, keep_ratios: KeepRatios, attention_ratios: KeepRatios | None = None
) -> nn.Module:
    """A copy of a detector, segmentor or backbone with other keep ratios, weights shared.

    Raises:
        TypeError: the model has no idle backbone.
    """
    clone = shared_copy(model)
    idle_backbone(clone).set_keep_ratios(keep_ratios, attention_ratios)
    return clone


def scheduled(backbone_cfg: Mapping[str, Any], ratio: float) -> dict[str, Any]:
    """The schedule by name that a backbone's config has, with another keep ratio.

    Raises:
        UsageError: it has none that takes a ratio.
    """
    own = backbone_cfg.get('keep_ratios')
    if not isinstance(own, Mapping) or 'keep_ratio' not in own:
        raise UsageError(f'--schedule: keep_ratios={own!r} of the backbone is none with keep_ratio')
    return {**own, 'keep_ratio': ratio}


def idle_backbone(model: nn.Module) -> Any:
    """The idle backbone of a model (or the model itself, if it is one).

    Raises:
        TypeError: there is none.
    """
    backbone = getattr(model, 'backbone', model)
    if not hasattr(backbone, 'set_keep_ratios'):
        raise TypeError(
            f'{type(backbone).__name__} is not an idle backbone: it has no set_keep_ratios()'
        )
    return backbone


def host_backbone(backbone: nn.Module, backbone_cfg: dict[str, Any]) -> nn.Module:
    """The first of an idle backbone's dense classes, with all of its weights.

    It is in the same mode and on the same device. ``backbone_cfg`` is what the idle backbone was
    built from.

    Raises:
        ValueError: there is no dense class with these settings, or its library is not installed.
    """
    name = type(backbone).__name__
    if not hasattr(backbone, 'DENSE'):
        raise ValueError(f'backbone={name} has no dense class in mmdet or mmseg')
    library, twin = backbone.DENSE[0]
    settings, state = backbone.dense_twin(backbone_cfg)
    try:
        dense_class = getattr(importlib.import_module(f'{library}.models'), twin)
    except (ImportError, AssertionError) as error:
        # AssertionError: what mmdet and mmseg raise where they do not like mmcv's version.
        raise ValueError(
            f'the dense class of {name} is in {_PROJECTS[library]}, which cannot be imported: '
            f'{error}'
        ) from error
    accepted = arguments_of(dense_class).keys() - {'init_cfg', 'pretrained'}
    arguments = {key: copy.deepcopy(value) for key, value in settings.items() if key in accepted}
    dense = dense_class(**arguments)
    # What idling learns or knows a dense class has no place for.
    state = {key: value for key, value in state.items() if not of_policy(key)}
    if misfit := compare(dense.state_dict(), state).misfit():
        raise ValueError(f'{twin} of {_PROJECTS[library]} does not take the weights: it {misfit}')
    # Not strictly: mmpretrain's Swin V2 drops its buffers as it loads, and misses them then.
    dense.load_state_dict(state, strict=False)
    dense.to(next(backbone.parameters()).device)
    dense.train(backbone.training)  # on a line of its own: mmdet's Swin returns None here
    return dense


class Autocast(nn.Module):
    """A model under autocast: mmdet's Swin cannot be in half precision as a whole.

    Args:
        model: With weights in that precision, so that they need not be cast.
        dtype: The precision.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        super().__init__()
        self.model, self.dtype = model.to(dtype), dtype

    def forward(self, x: torch.Tensor) -> Any:
        """What the model gives."""
        # A cache would outlive a CUDA graph's memory.
        with torch.autocast(x.device.type, self.dtype, cache_enabled=False):
            return self.model(x)


def parse_shapes(texts: Sequence[str]) -> list[tuple[int, int]]:
    """Heights and widths from a command line: ``512x512 800x1280``, or one as ``800 1280``.

    Raises:
        ValueError: a size is not written like that, or not positive.
    """
    sizes = texts if any('x' in text.lower() for text in texts) else ['x'.join(texts)]
    found = [re.fullmatch('0*([1-9][0-9]*)x0*([1-9][0-9]*)', size.lower()) for size in sizes]
    if not all(found):
        raise ValueError(f'shape={" ".join(texts)!r} must be HEIGHTxWIDTH, such as 800x1280')
    return [(int(size[1]), int(size[2])) for size in found if size]


def image_channels(model: nn.Module) -> int:
    """Channels of the images of a model: those of the first convolution of its backbone, or 3."""
    parts = getattr(model, 'backbone', model).modules()
    return next((part.in_channels for part in parts if isinstance(part, nn.Conv2d)), 3)


def noise_image(
    shape: Sequence[int],
    device: str | torch.device = 'cpu',
    model: nn.Module | None = None,
    batch: int = 1,
) -> torch.Tensor:
    """A fixed standard-normal batch (B, C, H, W).

    Of what is left out of the shape, B is ``batch`` and C that of the images of ``model``, or 3.
    """
    first = batch, 3 if model is None else image_channels(model)
    generator = torch.Generator().manual_seed(0)
    return torch.randn((*first[: 4 - len(shape)], *shape), generator=generator).to(device)


def blank_data_samples(model: nn.Module, shape: Sequence[int]) -> list[Any] | None:
    """Data samples without annotations for a detector and full-size images (B, C, H, W).

    None for a segmentor or a classifier, which makes its own.
    """
    if hasattr(model, 'decode_head') or hasattr(model, 'head'):
        return None
    from mmdet.structures import DetDataSample

    names = ('img_shape', 'ori_shape', 'pad_shape', 'batch_input_shape')
    meta = {**dict.fromkeys(names, tuple(shape[2:])), 'scale_factor': (1.0, 1.0)}
    return [DetDataSample(metainfo=meta) for _ in range(shape[0])]
