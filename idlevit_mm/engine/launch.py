"""Train and test from a config file: what ``tools/train.py`` and ``tools/test.py`` call.

One path for detection (mmdet), segmentation (mmseg) and classification (mmpretrain). Everything
that can be known to be wrong is checked before any work and reported as :class:`UsageError`; with
:func:`run_tool` that is one line and exit code 2.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.dist import is_distributed
from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch.distributed.elastic.multiprocessing.errors import get_error_handler, record

from ..checkpoints import is_local, load_checkpoint
from ..errors import UsageError, one_line
from .checks import (
    check_datasets,
    check_pretrained,
    check_teachers,
    check_weights,
    find_resumable,
    resuming_problem,
)
from .faults import naming_the_remedy
from .options import Overrides, augment, paint, scale_lr, set_precision, write_predictions
from .processes import (
    LAUNCHERS,
    end_now,
    leave_together,
    lost_process,
    open_group,
    place_process,
    rank,
    say,
)
from .runner import ResumableRunner
from .settings import check_settings, with_likely_word
from .start import check_same_config, locked, other_settings

TRACEBACK_VARIABLE = 'IDLEVIT_MM_TRACEBACK'
_WAIT_FOR_OTHERS = 10  # seconds
_LEAST_ROOM = 2**20  # bytes, for the log and the config
_NEEDED = {
    'trained': ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'),
    'tested': ('model', 'test_dataloader', 'test_cfg', 'test_evaluator'),
}
_TASKS = {'mmdet': 'detection', 'mmseg': 'segmentation', 'mmpretrain': 'classification'}
_HEADS = ('bbox_head', 'roi_head', 'rpn_head', 'mask_head')


def run_tool(function: Callable[..., Any], **arguments: Any) -> None:
    """Call a function for the command line: user errors become one line and exit code 2.

    The loss of another process of a distributed run becomes one line and exit code 1. Setting the
    environment variable ``IDLEVIT_MM_TRACEBACK=1`` shows the traceback instead.
    """
    try:
        naming_the_remedy(lambda: function(**arguments))
        leave_together()
    except SystemExit as end:  # of a training that was told to stop
        if is_distributed() and isinstance(end.code, int):
            end_now(end.code)
        raise
    except RuntimeError as error:
        usage = isinstance(error, UsageError)
        message = str(error) if usage else lost_process(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE, '0') not in ('', '0'):
            raise
        get_error_handler().record_exception(error)  # torchrun tells which process failed, and why
        if rank() > 0 or not usage:
            # Rank 0 most likely fails on the same thing, or another process has, and the launcher
            # then ends this one before it says more. What is wrong here alone still gets said.
            time.sleep(_WAIT_FOR_OTHERS)
        print(f'error: {message}', file=sys.stderr, flush=True)
        code = 2 if usage else 1
        if is_distributed():
            end_now(code)
        sys.exit(code)


@record
def run_config_tool(function: Callable[..., Any], parser: argparse.ArgumentParser) -> None:
    """Train or test as a command line says, to which the options common to both are added."""
    add = parser.add_argument
    options_help = (
        'override entries of the config, e.g. model.backbone.keep_ratios=0.5 '
        'train_cfg.max_epochs=3; lists as key="[a,b]", without spaces'
    )
    add('--cfg-options', nargs='+', action=Overrides, metavar='KEY=VALUE', help=options_help)
    launcher_help = 'what started this process; see tools/dist_*.sh and tools/slurm_*.sh'
    add('--launcher', choices=['none', *LAUNCHERS], default='none', help=launcher_help)
    add('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    os.environ.setdefault('LOCAL_RANK', str(args.pop('local_rank')))
    run_tool(function, **args)


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config file and apply ``--cfg-options``: dotted names and values.

    Raises:
        UsageError: The file is missing or cannot be read, or an option does not apply.
    """
    if not os.path.isfile(path):
        raise UsageError(f'config {path} does not exist')
    fault = f'config {path} cannot be read'
    try:
        cfg = Config.fromfile(path)
        fault = f'--cfg-options does not fit {path}'
        cfg.merge_from_dict(options or {})
    except (Exception, SystemExit) as error:  # a config may call exit()
        raise UsageError(f'{fault}: {one_line(error)}') from error
    return cfg


