"""The report of the policy study: tables, times, the goal, and a figure."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from idlevit_mm.analysis import finetuning
from idlevit_mm.analysis.latency import Spread, compare
from idlevit_mm.analysis.ledger import scores_of, seed_deviation
from idlevit_mm.analysis.models import host_backbone, noise_image
from idlevit_mm.analysis.policy_study import (
    DENSE,
    GOAL_LEVEL,
    METHODS,
    RANDOM_RATIOS,
    RANDOM_RATIOS_TASK,
    Outcome,
    Setup,
    Start,
    Task,
    Variant,
    build_backbone,
    dense_variant,
    ratio_variants,
)

ALLOWED_LOSS = 0.5  # points
SHAPES = ((4, 3, 128, 128), (1, 3, 512, 512))


# --- Times ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Speed:
    """How much faster an idle backbone is; above 1 is faster.

    Attributes:
        against_dense: time of the same class at keep 1 divided by its time.
        against_host: time of mmdet's own class divided by its time.
    """

    against_dense: Spread
    against_host: Spread


# By shape of the batch (B, C, H, W), then by variant.
Speeds = Mapping[tuple[int, ...], Mapping[Variant, Speed]]


def measure_speed(
    start: Start,
    setups: Mapping[Variant, Setup],
    shape: Sequence[int],
    *,
    rounds: int = 30,
    max_seconds: float | None = 60.0,
    threads: int = 1,
) -> dict[Variant, Speed]:
    """Time the backbones of a task's variants in turns, in eval mode.

    The weights are untrained: how many tokens are kept does not depend on them.

    Args:
        start: the task.
        setups: of its variants.
        shape: (B, C, H, W) of the batch, in pixels.
        rounds: how often each is timed.
        max_seconds: stop earlier when this much time has passed.
        threads: computing threads.
    """
    backbone_cfg = start.cfg.to_dict()['model']['backbone']
    dense = build_backbone(backbone_cfg, None)
    # Methods that differ in training alone are one backbone.
    keys = {variant: _backbone_key(setup) for variant, setup in setups.items()}
    models = {'dense': dense, 'host': host_backbone(dense, backbone_cfg)}
    for variant, setup in setups.items():
        if keys[variant] not in models:
            models[keys[variant]] = build_backbone(backbone_cfg, setup.policy, setup.keep_ratios)
    image = noise_image(shape)
    with _threads(threads):
        timing = compare(
            {key: partial(model, image) for key, model in models.items()},
            rounds=rounds,
            max_seconds=max_seconds,
        )
    return {
        variant: Speed(timing.ratio('dense', key), timing.ratio('host', key))
        for variant, key in keys.items()
    }


def _backbone_key(setup: Setup) -> str:
    if setup.keep_ratios == 1.0:
        return 'dense'
    return json.dumps([setup.policy, setup.keep_ratios])


@contextmanager
def _threads(number: int) -> Iterator[None]:
    """Compute with so many threads for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def measure_speeds(
    outcome: Outcome,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    max_seconds: float | None = 60.0,
    threads: int = 1,
) -> dict[tuple[int, ...], dict[Variant, Speed]]:
    """Time all rows of the report, task by task and shape by shape."""
    speeds: dict[tuple[int, ...], dict[Variant, Speed]] = {shape: {} for shape in shapes}
    for name, start in outcome.starts.items():
        setups = {variant: outcome.setups[variant] for variant in rows_of(outcome, name)}
        for shape in shapes if setups else ():
            speeds[shape] |= measure_speed(
                start, setups, shape, max_seconds=max_seconds, threads=threads
            )
    return speeds


# --- Tables -----------------------------------------------------------------------------------


def rows_of(outcome: Outcome, task: str) -> list[Variant]:
    """Variants of a task's table: dense, then level by level, the best first."""
    found = {run.variant for run in outcome.results if run.variant.task == task}
    rows = [v for v in found if v.level is not None or v == dense_variant(task)]
    return sorted(rows, key=lambda v: (v.level or 0.0, -_mean(outcome, v), v.name))


def _mean(outcome: Outcome, variant: Variant) -> float:
    return statistics.fmean(scores_of(variant, outcome.results))


def _difference(outcome: Outcome, variant: Variant, reference: Variant) -> str:
    """Difference of two means, taken over the seeds that both have."""
    pairs = _paired(outcome, variant, reference)
    if variant == reference or not pairs:
        return '–'
    return f'{statistics.fmean(own - other for own, other in pairs):+.2f}'


