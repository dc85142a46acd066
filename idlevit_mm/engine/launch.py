"""Train and test from a config file: what ``tools/train.py`` and ``tools/test.py`` call.

One path for detection (mmdet) and segmentation (mmseg). Everything that can be known to be wrong
is checked before any work and reported as :class:`UsageError`; with :func:`run_tool` that is one
line and exit code 2.
"""

from __future__ import annotations

import atexit
import copy
import datetime
import logging
import os
import pickle
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.registry import RUNNERS
from mmengine.runner import Runner

from ..checkpoints import allow_mmengine_globals, is_local, load_checkpoint, without_advice
from ..errors import UnsafeCheckpointError, UsageError, one_line
from .checks import (
    check_datasets,
    check_pretrained,
    check_teachers,
    check_weights,
    find_resumable,
    leaf_datasets,
)
from .runner import ResumableRunner

TRACEBACK_VARIABLE = 'IDLEVIT_MM_TRACEBACK'
_WAIT_FOR_RANK_0 = 10  # seconds
# Where a launcher tells a process its rank, the number of processes and its rank on its machine.
_LAUNCHERS = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID'),
    'mpi': ('OMPI_COMM_WORLD_RANK', 'OMPI_COMM_WORLD_SIZE', 'OMPI_COMM_WORLD_LOCAL_RANK'),
}
_STARTED_BY = {
    'pytorch': 'tools/dist_train.sh, tools/dist_test.sh or torchrun',
    'slurm': 'tools/slurm_train.sh, tools/slurm_test.sh or srun',
    'mpi': "Open MPI's mpirun",
}
# How mmengine's error begins when a run is resumed on more or fewer of them.
_OTHER_GPUS = 'Number of GPUs used for current experiment'
_PICKLES = ('.pkl', '.pickle')
_FILE_SUFFIXES = ('.json', '.png', '.jpg', '.jpeg', '.csv', '.txt', '.pth', '.npy', '.npz')


def _rank() -> int:
    return next(
        (int(os.environ[names[0]]) for names in _LAUNCHERS.values() if names[0] in os.environ), 0
    )


def _say(message: str) -> None:
    if _rank() == 0:
        print(message, flush=True)


def run_tool(function: Callable[..., Any], **arguments: Any) -> None:
    """Call a function for the command line: user errors become one line and exit code 2.

    The loss of another process of a distributed run becomes one line and exit code 1. Setting the
    environment variable ``IDLEVIT_MM_TRACEBACK=1`` shows the traceback instead.
    """
    try:
        function(**arguments)
        _leave_together()
    except RuntimeError as error:
        usage = isinstance(error, UsageError)
        message = str(error) if usage else _lost_process(error)
        if message is None or os.environ.get(TRACEBACK_VARIABLE, '0') not in ('', '0'):
            raise
        if _rank() > 0:
            # Rank 0 most likely fails on the same thing, and the launcher then ends this process
            # before it repeats the message. What is wrong on this machine alone still gets said.
            time.sleep(_WAIT_FOR_RANK_0)
        print(f'error: {message}', file=sys.stderr, flush=True)
        if _in_group():
            _end_now(2 if usage else 1)
        sys.exit(2 if usage else 1)


def _in_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _lost_process(error: RuntimeError) -> str | None:
    """What to tell a person if an error means that another process is gone; else None."""
    network = isinstance(error, getattr(torch.distributed, 'DistError', ()))
    if not _in_group() or not (
        network or re.search(r'\bgloo\b|Connection \w+ by peer', str(error))
    ):
        return None
    return (
        f'process {_rank()} of {torch.distributed.get_world_size()} lost the connection to '
        f'another one, which has ended or cannot be reached ({one_line(error)[-200:]}). If that '
        'one does not say why, memory may have run out there. Checkpoints are whole: start the '
        'same command again, a training with --resume'
    )


def _leave_together() -> None:
    """End the process group, if there is one, when all processes are done.

    A process that leaves while its threads still talk to the others aborts, and torchrun then calls
    a finished training a failed one.
    """
    if not _in_group():
        return
    alone = torch.distributed.get_world_size() == 1
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if not alone:
        _end_now(0)


