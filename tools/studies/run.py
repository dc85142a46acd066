"""Compare policies and scorers by fine-tuning one dense checkpoint, at equal multiply-adds.

Finished runs are kept: after an interruption, the same command goes on where it stopped.
"""

import argparse
import copy
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import report
import variants
from mmengine.config import Config, DictAction
from variants import TASKS, Run, planned_runs

from idlevit_mm.analysis.models import load_config
from idlevit_mm.analysis.results import Line, add_line
from idlevit_mm.engine.launch import run_tool
from idlevit_mm.errors import UsageError

ROOT = variants.CONFIGS.parents[1]


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--tasks', nargs='+', choices=TASKS, default=list(TASKS))
    add('--methods', nargs='+', choices=variants.METHODS, default=variants.POLICIES)
    add('--levels', nargs='*', type=float, default=variants.LEVELS, help='multiply-adds to save')
    add('--keep-ratios', nargs='+', type=float, default=[], help='runs at equal ratios besides')
    add('--seeds', nargs='+', type=int, default=[0, 1])
    add('--epochs', type=int, default=1, help='fine-tuning epochs of every run')
    add('--jobs', type=int, default=2, help='runs at a time')
    add('--threads', type=int, default=1, help='computing threads per run')
    add('--out-dir', type=Path, default=ROOT / 'work_dirs' / 'policies_study')
    dense_help = 'folder with the dense runs, MODEL_dense_digits/epoch_N.pth; trained if missing'
    add('--dense-dir', type=Path, default=ROOT / 'work_dirs', help=dense_help)
    add('--cfg-options', nargs='+', action=DictAction, help='further overrides for every run')
    args = parser.parse_args()
    if not all(0 < share < 1 for share in [*args.keep_ratios, *args.levels]):
        parser.error('--keep-ratios and --levels must lie in (0, 1); a dense row is always there')
    if min(args.epochs, args.jobs, args.threads) < 1:
        parser.error('--epochs, --jobs and --threads must be at least 1')
    args.out_dir = args.out_dir.resolve()
    return args


def main(args: argparse.Namespace) -> None:
    """Do the study, or what is left of it, and write its tables."""
    planned = planned_runs(args.seeds, args.levels, args.keep_ratios, args.tasks, args.methods)
    lines = do_runs(planned, args)
    tables = report.text(report.frame_of(lines))
    (args.out_dir / 'study.md').write_text(tables)
    print(f'\n{tables}\nwritten to {args.out_dir / "study.md"}')


def do_runs(planned: Iterable[Run], args: argparse.Namespace) -> list[Line]:
    """Do the runs that ``runs.jsonl`` does not hold yet; returns its lines of all runs.

    Raises:
        UsageError: a run failed; no other is started.
    """
    runs = list(planned)
    starts = {key: start_of(*key, args) for key in dict.fromkeys(map(begins, runs))}
    configs = {run.name: run_config(run, *starts[begins(run)], args.epochs) for run in runs}
    plan = {run.name: lines_of(run, configs[run.name]) for run in runs}
    file = args.out_dir / 'runs.jsonl'
    found = {_key(line): line for line in report.lines_of(file)}
    waiting = [run for run in runs if any(_key(line) not in found for line in plan[run.name])]
    print(f'{len(runs) - len(waiting)} of {len(runs)} runs are already in {file}')
    begin = time.monotonic()
    with ThreadPoolExecutor(args.jobs) as pool:
        jobs = [pool.submit(do_run, run, configs[run.name], args) for run in waiting]
        try:
            for done, (run, job) in enumerate(zip(waiting, jobs, strict=True), 1):
                scores = job.result()
                for line, score in zip(plan[run.name], scores, strict=True):
                    found[_key(line)] = line | dict(score=score)
                    add_line(found[_key(line)], file)
                left = (time.monotonic() - begin) / done * (len(waiting) - done) / 60
                text = f'{run.name}: {scores[0]:.4g}, about {left:.0f} min left'
                print(f'[{done}/{len(waiting)}] {text}', flush=True)
        finally:
            pool.shutdown(cancel_futures=True)
    return [found[_key(line)] for run in runs for line in plan[run.name]]


def begins(run: Run) -> tuple[str, float]:
    """The task and the scale of images of the dense model that a run begins with."""
    return run.variant['task'], run.method.scale if run.method.grown else 1.0


def start_of(task: str, scale: float, args: argparse.Namespace) -> tuple[Config, Path]:
    """The fine-tune config of a task and its dense checkpoint, trained first if it is not there."""
    config, epochs = TASKS[task].config('dense'), variants.DENSE_EPOCHS
    cfg = load_config(config, args.cfg_options)
    set_epochs(cfg, epochs)
    enlarge(cfg, scale)
    folder = args.dense_dir.resolve() / (config.stem if scale == 1.0 else f'{config.stem}-{scale}x')
    checkpoint = folder / f'epoch_{epochs}.pth'
    if not checkpoint.is_file():
        print(f'training {config.stem} first ({epochs} epochs)', flush=True)
        config = dumped(cfg, folder / 'config' / config.name)
        call(folder, args.threads, 'tools/train.py', config, '--resume')
    return load_config(TASKS[task].config('finetune'), args.cfg_options), checkpoint


def set_epochs(cfg: Config, epochs: int) -> None:
    """Set the length of a training, and of its schedule."""
    for scheduler in cfg.param_scheduler:
        if scheduler.get('by_epoch', True) and scheduler.get('end', 0) >= cfg.train_cfg.max_epochs:
            scheduler.end = epochs
    cfg.train_cfg.max_epochs = epochs


