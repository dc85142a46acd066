"""A study of scorers and scopes: which tokens should stay active?

From one dense checkpoint, every variant is fine-tuned equally long, the dense one too, once per
seed, and evaluated on the whole validation set. Finished runs are kept in a JSON lines file:
starting the study again goes on where it stopped.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from idlevit_mm.analysis import runs
from idlevit_mm.analysis.models import load_config

SCORERS = ('mean_distance', 'activation_norm', 'mean_query', 'random', 'uniform_grid')
SCOPES = ('map', 'window_tokens', 'windows')


@dataclass(frozen=True)
class Variant:
    """One row of the table; a dense row has keep ratio 1 and neither scorer nor scope."""

    keep_ratio: float
    scorer: str | None = None
    scope: str | None = None

    @property
    def name(self) -> str:
        """Short text, unique among variants."""
        if self.scorer is None:
            return 'dense'
        return f'{self.scorer}-{self.scope}-{self.keep_ratio:g}'


DENSE = Variant(1.0)


@dataclass(frozen=True)
class Run:
    """One fine-tuning run: a variant and a seed."""

    variant: Variant
    seed: int

    @property
    def name(self) -> str:
        """Short text, unique among the runs of a study."""
        return f'{self.variant.name}-seed{self.seed}'


@dataclass(frozen=True)
class Result:
    """What a finished run left: box AP and the seconds it took."""

    ap: float
    seconds: float


Runner = Callable[[Run], Result]
Results = Mapping[Run, Result]


# --- Which runs -------------------------------------------------------------------------------


def scorer_runs(
    scorers: Sequence[str], keep_ratios: Sequence[float], seeds: Sequence[int]
) -> list[Run]:
    """The first part: dense, then every scorer on the whole map, seed by seed."""
    variants = [DENSE] + [
        Variant(ratio, scorer, 'map') for scorer in scorers for ratio in keep_ratios
    ]
    return [Run(variant, seed) for seed in seeds for variant in variants]


def scope_runs(
    scorer: str, scopes: Sequence[str], keep_ratios: Sequence[float], seeds: Sequence[int]
) -> list[Run]:
    """The second part: the best scorer in the other scopes."""
    return [
        Run(Variant(ratio, scorer, scope), seed)
        for seed in seeds
        for scope in scopes
        if scope != 'map'
        for ratio in keep_ratios
    ]


def aps_of(variant: Variant, results: Results) -> list[float]:
    """AP of each finished seed of a variant, in the order of the seeds."""
    found = [(run.seed, result.ap) for run, result in results.items() if run.variant == variant]
    return [ap for _, ap in sorted(found)]


def best_scorer(
    results: Results,
    scorers: Sequence[str],
    keep_ratios: Sequence[float],
    seeds: Sequence[int],
) -> str | None:
    """The scorer with the highest AP on the whole map, averaged over keep ratios and seeds.

    Returns:
        Its name; None unless every scorer has finished all its runs, because means over
        different runs cannot be compared.
    """
    means = {}
    for scorer in scorers:
        aps = [
            results[run].ap
            for ratio in keep_ratios
            for seed in seeds
            if (run := Run(Variant(ratio, scorer, 'map'), seed)) in results
        ]
        if len(aps) < len(keep_ratios) * len(seeds):
            return None
        means[scorer] = statistics.fmean(aps)
    return max(means, key=means.__getitem__) if means else None


# --- Keeping results --------------------------------------------------------------------------


class Ledger:
    """Finished runs in a JSON lines file, one line each, written when a run ends.

    Runs with other settings (another checkpoint, config or number of epochs) may stand in the
    same file: they are kept and not used.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.settings = dict(settings)
        self._lock = threading.Lock()

    def read(self) -> dict[Run, Result]:
        """All finished runs with these settings."""
        results: dict[Run, Result] = {}
        if not self.path.is_file():
            return results
        for line in self.path.read_text().splitlines():
            try:
                entry = json.loads(line)
            except json.JSONDecodeError:
                continue  # the process was killed while it wrote this line
            if entry['settings'] == self.settings:
                run = Run(Variant(**entry['variant']), entry['seed'])
                results[run] = Result(entry['ap'], entry['seconds'])
        return results

    def add(self, run: Run, result: Result) -> None:
        """Append one finished run."""
        entry = {
            'variant': asdict(run.variant),
            'seed': run.seed,
            **asdict(result),
            'settings': self.settings,
        }
        with self._lock:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            # A killed process may have left half a line: do not write into it.
            torn = self.path.is_file() and self.path.read_bytes()[-1:] not in (b'', b'\n')
            with self.path.open('a') as file:
                file.write(('\n' if torn else '') + json.dumps(entry) + '\n')


