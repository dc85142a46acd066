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
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from idlevit_mm.analysis import runs
from idlevit_mm.analysis.latency import Spread

EXPECTED = 0.60
_BATCH = 8
_LARGE = 512
_ROUNDS = 40
_MAX_SECONDS = 12.0


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
class Cost:
    """Cost of one part of a model against its dense versions.

    Attributes:
        part: what was measured, on what.
        milliseconds: per image, as trained.
        against_dense: time divided by that of the same model at keep 1.
        against_host: time divided by that of the model with mmdet's own dense backbone.
        multiply_adds: per image, as trained.
        operation_ratio: multiply-adds divided by those at keep 1.
    """

    part: str
    milliseconds: Spread
    against_dense: Spread
    against_host: Spread
    multiply_adds: int
    operation_ratio: float


@dataclass(frozen=True)
class Outcome:
    """All figures of one model."""

    task: Task
    quality: float
    share_kept: float
    costs: tuple[Cost, ...]
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
    work_dir: Path,
    data_root: Path,
    fresh: bool = False,
    console: Console | None = None,
    options: Mapping[str, Any] | None = None,
) -> bool:
    """Write the data, train, test and measure both models, and show what came out.

    Args:
        work_dir: folder for everything the demo makes but the data.
        data_root: folder of the digit scenes, written if they are not there.
        fresh: forget earlier runs of the demo in ``work_dir``.
        console: where to print.
        options: overrides of both configs, as ``--cfg-options``.

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
        outcome, paths = run_task(task, work_dir, data_root, console, options)
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
    task: Task,
    work_dir: Path,
    data_root: Path,
    console: Console,
    extra: Mapping[str, Any] | None = None,
) -> tuple[Outcome, list[Path]]:
    """Train, test and measure one model and draw its pictures."""
    from idlevit_mm.analysis.models import load_config
    from idlevit_mm.analysis.pictures import draw_dataset

    config = runs.REPOSITORY / 'configs' / 'digit_scenes' / f'{task.config}.py'
    cfg = load_config(config, dict(extra or {}))
    options = {**data_options(cfg, data_root), **(extra or {})}
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
    with console.status('  measuring and drawing'), _hushed():
        model = load_trained(config, checkpoint, options)
        outcome = measure(task, model, metrics, memory.get('train')['seconds'])
        paths = draw_dataset({'Prediction': model}, work_dir / 'pictures' / task.config, count=4)
    console.print('  measured and drawn')
    return outcome, paths


@contextmanager
def _hushed() -> Iterator[None]:
    """Swallow what pycocotools prints and the libraries' warnings about themselves."""
    with warnings.catch_warnings(), redirect_stdout(StringIO()):
        warnings.simplefilter('ignore')
        yield


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
    options: Mapping[str, Any],
    memory: Memory,
    console: Console,
) -> Path:
    """Train by ``tools/train.py``, or go on with a training that was interrupted."""
    done = memory.get('train')
    checkpoint = runs.latest_checkpoint(folder)
    if done and checkpoint is not None:
        console.print('  training: done before')
        return checkpoint
    resume = []
    if checkpoint is not None:
        console.print(f'  training: going on from {checkpoint.name}')
        resume = ['--resume']
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
            if progress is None:
                return
            epoch = progress.epoch or 1
            text = (
                f'epoch {epoch}/{epochs}  {progress.step}/{progress.steps}  '
                f'loss {progress.loss:.3f}  eta {progress.eta}'
            )
            share = (epoch - 1 + progress.step / progress.steps) / epochs
            bar.update(line_number, completed=share, description=text)
            if not console.is_terminal:  # a live line cannot be drawn: print some
                console.print(f'  {text}')

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
    options: Mapping[str, Any],
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


def load_trained(config: Path, checkpoint: Path, options: Mapping[str, Any]) -> Any:
    """The trained model with a config whose data paths hold from any folder."""
    from idlevit_mm.analysis.models import load_config, load_model

    default = runs.data_root_options(
        load_config(config), 'data/digit_scenes', runs.REPOSITORY / 'data' / 'digit_scenes'
    )
    return load_model(config, checkpoint, cfg_options={**default, **options})


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
    large = torch.nn.functional.interpolate(inputs[:2], size=(_LARGE, _LARGE), mode='bilinear')
    height, width = inputs.shape[-2:]
    costs = []
    for part, images, title in (
        ('backbone', inputs, f'backbone, {height}×{width}'),
        ('backbone', large, f'backbone, {_LARGE}×{_LARGE}'),
        ('model', inputs, f'whole model, {height}×{width}'),
    ):
        rows, timing = benchmark(
            candidates,
            images,
            part,
            reference='dense',
            data_samples=samples,
            rounds=_ROUNDS,
            max_seconds=_MAX_SECONDS,
        )
        idle = rows[0]
        costs.append(
            Cost(
                title,
                idle.milliseconds,
                idle.time_ratio,
                timing.ratio('idle', 'host'),
                idle.multiply_adds,
                idle.operation_ratio,
            )
        )
    return Outcome(task, quality_of(task, metrics), kept, tuple(costs), train_seconds)


# --- The table --------------------------------------------------------------------------------

_NOTE = (
    f'Times are medians (with quartiles) of up to {_ROUNDS} rounds in which all candidates take '
    f'turns, per image of a batch of {_BATCH} validation images (2, enlarged, for '
    f'{_LARGE}×{_LARGE}). "Keep 1" is the same model with all tokens active; "mmdet" is the same '
    "model with mmdet's own dense backbone. Below 1 is faster."
)


def table_rows(outcomes: Sequence[Outcome]) -> list[list[str]]:
    """One row per figure: its name, then the text for each model."""
    from idlevit_mm.analysis.flops import pretty

    def ratio(spread: Spread) -> str:
        return f'{spread.median:.2f} ({spread.low:.2f}–{spread.high:.2f})'

    rows = [
        ['quality', *(f'{o.task.metric_name} {o.quality:.3f}' for o in outcomes)],
        ['tokens kept', *(f'{100 * o.share_kept:.0f} %' for o in outcomes)],
    ]
    for same_part in zip(*(outcome.costs for outcome in outcomes), strict=True):
        rows += [
            [same_part[0].part, *('' for _ in same_part)],
            [
                '  multiply-adds',
                *(f'{pretty(c.multiply_adds)}, {c.operation_ratio:.2f} × dense' for c in same_part),
            ],
            ['  time per image', *(f'{c.milliseconds.median:.1f} ms' for c in same_part)],
            ['  time / keep 1', *(ratio(c.against_dense) for c in same_part)],
            ['  time / mmdet', *(ratio(c.against_host) for c in same_part)],
        ]
    rows.append(['training', *(f'{o.train_seconds / 60:.1f} min' for o in outcomes)])
    return rows


def rich_table(outcomes: Sequence[Outcome]) -> Table:
    """The table for a terminal."""
    table = Table(title='Token idling on digit scenes', caption=_NOTE)
    table.add_column('')
    for outcome in outcomes:
        table.add_column(outcome.task.name)
    for cells in table_rows(outcomes):
        table.add_row(*cells)
    return table


def markdown_table(outcomes: Sequence[Outcome]) -> str:
    """The same table in Markdown."""
    lines = [
        '| | ' + ' | '.join(outcome.task.name for outcome in outcomes) + ' |',
        '|' + '---|' * (1 + len(outcomes)),
    ]
    for cells in table_rows(outcomes):
        name = cells[0].replace('  ', '– ', 1)
        lines.append('| ' + ' | '.join([name, *cells[1:]]) + ' |')
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