def library_of(cfg: Mapping[str, Any]) -> str:
    """Name in ``_TASKS``, by the scope, else by the model's heads; '' if neither tells."""
    scope, model = cfg.get('default_scope'), cfg.get('model') or {}
    if scope in _TASKS:
        return scope
    if 'decode_head' in model:
        return 'mmseg'
    if model.get('type') == 'ImageClassifier':
        return 'mmpretrain'
    return 'mmdet' if any(head in model for head in _HEADS) else ''


def task_of(cfg: Config) -> str:
    """The task of the library that ``library_of`` tells; a UsageError if it cannot."""
    if library := library_of(cfg):
        return _TASKS[library]
    scope = cfg.get('default_scope')
    raise UsageError(
        f"default_scope is {scope!r}: set it to 'mmdet' for a detector, 'mmseg' for a segmentor or "
        "'mmpretrain' for a classifier"
    )


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config: its own ``runner_type``, or :class:`ResumableRunner`.

    Raises:
        UsageError: A part rejects its arguments, with that part's message.
    """
    try:
        return RUNNERS.build(cfg) if cfg.get('runner_type') else ResumableRunner.from_cfg(cfg)
    except UsageError:
        raise
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise UsageError(
            f'the config does not build: {with_likely_word(one_line(error))} '
            f'({TRACEBACK_VARIABLE}=1 shows where)'
        ) from error


def train_from_config(
    config: str,
    work_dir: str | None = None,
    resume: str | None = None,
    amp: bool = False,
    auto_scale_lr: bool = False,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = 'none',
) -> Runner:
    """Train as ``tools/train.py`` with these options does, and return the runner.

    Raises:
        UsageError: Anything is missing or does not fit.
    """
    cfg = _opened(config, 'trained', cfg_options, work_dir, launcher)
    set_precision(cfg, amp)
    if auto_scale_lr:
        scale_lr(cfg)
    checkpoint = _choose_start(cfg, config, resume)
    if checkpoint is None or not cfg.resume:
        check_pretrained(cfg)
    check_teachers(cfg)
    _check_places(cfg, ('train', 'val') if cfg.get('val_cfg') is not None else ('train',))
    with locked(cfg.work_dir) if rank() == 0 else contextlib.nullcontext():
        runner = _built(cfg)
        if checkpoint is not None:
            purpose = 'resume' if cfg.resume else 'load_from'
            for warning in check_weights(runner.model, checkpoint, cfg.load_from, purpose):
                runner.logger.warning(warning)
            if cfg.resume and (other := other_settings(checkpoint, runner.cfg.pretty_text)):
                say(other)
            del checkpoint
        naming_the_remedy(runner.train)
    return runner


def evaluate_from_config(*args: Any, **kwargs: Any) -> dict[str, float]:
    """Do the test of ``runner_of_test`` with these arguments, and return the metrics by name.

    Raises:
        UsageError: Anything is missing or does not fit.
    """
    return naming_the_remedy(runner_of_test(*args, **kwargs).test)


def runner_of_test(
    config: str,
    checkpoint: str,
    work_dir: str | None = None,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = 'none',
) -> Runner:
    """What tests as ``tools/test.py`` with these options does.

    Raises:
        UsageError: Anything is missing or does not fit.
    """
    cfg = _opened(config, 'tested', cfg_options, work_dir, launcher)
    task = task_of(cfg)
    weights = load_checkpoint(checkpoint) if is_local(checkpoint) else None
    cfg.resume, cfg.load_from = False, checkpoint
    if out is not None:
        write_predictions(cfg, task, out)
    if show_dir is not None:
        paint(cfg, task, show_dir)
    if tta:
        augment(cfg, task)
    _check_places(cfg, ('test',))
    runner = _built(cfg)
    # Hooks ask the runner for its iteration, and it would build the training data to answer.
    runner._train_loop = runner._val_loop = None
    if weights is not None:
        check_weights(runner.model, weights, checkpoint, 'test')
    return runner


def _opened(path: str, what: str, options: Any, work_dir: str | None, launcher: str) -> Config:
    """Read the config of a run that is to be ``'trained'`` or ``'tested'``."""
    place_process(launcher)
    cfg = load_config(path, options)
    for key in _NEEDED[what]:
        if cfg.get(key) is None:
            raise UsageError(f'config {path} cannot be {what}: it has no {key}')
    check_settings(cfg)
    cfg.launcher = launcher
    cfg.work_dir = work_dir or cfg.get('work_dir') or os.path.join('work_dirs', Path(path).stem)
    return cfg


def _check_places(cfg: Config, phases: tuple[str, ...]) -> None:
    """Check what a run reads and where it writes."""
    check_datasets(cfg, phases)
    try:
        os.makedirs(cfg.work_dir, exist_ok=True)
        # Asking for permission tells neither of full disks nor of read-only file systems.
        with tempfile.TemporaryFile(dir=cfg.work_dir) as file:
            file.write(bytes(_LEAST_ROOM))
    except OSError as error:
        raise UsageError(
            f'work dir {cfg.work_dir} cannot be written to: {error.strerror or error}. Make room, '
            'or name another one with --work-dir'
        ) from error


def _built(cfg: Config) -> Runner:
    """Meet the other processes, if there are any, and build the runner."""
    open_group(cfg)
    if is_distributed():
        check_same_config(cfg)
    return build_runner(cfg)


def _choose_start(cfg: Config, config: str, resume: str | None) -> dict[str, Any] | None:
    """Decide what training starts from; sets ``cfg.resume`` and ``cfg.load_from``.

    Returns:
        The checkpoint; None to start from scratch or from an address.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    if resume == 'auto':
        resume = _newest(cfg)
    elif resume is not None and is_local(resume) and not os.path.isfile(resume):
        raise UsageError(f'--resume {resume} does not exist')
    cfg.resume = resume is not None
    start = cfg.load_from = resume or cfg.get('load_from')
    if not start or not is_local(start):
        return None
    if not os.path.isfile(start):
        parent = Path(config).with_name(f'{Path(start).parent.name}.py')
        remedy = 'Name another checkpoint with --cfg-options load_from=PATH'
        if parent.is_file():
            remedy = f'Train it first: python tools/train.py {parent}'
        raise UsageError(f'load_from {start} does not exist. {remedy}')
    checkpoint = load_checkpoint(start, verify=cfg.resume)
    if not cfg.resume:
        return checkpoint
    if problem := resuming_problem(checkpoint):
        raise UsageError(
            f'--resume {start} {problem}. To start from its weights: --cfg-options '
            f'load_from={start}'
        )
    seed, randomness = checkpoint['meta'].get('seed'), cfg.setdefault('randomness', ConfigDict())
    if isinstance(seed, int):
        # The run goes on with its seed, also where the config leaves the choice to chance.
        if (asked := randomness.get('seed')) not in (None, seed):
            say(f'The run being resumed has seed {seed}; randomness.seed={asked} is not used.')
        randomness.seed = seed
    say(f'Resuming from {start}.')
    return checkpoint


def _newest(cfg: Config) -> str | None:
    """The checkpoint that ``--resume`` without a path means; None to start at the beginning."""
    work_dir, hook = cfg.work_dir, (cfg.get('default_hooks') or {}).get('checkpoint') or {}
    found, passed_over = find_resumable(work_dir, hook.get('out_dir'))
    if found is None:
        if passed_over:
            why = f'no checkpoint in {work_dir} can be resumed from: {"; ".join(passed_over)}'
            raise UsageError(f'--resume: {why}. Delete them to start anew')
        say(f'Nothing to resume in {work_dir}; training starts at the beginning.')
    for reason in passed_over:
        say(f'Passed over: {reason}.')
    return found