# --- Running ----------------------------------------------------------------------------------


class OutOfTime(Exception):
    """The time budget ended before all runs were done."""


def execute(
    plan: Iterable[Run],
    ledger: Ledger,
    runner: Runner,
    *,
    jobs: int = 2,
    deadline: float | None = None,
    clock: Callable[[], float] = time.monotonic,
    report: Callable[[str], None] = print,
) -> dict[Run, Result]:
    """Do the runs of a plan that are not in the ledger, several at a time.

    Args:
        plan: the runs, in the order in which they are started.
        ledger: knows finished runs and is told of each new one.
        runner: does one run; called from several threads.
        jobs: runs at a time.
        deadline: no run is started that would probably end later, judged by the longest one
            so far; in seconds of the clock.
        clock: returns seconds.
        report: gets one line per event.

    Returns:
        All results of the ledger.

    Raises:
        OutOfTime: runs are left because of the deadline.
        RunFailed: a run failed; those under way are finished and kept first.
    """
    plan = list(plan)
    results = ledger.read()
    waiting = [run for run in plan if run not in results]
    done = len(plan) - len(waiting)
    if done:
        report(f'{done} of {len(plan)} runs are already in {ledger.path}')
    longest = max((results[run].seconds for run in plan if run in results), default=0.0)
    running: dict[Future, Run] = {}
    failure: BaseException | None = None
    late = False
    with ThreadPoolExecutor(max_workers=jobs) as pool:
        try:
            while waiting or running:
                while waiting and len(running) < jobs and failure is None and not late:
                    if deadline is not None and clock() + longest > deadline:
                        late = True
                        break
                    run = waiting.pop(0)
                    running[pool.submit(runner, run)] = run
                if not running:
                    break
                finished, _ = wait(running, return_when=FIRST_COMPLETED)
                for future in finished:
                    run = running.pop(future)
                    error = future.exception()
                    if error is not None:
                        failure = failure or error
                        report(f'{run.name}: FAILED')
                        continue
                    result = future.result()
                    ledger.add(run, result)
                    done += 1
                    longest = max(longest, result.seconds)
                    left = (len(plan) - done) * longest / jobs / 60
                    report(
                        f'[{done}/{len(plan)}] {run.name}: AP {result.ap:.3f} '
                        f'({result.seconds:.0f} s; at most {left:.0f} min left)'
                    )
        except BaseException:
            runs.stop_all()
            raise
    if failure is not None:
        raise failure
    if late:
        raise OutOfTime(f'{len(waiting)} runs were not started; run the same command again')
    return ledger.read()


def fine_tune_options(
    cfg: Any, run: Run, checkpoint: Path, epochs: int, workers: int = 0
) -> dict[str, Any]:
    """Overrides that make one run of the study out of the fine-tune config.

    Args:
        cfg: the read fine-tune config.
        run: variant and seed.
        checkpoint: dense weights to start from.
        epochs: length of the run; schedules that end with the config's run are fitted to it.
        workers: data loading processes.
    """
    options: dict[str, Any] = {
        'load_from': checkpoint,
        'randomness.seed': run.seed,
        'model.backbone.keep_ratios': run.variant.keep_ratio,
        # One evaluation and one small checkpoint, at the end.
        'train_cfg.val_interval': epochs,
        'default_hooks.checkpoint.interval': epochs,
        'default_hooks.checkpoint.save_optimizer': False,
        'default_hooks.logger.interval': 50,
    }
    if run.variant.scorer is not None:
        options['model.backbone.policy.scorer'] = run.variant.scorer
        options['model.backbone.policy.scope'] = run.variant.scope
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