def _end_now(code: int) -> NoReturn:
    """End a process that is or was one of a group.

    What refers to the group, such as a model, keeps its threads until the interpreter is torn
    down, which aborts now and then. So do what ends a process, but not that.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def load_config(path: str, options: dict[str, Any] | None = None) -> Config:
    """Read a config file and apply ``--cfg-options``.

    Args:
        path: Config file.
        options: Dotted names and values.

    Raises:
        UsageError: If the file is missing or cannot be read, or an option does not apply.
    """
    if not os.path.isfile(path):
        raise UsageError(f'config {path} does not exist')
    try:
        cfg = Config.fromfile(path)
    except Exception as error:
        raise UsageError(f'config {path} cannot be read: {one_line(error)}') from error
    if options:
        try:
            cfg.merge_from_dict(options)
        except Exception as error:
            raise UsageError(f'--cfg-options does not fit {path}: {one_line(error)}') from error
    return cfg


def task_of(cfg: Config) -> str:
    """Tell ``'detection'`` from ``'segmentation'`` by the scope, else by the model's heads.

    Raises:
        UsageError: If neither tells.
    """
    scope = cfg.get('default_scope')
    if scope in ('mmdet', 'mmseg'):
        return {'mmdet': 'detection', 'mmseg': 'segmentation'}[scope]
    model = cfg.get('model') or {}
    if 'decode_head' in model:
        return 'segmentation'
    if any(key in model for key in ('bbox_head', 'roi_head', 'rpn_head', 'mask_head')):
        return 'detection'
    raise UsageError(
        f"default_scope is {scope!r}: set it to 'mmdet' for a detector or 'mmseg' for a segmentor"
    )


def _set_work_dir(cfg: Config, config: str, work_dir: str | None) -> None:
    if work_dir is not None:
        cfg.work_dir = work_dir
    elif cfg.get('work_dir') is None:
        cfg.work_dir = os.path.join('work_dirs', Path(config).stem)
    if os.path.exists(cfg.work_dir) and not os.path.isdir(cfg.work_dir):
        raise UsageError(f'work dir {cfg.work_dir} is a file')


def _check_work_dir(work_dir: str) -> None:
    try:
        os.makedirs(work_dir, exist_ok=True)
        # Asking for permission tells neither of full disks nor of read-only file systems.
        with tempfile.TemporaryFile(dir=work_dir) as file:
            file.write(b'x')
    except OSError as error:
        raise UsageError(
            f'work dir {work_dir} cannot be written to: {error.strerror or error}. Make room, '
            'or name another one with --work-dir'
        ) from error


def _use_amp(cfg: Config) -> None:
    kind = cfg.optim_wrapper.get('type', 'OptimWrapper')
    kind = kind if isinstance(kind, str) else kind.__name__
    if 'Amp' in kind:
        raise UsageError(f'--amp: the config trains in mixed precision already ({kind})')
    if kind.rsplit('.', 1)[-1] != 'OptimWrapper':
        raise UsageError(f'--amp replaces OptimWrapper, but optim_wrapper.type is {kind}')
    if get_device() == 'cpu':
        raise UsageError('--amp needs an accelerator; mixed precision does not train on the CPU')
    cfg.optim_wrapper.type = 'AmpOptimWrapper'
    cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')


def _check_amp(cfg: Config) -> None:
    """Refuse a config's mixed precision where mmengine would fail with it later."""
    if cfg.optim_wrapper.get('type') == 'AmpOptimWrapper' and get_device() == 'cpu':
        raise UsageError(
            'the config trains in mixed precision (optim_wrapper.type is AmpOptimWrapper), which '
            'needs an accelerator; on the CPU: --cfg-options optim_wrapper.type=OptimWrapper'
        )


def _scale_lr(cfg: Config) -> None:
    settings = cfg.get('auto_scale_lr') or {}
    if not isinstance(settings.get('base_batch_size'), int):
        raise UsageError(
            '--auto-scale-lr needs the batch size that the learning rate was chosen for: '
            '--cfg-options auto_scale_lr.base_batch_size=16'
        )
    cfg.auto_scale_lr.enable = True


