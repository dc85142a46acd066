"""From nothing to a table and pictures: train, test and measure two models on digit scenes.

Every step is one of the repository's own tools. Finished steps are remembered in the demo's work
folder and skipped when it is started again; an interrupted training goes on from its last
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from idlevit_mm.analysis import runs
from idlevit_mm.analysis.latency import Spread

EXPECTED = 0.60
_BATCH = 8
_ROUNDS = 40
_MAX_SECONDS = 25.0


@dataclass(frozen=True)
class Task:
    """One model of the demo.

    Attributes:
        name: title in the table.
        config: file below ``configs/digit_scenes``, without a suffix.
        metric: its key in the logs.
        metric_name: its name in the table.
        percent: whether the logs hold it in percent.
    """

    name: str
    config: str
    metric: str
    metric_name: str
    percent: bool = False


TASKS = (
    Task('RetinaNet + idle Swin', 'retinanet_idle-swin_digits', 'coco/bbox_mAP', 'box AP'),
    Task('Semantic FPN + idle PVTv2', 'fpn_idle-pvtv2_digits', 'mIoU', 'mIoU', percent=True),
)


@dataclass(frozen=True)
class PartFigures:
    """Cost of one part of a model (its backbone, or all of it) against its dense versions.

    Attributes:
        milliseconds: per image, as trained.
        against_dense: time divided by that of the same model at keep 1.
        against_host: time divided by that of the model with mmdet's own dense backbone.
        multiply_adds: per image, as trained.
        operation_ratio: multiply-adds divided by those at keep 1.
    """

    milliseconds: Spread
    against_dense: Spread
    against_host: Spread
    multiply_adds: int
    operation_ratio: float

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> PartFigures:
        """Inverse of ``dataclasses.asdict``."""
        spreads = {
            name: Spread(**values[name])
            for name in ('milliseconds', 'against_dense', 'against_host')
        }
        return cls(**{**values, **spreads})


@dataclass(frozen=True)
class Outcome:
    """All figures of one model."""

    task: Task
    quality: float
    share_kept: float
    backbone: PartFigures
    model: PartFigures
    train_seconds: float

    @property
    def good(self) -> bool:
        """Whether the model is as good as it should be."""
        return self.quality >= EXPECTED


class Memory:
    """Steps that are done, in a JSON file; forgotten when the settings change."""

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        stored = json.loads(path.read_text()) if path.is_file() else {}
        same = stored.get('settings') == settings
        self.changed = bool(stored) and not same
        self._values = stored if same else {'settings': settings}

    def get(self, step: str) -> Any:
        """What a finished step left; None if it is not done."""
        return self._values.get(step)

    def put(self, step: str, value: Any) -> None:
        """Remember a finished step."""
        self._values[step] = value
        self.save()

    def save(self) -> None:
        """Write the file at once and whole."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draft = self.path.with_suffix('.part')
        draft.write_text(json.dumps(self._values, indent=2) + '\n')
        draft.replace(self.path)


# --- Steps ------------------------------------------------------------------------------------


def run_demo(
    work_dir: Path, data_root: Path, fresh: bool = False, console: Console | None = None
) -> bool:
    """Write the data, train, test and measure both models, and show what came out.

    Args:
        work_dir: folder for everything the demo makes but the data.
        data_root: folder of the digit scenes, written if they are not there.
        fresh: forget earlier runs of the demo in ``work_dir``.
        console: where to print.

    Returns:
        Whether both models are as good as they should be.

    Raises:
        RunFailed: a tool failed.
    """
    console = console or Console(highlight=False)
    started = time.monotonic()
    work_dir.mkdir(parents=True, exist_ok=True)
    if fresh:
        forget(work_dir)
    console.print(f'Demo: everything below [bold]{runs.shown(work_dir)}[/bold]')
    write_data(data_root, console)
    outcomes, pictures = [], []
    for task in TASKS:
        outcome, paths = run_task(task, work_dir, data_root, console)
        outcomes.append(outcome)
        pictures += paths
    console.print()
    console.print(rich_table(outcomes))
    write_results(outcomes, work_dir)
    console.print(f'Table: {runs.shown(work_dir / "results.md")}, results.json')
    console.print('Pictures:')
    for path in pictures:
        console.print(f'  {runs.shown(path)}')
    console.print(f'Done in {(time.monotonic() - started) / 60:.1f} minutes.')
    for outcome in outcomes:
        if not outcome.good:
            console.print(
                f'[bold red]{outcome.task.name}: {outcome.task.metric_name} '
                f'{outcome.quality:.3f} is below the expected {EXPECTED:.2f}.[/bold red]'
            )
    return all(outcome.good for outcome in outcomes)


def forget(work_dir: Path) -> None:
    """Delete what earlier runs of the demo left in its folder, and nothing else there."""
    for name in [task.config for task in TASKS] + ['pictures']:
        shutil.rmtree(work_dir / name, ignore_errors=True)
    for name in ('results.md', 'results.json'):
        (work_dir / name).unlink(missing_ok=True)


