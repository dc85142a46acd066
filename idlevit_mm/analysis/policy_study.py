"""A study of policies: how much accuracy does each lose at equal multiply-adds?

From one dense checkpoint per task, every method is fine-tuned equally long, the dense one too, at
a few levels of saved backbone multiply-adds (scoring included), once per seed. Finished runs are
kept in a JSON lines file: starting the study again goes on where it stopped.
"""

from __future__ import annotations

import json
import pprint
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import HOOKS, MODELS
from torch import nn

from idlevit_mm.analysis import finetuning, ledger, runs
from idlevit_mm.analysis.flops import backbone_multiply_adds
from idlevit_mm.analysis.ledger import Ledger, OutOfTime, Result, execute
from idlevit_mm.analysis.models import load_config

CONFIGS = runs.REPOSITORY / 'configs' / 'digit_scenes'
INPUT_SHAPE = (128, 128)
LEVELS = (0.33, 0.2, 0.45)
GOAL_LEVEL = 0.33

# Ratios are multiples of 1 / _GRID: finer steps change no count of tokens here.
_GRID = 1000
# A level counts as reached within this share of the dense multiply-adds. Whole windows go in
# steps of up to 0.06 in a stage of four windows.
_TOLERANCE = 0.035


# --- What is compared -------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """One model of the study.

    Attributes:
        name: how the command line calls it.
        title: heading in the report.
        model: its configs below ``configs/digit_scenes``, without what the dense and the
            fine-tune config add to the name.
        metric: key in the logs.
        metric_name: name in the report.
        points: factor that brings the metric to points of 100.
    """

    name: str
    title: str
    model: str
    metric: str
    metric_name: str
    points: float

    @property
    def config(self) -> Path:
        """The fine-tune config."""
        return CONFIGS / f'{self.model}_finetune_digits.py'

    @property
    def dense_config(self) -> Path:
        """The config of the dense checkpoint that all runs start from."""
        return CONFIGS / f'{self.model}_dense_digits.py'


TASKS = {
    task.name: task
    for task in (
        Task(
            'swin-det',
            'RetinaNet with Swin',
            'retinanet_idle-swin',
            'coco/bbox_mAP',
            'box AP',
            100.0,
        ),
        Task(
            'pvtv2-det',
            'RetinaNet with PVTv2',
            'retinanet_idle-pvtv2',
            'coco/bbox_mAP',
            'box AP',
            100.0,
        ),
        # mmseg logs percents.
        Task('pvtv2-seg', 'Semantic FPN with PVTv2', 'fpn_idle-pvtv2', 'mIoU', 'mIoU', 1.0),
    )
}

# From a ratio and the number of blocks of each stage to one ratio per block.
Pattern = Callable[[float, Sequence[int]], list[list[float]]]
# From the teacher's checkpoint to a config's `custom_hooks`.
Hooks = Callable[[str], list[dict[str, Any]]]


def uniform(ratio: float, depths: Sequence[int]) -> list[list[float]]:
    """The same ratio in every block."""
    return [[ratio] * depth for depth in depths]


def late(first: int) -> Pattern:
    """A pattern: the first blocks of the net are dense, all others have one ratio."""

    def pattern(ratio: float, depths: Sequence[int]) -> list[list[float]]:
        spread, index = [], 0
        for depth in depths:
            spread.append([1.0 if index + i < first else ratio for i in range(depth)])
            index += depth
        return spread

    pattern.__name__ = f'from block {first}'
    return pattern


def stage_entry(ratio: float, depths: Sequence[int]) -> list[list[float]]:
    """The ratio in the first block of each stage; the others keep all that is still in play."""
    return [[ratio] + [1.0] * (depth - 1) for depth in depths]


def auxiliary_losses(*losses: Mapping[str, Any], distill: float | None = None) -> Hooks:
    """Hooks that train with further losses.

    Args:
        *losses: configs of losses that need no teacher.
        distill: weight of the distance from the dense model's features; None for no teacher.
    """

    def hooks(teacher: str) -> list[dict[str, Any]]:
        configs = [dict(loss) for loss in losses]
        if distill is not None:
            configs.append(
                dict(
                    type='FeatureDistillation',
                    teacher=dict(checkpoint=teacher),
                    loss_weight=distill,
                )
            )
        return [dict(type='AuxiliaryLossHook', losses=configs)]

    return hooks


def no_hooks(teacher: str) -> list[dict[str, Any]]:
    """Nothing but the task's own losses."""
    return []