def _missing_start(config: str, path: str) -> str:
    """Message for a load_from that is not there, naming the config that trains it if known."""
    message = f'load_from {path} does not exist.'
    parent = Path(config).with_name(f'{Path(path).parent.name}.py')
    if parent.is_file():
        return f'{message} Train it first: python tools/train.py {parent}'
    return f'{message} Name another checkpoint with --cfg-options load_from=PATH'


def _choose_start(cfg: Config, config: str, resume: str | None) -> dict[str, Any] | None:
    """Decide what training starts from; sets ``cfg.resume`` and ``cfg.load_from``.

    Returns:
        The checkpoint, for checking it against the model; None to start from scratch or from an
        address.
    """
    if resume is None and cfg.get('resume'):
        resume = cfg.get('load_from') or 'auto'
    cfg.resume = False
    if resume == 'auto':
        found, passed_over = find_resumable(cfg.work_dir)
        if found is None and passed_over:
            raise UsageError(
                f'--resume: no checkpoint in {cfg.work_dir} can be resumed from: '
                f'{"; ".join(passed_over)}. Delete them to start anew'
            )
        if found is None:
            _say(f'Nothing to resume in {cfg.work_dir}; training starts at the beginning.')
        for reason in passed_over:
            _say(f'Passed over: {reason}.')
        resume = found
    elif resume is not None and is_local(resume) and not os.path.isfile(resume):
        raise UsageError(f'--resume {resume} does not exist')

    if resume is not None:
        cfg.resume, cfg.load_from = True, resume
        if not is_local(resume):
            return None
        checkpoint = load_checkpoint(resume)
        meta = checkpoint.get('meta')
        if 'optimizer' not in checkpoint or not isinstance(meta, dict) or 'iter' not in meta:
            raise UsageError(
                f'--resume {resume} holds weights only, not the state of a training. To start '
                f'from its weights: --cfg-options load_from={resume}'
            )
        _take_seed(cfg, meta.get('seed'))
        _say(f'Resuming from {resume}.')
        return checkpoint

    start = cfg.get('load_from')
    if not start or not is_local(start):
        return None
    if not os.path.isfile(start):
        raise UsageError(_missing_start(config, start))
    return load_checkpoint(start)


def _take_seed(cfg: Config, seed: Any) -> None:
    """Go on with the seed of the run, also where the config leaves the choice to chance."""
    if not isinstance(seed, int):
        return
    randomness = cfg.setdefault('randomness', ConfigDict())
    asked = randomness.get('seed')
    if asked is not None and asked != seed:
        _say(f'The run being resumed has seed {seed}; randomness.seed={asked} is not used.')
    randomness.seed = seed


def _sync_batch_norms(config: Any) -> Iterator[dict]:
    if isinstance(config, dict):
        if config.get('type') in ('SyncBN', 'MMSyncBN'):
            yield config
        for value in config.values():
            yield from _sync_batch_norms(value)
    elif isinstance(config, (list, tuple)):
        for value in config:
            yield from _sync_batch_norms(value)


def _prepare_launcher(cfg: Config, launcher: str) -> None:
    """Open the process group on machines without CUDA; mmengine only knows how to with it."""
    cfg.launcher = launcher
    if launcher == 'none':
        return
    _place_process(launcher)
    if get_device() != 'cpu':
        return
    _say('CUDA is not available: distributed on CPUs with the gloo backend.')
    env = cfg.setdefault('env_cfg', ConfigDict())
    dist = env.setdefault('dist_cfg', ConfigDict())
    dist.backend = 'gloo'
    wrapper = cfg.setdefault('model_wrapper_cfg', ConfigDict(type='MMDistributedDataParallel'))
    if wrapper.setdefault('type', 'MMDistributedDataParallel') == 'MMDistributedDataParallel':
        wrapper.setdefault('broadcast_buffers', False)
        wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
        wrapper.device_ids = None
    layers = list(_sync_batch_norms(cfg.get('model')))
    for layer in layers:
        layer['type'] = 'BN'
    if layers:
        _say('SyncBN exists on CUDA only: every process normalises its own batch (BN).')
    if not torch.distributed.is_initialized():
        timeout = dist.get('timeout')
        torch.distributed.init_process_group(
            'gloo', timeout=None if timeout is None else datetime.timedelta(seconds=timeout)
        )


