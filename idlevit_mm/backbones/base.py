"""What all idle backbones share: keep ratios, keep masks, freezing and loading of weights.

Shape letters: B images, H and W of a stage's map in tokens, N = H * W.
"""

import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any, ClassVar

import torch
from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.model.weight_init import constant_init, trunc_normal_init
from torch import Tensor, nn

from ..blocks import IDLE_WHERE, IdleBlock, Payer, StageRecord
from ..checkpoints import (
    PACE,
    TIMM,
    StateDict,
    WeightsReport,
    compare,
    read_weights,
    split_backbone,
    with_shapes,
)
from ..converters import Fitted, Format, Size, detect, fit_tables
from ..errors import SettingError, shortened
from ..policies import KeepRatios, normalize_keep_ratios
from ..registry import arguments_of
from .arguments import check_numbers, pretrained_cfg
from .extents import ImgShapes

GELU = dict(type='GELU')


class IdleBackbone(BaseModule, ABC):
    """Base of backbones whose blocks compute only active tokens.

    Names and shapes of parameters are those of the dense twins; at ``keep_ratios=1.0`` so are
    outputs and gradients.

    Args:
        depths: Number of blocks of each stage.
        out_indices: Stages whose maps are returned; blocks where there is one stage.
        frozen_stages: Number of stages without gradients and in eval mode, the patch embedding
            included (blocks where there is one stage); 0 freezes the patch embedding alone, -1
            nothing.
        convert_weights: Whether a checkpoint named in ``init_cfg`` may have other names than
            mmdet's and mmseg's: those of timm or of a release; its keys tell which.
        pretrained: Deprecated spelling of ``init_cfg=dict(type='Pretrained', checkpoint=...)``.
        padded_images: Whether images may be padded to share a batch; a classifier's are not.
        init_cfg: Where the weights come from: ``dict(type='Pretrained', checkpoint=...)`` with a
            ``.pth`` or ``.safetensors`` file, an address, or ``timm://`` and a model of timm. Of a
            file weights of other shapes are left out with a warning; with ``in_channels='mean'``
            or ``'repeat'`` the first convolution is adapted to other channels.

    All families take these arguments, and besides:
        in_channels, embed_dims: Channels of the image, and of the tokens.
        num_layers, num_heads: Blocks (in Swin ``depths``) and attention heads of each stage.
        mlp_ratio: Hidden channels of the feed-forward networks, relative to the tokens'.
        qkv_bias: Whether query, key and value have a bias; but in windows, the output has it too.
        drop_rate, attn_drop_rate: Dropout, and dropout of the attention weights.
        drop_path_rate: Stochastic depth of the last block; grows linearly from 0 at the first.
        act_cfg, norm_cfg: Activation of the feed-forward networks, and norm layers.
        with_cp: Whether to recompute blocks in the backward pass to save memory.
        keep_ratios: Share of active tokens; see ``set_keep_ratios``. 1.0 is the dense backbone.
        policy: Which tokens are active, such as ``dict(type='IdleViT', scorer='mean_distance')``.
        idle_where: Whether blocks idle ``'always'``, or only where it ``'pays'``: where they are
            predicted to be faster than dense ones for the size of an image and the device of the
            first pass, whose pace is saved with the weights (``blocks.cost``).

    Raises:
        TypeError: An argument is unknown; ``pretrained`` or an argument of ``keep_ratios`` or
            ``policy`` has a wrong type.
        ValueError: A value is not allowed, or lists have different lengths.

    Attributes:
        family, DENSE: Its name in ``converters``; library and class of dense twins, the main first.
        FORMATS: Names that its weights have in OpenMMLab, first of all, and elsewhere.
        TABLE_MODE: How absolute position tables of weights are interpolated.
        RENAMED, AS_DENSE: Names here of a dense class's arguments, and those to return as it does.
        keep_ratios: One list per stage with one ratio per block; set by ``built``.
        strides: Distance of the tokens of each stage in those, or pixels, before; by the family.
        records: What each stage did in the last forward pass of the thread that asks.
        record_inputs: Whether records hold the inputs of idle blocks; losses need them.
    """

    family: str
    DENSE: ClassVar[tuple[tuple[str, str], ...]]
    FORMATS: ClassVar[tuple[Format, ...]]
    TABLE_MODE: ClassVar[str] = 'bicubic'
    RENAMED: ClassVar[dict[str, dict[str, str]]] = {}
    AS_DENSE: ClassVar[dict[tuple[str, str], dict[str, Any]]] = {}

    def __new__(cls, *args: Any, **kwargs: Any) -> 'IdleBackbone':
        """Check the numbers that a constructor is about to get, whatever the family."""
        by_place = (n for n, p in arguments_of(cls).items() if p.kind is not p.KEYWORD_ONLY)
        check_numbers(cls, {**dict(zip(by_place, args, strict=False)), **kwargs})
        return super().__new__(cls)

    def __init__(
        self,
        depths: Sequence[int],
        out_indices: Sequence[int],
        /,
        frozen_stages: int = -1,
        convert_weights: bool = False,
        pretrained: str | None = None,
        padded_images: bool = True,
        init_cfg: dict[str, Any] | None = None,
        **unknown: Any,
    ) -> None:
        if unknown:
            # Python would name this base, which no config does.
            name, family = next(iter(unknown)), type(self).__name__
            raise TypeError(f'{family}.__init__() got an unexpected keyword argument {name!r}')
        if pretrained is not None:
            init_cfg = pretrained_cfg(pretrained, init_cfg)
        super().__init__(init_cfg=init_cfg)
        stages = len(depths)
        outputs = stages if stages > 1 else depths[0]
        if not all(0 <= index < outputs for index in out_indices):
            raise ValueError(f'out_indices={tuple(out_indices)} must lie in 0 to {outputs - 1}')
        if not -1 <= frozen_stages <= outputs:
            raise ValueError(f'frozen_stages={frozen_stages} must lie in -1 to {outputs}')
        self.out_indices = tuple(out_indices)
        self.depths, self.frozen_stages = tuple(depths), frozen_stages
        self.strides: tuple[int, ...] = ()
        self.padded_images = padded_images
        self.convert_weights = convert_weights
        self._passes = threading.local()
        self.record_inputs = False
        self.keep_ratios: list[list[float]] = []

    @property
    def records(self) -> list[StageRecord]:
        return getattr(self._passes, 'records', [])

    @records.setter
    def records(self, records: list[StageRecord]) -> None:
        self._passes.records = records

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name != '_passes'}

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy, a shallow one too, has had no pass of its own.
        super().__setstate__({**state, '_passes': threading.local()})

    def _load_from_state_dict(self, state_dict: StateDict, prefix: str, *args: Any) -> None:
        if not hasattr(self, 'payer'):
            state_dict.pop(f'{prefix}{PACE}', None)
        super()._load_from_state_dict(state_dict, prefix, *args)

    @property
    def idle_blocks(self) -> list[list[IdleBlock]]:
        """The blocks of each stage."""
        return [
            [module for module in stage.modules() if isinstance(module, IdleBlock)]
            for stage in self._stages()
        ]

    def built(self, keep_ratios: KeepRatios, idle_where: str = 'always') -> None:
        """To be called at the end of a family's constructor, when all parts are there.

        Raises:
            ValueError: A keep ratio or ``idle_where`` is not allowed.
        """
        if idle_where not in IDLE_WHERE:
            allowed = ', '.join(IDLE_WHERE)
            raise ValueError(f'idle_where={idle_where!r} is unknown; allowed: {allowed}')
        for place, block in enumerate(chain(*self.idle_blocks)):
            block.policy.put(place, self.depths)
        self.set_keep_ratios(keep_ratios, self.idle_blocks[0][0].policy.attention_ratios)
        if idle_where == 'pays':
            self.payer = Payer()
            for block in chain(*self.idle_blocks):
                # Not as a part of the block: it is the backbone's.
                block.__dict__['payer'] = self.payer
        self._freeze()

    def set_keep_ratios(
        self, keep_ratios: KeepRatios, attention_ratios: KeepRatios | None = None
    ) -> None:
        """Change the share of active tokens from the next forward pass on.

        Args:
            keep_ratios: One ratio in (0, 1] for all blocks, one per stage, or one list per stage
                with one per block; or a schedule by name, see ``normalize_keep_ratios``.
            attention_ratios: Shares that attend, as ``policy.attention_ratios``; None leaves them.

        Raises:
            TypeError: An entry is no number.
            ValueError: A ratio lies outside (0, 1], a list has the wrong length, or the policy
                cannot follow; all old ratios then stay in place.
        """
        ratios = normalize_keep_ratios(keep_ratios, self.depths)
        policy = self.idle_blocks[0][0].policy
        policy.check_keep_ratios(ratios)
        if attention_ratios is not None:
            name = 'policy.attention_ratios'
            table = normalize_keep_ratios(attention_ratios, self.depths, name, nothing=True)
            policy.check_attention_ratios(table)
            for block, ratio in zip(chain(*self.idle_blocks), chain(*table), strict=True):
                block.policy.attention_ratio = ratio
        self.keep_ratios = ratios

    @property
    def keep_masks(self) -> list[list[Tensor]]:
        """Active tokens of each block of each stage in the last forward pass: (B, H, W), bool.

        The pass is the last of the thread that asks. Empty before the first one: whoever walks over
        attributes, as tracers do, meets it then.
        """
        return [
            [record.keep_mask(block) for block in range(len(record.plans))]
            for record in self.records
        ]

    def train(self, mode: bool = True) -> 'IdleBackbone':
        """Switch modes, leaving frozen stages in eval mode without gradients."""
        super().train(mode)
        self._freeze()
        return self

    def _freeze(self) -> None:
        for part in self._frozen_modules():
            part.requires_grad_(False)
            if isinstance(part, nn.Module):
                part.eval()

    def init_weights(self) -> None:
        """Draw new weights, or load the checkpoint named in ``init_cfg``.

        Raises:
            UsageError: The checkpoint cannot be read.
            SettingError: ``init_cfg`` names no checkpoint, or its weights do not fit this backbone.
        """
        if self.init_cfg is None:
            self._init_from_scratch()
        else:
            self._init_from_checkpoint()

    @classmethod
    def table_shapes(cls, state: StateDict, img_size: Size) -> dict[str, Size]:
        """Height and width in tokens of absolute position tables, by name, for a size in pixels.

        Raises:
            SettingError: An image is smaller than a token.
        """
        return {}

    @classmethod
    def fit_tables(
        cls, state: StateDict, shapes: Mapping[str, Size], window_size: int | None, is_foreign: bool
    ) -> Fitted:
        """Resize the position tables of weights that no backbone has been built for.

        ``shapes`` are like those of ``table_shapes``; ``window_size`` is in tokens, and None leaves
        tables that depend on it alone; foreign weights had other names in their file.
        """
        return fit_tables(state, shapes, cls.TABLE_MODE, window_size)

    def dense_twin(self, cfg: Mapping[str, Any]) -> tuple[dict[str, Any], StateDict]:
        """Settings and weights with which the first of ``DENSE`` is this backbone at 1.0.

        ``cfg`` is what this one was built from; some settings may not be taken by the dense class.

        Raises:
            ValueError: The dense class has no such settings.
        """
        return dict(cfg), self.state_dict()

    @abstractmethod
    def forward(self, x: Tensor, img_shapes: ImgShapes = None) -> Any:
        """Maps (B, C, H, W) of images (B, 3, height, width), one for each of ``out_indices``.

        With ``output_cls_token`` each is a list of the map and the class token (B, C).
        ``img_shapes`` are heights and widths in pixels of images that are padded, if known.
        """

    @abstractmethod
    def _stages(self) -> Iterable[nn.Module]:
        """Modules that hold the blocks of each stage."""

    @abstractmethod
    def _init_from_scratch(self) -> None:
        """Draw new weights as the reference implementation does."""

    @abstractmethod
    def _frozen_modules(self) -> Iterable[nn.Module | nn.Parameter]:
        """Modules of the patch embedding and the first ``frozen_stages`` stages; and tables."""

    def _fit_tables(self, state: StateDict, is_foreign: bool) -> Fitted:
        """Resize position tables to the sizes of this backbone."""
        return Fitted(state, {})

    def _init_from_checkpoint(self) -> None:
        logger = MMLogger.get_current_instance()
        path = self.init_cfg.get('checkpoint') if isinstance(self.init_cfg, dict) else None
        if not path:
            raise SettingError(
                f'init_cfg={self.init_cfg!r} of {type(self).__name__}; allowed: None or '
                "dict(type='Pretrained', checkpoint=...)"
            )
        state, _ = split_backbone(read_weights(path, logger))
        found = detect(state, self.family)
        if misfit := self._format_misfit(found):
            raise SettingError(f'checkpoint {path!r} {misfit}')
        dropped: list[str] = []
        if found is not None:
            state, dropped, _ = found.decode(state)
        self._fit_first_layer(state)
        fitted = self._fit_tables(state, found is not None and found.is_foreign)
        report = compare(self.state_dict(), fitted.state, policy_too=False)
        report.resized, report.dropped = fitted.resized, dropped
        if misfit := self._misfit(report, path, state):
            raise SettingError(f'checkpoint {path!r} {misfit}')
        fitting = {k: v for k, v in fitted.state.items() if k not in report.mismatched}
        self.load_state_dict(fitting, strict=False)
        title = '' if found is None else f' ({found.title})'
        # Norms of outputs start anew where a classifier was; weights of blocks hardly ever should.
        partly = report.mismatched or _of_stages([*report.missing, *report.unexpected])
        level = logging.WARNING if partly else logging.INFO
        logger.log(level, f'{type(self).__name__}: loaded from {path}{title}: {report.summary()}')

    def _fit_first_layer(self, state: StateDict) -> None:
        """Adapt the first convolution to other numbers of channels, where ``init_cfg`` says how."""
        how = self.init_cfg.get('in_channels')
        if how not in (None, 'mean', 'repeat'):
            raise SettingError(f'init_cfg.in_channels={how!r} is unknown; allowed: mean, repeat')
        convolutions = (n for n, m in self.named_modules() if isinstance(m, nn.Conv2d))
        key = f'{next(convolutions)}.weight'
        if how is None or key not in state:
            return
        weight, channels = state[key], self.state_dict()[key].shape[1]
        given = weight.shape[1]
        if how == 'mean':
            weight = weight.mean(dim=1, keepdim=True)
        # With the mean a grey image gives the same features as before.
        chosen = torch.arange(channels) % weight.shape[1]
        state[key] = weight[:, chosen] * (given / channels)

    def _format_misfit(self, found: Format | None) -> str:
        """Why weights with these names are none of this backbone's; '' where they may be."""
        if found is None:
            return ''
        name, keys = type(self).__name__, f'its keys are those of {found.title}'
        if found.family != self.family:
            return f'has no weight of {name}: {keys}'
        if found.is_foreign and not self.convert_weights:
            what = f'has no weight by the names of {name}: {keys}'
            return f'{what}; set convert_weights=True to convert them'
        return ''

    def _misfit(self, report: WeightsReport, path: str, state: StateDict) -> str:
        """Why weights by the right names are others than this backbone's; '' where they are not."""
        name = type(self).__name__
        fits = any(key.endswith('.weight') for key in _of_stages(report.matched))
        # A model's name stands for one architecture; of a file what fits is taken.
        if report.mismatched and (str(path).startswith(TIMM) or not fits):
            listed = with_shapes(report.mismatched, 'not')
            return f'has another shape than {name}: {shortened(listed, 3)}'
        if not report.matched:
            return f'has no weight of {name}: its keys begin with {shortened(sorted(state), 3)}'
        lacking, unknown = _of_stages(report.missing), _of_stages(report.unexpected)
        if str(path).startswith(TIMM) and (lacking or unknown):
            what = f'lacks {shortened(lacking, 3)}' if lacking else f'has {shortened(unknown, 3)}'
            return f'is of another size than {name}: it {what}'
        return ''


def init_layer(module: nn.Module) -> None:
    """Draw a linear layer and reset a norm as mmdet does; leave other modules alone."""
    if isinstance(module, nn.Linear):
        trunc_normal_init(module, std=0.02, bias=0.0)
    elif isinstance(module, nn.LayerNorm):
        constant_init(module, 1.0)


def _of_stages(keys: Sequence[str]) -> list[str]:
    """Those weights that are no part of outputs, embeddings or classifiers."""
    return [key for key in keys if key.startswith(('stages.', 'layers.'))]
