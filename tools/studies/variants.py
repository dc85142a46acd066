"""What a study compares: tasks, and methods at equal multiply-adds or at equal keep ratios."""

import json
from bisect import bisect
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from importlib import import_module
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
# Ratios of all blocks but the first at which one checkpoint for many is tested.
SERVED_RATIOS = (1.0, 0.8, 0.6, 0.5, 0.4)
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
    """One way to save operations: policy, losses, hook, tasks that it fits, where it idles.

    The first block is dense in all of them.
    """

    policy: Mapping[str, Any]
    losses: tuple[Mapping[str, Any], ...] = ()
    ratios: Mapping[str, Any] | None = None  # the hook that sets them in training
    tasks: tuple[str, ...] = tuple(TASKS)
    idles: str = ''  # the blocks that do, all but the first by default
    scale: float = 1.0  # of the images
    grown: bool = False  # whether the dense model that it begins with was trained on such images


TEACHER = 'DENSE'  # stands for the path of the dense checkpoint
# IdleViT's own runs give the token cut 20 (arXiv 2310.05654): here that costs 7 points of AP.
_CUT = dict(type='TokenCutLoss', loss_weight=0.1)
_DISTILL = dict(type='FeatureDistillation', teacher=dict(checkpoint=TEACHER), loss_weight=5.0)
_IN_PLACE = dict(_DISTILL, teacher='student')
_LOGITS = dict(
    type='LogitDistillation', teacher=_DISTILL['teacher'], modules=('decode_head',), loss_weight=1.0
)
_IDLEVIT = dict(type='IdleViT', scorer='mean_distance', scope='map')
_LEARNED = dict(type='learned', learns_from='importance')
_SUMMARY = dict(_IDLEVIT, context='summary')
_EVOVIT = dict(type='EvoViT')
_SWIN, _PVTV2 = ('swin-det',), ('pvtv2-det', 'pvtv2-seg')
# Of rules.py.
TRIED = (
    'AgedIdleViT',
    'BlendedIdleViT',
    'RememberingIdleViT',
    'MixingEvoViT',
    'FastIdleViT',
    'FastEvoViT',
    'query_logits',
)
_ENTRY, _ODD, _FOUND, _HALVES = 'stage entry', 'stages 1 and 3', 'found', 'found halves'
# Ratios that do the dense checkpoints the least damage: by tools/search.py, with Evo-ViT, on
# training images. Commands: docs/studies/one_frame.md.
FOUND = {
    'swin-det': {
        0.33: [[1.0, 1.0], [0.5, 1.0], [0.4, 0.2], [0.3, 0.1]],
        0.45: [[0.6, 1.0], [0.5, 0.6], [0.4, 0.2], [0.1, 0.1]],
    },
    'pvtv2-det': {
        0.33: [[1.0, 0.8], [0.6, 0.6], [0.5, 0.2], [0.1, 0.1]],
        0.45: [[0.8, 0.5], [0.5, 0.5], [0.2, 0.1], [0.1, 0.1]],
    },
    'pvtv2-seg': {
        0.33: [[1.0, 0.6], [0.6, 0.6], [0.5, 0.5], [0.1, 0.1]],
        0.45: [[0.6, 0.4], [0.4, 0.5], [0.4, 0.4], [0.1, 0.1]],
    },
}
# The same where fewer tokens may attend (--attention 0 0.05): keep ratios, and those of attention.
FOUND_HALVES = {
    'swin-det': {
        0.45: (
            [[0.8, 1.0], [0.4, 0.6], [0.4, 0.1], [0.1, 0.1]],
            [[1.0, 1.0], [1.0, 1.0], [1.0, 0.05], [0.0, 0.0]],
        ),
        0.556: (  # what images of 1.5 times the side leave
            [[0.8, 0.4], [0.4, 0.4], [0.4, 0.1], [0.1, 0.1]],
            [[1.0, 1.0], [1.0, 1.0], [1.0, 0.05], [0.0, 0.0]],
        ),
    },
    'pvtv2-seg': {
        0.45: (
            [[1.0, 0.8], [0.6, 0.6], [0.6, 0.6], [0.1, 0.1]],
            [[1.0, 1.0], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
        ),
    },
    'pvtv2-det': {
        0.45: (
            [[1.0, 0.8], [0.8, 0.8], [0.6, 0.6], [0.1, 0.1]],
            [[1.0, 0.05], [0.0, 0.0], [0.0, 0.0], [0.0, 0.0]],
        ),
    },
}
METHODS = {
    'idlevit': Method(_IDLEVIT),
    'idlevit+distill': Method(_IDLEVIT, (_DISTILL,)),
    'idlevit-summary': Method(_SUMMARY),
    'idlevit-summary+distill': Method(_SUMMARY, (_DISTILL,)),
    'evovit': Method(_EVOVIT),
    'evovit+distill': Method(_EVOVIT, (_DISTILL,)),
    'evovit+distill+logits': Method(_EVOVIT, (_DISTILL, _LOGITS), tasks=('pvtv2-seg',)),
    # Drops for good, once per stage, as EViT does in three of twelve layers.
    'evit': Method(dict(type='EViT'), idles=_ENTRY),
    'sparsevit': Method(dict(type='SparseViT'), tasks=_SWIN),
    'sparsevit-distance': Method(dict(type='SparseViT', scorer='mean_distance'), tasks=_SWIN),
    'random': Method(dict(_IDLEVIT, scorer='random')),
}
METHODS |= {
    f'{name}-cells{side}{more}': Method(dict(policy, summary_size=side), losses, tasks=_PVTV2)
    for name, policy in (('evovit', _EVOVIT), ('idlevit-summary', _SUMMARY))
    for side in (4, 8)
    for more, losses in (('', ()), ('+distill', (_DISTILL,)))
}
# Methods by default; the others are of other studies: of rules, scorers and scopes.
POLICIES = tuple(METHODS)
METHODS |= {
    'idlevit-all': Method(dict(_IDLEVIT, context='all')),
    'idlevit+cut': Method(_IDLEVIT, (_CUT,)),
    'idlevit-age': Method(dict(_IDLEVIT, type='AgedIdleViT')),
    'idlevit-two-blocks': Method(dict(_IDLEVIT, type='BlendedIdleViT')),
    'idlevit-last-hidden': Method(dict(_IDLEVIT, type='RememberingIdleViT'), tasks=_PVTV2),
    # PVTv2 would save less than a third so.
    'idlevit-odd-stages': Method(_IDLEVIT, idles=_ODD, tasks=_SWIN),
    'evovit-found+distill': Method(_EVOVIT, (_DISTILL,), idles=_FOUND),
    'idlevit-found+distill': Method(_IDLEVIT, (_DISTILL,), idles=_FOUND),
    'evovit-halves+distill': Method(_EVOVIT, (_DISTILL,), idles=_HALVES),
    'idlevit-halves+distill': Method(_IDLEVIT, (_DISTILL,), idles=_HALVES),
    'evovit-mixing+distill': Method(
        dict(type='MixingEvoViT', summary_size=8), (_DISTILL,), tasks=_PVTV2
    ),
    'idlevit-fast+distill': Method(dict(_IDLEVIT, type='FastIdleViT'), (_DISTILL,)),
    'evovit-fast+distill': Method(dict(type='FastEvoViT'), (_DISTILL,)),
    'evovit-contrast': Method(dict(_EVOVIT, scorer='local_contrast')),
    'learned': Method(dict(_IDLEVIT, scorer='learned')),
    'learned-importance': Method(dict(_IDLEVIT, scorer=_LEARNED)),
    'learned-begins': Method(dict(_IDLEVIT, scorer=dict(_LEARNED, begins_as='mean_distance'))),
}
METHODS |= {
    name: Method(dict(_IDLEVIT, scorer=name))
    for name in ('activation_norm', 'local_contrast', 'mean_query', 'query_logits', 'uniform_grid')
}
METHODS |= {
    name: Method(dict(_IDLEVIT, scope=name), tasks=_SWIN) for name in ('window_tokens', 'windows')
}
# One checkpoint for many ratios, against one for each.
_RANDOM = dict(type='RandomKeepRatioHook', low=0.4, per='model')
_SANDWICH = dict(_RANDOM, sandwich=True)
METHODS |= {
    f'{name}{more}-{way}': Method(policy, losses, hook, tasks=_SWIN)
    for name, policy in (('idlevit', _IDLEVIT), ('evovit', _EVOVIT))
    for more, losses in (('', ()), ('+distill', (_DISTILL,)), ('+in-place', (_IN_PLACE,)))
    for way, hook in (('random', _RANDOM), ('sandwich', _SANDWICH))
}
# More image for the same multiply-adds; and what that image gives a dense backbone. From the dense
# model of small images, and from one that was trained on large ones.
METHODS |= {
    'evovit-halves-1.5x+distill': Method(
        _EVOVIT, (_DISTILL,), None, _SWIN, _HALVES, scale=1.5, grown=True
    ),
    'dense-1.5x-grown': Method(_IDLEVIT, tasks=_SWIN, scale=1.5, grown=True),
}
METHODS |= {
    f'{name}-{scale:g}x': Method(policy, scale=scale, tasks=_SWIN)
    for name, policy in (('evovit', _EVOVIT), ('dense', _IDLEVIT))
    for scale in (1.25, 1.5)
}


class Run(NamedTuple):
    """One training."""

    variant: dict[str, Any]  # what its line of results says: task, method, level, keep_ratio
    seed: int
    policy: Mapping[str, Any] | None = None  # None: the config's own
    keep_ratios: Any = 1.0
    method: Method = Method({})
    served: tuple[float, ...] = ()  # ratios at which the checkpoint is tested, a line for each

    @property
    def hooks(self) -> list[dict[str, Any]]:
        """Hooks of the training, with TEACHER in place of the dense checkpoint."""
        _, losses, ratios, *_ = self.method
        hooks = [dict(type='AuxiliaryLossHook', losses=list(losses))] if losses else []
        return hooks + ([dict(ratios)] if ratios else [])

    def served_at(self, ratio: float) -> list[list[float]]:
        """Keep ratios of all blocks where the checkpoint is tested at one of many."""
        return spread(ratio, [len(stage) for stage in self.keep_ratios])

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

    Seed by seed; within a seed all tasks at one level or keep ratio, then at the next. Methods that
    serve many ratios, or that spend what they save on larger images, come last, a run for each.
    """
    points = [*product(levels, [None]), *product([None], ratios)]
    for seed in seeds:
        for task in tasks:
            yield Run(dict(task=task, method='dense', level=None, keep_ratio=None), seed)
        for (level, ratio), task, name in product(points, tasks, methods):
            method = METHODS[name]
            if task in method.tasks and method.ratios is None and method.scale == 1.0:
                variant = dict(task=task, method=name, level=level, keep_ratio=ratio)
                own = _ratios(task, name, level, ratio)
                yield Run(variant, seed, policy_of(task, name, level), own, method)
        for task, name in product(tasks, methods):
            method, variant = METHODS[name], dict(task=task, method=name, level=None)
            variant['keep_ratio'] = None
            if task not in method.tasks:
                continue
            if method.ratios is not None:
                own = spread(min(SERVED_RATIOS), _backbone(task, 'null').depths)
                yield Run(variant, seed, method.policy, own, method, SERVED_RATIOS)
            elif name.startswith('dense'):
                yield Run(variant, seed, method.policy, 1.0, method)
            elif method.scale != 1.0:
                level = round(1 - 1 / method.scale**2, 3)
                own = level_ratios(task, name, level)
                yield Run(variant, seed, policy_of(task, name, level), own, method)


def _ratios(task: str, name: str, level: float | None, ratio: float | None) -> list[list[float]]:
    if level:
        return level_ratios(task, name, level)
    assert ratio is not None
    if METHODS[name].idles in (_FOUND, _HALVES):
        raise UsageError(f'--keep-ratios: {name} has ratios of its own; allowed for it: --levels')
    return spread(ratio, _backbone(task, 'null').depths, METHODS[name].idles)


def spread(ratio: float, depths: Sequence[int], idles: str = '') -> list[list[float]]:
    """One ratio for each block but the first: all, the first of a stage, or every second stage."""
    ratios = [[ratio] * depth for depth in depths]
    if idles == _ENTRY:  # the other blocks keep all that is still in play
        ratios = [[ratio] + [1.0] * (depth - 1) for depth in depths]
        ratios[0][1:2] = [ratio] * (depths[0] > 1)
    elif idles == _ODD:
        ratios = [[ratio if i % 2 == 0 else 1.0] * depth for i, depth in enumerate(depths)]
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
        UsageError: it cannot come near to the level, or none was searched for it.
    """
    policy, idles = METHODS[method].policy, METHODS[method].idles
    if idles in (_FOUND, _HALVES):
        found: Mapping[float, Any] = (FOUND if idles == _FOUND else FOUND_HALVES)[task]
        if level not in found:
            raise UsageError(
                f'level={level:g} was not searched for {task}; allowed for {method}: '
                f'{", ".join(map(str, found))}'
            )
        return found[level] if idles == _FOUND else found[level][0]
    depths = _backbone(task, 'null').depths
    ratio = nearest_ratio(lambda r: operations(task, policy, spread(r, depths, idles)), 1 - level)
    saved = 1 - operations(task, policy, spread(ratio, depths, idles))
    if abs(saved - level) > _TOLERANCE:
        raise UsageError(
            f'level={level:g} cannot be reached by {method} on {task}: the nearest keep ratio, '
            f'{ratio:g}, saves {saved:.3f} of the multiply-adds; allowed: levels that are met '
            f'within {_TOLERANCE:g}'
        )
    return spread(ratio, depths, idles)


def policy_of(task: str, method: str, level: float | None) -> Mapping[str, Any]:
    """The policy of a method, with the ratios of attention that were found for a level."""
    policy, idles = METHODS[method].policy, METHODS[method].idles
    if idles != _HALVES or level not in FOUND_HALVES[task]:
        return policy
    return dict(policy, attention_ratios=FOUND_HALVES[task][level][1])


def is_tried(policy: Mapping[str, Any]) -> bool:
    """Whether a policy is one of ``rules.py``, or its scorer."""
    return bool({policy.get('type'), str(policy.get('scorer'))} & set(TRIED))


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
    if is_tried(cfg['policy']):
        import_module('rules')  # which registers it
    # Which tokens are active, and with it the count, follows from the random weights.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return MODELS.build(cfg).eval()