def write_data(data_root: Path, console: Console) -> None:
    """Write the digit scenes, unless they are there."""
    from idlevit_mm.datasets.digit_scenes import write_digit_scenes

    written = write_digit_scenes(data_root)
    state = 'written to' if written else 'found in'
    console.print(f'Digit scenes: {state} {runs.shown(data_root)}')


def run_task(
    task: Task, work_dir: Path, data_root: Path, console: Console
) -> tuple[Outcome, list[Path]]:
    """Train, test and measure one model and draw its pictures."""
    from idlevit_mm.analysis.models import load_config
    from idlevit_mm.analysis.pictures import draw_dataset

    config = runs.REPOSITORY / 'configs' / 'digit_scenes' / f'{task.config}.py'
    cfg = load_config(config)
    options = data_options(cfg, data_root)
    folder = work_dir / task.config
    settings = {
        'config_sha256': hashlib.sha256(cfg.dump().encode()).hexdigest()[:12],
        'data_root': str(data_root),
    }
    memory = Memory(folder / 'demo.json', settings)
    if memory.changed:
        console.print(f'{task.name}: the config or the data changed, starting over')
        shutil.rmtree(folder)
    memory.save()

    console.print(f'[bold]{task.name}[/bold] ({runs.shown(config)})')
    checkpoint = train(task, cfg, config, folder, options, memory, console)
    metrics = test(task, config, checkpoint, folder, options, memory, console)
    model = load_trained(config, checkpoint, options)
    console.print('  measuring')
    outcome = measure(task, model, metrics, memory.get('train')['seconds'])
    console.print('  drawing')
    return outcome, draw_dataset(model, work_dir / 'pictures' / task.config, count=4)


def data_options(cfg: Any, data_root: Path) -> dict[str, str]:
    """Overrides that point a config at the demo's data folder; none if it already does."""
    default = 'data/digit_scenes'
    if data_root.resolve() == (runs.REPOSITORY / default).resolve():
        return {}
    return runs.data_root_options(cfg, default, data_root.resolve())


def train(
    task: Task,
    cfg: Any,
    config: Path,
    folder: Path,
    options: dict[str, str],
    memory: Memory,
    console: Console,
) -> Path:
    """Train by ``tools/train.py``, or go on with a training that was interrupted."""
    done = memory.get('train')
    checkpoint = runs.latest_checkpoint(folder)
    if done and checkpoint is not None:
        console.print('  training: done before')
        return checkpoint
    resume = ['--resume'] if checkpoint is not None else []
    if resume:
        console.print(f'  training: going on from {checkpoint.name}')
    start = time.monotonic()
    with Progress(
        TextColumn('  training'),
        BarColumn(bar_width=30),
        TextColumn('{task.description}'),
        TimeElapsedColumn(),
        console=console,
    ) as bar:
        line_number = bar.add_task('starting', total=1.0)
        epochs = cfg.train_cfg.get('max_epochs', 1)

        def show(line: str) -> None:
            progress = runs.Progress.of(line)
            if progress is not None:
                done_epochs = (progress.epoch or 1) - 1 + progress.step / progress.steps
                bar.update(
                    line_number,
                    completed=done_epochs / epochs,
                    description=f'epoch {progress.epoch or 1}/{epochs}  '
                    f'{progress.step}/{progress.steps}  loss {progress.loss:.3f}  '
                    f'eta {progress.eta}',
                )

        runs.run_tool(
            [
                'tools/train.py',
                config,
                '--work-dir',
                folder,
                *resume,
                *runs.option_list(options),
            ],
            folder / 'train.log',
            on_line=show,
        )
        bar.update(line_number, completed=1.0, description='done')
    checkpoint = runs.latest_checkpoint(folder)
    if checkpoint is None:
        raise runs.RunFailed(f'{task.name}: the training left no checkpoint in {folder}')
    memory.put('train', {'seconds': round(time.monotonic() - start, 1)})
    return checkpoint


def test(
    task: Task,
    config: Path,
    checkpoint: Path,
    folder: Path,
    options: dict[str, str],
    memory: Memory,
    console: Console,
) -> dict[str, float]:
    """Test by ``tools/test.py``."""
    done = memory.get('test')
    if done:
        console.print('  testing: done before')
        return done
    with console.status('  testing'):
        runs.run_tool(
            [
                'tools/test.py',
                config,
                checkpoint,
                '--work-dir',
                folder / 'test',
                *runs.option_list(options),
            ],
            folder / 'test.log',
        )
    metrics = runs.last_metrics(folder / 'test')
    if task.metric not in metrics:
        raise runs.RunFailed(f'{task.name}: no {task.metric} in the logs below {folder / "test"}')
    console.print(f'  testing: {task.metric_name} {quality_of(task, metrics):.3f}')
    memory.put('test', metrics)
    return metrics