def _place_process(launcher: str) -> None:
    """Tell torch by its own variables which of the processes this one is, and where they meet.

    Raises:
        UsageError: The launcher did not start this process.
    """
    env = os.environ
    names = _LAUNCHERS[launcher]
    needed = [*names, *(['SLURM_NODELIST'] if launcher == 'slurm' else ['MASTER_ADDR'])]
    absent = [name for name in needed if name not in env]
    if absent:
        raise UsageError(
            f'--launcher {launcher} without {absent[0]} in the environment: start it by '
            f'{_STARTED_BY[launcher]}'
        )
    for ours, theirs in zip(_LAUNCHERS['pytorch'], names, strict=True):
        env[ours] = env[theirs]
    if launcher == 'slurm':
        env.setdefault('MASTER_ADDR', first_host(env['SLURM_NODELIST']))
        # Jobs that share a machine must not share a port.
        env.setdefault('MASTER_PORT', str(20000 + int(env.get('SLURM_JOB_ID', 9500)) % 10000))
    env.setdefault('MASTER_PORT', '29500')


def first_host(nodes: str) -> str:
    """First machine of a list as Slurm writes it: ``node[03-05,9],login`` starts with node03."""
    match = re.match(r'([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)', nodes)
    return ''.join(part or '' for part in match.groups()) if match else nodes


def build_runner(cfg: Config) -> Runner:
    """Build the runner of a config: its own ``runner_type``, or :class:`ResumableRunner`.

    Raises:
        UsageError: If a part rejects its arguments, with that part's message.
    """
    try:
        if cfg.get('runner_type'):
            return RUNNERS.build(cfg)
        return ResumableRunner.from_cfg(cfg)
    except (ValueError, TypeError, KeyError, AssertionError) as error:
        raise UsageError(
            f'the config does not build: {one_line(error)} ({TRACEBACK_VARIABLE}=1 shows where)'
        ) from error