def training_runner(
    config: Path,
    checkpoint: Path,
    work_dir: Path,
    epochs: int,
    threads: int,
    extra_options: Mapping[str, Any] | None = None,
) -> Runner:
    """A runner that fine-tunes by ``tools/train.py`` and reads the AP of its last evaluation."""
    cfg = load_config(config)

    def run_one(run: Run) -> Result:
        folder = work_dir / run.name
        options = fine_tune_options(cfg, run, checkpoint, epochs) | dict(extra_options or {})
        start = time.monotonic()
        runs.run_tool(
            ['tools/train.py', config, '--work-dir', folder, *runs.option_list(options)],
            folder / 'train.log',
            threads=threads,
        )
        metrics = runs.last_metrics(folder)
        if 'coco/bbox_mAP' not in metrics:
            raise runs.RunFailed(f'{run.name}: no box AP in the logs below {folder}')
        return Result(metrics['coco/bbox_mAP'], round(time.monotonic() - start, 1))

    return run_one


# --- The table --------------------------------------------------------------------------------


def multiply_add_ratios(
    config: Path, variants: Iterable[Variant], input_shape: Sequence[int]
) -> dict[Variant, float]:
    """Backbone multiply-adds of each variant divided by the dense backbone's."""
    from mmengine.registry import MODELS

    from idlevit_mm.analysis.flops import backbone_multiply_adds

    cfg = load_config(config)

    def count(variant: Variant) -> int:
        backbone = dict(cfg.model.backbone, keep_ratios=variant.keep_ratio, init_cfg=None)
        if variant.scorer is not None:
            backbone['policy'] = {'scorer': variant.scorer, 'scope': variant.scope}
        return backbone_multiply_adds(MODELS.build(backbone), input_shape)

    dense = count(DENSE)
    return {variant: count(variant) / dense for variant in variants}


def seed_deviation(results: Results) -> float | None:
    """Standard deviation of one run around its variant's mean, pooled over all variants."""
    squares, freedom = 0.0, 0
    for variant in {run.variant for run in results}:
        aps = aps_of(variant, results)
        if len(aps) > 1:
            squares += sum((ap - statistics.fmean(aps)) ** 2 for ap in aps)
            freedom += len(aps) - 1
    return (squares / freedom) ** 0.5 if freedom else None


def markdown_table(
    results: Results, operations: Mapping[Variant, float], seeds: Sequence[int]
) -> str:
    """The table of the study: a row per variant, the dense one first, then by keep ratio and AP."""
    variants = sorted(
        {run.variant for run in results},
        key=lambda variant: (
            variant.scope not in (None, 'map'),
            -variant.keep_ratio,
            -statistics.fmean(aps_of(variant, results)),
        ),
    )
    dense = aps_of(DENSE, results)
    lines = [
        '| scorer | scope | keep | box AP | against dense | each seed '
        f'({", ".join(map(str, seeds))}) | backbone multiply-adds |',
        '|---|---|---|---|---|---|---|',
    ]
    for variant in variants:
        aps = aps_of(variant, results)
        mean = statistics.fmean(aps)
        against = f'{mean - statistics.fmean(dense):+.3f}' if dense else '–'
        ratio = f'{operations[variant]:.2f}' if variant in operations else '–'
        lines.append(
            f'| {variant.scorer or "dense"} | {variant.scope or "–"} | {variant.keep_ratio:g} '
            f'| {mean:.3f} | {"–" if variant == DENSE else against} '
            f'| {", ".join(f"{ap:.3f}" for ap in aps)} | {ratio} |'
        )
    return '\n'.join(lines)


def scorer_means(
    results: Results, scorers: Sequence[str], keep_ratios: Sequence[float]
) -> dict[str, float]:
    """Mean AP of each scorer on the whole map over keep ratios and seeds, best first."""
    means = {}
    for scorer in scorers:
        aps = [ap for ratio in keep_ratios for ap in aps_of(Variant(ratio, scorer, 'map'), results)]
        if aps:
            means[scorer] = statistics.fmean(aps)
    return dict(sorted(means.items(), key=lambda item: -item[1]))