def quality_of(task: Task, metrics: dict[str, float]) -> float:
    """The task's metric as a share of 1."""
    return metrics[task.metric] / (100 if task.percent else 1)


def load_trained(config: Path, checkpoint: Path, options: dict[str, str]) -> Any:
    """The trained model with a config whose data paths hold from any folder."""
    from idlevit_mm.analysis.models import load_config, load_model

    options = options or runs.data_root_options(
        load_config(config), 'data/digit_scenes', runs.REPOSITORY / 'data' / 'digit_scenes'
    )
    return load_model(config, checkpoint, cfg_options=options)


def measure(task: Task, model: Any, metrics: dict[str, float], train_seconds: float) -> Outcome:
    """Tokens kept, multiply-adds and times on a batch of the test data set."""
    import torch
    from mmengine.dataset import pseudo_collate
    from mmengine.registry import DATASETS

    from idlevit_mm.analysis.benchmark import benchmark
    from idlevit_mm.analysis.models import (
        idle_backbone,
        share_kept,
        with_host_backbone,
        with_keep_ratios,
    )

    dataset = DATASETS.build(model.cfg.test_dataloader.dataset)
    batch = model.data_preprocessor(pseudo_collate([dataset[i] for i in range(_BATCH)]), False)
    inputs, samples = batch['inputs'], batch['data_samples']
    with torch.no_grad():
        idle_backbone(model)(inputs)
    kept = share_kept(idle_backbone(model))
    candidates = {
        'idle': model,
        'dense': with_keep_ratios(model, 1.0),
        'host': with_host_backbone(model),
    }
    figures = {}
    for part in ('backbone', 'model'):
        rows, timing = benchmark(
            candidates,
            inputs,
            part,
            reference='dense',
            data_samples=samples,
            rounds=_ROUNDS,
            max_seconds=_MAX_SECONDS,
        )
        idle = rows[0]
        figures[part] = PartFigures(
            milliseconds=idle.milliseconds,
            against_dense=idle.time_ratio,
            against_host=timing.ratio('idle', 'host'),
            multiply_adds=idle.multiply_adds,
            operation_ratio=idle.operation_ratio,
        )
    return Outcome(
        task, quality_of(task, metrics), kept, figures['backbone'], figures['model'], train_seconds
    )


# --- The table --------------------------------------------------------------------------------

HEADER = (
    'model',
    'quality',
    'tokens kept',
    'backbone multiply-adds',
    'backbone, ms per image',
    'whole model, ms per image',
)
_NOTE = (
    f'Times: batch of {_BATCH} validation images, all candidates in turns in one process, median; '
    '"keep 1" is the same model with all tokens active, "mmdet" the same with mmdet\'s own dense '
    'backbone. Multiply-adds are per image.'
)


def table_cells(outcome: Outcome) -> list[str]:
    """The cells of one model, in the order of ``HEADER``."""
    from idlevit_mm.analysis.flops import pretty

    def timing(figures: PartFigures) -> str:
        return (
            f'{figures.milliseconds.median:.2f} = {figures.against_dense.median:.2f} × keep 1, '
            f'{figures.against_host.median:.2f} × mmdet'
        )

    backbone = outcome.backbone
    return [
        outcome.task.name,
        f'{outcome.task.metric_name} {outcome.quality:.3f}',
        f'{100 * outcome.share_kept:.0f} %',
        f'{pretty(backbone.multiply_adds)} = {backbone.operation_ratio:.2f} × dense',
        timing(backbone),
        timing(outcome.model),
    ]


def rich_table(outcomes: Sequence[Outcome]) -> Table:
    """The table for a terminal."""
    table = Table(title='Token idling on digit scenes', caption=_NOTE, show_lines=True)
    for name in HEADER:
        table.add_column(name)
    for outcome in outcomes:
        table.add_row(*table_cells(outcome))
    return table


def markdown_table(outcomes: Sequence[Outcome]) -> str:
    """The same table in Markdown."""
    lines = ['| ' + ' | '.join(HEADER) + ' |', '|' + '---|' * len(HEADER)]
    lines += ['| ' + ' | '.join(table_cells(outcome)) + ' |' for outcome in outcomes]
    return '\n'.join(lines)


def write_results(outcomes: Sequence[Outcome], work_dir: Path) -> None:
    """Write ``results.md`` and ``results.json``."""
    lines = [
        '# Token idling on digit scenes',
        '',
        markdown_table(outcomes),
        '',
        _NOTE,
        '',
        f'{runs.machine()}; {runs.versions()}',
    ]
    (work_dir / 'results.md').write_text('\n'.join(lines) + '\n')
    record = {
        'machine': runs.machine(),
        'versions': runs.versions(),
        'outcomes': [asdict(outcome) for outcome in outcomes],
    }
    (work_dir / 'results.json').write_text(json.dumps(record, indent=2) + '\n')