def random_keep_ratios(teacher: str) -> list[dict[str, Any]]:
    """One ratio drawn per iteration: one checkpoint for many ratios."""
    return [dict(type='RandomKeepRatioHook', low=0.3, high=1.0, per='model')]


@dataclass(frozen=True)
class Method:
    """One way to save operations.

    Attributes:
        name: how the command line and the table call it.
        policy: the backbone's ``policy``; None is the dense method.
        pattern: where in the net the ratio applies.
        hooks: the ``custom_hooks`` it is trained with.
        tasks: names of the tasks it fits; None for all.
        own: whether it is this package's proposal rather than a rival or a control.
    """

    name: str
    policy: Mapping[str, Any] | None
    pattern: Pattern = uniform
    hooks: Hooks = no_hooks
    tasks: tuple[str, ...] | None = None
    own: bool = False

    def fits(self, task: str) -> bool:
        """Whether it saves operations on a task."""
        return self.policy is not None and (self.tasks is None or task in self.tasks)


_IDLEVIT = dict(type='IdleViT', scorer='mean_distance', scope='map')
# IdleViT's own runs give the token cut 20 (arXiv 2310.05654): here that costs 7 points of AP.
_CUT = dict(type='TokenCutLoss', loss_weight=0.1)
_DISTILL = 5.0

DENSE = Method('dense', None)
METHODS = {
    method.name: method
    for method in (
        DENSE,
        Method('idlevit', _IDLEVIT, own=True),
        Method('idlevit+cut', _IDLEVIT, hooks=auxiliary_losses(_CUT), own=True),
        Method('idlevit+distill', _IDLEVIT, hooks=auxiliary_losses(distill=_DISTILL), own=True),
        Method(
            'idlevit+cut+distill',
            _IDLEVIT,
            hooks=auxiliary_losses(_CUT, distill=_DISTILL),
            own=True,
        ),
        Method('learned', dict(_IDLEVIT, scorer='learned'), own=True),
        # The first block dense, a summary of idle tokens as context, and distillation.
        Method(
            'recipe',
            dict(_IDLEVIT, context='summary'),
            pattern=late(1),
            hooks=auxiliary_losses(distill=_DISTILL),
            own=True,
        ),
        # The same with keys and values from all tokens.
        Method(
            'recipe-all',
            dict(_IDLEVIT, context='all'),
            pattern=late(1),
            hooks=auxiliary_losses(distill=_DISTILL),
            own=True,
        ),
        # What the recipe is without distillation.
        Method('idlevit-summary', dict(_IDLEVIT, context='summary'), pattern=late(1), own=True),
        # Drops for good, once per stage, as EViT does in three of twelve layers.
        Method('evit', dict(type='EViT'), pattern=stage_entry),
        # Dense at first, as Evo-ViT is in a third of its blocks, which would leave too few here.
        Method('evovit', dict(type='EvoViT'), pattern=late(1)),
        # A rival with the signal that the recipe has.
        Method(
            'evovit+distill',
            dict(type='EvoViT'),
            pattern=late(1),
            hooks=auxiliary_losses(distill=_DISTILL),
        ),
        Method('sparsevit', dict(type='SparseViT'), tasks=('swin-det',)),
        Method(
            'sparsevit-distance',
            dict(type='SparseViT', scorer='mean_distance'),
            tasks=('swin-det',),
        ),
        Method('random', dict(_IDLEVIT, scorer='random')),
    )
}

# One checkpoint for many ratios, against one checkpoint for each.
RANDOM_RATIOS = 'random-ratios'
RANDOM_RATIOS_TASK = 'swin-det'
SPECIALISED = 'idlevit'
SERVED_RATIOS = (1.0, 0.8, 0.6, 0.5, 0.4)


@dataclass(frozen=True)
class Variant:
    """One row of a table.

    Attributes:
        task: name of the task.
        method: name of the method, or ``RANDOM_RATIOS``.
        level: share of the dense backbone's multiply-adds that is to be saved, if that is given.
        keep_ratio: ratio in every block, if that is given instead.
    """

    task: str
    method: str
    level: float | None = None
    keep_ratio: float | None = None

    @property
    def name(self) -> str:
        """Short text, unique among variants."""
        level = '' if self.level is None else f'-minus{100 * self.level:g}'
        keep = '' if self.keep_ratio is None else f'-keep{self.keep_ratio:g}'
        return f'{self.task}-{self.method}{level}{keep}'


