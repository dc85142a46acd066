"""The processes of a distributed run: how each finds its place, and how they end together."""

from __future__ import annotations

import atexit
import datetime
import logging
import os
import re
import sys
from typing import Any, NoReturn

import torch
from mmengine.config import Config, ConfigDict
from mmengine.device import get_device
from mmengine.dist import get_world_size, init_dist, is_distributed

from ..errors import UsageError, one_line, shortened
from .checks import parts_of

_SYNCED = ('SyncBN', 'MMSyncBN')
_LOST = re.compile(r'\bgloo\b|Connection \w+ by peer')
# Seconds until all processes must have met, and until each must have made progress.
_MEETING, _LONGEST_WAIT = 120, 600
_MPI = 'OMPI_COMM_WORLD_'
# Where a launcher tells a process its rank, the number of processes and its rank on its machine,
# then where they meet.
LAUNCHERS = {
    'pytorch': ('RANK', 'WORLD_SIZE', 'LOCAL_RANK', 'MASTER_ADDR'),
    'slurm': ('SLURM_PROCID', 'SLURM_NTASKS', 'SLURM_LOCALID', 'SLURM_NODELIST'),
    'mpi': (f'{_MPI}RANK', f'{_MPI}SIZE', f'{_MPI}LOCAL_RANK', 'MASTER_ADDR'),
}
_STARTERS = {
    'pytorch': 'tools/dist_train.sh, tools/dist_test.sh or torchrun',
    'slurm': 'tools/slurm_train.sh, tools/slurm_test.sh or srun',
    'mpi': "Open MPI's mpirun",
}


def rank() -> int:
    """Number of this process; 0 where there is only one, or none has its place yet."""
    return int(os.environ.get('RANK') or 0)


def say(message: str) -> None:
    """Print on the first process."""
    if rank() == 0:
        print(message, flush=True)


def place_process(launcher: str) -> None:
    """Tell torch by its own variables which of the processes this one is, and where they meet.

    Raises:
        UsageError: The launcher did not start this process, or there is no GPU for it.
    """
    if launcher == 'none':
        return
    env = os.environ
    names = LAUNCHERS[launcher]
    if absent := [name for name in names if name not in env]:
        problem = f'--launcher {launcher} without {absent[0]} in the environment'
        raise UsageError(f'{problem}: start it by {_STARTERS[launcher]}')
    for ours, theirs, least in zip(LAUNCHERS['pytorch'], names, (0, 1, 0), strict=False):
        value = env[ours] = env[theirs]
        if not value.isdecimal() or int(value) < least:
            raise UsageError(f'{ours}={value!r} must be a whole number from {least} on')
    if int(env['RANK']) >= int(env['WORLD_SIZE']):
        largest = int(env['WORLD_SIZE']) - 1
        raise UsageError(
            f'RANK={env["RANK"]} with WORLD_SIZE={env["WORLD_SIZE"]}; allowed: 0 to {largest}'
        )
    if launcher == 'slurm':
        env.setdefault('MASTER_ADDR', first_host(env['SLURM_NODELIST']))
        # Jobs that share a machine must not share a port.
        env.setdefault('MASTER_PORT', str(20000 + int(env.get('SLURM_JOB_ID', 9500)) % 10000))
    env.setdefault('MASTER_PORT', '29500')
    gpus = torch.cuda.device_count()
    if launcher == 'pytorch' and 0 < gpus <= int(env['LOCAL_RANK']):
        raise UsageError(f'this machine has {gpus} GPUs, one for each process: start {gpus}')


def first_host(nodes: str) -> str:
    """First machine of a list as Slurm writes it: ``node[03-05,9],login`` starts with node03."""
    match = re.match(r'([^\[,]*)(?:\[(\w+)[^\]]*\])?([^\[,]*)', nodes)
    return ''.join(part or '' for part in match.groups()) if match else nodes