def report_text(
    results: Results,
    operations: Mapping[Variant, float],
    *,
    scorers: Sequence[str],
    keep_ratios: Sequence[float],
    seeds: Sequence[int],
    settings: Mapping[str, Any],
    command: str,
    complete: bool,
) -> str:
    """The whole report in Markdown: table, spread, best scorer, and how it was made."""
    deviation = seed_deviation(results)
    best = best_scorer(results, scorers, keep_ratios, seeds)
    means = scorer_means(results, scorers, keep_ratios)
    lines = ['# Scorers and scopes on digit scenes', '']
    if not complete:
        lines += ['**Unfinished: run the same command again to go on.**', '']
    lines += [markdown_table(results, operations, seeds), '']
    epochs = settings['epochs']
    budget = f'{epochs} epoch{"s" if epochs > 1 else ""}'
    lines.append(
        'Box AP (0.50:0.95) on the whole validation set, mean over the seeds. Every row, the dense '
        f'one too, was fine-tuned for {budget} from the same dense checkpoint. Multiply-adds are '
        'those of the backbone, scoring included, divided by those of the dense backbone.'
    )
    if deviation is not None:
        lines.append(
            f'One run scatters around the mean of its row with a standard deviation of '
            f'{deviation:.4f} (pooled over all rows); a mean over {len(seeds)} seeds therefore has '
            f'a standard error of about {deviation / len(seeds) ** 0.5:.4f}, a difference between '
            f'two rows one of about {deviation * (2 / len(seeds)) ** 0.5:.4f}.'
        )
    lines += ['', 'Mean over keep ratios and seeds on the whole map: ']
    lines[-1] += ', '.join(f'{name} {mean:.3f}' for name, mean in means.items()) + '.'
    if best is not None:
        lines.append(f'Best scorer: **{best}**.')
    lines += [
        '',
        f'- command: `{command}`',
        f'- settings: `{json.dumps(dict(settings), sort_keys=True)}`',
        f'- versions: {runs.versions()}',
        f'- machine: {runs.machine()}',
        f'- runs: {len(results)}, '
        f'{sum(result.seconds for result in results.values()) / 60:.0f} minutes of run time '
        'in all',
    ]
    return '\n'.join(lines) + '\n'