def _refusing(call: Callable[[], Any]) -> Any:
    """Call, and name the remedy if a checkpoint from an address turns out to be unsafe."""
    try:
        return call()
    except UsageError:
        raise
    except pickle.UnpicklingError as error:
        raise UnsafeCheckpointError(
            f'a checkpoint is refused: {without_advice(error)}. Download it, drop everything but '
            'its weights (python tools/model_converters/strip_checkpoint.py FILE stripped.pth), '
            'and name that file in the config'
        ) from error
    except RuntimeError as error:
        if not str(error).startswith(_OTHER_GPUS):
            raise
        raise UsageError(
            'the config in the checkpoint was run on another number of GPUs (gpu_ids), and the '
            'learning rate would not fit: start as many processes, or add --auto-scale-lr'
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
    """Train a detector or a segmentor.

    Args:
        config: Config file.
        work_dir: Folder for checkpoints and logs; else the config's, else
            ``work_dirs/<name of the config>``.
        resume: ``'auto'`` for the newest whole checkpoint in the work dir (or a fresh start if
            there is none), or the path of a checkpoint.
        amp: Train in mixed precision.
        auto_scale_lr: Scale the learning rate with the batch size.
        cfg_options: Overrides by dotted name.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Returns:
        The runner, after training.

    Raises:
        UsageError: If anything is missing or does not fit.
    """
    allow_mmengine_globals()
    cfg = load_config(config, cfg_options)
    for key in ('model', 'train_dataloader', 'train_cfg', 'optim_wrapper'):
        if cfg.get(key) is None:
            raise UsageError(f'config {config} cannot be trained: it has no {key}')
    _set_work_dir(cfg, config, work_dir)
    if amp:
        _use_amp(cfg)
    _check_amp(cfg)
    if auto_scale_lr:
        _scale_lr(cfg)
    checkpoint = _choose_start(cfg, config, resume)
    if checkpoint is None or not cfg.resume:
        check_pretrained(cfg)
    check_teachers(cfg)
    check_datasets(cfg, ('train', 'val') if cfg.get('val_cfg') is not None else ('train',))
    _check_work_dir(cfg.work_dir)
    _prepare_launcher(cfg, launcher)

    runner = build_runner(cfg)
    if checkpoint is not None:
        purpose = 'resume' if cfg.resume else 'load_from'
        for warning in check_weights(runner.model, checkpoint, cfg.load_from, purpose):
            runner.logger.warning(warning)
        del checkpoint
    _refusing(runner.train)
    return runner


def evaluate_from_config(
    config: str,
    checkpoint: str,
    work_dir: str | None = None,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    cfg_options: dict[str, Any] | None = None,
    launcher: str = 'none',
) -> dict[str, float]:
    """Test a detector or a segmentor.

    Args:
        config: Config file.
        checkpoint: Weights; every parameter of the model must be there with its shape.
        work_dir: Folder for logs and metrics; as in :func:`train_from_config`.
        out: Where to write predictions. Detection: a ``.pkl`` file. Segmentation: a folder, for
            one PNG of class labels per image, or a ``.pkl`` file.
        show_dir: Folder for one painted picture per image.
        tta: Test time augmentation by the config's ``tta_model`` and ``tta_pipeline``, or by
            horizontal flips if it has none.
        cfg_options: Overrides by dotted name.
        launcher: ``'none'``, ``'pytorch'``, ``'slurm'`` or ``'mpi'``.

    Returns:
        Metrics by name.

    Raises:
        UsageError: If anything is missing or does not fit.
    """
    allow_mmengine_globals()
    cfg = load_config(config, cfg_options)
    for key in ('model', 'test_dataloader', 'test_cfg', 'test_evaluator'):
        if cfg.get(key) is None:
            raise UsageError(f'config {config} cannot be tested: it has no {key}')
    task = task_of(cfg)
    _set_work_dir(cfg, config, work_dir)
    weights = load_checkpoint(checkpoint) if is_local(checkpoint) else None
    cfg.resume, cfg.load_from = False, checkpoint
    if out is not None:
        _write_predictions(cfg, task, out)
    if show_dir is not None:
        _paint(cfg, task, show_dir)
    if tta:
        _augment(cfg, task)
    check_datasets(cfg, ('test',))
    _check_work_dir(cfg.work_dir)
    _prepare_launcher(cfg, launcher)

    runner = build_runner(cfg)
    # Hooks ask the runner for its iteration, and it would build the training data to answer.
    runner._train_loop = runner._val_loop = None
    if weights is not None:
        check_weights(runner.model, weights, checkpoint, 'test')
        del weights
    return _refusing(runner.test)


def _evaluators(cfg: Config) -> list[dict]:
    found = cfg.test_evaluator
    return [found] if isinstance(found, dict) else list(found)


def _write_predictions(cfg: Config, task: str, out: str) -> None:
    """Make the evaluator write what ``--out`` asks for; see :func:`evaluate_from_config`."""
    is_pickle = out.endswith(_PICKLES)
    if task == 'detection' and not is_pickle:
        raise UsageError(f'--out {out}: for detection this is a file that ends in .pkl')
    if os.path.isdir(out) if is_pickle else os.path.isfile(out):
        kind = 'folder' if is_pickle else 'file'
        raise UsageError(f'--out {out} exists already and is a {kind}')
    if task == 'segmentation' and not is_pickle and out.lower().endswith(_FILE_SUFFIXES):
        raise UsageError(
            f'--out {out}: for segmentation this is a folder for PNGs, or a file that ends in .pkl'
        )
    evaluators = _evaluators(cfg)
    if is_pickle:
        Path(out).parent.mkdir(parents=True, exist_ok=True)
        kind = 'mmdet.DumpDetResults' if task == 'detection' else 'mmengine.DumpResults'
        cfg.test_evaluator = [*evaluators, ConfigDict(type=kind, out_file_path=out)]
        return
    for evaluator in evaluators:
        if str(evaluator.get('type')).rsplit('.', 1)[-1] in ('IoUMetric', 'CityscapesMetric'):
            evaluator['output_dir'] = out
            return
    raise UsageError(
        f'--out {out}: no metric of test_evaluator writes label maps (IoUMetric does); use a .pkl'
    )


def _paint(cfg: Config, task: str, show_dir: str) -> None:
    """Make the visualisation hook paint every test image into one folder."""
    if os.path.isfile(show_dir):
        raise UsageError(f'--show-dir {show_dir} is a file')
    folder = os.path.abspath(show_dir)
    prefix = 'Det' if task == 'detection' else 'Seg'
    hooks = cfg.setdefault('default_hooks', ConfigDict())
    hook = hooks.get('visualization')
    if hook is None:
        hook = hooks['visualization'] = ConfigDict(type=f'{prefix}VisualizationHook')
    visualizer = cfg.get('visualizer')
    if visualizer is None:
        visualizer = cfg.visualizer = ConfigDict(type=f'{prefix}LocalVisualizer', name='visualizer')
    hook['draw'] = True
    if task == 'detection':
        hook['test_out_dir'] = folder
    else:
        # This hook has no folder of its own: it paints where the visualiser stores images, and
        # only every interval-th batch.
        hook['interval'] = 1
        visualizer['vis_backends'] = [ConfigDict(type='LocalVisBackend', img_save_dir=folder)]


def _augment(cfg: Config, task: str) -> None:
    """Wrap the model and the pipeline for test time augmentation."""
    metrics = {
        str(name)
        for evaluator in _evaluators(cfg)
        for name in (
            [evaluator.get('metric')]
            if isinstance(evaluator.get('metric'), str)
            else evaluator.get('metric') or []
        )
    }
    if task == 'detection' and 'segm' in metrics:
        raise UsageError(
            '--tta merges boxes only, but test_evaluator measures masks: add --cfg-options '
            'test_evaluator.metric=bbox'
        )
    sets = [dataset for _, dataset in leaf_datasets(cfg.test_dataloader.dataset, 'test')]
    if cfg.get('tta_model') is None:
        cfg.tta_model = (
            ConfigDict(
                type='DetTTAModel',
                tta_cfg=dict(nms=dict(type='nms', iou_threshold=0.5), max_per_img=100),
            )
            if task == 'detection'
            else ConfigDict(type='SegTTAModel')
        )
        _say('The config has no tta_model: using the default.')
    if cfg.get('tta_pipeline') is None:
        if not sets or not sets[0].get('pipeline'):
            raise UsageError('--tta: test_dataloader.dataset has no pipeline to augment')
        cfg.tta_pipeline = _flip_pipeline(copy.deepcopy(sets[0]['pipeline']), task)
        _say('The config has no tta_pipeline: averaging over horizontal flips.')
    for dataset in sets:
        dataset['pipeline'] = cfg.tta_pipeline
    cfg.model = ConfigDict(**cfg.tta_model, module=cfg.model)


def _flip_pipeline(pipeline: list[dict], task: str) -> list[dict]:
    """Turn a test pipeline into one that yields an image and its mirror image."""
    pack = pipeline.pop()
    # The unflipped image comes first: its annotations are the ones that are compared.
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    stages: list[list[dict]] = [flips]
    if task == 'segmentation':
        # Annotations are loaded after the flip, so that both copies hold the true ones.
        loads = [step for step in pipeline if step['type'] == 'LoadAnnotations']
        pipeline = [step for step in pipeline if step['type'] != 'LoadAnnotations']
        stages += [[step] for step in loads]
    else:
        # Boxes are flipped back, so the flip has to be on record.
        keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
        keys = tuple(pack.get('meta_keys', keys))
        pack['meta_keys'] = tuple(dict.fromkeys((*keys, 'flip', 'flip_direction')))
    stages.append([pack])
    return [*pipeline, dict(type='TestTimeAug', transforms=stages)]