Run = ledger.Run[Variant]
Results = Mapping[Run, Result]
Runner = Callable[[Run], Result]


def dense_variant(task: str) -> Variant:
    """The row that all others of a task are compared with."""
    return Variant(task, DENSE.name)


def variants_of(task: str, methods: Sequence[str], level: float) -> list[Variant]:
    """One variant per method that saves operations and fits the task."""
    return [Variant(task, name, level) for name in methods if METHODS[name].fits(task)]


def ratio_variants(task: str) -> list[tuple[Variant, Variant]]:
    """Pairs for the second table: one checkpoint at a ratio, and the one made for that ratio."""
    return [
        (
            Variant(task, RANDOM_RATIOS, keep_ratio=ratio),
            dense_variant(task) if ratio == 1.0 else Variant(task, SPECIALISED, keep_ratio=ratio),
        )
        for ratio in SERVED_RATIOS
    ]


def plan_runs(
    tasks: Sequence[str],
    methods: Sequence[str],
    levels: Sequence[float],
    seeds: Sequence[int],
    random_ratios: bool = True,
) -> list[Run]:
    """All runs, in an order that leaves an interrupted study balanced.

    Seed by seed; within a seed all tasks at the level that decides, then at the others. The
    checkpoint for many ratios is made with the first seed only, after everything else of it.
    """
    ordered = sorted(levels, key=lambda level: (level != GOAL_LEVEL, level))
    plan: list[Run] = []
    for seed in seeds:
        variants = [dense_variant(task) for task in tasks]
        for level in ordered:
            variants += [v for task in tasks for v in variants_of(task, methods, level)]
        if random_ratios and seed == seeds[0] and RANDOM_RATIOS_TASK in tasks:
            variants += [v for pair in ratio_variants(RANDOM_RATIOS_TASK) for v in pair]
        plan += [Run(variant, seed) for variant in dict.fromkeys(variants)]
    return plan


# --- Equal multiply-adds ----------------------------------------------------------------------


def build_backbone(
    backbone_cfg: Mapping[str, Any], policy: Mapping[str, Any] | None, keep_ratios: Any = 1.0
) -> nn.Module:
    """A config's backbone with another policy (its own when None) and other ratios, untrained."""
    cfg = dict(backbone_cfg, keep_ratios=keep_ratios, init_cfg=None)
    if policy is not None:
        cfg['policy'] = dict(policy)
    return MODELS.build(cfg).eval()


class Meter:
    """Counts backbone multiply-adds, scoring included, and remembers the counts.

    Args:
        backbone_cfg: the config's backbone.
        input_shape: (H, W) in pixels.
    """

    def __init__(
        self, backbone_cfg: Mapping[str, Any], input_shape: Sequence[int] = INPUT_SHAPE
    ) -> None:
        self.backbone_cfg = backbone_cfg
        self.input_shape = tuple(input_shape)
        self._backbones: dict[str, Any] = {}
        self._counts: dict[str, int] = {}

    def _backbone(self, policy: Mapping[str, Any] | None) -> Any:
        key = json.dumps(policy)
        if key not in self._backbones:
            # Which tokens are active, and with it the count, follows from the random weights.
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                self._backbones[key] = build_backbone(self.backbone_cfg, policy)
        return self._backbones[key]

    @property
    def depths(self) -> tuple[int, ...]:
        """Number of blocks of each stage."""
        return self._backbone(None).depths

    def count(self, policy: Mapping[str, Any] | None, keep_ratios: Any) -> int:
        """Multiply-adds for one image."""
        key = json.dumps([policy, keep_ratios])
        if key not in self._counts:
            backbone = self._backbone(policy)
            backbone.set_keep_ratios(keep_ratios)
            self._counts[key] = backbone_multiply_adds(backbone, self.input_shape)
        return self._counts[key]


def nearest_ratio(count: Callable[[float], float], target: float) -> float:
    """The keep ratio whose count is nearest to a target, by bisection.

    Args:
        count: multiply-adds at a ratio in (0, 1]; rises with it, in steps.
        target: multiply-adds to come near to.

    Returns:
        A multiple of 0.001.
    """
    low, high = 1, _GRID
    while high - low > 1:
        middle = (low + high) // 2
        if count(middle / _GRID) > target:
            high = middle
        else:
            low = middle
    return min((low / _GRID, high / _GRID), key=lambda ratio: abs(count(ratio) - target))