def run_config(run: Run, base: Config, checkpoint: Path, epochs: int) -> Config:
    """The config of a run: one evaluation and one small checkpoint, at its end."""
    cfg = copy.deepcopy(base)
    set_epochs(cfg, epochs)
    saving = dict(interval=epochs, save_optimizer=False, save_best=None)
    loading = dict(num_workers=0, persistent_workers=False)
    cfg.merge_from_dict(
        dict(
            load_from=str(checkpoint),
            randomness=dict(seed=run.seed),
            train_cfg=dict(val_interval=epochs),
            default_hooks=dict(checkpoint=saving, logger=dict(interval=50)),
            train_dataloader=loading,
            val_dataloader=loading,
        )
    )
    if variants.is_tried(run.policy or {}):
        cfg.custom_imports = dict(imports=['idlevit_mm', 'rules'])
    enlarge(cfg, run.method.scale)
    cfg.model.backbone.keep_ratios = run.keep_ratios
    if run.policy is not None:
        cfg.model.backbone.policy = dict(run.policy)
    hooks = json.loads(json.dumps(run.hooks).replace(variants.TEACHER, str(checkpoint)))
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), *hooks]
    return cfg


def enlarge(cfg: Config, scale: float) -> None:
    """Let the pipelines of a detector resize images."""
    if scale == 1.0:
        return
    for loader in (cfg.train_dataloader, cfg.val_dataloader, cfg.test_dataloader):
        steps = [step for step in loader.dataset.pipeline if step['type'] != 'Resize']
        packing = steps.pop()
        loader.dataset.pipeline = [*steps, dict(type='Resize', scale_factor=scale), packing]


def lines_of(run: Run, cfg: Config) -> list[Line]:
    """What the results of a run hold besides the score: all that it depends on."""
    data = json.dumps(cfg.to_dict(), sort_keys=True, default=str).encode()
    digests = [hashlib.sha256(d).hexdigest()[:12] for d in (data, Path(cfg.load_from).read_bytes())]
    settings = dict(zip(('config_sha256', 'checkpoint_sha256'), digests, strict=True))
    settings |= dict(epochs=cfg.train_cfg.max_epochs, policy=run.policy, custom_hooks=run.hooks)
    settings |= dict(scale=run.method.scale)
    lines = []
    for ratio in run.served or (None,):
        variant = dict(run.variant, keep_ratio=ratio or run.variant['keep_ratio'])
        own = dict(settings, keep_ratios=run.served_at(ratio) if ratio else run.keep_ratios)
        lines.append(dict(variant=variant, seed=run.seed, settings=own))
    return lines


def do_run(run: Run, cfg: Config, args: argparse.Namespace) -> list[float]:
    """Train, and test at each ratio to serve; returns the scores."""
    task = TASKS[run.variant['task']]
    folder = args.out_dir / 'runs' / run.name
    shutil.rmtree(folder, ignore_errors=True)  # an earlier score must not pass for its own
    config = dumped(cfg, folder.parent / f'{run.name}.py')
    call(folder, args.threads, 'tools/train.py', config)
    scores = [] if run.served else [last_score(folder, task.metric)]
    for ratio in run.served:
        tested = folder / f'keep{ratio:g}'
        checkpoint = folder / f'epoch_{args.epochs}.pth'
        ratios = str(run.served_at(ratio)).replace(' ', '')
        options = ['--cfg-options', f'model.backbone.keep_ratios={ratios}']
        call(tested, args.threads, 'tools/test.py', config, checkpoint, *options)
        scores.append(last_score(tested, task.metric))
    return [score * task.points for score in scores]


def call(folder: Path, threads: int, *command: str | Path) -> None:
    """Run a tool of the checkout with a work folder, and keep what it prints there.

    Raises:
        UsageError: it failed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    variables = dict.fromkeys(('OMP_NUM_THREADS', 'MKL_NUM_THREADS'), str(threads))
    here = [str(Path(__file__).parent), os.environ.get('PYTHONPATH', '')]
    variables['PYTHONPATH'] = os.pathsep.join(filter(None, here))  # of rules.py
    log = folder / 'output.log'
    with log.open('w') as file:
        done = subprocess.run(
            [sys.executable, *map(str, command), '--work-dir', str(folder)],
            cwd=ROOT,
            env=os.environ | variables,
            stdout=file,
            stderr=subprocess.STDOUT,
        )
    if done.returncode:
        last = (log.read_text().strip().splitlines() or ['it printed nothing'])[-1]
        raise UsageError(f'{command[0]} failed for {folder.name}: {last} (the whole log: {log})')


def last_score(folder: Path, metric: str) -> float:
    """A metric of the last evaluation in mmengine's logs.

    Raises:
        UsageError: there is none.
    """
    logs = [*folder.glob('*/vis_data/scalars.json'), *folder.glob('*/*.json')]
    entries = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    scores = [entry[metric] for entry in entries if metric in entry]
    if not scores:
        raise UsageError(f'no {metric} in the logs below {folder}')
    return scores[-1]


def dumped(cfg: Config, path: Path) -> Path:
    """Write a config, and its folder; returns the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # mmengine's own layout costs a second for each file, and nobody reads hundreds of them.
    path.write_text(''.join(f'{key} = {value!r}\n' for key, value in cfg.to_dict().items()))
    return path


def _key(line: Line) -> str:
    return json.dumps([line['variant'], line['seed'], line['settings']], sort_keys=True)


if __name__ == '__main__':
    run_tool(main, args=parse_args())
