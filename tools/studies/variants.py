"""What a study compares: tasks, and methods at equal multiply-adds or at equal keep ratios."""

import json
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.registry import MODELS

from idlevit_mm.analysis.flops import backbone_multiply_adds
from idlevit_mm.analysis.models import load_config
from idlevit_mm.errors import UsageError

CONFIGS = Path(__file__).resolve().parents[2] / 'configs' / 'digit_scenes'
INPUT_SHAPE = (128, 128)
DENSE_EPOCHS = 12  # twice those of the configs: until the dense models gain nothing more
LEVELS = (0.33, 0.2, 0.45)  # shares of the dense multiply-adds to save; the first one decides
# One checkpoint for many ratios, against one checkpoint for each.
RANDOM_RATIOS, SERVED_RATIOS = 'random-ratios', (1.0, 0.8, 0.6, 0.5, 0.4)
# A level counts as reached within this share of the dense multiply-adds. Whole windows go in
# steps of up to 0.06 in a stage of four windows.
_TOLERANCE = 0.035


class Task(NamedTuple):
    """A model: its title and configs, its metric in the logs, and what makes that points of 100."""

    title: str
    model: str
    metric: str
    unit: str
    points: float

    def config(self, kind: str) -> Path:
        """The config of the ``dense`` or the ``finetune`` run."""
        return CONFIGS / f'{self.model}_{kind}_digits.py'


_AP = ('coco/bbox_mAP', 'box AP', 100.0)
TASKS = {
    'swin-det': Task('RetinaNet with Swin', 'retinanet_idle-swin', *_AP),
    'pvtv2-det': Task('RetinaNet with PVTv2', 'retinanet_idle-pvtv2', *_AP),
    # mmseg logs percents.
    'pvtv2-seg': Task('Semantic FPN with PVTv2', 'fpn_idle-pvtv2', 'mIoU', 'mIoU', 1.0),
}


class Method(NamedTuple):
    """One way to save operations: policy, where its ratio applies, losses, tasks that it fits."""

    policy: Mapping[str, Any]
    where: str = ''
    losses: tuple[Mapping[str, Any], ...] = ()
    tasks: tuple[str, ...] = tuple(TASKS)


TEACHER = 'DENSE'  # stands for the path of the dense checkpoint
# IdleViT's own runs give the token cut 20 (arXiv 2310.05654): here that costs 7 points of AP.
_CUT = dict(type='TokenCutLoss', loss_weight=0.1)
_DISTILL = dict(type='FeatureDistillation', teacher=dict(checkpoint=TEACHER), loss_weight=5.0)
_IDLEVIT = dict(type='IdleViT', scorer='mean_distance', scope='map')
_SUMMARY = dict(_IDLEVIT, context='summary')
_LATE, _ENTRY = 'from block 1', 'stage entry'
METHODS = {
    'idlevit': Method(_IDLEVIT),
    'idlevit+cut': Method(_IDLEVIT, losses=(_CUT,)),
    'idlevit+distill': Method(_IDLEVIT, losses=(_DISTILL,)),
    'idlevit+cut+distill': Method(_IDLEVIT, losses=(_CUT, _DISTILL)),
    'learned': Method(dict(_IDLEVIT, scorer='learned')),
    # The first block dense, a summary of idle tokens as context, and distillation.
    'recipe': Method(_SUMMARY, _LATE, (_DISTILL,)),
    'recipe-all': Method(dict(_IDLEVIT, context='all'), _LATE, (_DISTILL,)),
    'idlevit-summary': Method(_SUMMARY, _LATE),
    # Drops for good, once per stage, as EViT does in three of twelve layers.
    'evit': Method(dict(type='EViT'), _ENTRY),
    # Dense at first, as Evo-ViT is in a third of its blocks, which would leave too few here.
    'evovit': Method(dict(type='EvoViT'), _LATE),
    'evovit+distill': Method(dict(type='EvoViT'), _LATE, (_DISTILL,)),
    'sparsevit': Method(dict(type='SparseViT'), tasks=('swin-det',)),
    'sparsevit-distance': Method(
        dict(type='SparseViT', scorer='mean_distance'), tasks=('swin-det',)
    ),
    'random': Method(dict(_IDLEVIT, scorer='random')),
}
# Methods by default; the others are of the study of scorers and scopes.
POLICIES = tuple(METHODS)
METHODS |= {
    name: Method(dict(_IDLEVIT, scorer=name))
    for name in ('activation_norm', 'mean_query', 'uniform_grid')
}
METHODS['learned-importance'] = Method(
    dict(_IDLEVIT, scorer=dict(type='learned', learns_from='importance'))
)
METHODS |= {
    name: Method(dict(_IDLEVIT, scope=name), tasks=('swin-det',))
    for name in ('window_tokens', 'windows')
}