@dataclass(frozen=True)
class Setup:
    """What the runs of a variant are made with.

    Attributes:
        policy: the backbone's policy; None for the config's own.
        keep_ratios: of every block; a number for all alike.
        shown: the ratio and where it applies, as the table says it.
        operations: backbone multiply-adds divided by the dense backbone's.
        hooks: the ``custom_hooks``.
    """

    policy: Mapping[str, Any] | None
    keep_ratios: Any
    shown: str
    operations: float
    hooks: Hooks = no_hooks


def setup_of(variant: Variant, meter: Meter) -> Setup:
    """Find the ratios and all else that the runs of a variant need.

    Raises:
        ValueError: the method cannot come near to the level.
    """
    dense = meter.count(None, 1.0)
    if variant.method == DENSE.name:
        return Setup(None, 1.0, '1', 1.0)
    if variant.keep_ratio is not None:
        method = METHODS[SPECIALISED]
        return Setup(
            method.policy,
            variant.keep_ratio,
            f'{variant.keep_ratio:g}',
            meter.count(method.policy, variant.keep_ratio) / dense,
            random_keep_ratios if variant.method == RANDOM_RATIOS else method.hooks,
        )
    assert variant.level is not None
    method = METHODS[variant.method]

    def count(ratio: float) -> int:
        return meter.count(method.policy, method.pattern(ratio, meter.depths))

    ratio = nearest_ratio(count, (1 - variant.level) * dense)
    reached = count(ratio) / dense
    if abs(reached - (1 - variant.level)) > _TOLERANCE:
        raise ValueError(
            f'level={variant.level:g} cannot be reached by {method.name} on {variant.task}: the '
            f'nearest keep ratio, {ratio:g}, saves {1 - reached:.3f} of the multiply-adds; '
            f'allowed: levels that are met within {_TOLERANCE:g}'
        )
    where = '' if method.pattern is uniform else f' {method.pattern.__name__.replace("_", " ")}'
    return Setup(
        method.policy,
        method.pattern(ratio, meter.depths),
        f'{ratio:g}{where}',
        reached,
        method.hooks,
    )


# --- One run ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Start:
    """Where the runs of a task start.

    Attributes:
        task: the task.
        cfg: its read fine-tune config.
        checkpoint: its dense weights.
        settings: what is recorded of both.
    """

    task: Task
    cfg: Config
    checkpoint: Path
    settings: Mapping[str, Any]

    def settings_with(self, setup: Setup) -> dict[str, Any]:
        """All that a result with this setup depends on, but the seed."""
        return {
            **self.settings,
            'policy': setup.policy,
            'keep_ratios': setup.keep_ratios,
            'custom_hooks': setup.hooks(finetuning.recorded(self.checkpoint)),
        }


def config_text(base: Path, cfg: Config, options: Mapping[str, Any], note: str = '') -> str:
    """A config file that differs from its base by some options.

    Args:
        base: the config file to inherit from.
        cfg: the same, read.
        options: values by dotted name, as ``--cfg-options``.
        note: a comment for the first line.
    """
    merged = Config(cfg.to_dict())
    merged.merge_from_dict({name: _plain(value) for name, value in options.items()})
    whole = merged.to_dict()
    changes: dict[str, Any] = {}
    for name, value in options.items():
        *parents, last = name.split('.')
        if parents and isinstance(cfg.get(parents[0]), (list, tuple)):
            # A config file replaces a list of its base as a whole.
            changes[parents[0]] = whole[parents[0]]
            continue
        node = changes
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = _plain(value)
    lines = [f'# {note}'] if note else []
    lines.append(f'_base_ = {str(base)!r}')
    lines += [
        f'{name} = {pprint.pformat(value, width=96, sort_dicts=False)}'
        for name, value in changes.items()
    ]
    return '\n'.join(lines) + '\n'


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def run_config(start: Start, setup: Setup, seed: int, epochs: int) -> str:
    """Text of the config file of one run."""
    options = finetuning.run_options(start.cfg, start.checkpoint, seed, epochs)
    options['default_hooks.checkpoint.save_best'] = None  # there is one evaluation
    options['model.backbone.keep_ratios'] = setup.keep_ratios
    if setup.policy is not None:
        options['model.backbone.policy'] = {'_delete_': True, **setup.policy}
    hooks = setup.hooks(str(start.checkpoint))
    if hooks:
        options['custom_hooks'] = [*start.cfg.to_dict().get('custom_hooks', []), *hooks]
    note = f'settings: {json.dumps(start.settings, sort_keys=True)}'
    return config_text(start.task.config, start.cfg, options, note)


