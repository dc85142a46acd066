"""Policies: which units of a block are active, and what the idle ones receive.

Shape letters: B images, N tokens of the map (H * W), C channels.
"""

import inspect
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from mmengine.registry import Registry
from torch import Tensor, nn

from ..ops import Selection, UnitLayout, select_units, unit_scores
from ..registry import POLICIES, SCORERS
from .scorers import ScorableBlock, Scorer

DEFAULT_POLICY = 'IdleViT'
DEFAULT_SCORER = 'mean_distance'


@POLICIES.register_module()
class IdleViT(nn.Module):
    """The best units are active, idle ones pass through unchanged (IdleViT, arXiv 2310.05654).

    Args:
        embed_dims: Channels of the tokens.
        scorer: Name of a registered scorer, or a dict with its ``type`` and arguments.
        scope: What is a unit and among which units the best are chosen; one of the names in
            ``scopes``.
        scopes: Scopes that the block can compute.

    Raises:
        ValueError: Unknown scope or scorer.
        TypeError: The scorer does not take an argument given to it.
    """

    def __init__(
        self,
        embed_dims: int,
        scorer: str | dict[str, Any] = DEFAULT_SCORER,
        scope: str = 'map',
        scopes: tuple[str, ...] = ('map',),
    ) -> None:
        super().__init__()
        if scope not in scopes:
            raise ValueError(
                f'policy.scope={scope!r} is unknown here; allowed: {", ".join(scopes)}'
            )
        self.scope = scope
        self.scorer: Scorer = _build(SCORERS, 'policy.scorer', scorer, embed_dims=embed_dims)

    @torch.no_grad()
    def select(
        self,
        x: Tensor,
        hw_shape: tuple[int, int],
        layout: UnitLayout,
        keep_ratio: float,
        block: ScorableBlock,
    ) -> Selection:
        """Choose the active units of each image.

        Args:
            x: (B, N, C), the map as it enters the block.
            hw_shape: Height and width of the map in tokens.
            layout: Units of the map.
            keep_ratio: Share of the valid units that is active, in (0, 1].
            block: The block that asks.
        """
        # Half precision cannot tell close scores apart, and would rank differently under autocast.
        with _full_precision(x.device.type):
            exact = x if x.dtype == torch.float64 else x.float()
            scores = self.scorer(exact, hw_shape, block)
        return select_units(unit_scores(scores, layout), layout, keep_ratio)


def _full_precision(device_type: str) -> AbstractContextManager:
    """Switch autocast off; the meta device has none."""
    if device_type == 'meta':
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def build_policy(
    policy: str | dict[str, Any] | None, embed_dims: int, scopes: tuple[str, ...]
) -> nn.Module:
    """Build the policy of one block from a config.

    Args:
        policy: None for the default, the name of a registered policy, or a dict with its arguments
            and optionally its ``type``.
        embed_dims: Channels of the tokens.
        scopes: Scopes that the block can compute.

    Raises:
        TypeError: The policy or its scorer does not take an argument given to it.
        ValueError: Unknown policy or scorer, or a value that is not allowed.
    """
    if policy is None:
        policy = {}
    if isinstance(policy, dict):
        policy = {'type': DEFAULT_POLICY, **policy}
    return _build(POLICIES, 'policy', policy, embed_dims=embed_dims, scopes=scopes)


def _build(registry: Registry, argument: str, cfg: Any, **kwargs: Any) -> Any:
    """Build from a name or dict; unlike Registry.build the error names the argument."""
    cfg = {'type': cfg} if isinstance(cfg, str) else cfg
    if not isinstance(cfg, dict) or not isinstance(cfg.get('type'), str):
        raise TypeError(f'{argument}={cfg!r} must be a name or a dict with a type')
    options = dict(cfg)
    name = options.pop('type')
    cls = registry.module_dict.get(name)
    if cls is None:
        allowed = ', '.join(sorted(registry.module_dict))
        raise ValueError(f'{argument}={name!r} is unknown; allowed: {allowed}')
    accepted = [key for key in inspect.signature(cls).parameters if key not in kwargs]
    for key in options:
        if key not in accepted:
            allowed = ', '.join(['type', *accepted])
            raise TypeError(
                f'{argument}={dict(cfg)!r} has an unknown key {key!r}; allowed: {allowed}'
            )
    return cls(**kwargs, **options)