def open_group(cfg: Config) -> None:
    """Meet the other processes, and open their group.

    ``env_cfg.dist_cfg`` has the seconds until all must have met, ``meeting_timeout``, and those
    until all must have come to the next point where they need each other, ``timeout``.

    Raises:
        UsageError: They do not meet.
    """
    if cfg.launcher == 'none':
        return
    dist = cfg.setdefault('env_cfg', ConfigDict()).setdefault('dist_cfg', ConfigDict())
    is_cpu = get_device() == 'cpu'
    if is_cpu:
        _suit_cpus(cfg, dist)
    if is_distributed():
        return
    options = {'backend': 'nccl', **dist}
    options['timeout'] = options.get('timeout') or _LONGEST_WAIT
    options |= _meet(options.pop('meeting_timeout', None) or _MEETING)
    if is_cpu:
        # mmengine's function asks for a device.
        options['timeout'] = datetime.timedelta(seconds=options['timeout'])
        torch.distributed.init_process_group(**options)
    else:
        init_dist('pytorch', **options)


def _meet(seconds: float) -> dict[str, Any]:
    """Wait for all processes; what they share, for ``init_process_group``."""
    wait, env = datetime.timedelta(seconds=seconds), os.environ
    world = int(env['WORLD_SIZE'])
    there = [False] * world
    try:
        store, number, _ = next(torch.distributed.rendezvous('env://', timeout=wait))
        keys = [f'idlevit_mm/{one}' for one in range(world)]
        store.set(keys[number], 'here')
        try:
            store.wait(keys, wait)
        except RuntimeError:
            there = [store.check([key]) for key in keys]
            raise
    except RuntimeError as error:
        absent = [str(number) for number, is_there in enumerate(there) if not is_there]
        who = f'; missing: {shortened(absent)}' if any(there) else ''
        raise UsageError(
            f'the WORLD_SIZE={world} processes did not meet at '
            f'{env["MASTER_ADDR"]}:{env["MASTER_PORT"]} within {seconds} s (this one has '
            f'RANK={env["RANK"]}{who}): start all of them, each with a RANK of its own, or wait '
            f'longer with env_cfg.dist_cfg.meeting_timeout ({one_line(error, 200)})'
        ) from error
    return dict(store=store, rank=number, world_size=world)


def _suit_cpus(cfg: Config, dist: ConfigDict) -> None:
    """Change what mmengine has for GPUs only."""
    say('CUDA is not available: distributed on CPUs with the gloo backend.')
    dist.backend = 'gloo'
    wrapper = cfg.setdefault('model_wrapper_cfg', ConfigDict(type='MMDistributedDataParallel'))
    if wrapper.setdefault('type', 'MMDistributedDataParallel') == 'MMDistributedDataParallel':
        wrapper.setdefault('broadcast_buffers', False)
        wrapper.setdefault('find_unused_parameters', cfg.get('find_unused_parameters', False))
        wrapper.device_ids = None
    layers = [part for _, part, _ in parts_of(cfg.get('model')) if part.get('type') in _SYNCED]
    if layers:
        say('SyncBN exists on CUDA only: every process normalises its own batch (BN).')
    for layer in layers:
        layer['type'] = 'BN'


def lost_process(error: RuntimeError) -> str | None:
    """What to tell a person if an error means that another process is gone; else None."""
    network = isinstance(error, getattr(torch.distributed, 'DistError', ()))
    if not is_distributed() or not (network or _LOST.search(str(error))):
        return None
    return (
        f'process {rank()} of {get_world_size()} lost the connection to '
        f'another one, which has ended or cannot be reached ({one_line(error)[-200:]}). If that '
        'one does not say why, memory may have run out there. Checkpoints are whole: start the '
        'same command again, a training with --resume'
    )


def leave_together() -> None:
    """End the process group, if there is one, when all processes are done.

    A process that leaves while its threads still talk to the others aborts, and torchrun then calls
    a finished training a failed one.
    """
    if not is_distributed():
        return
    alone = get_world_size() == 1
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
    if not alone:
        end_now(0)


def end_now(code: int) -> NoReturn:
    """End a process that is or was one of a group, without tearing the interpreter down.

    What refers to the group, such as a model, keeps its threads until then, which aborts at times.
    """
    atexit._run_exitfuncs()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)