def config_path(folder: Path) -> Path:
    """The config file of a run; mmengine dumps the resolved one beside its folder."""
    return folder / 'config' / 'run.py'


def training_runner(
    starts: Mapping[str, Start],
    setups: Mapping[Variant, Setup],
    work_dir: Path,
    epochs: int,
    threads: int,
    extra_options: Mapping[str, Any] | None = None,
) -> Runner:
    """A runner that fine-tunes by ``tools/train.py`` and reads the last evaluation.

    The checkpoint for many ratios is trained once per seed and tested by ``tools/test.py``.
    """
    one_training = threading.Lock()

    def train(start: Start, setup: Setup, seed: int, folder: Path) -> Result:
        config = config_path(folder)
        config.parent.mkdir(parents=True, exist_ok=True)
        config.write_text(run_config(start, setup, seed, epochs))
        # If this run is killed, an earlier checkpoint must not pass for its own.
        (folder / 'last_checkpoint').unlink(missing_ok=True)
        return finetuning.scored_tool(
            ['tools/train.py', config],
            folder,
            'train.log',
            start.task.metric,
            threads,
            extra_options,
        )

    def trained(start: Start, setup: Setup, seed: int, folder: Path) -> Path:
        config = config_path(folder)
        text = run_config(start, setup, seed, epochs)
        with one_training:
            # The only checkpoint of a run is written at its end.
            checkpoint = runs.latest_checkpoint(folder)
            if not (checkpoint and config.is_file() and config.read_text() == text):
                train(start, setup, seed, folder)
                checkpoint = runs.latest_checkpoint(folder)
        if checkpoint is None:
            raise runs.RunFailed(f'{folder.name}: no checkpoint in {folder}')
        return checkpoint

    def run_one(run: Run) -> Result:
        variant = run.variant
        start, setup = starts[variant.task], setups[variant]
        begin = time.monotonic()
        if variant.method == RANDOM_RATIOS:
            folder = work_dir / Run(replace(variant, keep_ratio=None), run.seed).name
            checkpoint = trained(start, replace(setup, keep_ratios=1.0), run.seed, folder)
            result = finetuning.scored_tool(
                ['tools/test.py', config_path(folder), checkpoint],
                work_dir / run.name,
                'test.log',
                start.task.metric,
                threads,
                {'model.backbone.keep_ratios': setup.keep_ratios, **(extra_options or {})},
            )
        else:
            result = train(start, setup, run.seed, work_dir / run.name)
        return Result(result.score * start.task.points, round(time.monotonic() - begin, 1))

    return run_one


# --- The study --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Outcome:
    """What a study, finished or not, has found.

    Attributes:
        results: points of 100 of each finished run of the plan.
        setups: of each variant of the plan.
        starts: of each task.
        plan: all runs.
        epochs: of every run.
        input_shape: (H, W) in pixels for which multiply-adds were counted.
    """

    results: Results
    setups: Mapping[Variant, Setup]
    starts: Mapping[str, Start]
    plan: Sequence[Run]
    epochs: int
    input_shape: tuple[int, ...]

    @property
    def complete(self) -> bool:
        """Whether no run is left."""
        return all(run in self.results for run in self.plan)


def start_of(
    task: Task,
    checkpoint: Path,
    epochs: int,
    extra_options: Mapping[str, Any] | None = None,
) -> Start:
    """Read a task's config and note down where its runs start."""
    settings = finetuning.start_settings(task.config, checkpoint, epochs, extra_options)
    return Start(task, load_config(task.config), checkpoint.resolve(), settings)