class Run(NamedTuple):
    """One training."""

    variant: dict[str, Any]  # what its line of results says: task, method, level, keep_ratio
    seed: int
    policy: Mapping[str, Any] | None = None  # None: the config's own
    keep_ratios: Any = 1.0
    hooks: list[dict[str, Any]] = []  # with TEACHER in place of the dense checkpoint
    served: tuple[float, ...] = ()  # ratios at which the checkpoint is tested, a line for each

    @property
    def name(self) -> str:
        """Folder of the run, unique within a study."""
        parts = [
            value if isinstance(value, str) else f'{key}{value:g}'
            for key, value in self.variant.items()
            if value is not None
        ]
        return '-'.join([*parts, f'seed{self.seed}']).replace('.', '_')


def planned_runs(
    seeds: Sequence[int],
    levels: Sequence[float],
    ratios: Sequence[float],
    tasks: Sequence[str],
    methods: Sequence[str],
) -> Iterator[Run]:
    """Runs of a study, in an order that leaves an interrupted one balanced.

    Seed by seed; within a seed all tasks at one level or keep ratio, then at the next. What serves
    many ratios follows with the first seed, for Swin alone.
    """
    variant: dict[str, Any]
    hooks: list[dict[str, Any]]
    own: Any
    points = [*product(levels, [None]), *product([None], ratios)]
    for seed in seeds:
        for task in tasks:
            yield Run(dict(task=task, method='dense', level=None, keep_ratio=None), seed)
        for (level, ratio), task, name in product(points, tasks, methods):
            policy, where, losses, fits = METHODS[name]
            if task in fits:
                variant = dict(task=task, method=name, level=level, keep_ratio=ratio)
                hooks = [dict(type='AuxiliaryLossHook', losses=list(losses))] if losses else []
                if level:
                    own = level_ratios(task, name, level)
                elif ratio:
                    own = spread(ratio, _backbone(task, 'null').depths, where)
                yield Run(variant, seed, policy, own, hooks)
        if seed == seeds[0] and levels and 'swin-det' in tasks and 'idlevit' in methods:
            variant = dict(task='swin-det', method='idlevit', level=None)
            for ratio in SERVED_RATIOS[1:]:  # the dense run is the one for 1.0
                yield Run(dict(variant, keep_ratio=ratio), seed, _IDLEVIT, ratio)
            variant = dict(variant, method=RANDOM_RATIOS, keep_ratio=None)
            hooks = [dict(type='RandomKeepRatioHook', low=0.3, high=1.0, per='model')]
            yield Run(variant, seed, _IDLEVIT, 1.0, hooks, SERVED_RATIOS)


def spread(ratio: float, depths: Sequence[int], where: str = '') -> list[list[float]]:
    """One ratio for each block: everywhere, ``from block 1`` on, or at each ``stage entry``."""
    if where == _ENTRY:  # the other blocks keep all that is still in play
        return [[ratio] + [1.0] * (depth - 1) for depth in depths]
    ratios = [[ratio] * depth for depth in depths]
    if where == _LATE:
        ratios[0][0] = 1.0
    return ratios


def nearest_ratio(count: Callable[[float], float], target: float, steps: int = 1000) -> float:
    """The multiple of 1 / ``steps`` whose count, which rises with it, is nearest to a target."""
    high = bisect(range(steps), target, lo=2, key=lambda step: count(step / steps))
    found = (high - 1) / steps, high / steps
    return min(found, key=lambda ratio: abs(count(ratio) - target))


def level_ratios(task: str, method: str, level: float) -> list[list[float]]:
    """Keep ratios with which a method saves a share of the dense backbone's multiply-adds.

    Raises:
        UsageError: it cannot come near to the level.
    """
    policy, where = METHODS[method][:2]
    depths = _backbone(task, 'null').depths
    ratio = nearest_ratio(lambda r: operations(task, policy, spread(r, depths, where)), 1 - level)
    saved = 1 - operations(task, policy, spread(ratio, depths, where))
    if abs(saved - level) > _TOLERANCE:
        raise UsageError(
            f'level={level:g} cannot be reached by {method} on {task}: the nearest keep ratio, '
            f'{ratio:g}, saves {saved:.3f} of the multiply-adds; allowed: levels that are met '
            f'within {_TOLERANCE:g}'
        )
    return spread(ratio, depths, where)


def operations(task: str, policy: Mapping[str, Any] | None, keep_ratios: Any) -> float:
    """Backbone multiply-adds, scoring included, divided by those of the dense backbone."""
    return _count(task, json.dumps(policy), json.dumps(keep_ratios)) / _count(task, 'null', '1.0')


@cache
def _count(task: str, policy: str, keep_ratios: str) -> int:
    backbone = _backbone(task, policy)
    backbone.set_keep_ratios(json.loads(keep_ratios))
    return backbone_multiply_adds(backbone, INPUT_SHAPE)


@cache
def _backbone(task: str, policy: str) -> Any:
    cfg = dict(load_config(TASKS[task].config('finetune')).model.backbone)
    cfg.update(keep_ratios=1.0, init_cfg=None, policy=json.loads(policy) or cfg.get('policy'))
    # Which tokens are active, and with it the count, follows from the random weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS.build(cfg).eval()
