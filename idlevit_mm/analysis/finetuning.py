"""Short fine-tuning runs from one dense checkpoint, as all studies do them."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from idlevit_mm.analysis import runs
from idlevit_mm.analysis.ledger import Result
from idlevit_mm.analysis.models import load_config

# --- One run ----------------------------------------------------------------------------------


def run_options(
    cfg: Any, checkpoint: str | Path, seed: int, epochs: int, workers: int = 0
) -> dict[str, Any]:
    """Overrides that make one run of a study out of a fine-tune config.

    Args:
        cfg: the read fine-tune config.
        checkpoint: dense weights to start from.
        seed: of the run.
        epochs: length of the run; schedules that end with the config's run are fitted to it.
        workers: data loading processes.
    """
    options: dict[str, Any] = {
        'load_from': checkpoint,
        'randomness.seed': seed,
        # One evaluation and one small checkpoint, at the end.
        'train_cfg.val_interval': epochs,
        'default_hooks.checkpoint.interval': epochs,
        'default_hooks.checkpoint.save_optimizer': False,
        'default_hooks.logger.interval': 50,
    }
    for loader in ('train_dataloader', 'val_dataloader'):
        options[f'{loader}.num_workers'] = workers
        options[f'{loader}.persistent_workers'] = workers > 0
    return {**options, **epoch_options(cfg, epochs)}


def epoch_options(cfg: Any, epochs: int) -> dict[str, Any]:
    """Overrides for another number of epochs, learning-rate schedules included."""
    planned = cfg.train_cfg.max_epochs
    options: dict[str, Any] = {'train_cfg.max_epochs': epochs}
    if planned == epochs:
        return options
    schedulers = cfg.get('param_scheduler') or []
    schedulers = schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]
    for index, scheduler in enumerate(schedulers):
        if not scheduler.get('by_epoch', True):
            continue
        key = f'param_scheduler.{index}'
        if scheduler.get('end', 0) >= planned:
            options[f'{key}.end'] = epochs
        if 'T_max' in scheduler:
            options[f'{key}.T_max'] = max(1, epochs - scheduler.get('begin', 0))
        if 'milestones' in scheduler:
            options[f'{key}.milestones'] = [
                max(1, round(step * epochs / planned)) for step in scheduler['milestones']
            ]
    return options


def scored_tool(
    arguments: Sequence[str | Path],
    folder: Path,
    log: str,
    metric: str,
    threads: int,
    extra_options: Mapping[str, Any] | None = None,
) -> Result:
    """Run ``tools/train.py`` or ``tools/test.py`` and read a metric of its last evaluation.

    Args:
        arguments: the tool and its arguments, without work folder and overrides.
        folder: work folder.
        log: name of the file in it for what the tool prints.
        metric: key in mmengine's logs.
        threads: computing threads.
        extra_options: overrides, as ``--cfg-options``.

    Raises:
        RunFailed: the tool failed or logged no such metric.
    """
    start = time.monotonic()
    # A run that evaluates to nothing must not be given the score of an earlier one.
    earlier = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    options = runs.option_list(extra_options or {})
    runs.run_tool([*arguments, '--work-dir', folder, *options], folder / log, threads=threads)
    metrics = runs.last_metrics(folder, ignore=earlier)
    if metric not in metrics:
        raise runs.RunFailed(f'{folder.name}: no {metric} in the logs below {folder}')
    return Result(metrics[metric], round(time.monotonic() - start, 1))


# --- Where runs start -------------------------------------------------------------------------


def digest(path: Path) -> str:
    """First characters of a file's SHA-256: tells whether it is still the same file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def dense_checkpoint(
    config: Path,
    work_dir: Path,
    extra_options: Mapping[str, Any] | None = None,
    report: Callable[[str], None] = print,
) -> Path:
    """The dense checkpoint in a folder, trained there first if it is not.

    Raises:
        RunFailed: the training failed or left no checkpoint.
    """
    trained = runs.latest_checkpoint(work_dir)
    planned = load_config(config).train_cfg.max_epochs
    if trained is not None and trained.name == f'epoch_{planned}.pth':
        return trained
    report(f'training the dense model first ({runs.shown(config)}, {planned} epochs)')
    runs.run_tool(
        [
            'tools/train.py',
            config,
            '--work-dir',
            work_dir,
            '--resume',
            *runs.option_list(extra_options or {}),
        ],
        work_dir / 'train.log',
    )
    trained = runs.latest_checkpoint(work_dir)
    if trained is None:
        raise runs.RunFailed(f'the dense run left no checkpoint in {work_dir}')
    return trained


# --- For the record ---------------------------------------------------------------------------


def start_settings(
    config: Path,
    checkpoint: Path,
    epochs: int,
    extra_options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What all runs from one checkpoint depend on, for a ledger."""
    settings: dict[str, Any] = {
        'config': recorded(config),
        'config_sha256': hashlib.sha256(load_config(config).dump().encode()).hexdigest()[:12],
        'checkpoint': recorded(checkpoint),
        'checkpoint_sha256': digest(checkpoint),
        'epochs': epochs,
    }
    if extra_options:
        settings['options'] = {key: str(value) for key, value in extra_options.items()}
    return settings


def recorded(argument: str | Path) -> str:
    """A path or an argument as it may stand in a report: no folders of this machine."""
    path = Path(argument)
    if not path.is_absolute():
        return str(argument)
    inside = path.is_relative_to(runs.REPOSITORY)
    return str(path.relative_to(runs.REPOSITORY)) if inside else path.name


def command_line() -> str:
    """The command that runs this process, as it may stand in a report."""
    return 'python ' + ' '.join(recorded(argument) for argument in sys.argv)


def scatter_text(deviation: float, seeds: int, digits: int) -> str:
    """A sentence about the spread between runs.

    Args:
        deviation: pooled standard deviation of a run.
        seeds: runs that a mean is taken over.
        digits: decimals to print.
    """
    return (
        f'One run scatters around the mean of its row with a standard deviation of '
        f'{deviation:.{digits}f} (pooled over all rows); a mean over {seeds} seeds therefore has '
        f'a standard error of about {deviation / seeds**0.5:.{digits}f}, a difference between '
        f'two rows one of about {deviation * (2 / seeds) ** 0.5:.{digits}f}.'
    )


def provenance(settings: Mapping[str, Any], command: str, results: Iterable[Result]) -> list[str]:
    """The list that ends a report: command, settings, versions, machine and run time."""
    results = list(results)
    return [
        f'- command: `{command}`',
        f'- settings: `{json.dumps(dict(settings), sort_keys=True)}`',
        f'- versions: {runs.versions()}',
        f'- machine: {runs.machine()}',
        f'- runs: {len(results)}, {sum(result.seconds for result in results) / 60:.0f} minutes of '
        'run time in all',
    ]
