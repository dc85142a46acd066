"""A study of scorers and scopes: which tokens should stay active?

From one dense checkpoint, every variant is fine-tuned equally long, the dense one too, once per
seed, and evaluated on the whole validation set. Finished runs are kept in a JSON lines file:
starting the study again goes on where it stopped.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from idlevit_mm.analysis import finetuning, ledger
from idlevit_mm.analysis.ledger import Ledger, OutOfTime, Result, execute, scores_of, seed_deviation
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


Run = ledger.Run[Variant]
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
            results[run].score
            for ratio in keep_ratios
            for seed in seeds
            if (run := Run(Variant(ratio, scorer, 'map'), seed)) in results
        ]
        if len(aps) < len(keep_ratios) * len(seeds):
            return None
        means[scorer] = statistics.fmean(aps)
    return max(means, key=means.__getitem__) if means else None


# --- Running ----------------------------------------------------------------------------------


def open_ledger(path: Path, settings: Mapping[str, Any]) -> Ledger[Variant]:
    """The file of this study's finished runs."""
    return Ledger(path, Variant, settings, score_key='ap')


def fine_tune_options(cfg: Any, run: Run, checkpoint: Path, epochs: int) -> dict[str, Any]:
    """Overrides that make one run of the study out of the fine-tune config.

    Args:
        cfg: the read fine-tune config.
        run: variant and seed.
        checkpoint: dense weights to start from.
        epochs: length of the run.
    """
    options = finetuning.run_options(cfg, checkpoint, run.seed, epochs)
    options['model.backbone.keep_ratios'] = run.variant.keep_ratio
    if run.variant.scorer is not None:
        options['model.backbone.policy.scorer'] = run.variant.scorer
        options['model.backbone.policy.scope'] = run.variant.scope
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
        options = fine_tune_options(cfg, run, checkpoint, epochs) | dict(extra_options or {})
        return finetuning.scored_tool(
            ['tools/train.py', config],
            work_dir / run.name,
            'train.log',
            'coco/bbox_mAP',
            threads,
            options,
        )

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


def markdown_table(
    results: Results, operations: Mapping[Variant, float], seeds: Sequence[int]
) -> str:
    """The table of the study: a row per variant, the dense one first, then by keep ratio and AP."""
    variants = sorted(
        {run.variant for run in results},
        key=lambda variant: (
            variant.scope not in (None, 'map'),
            -variant.keep_ratio,
            -statistics.fmean(scores_of(variant, results)),
        ),
    )
    dense = scores_of(DENSE, results)
    lines = [
        '| scorer | scope | keep | box AP | against dense | each seed '
        f'({", ".join(map(str, seeds))}) | backbone multiply-adds |',
        '|---|---|---|---|---|---|---|',
    ]
    for variant in variants:
        aps = scores_of(variant, results)
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
        aps = [
            ap for ratio in keep_ratios for ap in scores_of(Variant(ratio, scorer, 'map'), results)
        ]
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
        lines.append(finetuning.scatter_text(deviation, len(seeds), digits=4))
    lines += ['', 'Mean over keep ratios and seeds on the whole map: ']
    lines[-1] += ', '.join(f'{name} {mean:.3f}' for name, mean in means.items()) + '.'
    if best is not None:
        lines.append(f'Best scorer: **{best}**.')
    lines += ['', *finetuning.provenance(settings, command, results.values())]
    return '\n'.join(lines) + '\n'


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
    settings = finetuning.start_settings(config, checkpoint, epochs, extra_options)
    finished = open_ledger(out_dir / 'runs.jsonl', settings)
    if runner is None:
        runner = training_runner(
            config, checkpoint, out_dir / 'runs', epochs, threads, extra_options
        )
    deadline = None if time_budget is None else time.monotonic() + time_budget
    complete = True
    plan = scorer_runs(scorers, keep_ratios, seeds)
    try:
        results = execute(plan, finished, runner, jobs=jobs, deadline=deadline, report=report)
        best = best_scorer(results, scorers, keep_ratios, seeds)
        if best is not None:
            report(f'best scorer on the whole map: {best}')
            second = scope_runs(best, scopes, keep_ratios, seeds)
            plan = plan + second
            results = execute(second, finished, runner, jobs=jobs, deadline=deadline, report=report)
    except OutOfTime as message:
        report(str(message))
        complete = False
        results = finished.read()
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
        command=finetuning.command_line(),
        complete=complete,
    )
    out_dir.mkdir(parents=True, exist_ok=True)
    (out_dir / 'study.md').write_text(text)
    return text, complete


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