def _paired(outcome: Outcome, one: Variant, other: Variant) -> list[tuple[float, float]]:
    seeds = {
        variant: {
            run.seed: result.score
            for run, result in outcome.results.items()
            if run.variant == variant
        }
        for variant in (one, other)
    }
    return [
        (score, seeds[other][seed]) for seed, score in seeds[one].items() if seed in seeds[other]
    ]


def _seeds(outcome: Outcome) -> list[int]:
    return list(dict.fromkeys(run.seed for run in outcome.plan))


def task_table(outcome: Outcome, task: Task, speeds: Speeds) -> str:
    """The table of one task in Markdown."""
    seeds = ', '.join(map(str, _seeds(outcome)))
    titles = [
        'method',
        'level',
        'keep',
        'multiply-adds',
        task.metric_name,
        'against dense',
        f'each seed ({seeds})',
        *(f'speed-up {shape[0]}×{shape[2]}×{shape[3]}' for shape in speeds),
    ]
    lines = ['| ' + ' | '.join(titles) + ' |', '|' + '---|' * len(titles)]
    for variant in rows_of(outcome, task.name):
        setup = outcome.setups[variant]
        cells = [
            variant.method,
            '–' if variant.level is None else f'-{100 * variant.level:g} %',
            setup.shown,
            f'{setup.operations:.3f}',
            f'{_mean(outcome, variant):.2f}',
            _difference(outcome, variant, dense_variant(task.name)),
            ', '.join(f'{score:.2f}' for score in scores_of(variant, outcome.results)),
        ]
        for of_shape in speeds.values():
            speed = of_shape.get(variant)
            cells.append(
                '–'
                if speed is None
                else f'{speed.against_dense.median:.2f} ({speed.against_host.median:.2f})'
            )
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines)


def goal_text(outcome: Outcome, task: Task) -> str:
    """Whether a task's goal is met, and by how much it is missed or exceeded."""
    goal = (
        f'Goal at -{100 * GOAL_LEVEL:g} % (at most {ALLOWED_LOSS:g} points below dense, and ahead '
        'of every other policy)'
    )
    planned = [v for v in outcome.setups if v.task == task.name and v.level == GOAL_LEVEL]
    own = [v for v in planned if METHODS[v.method].own]
    others = [v for v in planned if not METHODS[v.method].own]
    if not own:
        return f'{goal}: not tried.'
    dense = dense_variant(task.name)
    missing = sum(
        run.variant in {dense, *planned} and run not in outcome.results for run in outcome.plan
    )
    left = f'{missing} run{"s" if missing > 1 else ""} missing'
    if not all(_paired(outcome, variant, dense) for variant in planned):
        return f'{goal}: **open**, {left}.'
    # Rows may have other seeds: each is compared with dense over its own.
    gains = {v: statistics.fmean(a - b for a, b in _paired(outcome, v, dense)) for v in planned}
    best = max(own, key=gains.__getitem__)
    loss = -gains[best]
    text = f'Best own row: {best.method}, {0.0 - loss:+.2f} against dense'
    short = [f'{loss - ALLOWED_LOSS:.2f} points against dense'] if loss > ALLOWED_LOSS else []
    if others:
        rival = max(others, key=gains.__getitem__)
        lead = gains[best] - gains[rival]
        text += f', {lead:+.2f} against {rival.method}, the best of the others'
        if lead <= 0:
            short.append(f'{-lead:.2f} points against {rival.method}')
    untried = [
        method.name
        for method in METHODS.values()
        if method.fits(task.name)
        and not method.own
        and method.name not in {v.method for v in others}
    ]
    if short:
        verdict = f'**missed** by {" and by ".join(short)}'
    elif untried:
        verdict = f'**open**, not tried: {", ".join(untried)}'
    else:
        verdict = '**met**'
    return f'{goal}: {verdict}{f" ({left})" if missing else ""}. {text}.'


def ratio_table(outcome: Outcome, task: Task) -> str | None:
    """One checkpoint for many ratios against one for each; None if nothing of it was run."""
    lines = [
        f'| keep | multiply-adds | {task.metric_name}, one checkpoint for all '
        f'| {task.metric_name}, one for each | difference |',
        '|---|---|---|---|---|',
    ]
    for served, special in ratio_variants(task.name):
        pairs = _paired(outcome, served, special)
        if pairs:
            lines.append(
                f'| {served.keep_ratio:g} | {outcome.setups[served].operations:.3f} '
                f'| {statistics.fmean(own for own, _ in pairs):.2f} '
                f'| {statistics.fmean(other for _, other in pairs):.2f} '
                f'| {_difference(outcome, served, special)} |'
            )
    return '\n'.join(lines) if len(lines) > 2 else None


# --- The report -------------------------------------------------------------------------------