def digest(path: Path) -> str:
    """First characters of a file's SHA-256: tells whether it is still the same file."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def dense_checkpoint(config: Path, work_dir: Path, report: Callable[[str], None] = print) -> Path:
    """The dense checkpoint in a folder, trained there first if it is not."""
    trained = runs.latest_checkpoint(work_dir)
    planned = load_config(config).train_cfg.max_epochs
    if trained is not None and trained.name == f'epoch_{planned}.pth':
        return trained
    report(f'training the dense model first ({runs.shown(config)}, {planned} epochs)')
    runs.run_tool(
        ['tools/train.py', config, '--work-dir', work_dir, '--resume'], work_dir / 'train.log'
    )
    trained = runs.latest_checkpoint(work_dir)
    if trained is None:
        raise runs.RunFailed(f'the dense run left no checkpoint in {work_dir}')
    return trained


def run_study(
    *,
    config: Path,
    checkpoint: Path,
    out_dir: Path,
    scorers: Sequence[str] = SCORERS,
    scopes: Sequence[str] = SCOPES,
    keep_ratios: Sequence[float] = (0.7, 0.5),
    seeds: Sequence[int] = (0, 1),
    epochs: int = 4,
    jobs: int = 2,
    threads: int = 1,
    time_budget: float | None = None,
    input_shape: Sequence[int] = (128, 128),
    extra_options: Mapping[str, Any] | None = None,
    runner: Runner | None = None,
    count_operations: Callable[[Iterable[Variant]], Mapping[Variant, float]] | None = None,
    report: Callable[[str], None] = print,
) -> tuple[str, bool]:
    """Do the study, or what is left of it, and write ``study.md`` and ``runs.jsonl``.

    Args:
        config: the fine-tune config (detection).
        checkpoint: dense weights that every run starts from.
        out_dir: folder of the results; each run has a folder below ``runs``.
        scorers: scorers compared on the whole map.
        scopes: scopes compared with the best scorer.
        keep_ratios: shares of tokens kept, the same in every block.
        seeds: one run per variant and seed.
        epochs: fine-tuning epochs of every run.
        jobs: runs at a time.
        threads: computing threads per run.
        time_budget: seconds after which no further run is started; None for no limit.
        input_shape: (H, W) in pixels for which multiply-adds are counted.
        extra_options: further overrides for every run.
        runner: does one run; ``tools/train.py`` when None.
        count_operations: multiply-adds of variants against the dense backbone; counted on the
            config's backbone when None.
        report: gets one line per event.

    Returns:
        The report in Markdown and whether the study is complete.
    """
    _check(scorers, scopes, keep_ratios, seeds, epochs, jobs)
    settings = {
        'config': _recorded(config),
        'config_sha256': hashlib.sha256(load_config(config).dump().encode()).hexdigest()[:12],
        'checkpoint': _recorded(checkpoint),
        'checkpoint_sha256': digest(checkpoint),
        'epochs': epochs,
    }
    if extra_options:
        settings['options'] = {key: str(value) for key, value in extra_options.items()}
    ledger = Ledger(out_dir / 'runs.jsonl', settings)
    if runner is None:
        runner = training_runner(
            config, checkpoint, out_dir / 'runs', epochs, threads, extra_options
        )
    deadline = None if time_budget is None else time.monotonic() + time_budget
    complete = True
    plan = scorer_runs(scorers, keep_ratios, seeds)
    try:
        results = execute(plan, ledger, runner, jobs=jobs, deadline=deadline, report=report)
        best = best_scorer(results, scorers, keep_ratios, seeds)
        if best is not None:
            report(f'best scorer on the whole map: {best}')
            second = scope_runs(best, scopes, keep_ratios, seeds)
            plan = plan + second
            results = execute(second, ledger, runner, jobs=jobs, deadline=deadline, report=report)
    except OutOfTime as message:
        report(str(message))
        complete = False
        results = ledger.read()
    results = {run: result for run, result in results.items() if run in set(plan)}
    variants = sorted({run.variant for run in results}, key=lambda variant: variant.name)
    count = count_operations or partial(multiply_add_ratios, config, input_shape=input_shape)
    operations = count(variants)
    text = report_text(
        results,
        operations,
        scorers=scorers,
        keep_ratios=keep_ratios,
        seeds=seeds,
        settings=settings,
        command='python ' + ' '.join(_recorded(argument) for argument in sys.argv),
        complete=complete,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / 'study.md').write_text(text)
    return text, complete


def _recorded(argument: str | Path) -> str:
    """A path or an argument as it may stand in a report: no folders of this machine."""
    path = Path(argument)
    if not path.is_absolute():
        return str(argument)
    inside = path.is_relative_to(runs.REPOSITORY)
    return str(path.relative_to(runs.REPOSITORY)) if inside else path.name


def _check(
    scorers: Sequence[str],
    scopes: Sequence[str],
    keep_ratios: Sequence[float],
    seeds: Sequence[int],
    epochs: int,
    jobs: int,
) -> None:
    """Refuse what cannot work before any training starts."""
    for name, values in (('scorers', scorers), ('keep_ratios', keep_ratios), ('seeds', seeds)):
        if not values or len(set(values)) != len(values):
            raise ValueError(f'{name}={list(values)} must hold at least one value, each once')
    unknown = [scope for scope in scopes if scope not in SCOPES]
    if unknown:
        raise ValueError(f'scopes={unknown} must be among {list(SCOPES)}')
    wrong = [ratio for ratio in keep_ratios if not 0 < ratio < 1]
    if wrong:
        raise ValueError(f'keep_ratios={wrong} must lie in (0, 1); the dense row is always there')
    if epochs < 1 or jobs < 1:
        raise ValueError(f'epochs={epochs} and jobs={jobs} must be at least 1')
