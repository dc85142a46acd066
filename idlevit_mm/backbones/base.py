"""What all idle backbones share: keep ratios, keep masks, freezing and loading of weights.

Shape letters: B images, H and W of a stage's map in tokens, N = H * W.
"""

import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

from mmengine.logging import MMLogger
from mmengine.model import BaseModule
from mmengine.runner.checkpoint import CheckpointLoader
from torch import Tensor, nn

from ..blocks import IdleBlock, StageRecord
from ..errors import SettingError
from ..policies import KeepRatios, normalize_keep_ratios

StateDict = dict[str, Tensor]

GELU = dict(type='GELU')


class IdleBackbone(BaseModule, ABC):
    """Base of backbones whose blocks compute only active tokens.

    Args:
        depths: Number of blocks of each stage.
        out_indices: Stages whose maps are returned; blocks where there is one stage.
        frozen_stages: Number of stages without gradients and in eval mode, the patch embedding
            included; 0 freezes the patch embedding alone, -1 nothing.
        convert_weights: Whether a checkpoint named in ``init_cfg`` may have the keys of the
            official release.
        pretrained: Deprecated spelling of ``init_cfg=dict(type='Pretrained', checkpoint=...)``.
        init_cfg: Where the weights come from.

    Raises:
        TypeError: ``pretrained`` is no string.
        ValueError: ``out_indices`` or ``frozen_stages`` names a stage that is not there, or both
            ``pretrained`` and ``init_cfg`` are given.

    Attributes:
        keep_ratios: One list per stage with one ratio per block; a family sets them at the end of
            its constructor by ``set_keep_ratios``.
        records: What each stage did in the last forward pass.
        record_inputs: Whether records hold the inputs of idle blocks; losses need them.
    """

    def __init__(
        self,
        depths: Sequence[int],
        out_indices: Sequence[int],
        frozen_stages: int = -1,
        convert_weights: bool = False,
        pretrained: str | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        if pretrained is not None:
            init_cfg = _pretrained_cfg(pretrained, init_cfg)
        super().__init__(init_cfg=init_cfg)
        stages = len(depths)
        outputs = stages if stages > 1 else depths[0]
        if not all(0 <= index < outputs for index in out_indices):
            raise ValueError(f'out_indices={tuple(out_indices)} must lie in 0 to {outputs - 1}')
        if not -1 <= frozen_stages <= outputs:
            raise ValueError(f'frozen_stages={frozen_stages} must lie in -1 to {outputs}')
        self.out_indices = tuple(out_indices)
        self.depths = tuple(depths)
        self.frozen_stages = frozen_stages
        self.convert_weights = convert_weights
        self.records: list[StageRecord] = []
        self.record_inputs = False
        self.keep_ratios: list[list[float]] = []

    @property
    def idle_blocks(self) -> list[list[IdleBlock]]:
        """The blocks of each stage."""
        return [
            [module for module in stage.modules() if isinstance(module, IdleBlock)]
            for stage in self._stages()
        ]

    def set_keep_ratios(self, keep_ratios: KeepRatios) -> None:
        """Change the share of active tokens from the next forward pass on.

        Args:
            keep_ratios: One ratio in (0, 1] for all blocks, one per stage, or one list per stage
                with one per block; or a schedule by name, see ``normalize_keep_ratios``.

        Raises:
            TypeError: An entry is no number.
            ValueError: A ratio lies outside (0, 1], a list has the wrong length, or the policy
                cannot follow; the old ratios then stay in place.
        """
        ratios = normalize_keep_ratios(keep_ratios, self.depths)
        self.idle_blocks[0][0].policy.check_keep_ratios(ratios)
        self.keep_ratios = ratios

    @property
    def keep_masks(self) -> list[list[Tensor]]:
        """Active tokens of each block of each stage in the last forward pass: (B, H, W), bool.

        Raises:
            RuntimeError: There was no forward pass yet.
        """
        if not self.records:
            raise RuntimeError('keep_masks are known only after a forward pass')
        return [
            [record.keep_mask(block) for block in range(len(record.selections))]
            for record in self.records
        ]

    def train(self, mode: bool = True) -> 'IdleBackbone':
        """Switch modes, leaving frozen stages in eval mode without gradients."""
        super().train(mode)
        for module in self._frozen_modules():
            module.eval()
        for parameter in self._frozen_parameters():
            parameter.requires_grad = False
        return self

    def init_weights(self) -> None:
        """Draw new weights, or load the checkpoint named in ``init_cfg``.

        Raises:
            SettingError: ``init_cfg`` names no checkpoint, or its weights do not fit this backbone.
        """
        if self.init_cfg is None:
            self._init_from_scratch()
        else:
            self._init_from_checkpoint()

    @abstractmethod
    def _stages(self) -> Iterable[nn.Module]:
        """Modules that hold the blocks of each stage."""

    @abstractmethod
    def _init_from_scratch(self) -> None:
        """Draw new weights as the reference implementation does."""

    @abstractmethod
    def _frozen_modules(self) -> Iterable[nn.Module]:
        """Modules of the patch embedding and the first ``frozen_stages`` stages."""

    def _frozen_parameters(self) -> Iterable[nn.Parameter]:
        for module in self._frozen_modules():
            yield from module.parameters()

    def _from_official(self, state: StateDict) -> StateDict:
        """Rename the keys of an official release; return others as they are."""
        return state

    def _fit_tables(self, state: StateDict) -> StateDict:
        """Resize position tables to the sizes of this backbone."""
        return state

    def _init_from_checkpoint(self) -> None:
        logger = MMLogger.get_current_instance()
        path = self.init_cfg.get('checkpoint') if isinstance(self.init_cfg, dict) else None
        if not path:
            raise SettingError(
                f'init_cfg={self.init_cfg!r} of {type(self).__name__}; allowed: None or '
                "dict(type='Pretrained', checkpoint=...)"
            )
        checkpoint = CheckpointLoader.load_checkpoint(path, map_location='cpu', logger=logger)
        state = _strip_prefixes(_state_dict_of(checkpoint))
        if self.convert_weights:
            state = self._from_official(state)
        state = self._fit_tables(state)
        self._check_fit(state, path)
        missing, unexpected = self.load_state_dict(state, strict=False)
        loaded = len(self.state_dict()) - len(missing)
        logger.info(
            f'{type(self).__name__}: {loaded} weights loaded from {path}'
            f'{_listed("missing", missing)}{_listed("not used", unexpected)}'
        )

    def _check_fit(self, state: StateDict, path: str) -> None:
        own = self.state_dict()
        common = own.keys() & state.keys()
        if not common:
            hint = (
                '' if self.convert_weights else '; set convert_weights=True for official releases'
            )
            raise SettingError(
                f'checkpoint {path!r} has no weight of {type(self).__name__}: '
                f'its keys begin with {sorted(state)[:3]}{hint}'
            )
        wrong = [
            f'{key} is {tuple(state[key].shape)}, not {tuple(own[key].shape)}'
            for key in sorted(common)
            if own[key].shape != state[key].shape
        ]
        if wrong:
            raise SettingError(
                f'checkpoint {path!r} has another shape than {type(self).__name__}: '
                f'{"; ".join(wrong[:3])}{f" and {len(wrong) - 3} more" if len(wrong) > 3 else ""}'
            )


def image_size(size: int | Sequence[int]) -> tuple[int, int]:
    """Height and width from one number or a sequence of one or two."""
    sizes = (size,) if isinstance(size, int) else tuple(size)
    if len(sizes) not in (1, 2):
        raise ValueError(f'pretrain_img_size={size} must be one number or two')
    return sizes[0], sizes[-1]


def _pretrained_cfg(pretrained: Any, init_cfg: dict[str, Any] | None) -> dict[str, Any]:
    if init_cfg is not None:
        raise ValueError('init_cfg and pretrained cannot be set at the same time')
    if not isinstance(pretrained, str):
        raise TypeError(f'pretrained={pretrained!r} must be a path or None')
    warnings.warn(
        "pretrained is deprecated; use init_cfg=dict(type='Pretrained', checkpoint=...)",
        DeprecationWarning,
        stacklevel=3,
    )
    return dict(type='Pretrained', checkpoint=pretrained)


def _state_dict_of(checkpoint: dict[str, Any]) -> StateDict:
    for key in ('state_dict', 'model'):
        if key in checkpoint:
            return checkpoint[key]
    return checkpoint


def _strip_prefixes(state: StateDict) -> StateDict:
    """Remove what wrappers put before keys, and all but the backbone of a whole model."""
    for prefix in ('module.', 'backbone.'):
        if any(key.startswith(prefix) for key in state):
            state = {
                key.removeprefix(prefix): value
                for key, value in state.items()
                if key.startswith(prefix)
            }
    return state


def _listed(title: str, keys: Sequence[str]) -> str:
    if not keys:
        return ''
    more = f' and {len(keys) - 5} more' if len(keys) > 5 else ''
    return f'; {title}: {", ".join(keys[:5])}{more}'