def report_text(outcome: Outcome, speeds: Speeds, command: str) -> str:
    """The whole report in Markdown."""
    height, width = outcome.input_shape
    budget = f'{outcome.epochs} epoch{"s" if outcome.epochs > 1 else ""}'
    lines = ['# Policies on digit scenes', '']
    if not outcome.complete:
        left = sum(run not in outcome.results for run in outcome.plan)
        lines += [
            f'**Unfinished, {left} of {len(outcome.plan)} runs are left: run the same command '
            'again to go on.**',
            '',
        ]
    lines += [
        'Points of 100 on the whole validation set, mean over the seeds. Every row, the dense one '
        f'too, was fine-tuned for {budget} from the same dense checkpoint of its task. Rows of a '
        'level were given the keep ratios that bring the multiply-adds of their backbone, scoring '
        f'included, nearest to the level at {height}×{width} pixels; "multiply-adds" is the share '
        'of the dense backbone that was reached. Where a keep ratio says no more, it holds in '
        'every block. "Against dense" is taken over the seeds that both rows have. The goals look '
        'at the best of several own rows and the best of the others, which flatters both a little.',
    ]
    if speeds:
        lines.append(
            'Speed-up: time of the backbone with all tokens kept, divided by the time of the row; '
            "in brackets against mmdet's own class. Medians of rounds in which all rows take "
            'turns, one process, one thread, float32, untrained weights.'
        )
    for name, start in outcome.starts.items():
        lines += [
            '',
            f'## {start.task.title} ({name})',
            '',
            task_table(outcome, start.task, speeds),
        ]
        lines += ['', goal_text(outcome, start.task)]
        results = {run: r for run, r in outcome.results.items() if run.variant.task == name}
        # Evaluations of one checkpoint are no runs of their own.
        trained = {run: r for run, r in results.items() if run.variant.method != RANDOM_RATIOS}
        deviation = seed_deviation(trained)
        if deviation is not None:
            lines.append(finetuning.scatter_text(deviation, len(_seeds(outcome)), digits=2))
    if RANDOM_RATIOS_TASK in outcome.starts:
        start = outcome.starts[RANDOM_RATIOS_TASK]
        ratios = ratio_table(outcome, start.task)
        if ratios is not None:
            lines += [
                '',
                '## One checkpoint for many ratios',
                '',
                ratios,
                '',
                f'{start.task.title}: one checkpoint, fine-tuned for {budget} with a ratio drawn '
                'anew in every iteration, tested at each ratio, against checkpoints fine-tuned '
                'equally long for that ratio alone. One seed: see the spread of a run above.',
            ]
    settings = {name: dict(start.settings) for name, start in outcome.starts.items()}
    lines += ['', '## How it was made', '']
    lines += finetuning.provenance(settings, command, outcome.results.values())
    return '\n'.join(lines) + '\n'


# --- The figure -------------------------------------------------------------------------------


def draw(outcome: Outcome, path: Path) -> None:
    """Draw score over multiply-adds, a panel per task, into a file.

    Args:
        outcome: what the study found.
        path: of the picture; its suffix is the format.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    tasks = [start.task for start in outcome.starts.values()]
    figure = Figure(figsize=(5.2 * len(tasks), 4.6), layout='constrained')
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(tasks), squeeze=False)[0]
    styles = {
        name: {
            'color': f'C{index % 10}',
            'marker': 'os^Dv<>Ph*'[index % 10],
            'linestyle': '-' if method.own else '--',
        }
        for index, (name, method) in enumerate(METHODS.items())
    }
    handles = {}
    for panel, task in zip(panels, tasks, strict=True):
        rows = rows_of(outcome, task.name)
        for name in METHODS:
            points = sorted(
                (outcome.setups[v].operations, _mean(outcome, v)) for v in rows if v.method == name
            )
            if not points:
                continue
            if name == DENSE.name:
                handles[name] = panel.axhline(points[0][1], color='black', linewidth=1)
            else:
                (handles[name],) = panel.plot(*zip(*points, strict=True), **styles[name])
        shares = [outcome.setups[v].operations for v in rows if v.level is not None]
        if shares:  # wide enough that rows of one level stand above each other
            panel.set_xlim(min(shares) - 0.05, max(shares) + 0.05)
        panel.set_title(task.title)
        panel.set_xlabel('backbone multiply-adds / dense')
        panel.set_ylabel(f'{task.metric_name} (points of 100)')
        panel.grid(alpha=0.3)
    if handles:
        figure.legend(
            list(handles.values()),
            list(handles),
            loc='outside lower center',
            ncols=3 * len(tasks),
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