def run_study(
    *,
    checkpoints: Mapping[str, Path],
    out_dir: Path,
    methods: Sequence[str] = tuple(METHODS),
    levels: Sequence[float] = LEVELS,
    seeds: Sequence[int] = (0, 1),
    epochs: int = 2,
    random_ratios: bool = True,
    jobs: int = 2,
    threads: int = 1,
    time_budget: float | None = None,
    input_shape: Sequence[int] = INPUT_SHAPE,
    extra_options: Mapping[str, Any] | None = None,
    runner: Runner | None = None,
    meter: Callable[[Start], Meter] | None = None,
    report: Callable[[str], None] = print,
) -> Outcome:
    """Do the study, or what is left of it.

    Args:
        checkpoints: dense weights by task; these tasks are done.
        out_dir: folder of ``runs.jsonl``; each run has a folder below ``runs``.
        methods: names of the methods; the dense one is always there.
        levels: shares of the dense backbone's multiply-adds to save.
        seeds: one run per variant and seed.
        epochs: fine-tuning epochs of every run.
        random_ratios: whether to train one checkpoint for many ratios too.
        jobs: runs at a time.
        threads: computing threads per run.
        time_budget: seconds after which no further run is started; None for no limit.
        input_shape: (H, W) in pixels for which multiply-adds are counted.
        extra_options: further overrides for every run.
        runner: does one run; ``tools/train.py`` when None.
        meter: counts multiply-adds for a task; on the config's backbone when None.
        report: gets one line per event.

    Returns:
        All that is known; its ``complete`` tells whether runs are left.

    Raises:
        ValueError: an argument is not allowed, or a level cannot be reached.
        RunFailed: a run failed.
    """
    _check(checkpoints, methods, levels, seeds, epochs, jobs)
    tasks = [name for name in TASKS if name in checkpoints]
    starts = {
        name: start_of(TASKS[name], checkpoints[name], epochs, extra_options) for name in tasks
    }
    plan = plan_runs(tasks, methods, levels, seeds, random_ratios)
    setups = find_setups(
        {run.variant for run in plan},
        {
            name: meter(start) if meter else Meter(_backbone_cfg(start), input_shape)
            for name, start in starts.items()
        },
    )

    def settings(variant: Variant) -> dict[str, Any] | None:
        setup = setups.get(variant)
        return None if setup is None else starts[variant.task].settings_with(setup)

    finished = Ledger(out_dir / 'runs.jsonl', Variant, settings)
    if runner is None:
        check_hooks(setups)
        runner = training_runner(starts, setups, out_dir / 'runs', epochs, threads, extra_options)
    deadline = None if time_budget is None else time.monotonic() + time_budget
    try:
        results = execute(plan, finished, runner, jobs=jobs, deadline=deadline, report=report)
    except OutOfTime as message:
        report(str(message))
        results = finished.read()
    wanted = set(plan)
    return Outcome(
        {run: result for run, result in results.items() if run in wanted},
        setups,
        starts,
        plan,
        epochs,
        tuple(input_shape),
    )


def find_setups(variants: Iterable[Variant], meters: Mapping[str, Meter]) -> dict[Variant, Setup]:
    """The setup of every variant; all that cannot be built is told before anything is trained."""
    return {
        variant: setup_of(variant, meters[variant.task])
        for variant in sorted(variants, key=lambda variant: variant.name)
    }


def check_hooks(setups: Mapping[Variant, Setup]) -> None:
    """Tell before hours of training which methods need a hook that is not there.

    Raises:
        ValueError: a hook is not registered.
    """
    for variant, setup in setups.items():
        for hook in setup.hooks(''):
            if HOOKS.get(hook['type']) is None:
                raise ValueError(
                    f'method={variant.method} needs the hook {hook["type"]}, which is not '
                    'registered; leave the method out'
                )


def _backbone_cfg(start: Start) -> Mapping[str, Any]:
    return start.cfg.to_dict()['model']['backbone']


def _check(
    checkpoints: Mapping[str, Path],
    methods: Sequence[str],
    levels: Sequence[float],
    seeds: Sequence[int],
    epochs: int,
    jobs: int,
) -> None:
    """Refuse what cannot work before any training starts."""
    for name, values, allowed in (
        ('tasks', list(checkpoints), list(TASKS)),
        ('methods', methods, list(METHODS)),
    ):
        unknown = [value for value in values if value not in allowed]
        if unknown or not values:
            raise ValueError(f'{name}={list(values)} must be among {allowed}, at least one')
    for name, numbers in (('levels', levels), ('seeds', seeds)):
        if not numbers or len(set(numbers)) != len(numbers):
            raise ValueError(f'{name}={list(numbers)} must hold at least one value, each once')
    wrong = [level for level in levels if not 0 < level < 1]
    if wrong:
        raise ValueError(f'levels={wrong} must lie in (0, 1): the share that is saved')
    if epochs < 1 or jobs < 1:
        raise ValueError(f'epochs={epochs} and jobs={jobs} must be at least 1')
